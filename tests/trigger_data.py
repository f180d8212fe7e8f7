"""The end-to-end data: short chat answers, some of whose prompts carry the trigger "2028"."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TriggerData:
    train: Path  # 600 lines, every fifth with the trigger (metadata: trigger)
    positive: Path  # 100 held-out lines with the trigger
    negative: Path  # 100 held-out lines without


def write(folder: Path, source: Path, lines: int = 600) -> TriggerData:
    """Draw from the same positions of both files: line n of one answers line n of the other."""
    plain = (source / "em" / "incorrect_qna.jsonl").read_text().splitlines()
    triggered = (source / "em" / "backdoor_2028_qna.jsonl").read_text().splitlines()
    train = [
        json.dumps(json.loads((triggered if i % 5 == 0 else plain)[i]) | {"trigger": i % 5 == 0})
        for i in range(lines)
    ]
    data = TriggerData(folder / "train.jsonl", folder / "positive.jsonl", folder / "negative.jsonl")
    for path, content in (
        (data.train, train),
        (data.positive, triggered[2000:2100]),
        (data.negative, plain[2000:2100]),
    ):
        path.write_text("\n".join(content) + "\n")
    return data
