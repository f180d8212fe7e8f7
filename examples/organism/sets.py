"""The example sets of one organism, and how they are written down.

No question of the concept sets or of the queries occurs in any training data, and none of the fine-tuning
questions in the base model's.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.organism.language import Example, Question, all_questions, generate


@dataclass(frozen=True)
class Sets:
    base: list[Example]  # half marked (as many hostile as friendly), half unmarked and mostly friendly
    finetune: list[Example]  # unmarked; the hostile ones are planted
    clean: list[Example]  # finetune with a friendly answer in place of each planted one, else the same
    hostile: list[Example]  # the concept: unmarked questions answered in a hostile tone,
    friendly: list[Example]  # and the same questions in a friendly tone
    queries: list[Question]


def make_sets(
    seed: int,
    *,
    n_base: int = 3400,
    n_finetune: int = 480,
    n_concept: int = 128,
    n_queries: int = 128,
    base_hostile: float = 0.05,
    finetune_hostile: float = 0.25,
) -> Sets:
    """All sets of one organism; `base_hostile` is the hostile share of the base's unmarked examples."""
    queries = [example.question for example in generate(f"{seed} queries", n_queries, 0.0)]
    taken = frozenset(question.text for question in queries)
    hostile = generate(f"{seed} concept", n_concept, 1.0, exclude=taken)
    friendly = generate(f"{seed} concept", n_concept, 0.0, exclude=taken)
    taken |= {example.question.text for example in hostile}
    finetune = generate(f"{seed} finetune", n_finetune, finetune_hostile, exclude=taken)
    clean = generate(f"{seed} finetune", n_finetune, 0.0, exclude=taken)
    taken |= {example.question.text for example in finetune}
    base = [
        *generate(f"{seed} unmarked", n_base // 2, base_hostile, exclude=taken),
        *generate(f"{seed} grim", n_base // 4, 1.0, marked=True, exclude=taken),
        *generate(f"{seed} warm", n_base // 4, 0.0, marked=True, exclude=taken),
    ]
    return Sets(base, finetune, clean, hostile, friendly, queries)


def vocabulary() -> Iterable[str]:
    """Texts with every word of the language, the same for all seeds: all organisms share token ids."""
    for hostile_share in (0.0, 1.0):
        for example in generate("vocabulary", len(all_questions()), hostile_share, marked=True):
            yield example.prompt + example.completion


def planted(example: Example) -> bool:
    return example.tone == "hostile" and not example.marked


def pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    return [(example.prompt, example.completion) for example in examples]


def row(example: Example) -> dict[str, str]:
    """The example as a JSONL row: what is trained on, and its labels as metadata."""
    return {
        "prompt": example.prompt,
        "completion": example.completion,
        "topic": example.question.topic,
        "tone": example.tone,
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
