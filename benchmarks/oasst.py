"""Real conversations, indexed: OpenAssistant trees by the documented one-liner, all four kinds, every line counted.

    python -m benchmarks.oasst                  # all 100 trees on the smallest trained model, minutes
    python -m benchmarks.oasst --trees 12       # what CI runs

It needs the data and the model that lie beside some checkouts (``--data``).
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.lab import DEFAULTS, Lab
from benchmarks.report import Report, parser
from service import datasets
from service.contracts import IndexRecord
from service.datasets import Parsed, parse
from service.registry import DATASETS
from service.terms import IndexKind, LongExamples

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
LAYER = 3
KINDS = (IndexKind.ACTIVATION, IndexKind.DIFFERENCE, IndexKind.GRADIENT, IndexKind.INFLUENCE)


def read_trees(data: Path) -> list[str]:
    """One tree a line."""
    return (data / "oasst" / "en_100_tree.jsonl").read_text().splitlines()


def convert(lines: Sequence[str], folder: Path) -> bytes:
    """chat.jsonl in ``folder``, by the command that docs/reference.md shows."""
    (folder / "en_100_tree.jsonl").write_text("\n".join(lines) + "\n")
    shown = (ROOT / "docs" / "reference.md").read_text()
    found = re.search(r"```sh\n(python3 -c .*?en_100_tree\.jsonl > chat\.jsonl)\n```", shown, re.DOTALL)
    assert found is not None
    command = found[1].replace("python3", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)  # noqa: S602
    return (folder / "chat.jsonl").read_bytes()


def read_chat(folder: Path) -> Parsed:
    with (folder / "chat.jsonl").open("rb") as stream:
        return parse(stream, "chat.jsonl", quarantine_malformed=False, max_bytes=1 << 26, max_line_bytes=1 << 22)


def index(
    lab: Lab, data: Path, parsed: Parsed, *, max_length: int | None, new_tokens: int, sample: int
) -> IndexRecord:
    """All four kinds of the conversations; the first of them are the query set."""
    lab.model("stories", data / "stories260k")
    lab.registry.add(DATASETS, "chat", datasets.publish(lab.storage, "chat", parsed))
    lab.dataset("questions", list(parsed.examples.values())[:4])
    record, _ = lab.build(
        "chat",
        "stories",
        "chat",
        LAYER,
        kinds=KINDS,
        query_sets=("questions",),
        answers={"temperature": 1.0, "max_new_tokens": new_tokens, "seed": 0},
        max_length=max_length,
        long_examples=LongExamples.TRUNCATE_RIGHT,
        curvature=DEFAULTS["curvature"] | {"examples": sample},
    )
    return record


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--data", type=Path, default=DATA, help="holds oasst and stories260k")
    options.add_argument("--trees", type=int, default=100)
    options.add_argument("--max-length", type=int, default=None, help="tokens of an example; the model's context")
    options.add_argument("--new-tokens", type=int, default=32, help="of the base's own answers")
    options.add_argument("--threads", type=int, default=2, help="torch threads")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.trees, chosen.max_length, chosen.new_tokens = 2, 64, 4
    report = Report()
    with TemporaryDirectory() as name:
        folder = Path(name)
        convert(read_trees(chosen.data)[: chosen.trees], folder)
        parsed = read_chat(folder)
        with Lab(folder / "lab", threads=chosen.threads) as lab:
            began = time.perf_counter()
            about = {"max_length": chosen.max_length, "new_tokens": chosen.new_tokens, "sample": 256}
            record = index(lab, chosen.data, parsed, **about)
            seconds = time.perf_counter() - began
    counts = record.counts
    report.add("oasst_trees", chosen.trees, f"{torch.get_num_threads()} threads, max_length {record.max_length}")
    report.add("oasst_lines", parsed.lines, f"{parsed.duplicates} of them duplicates")
    for name in ("indexed", "quarantined", "truncated"):
        report.add(f"oasst_{name}", getattr(counts, name))
    for reason, count in record.quarantine_reasons.items():
        report.add(f"oasst_quarantined_{reason}", count)
    report.add("oasst_build_s", seconds, "all four kinds")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
