"""What attribution is judged against: a fine-tuning run, its data, and what retraining on subsets really did.

A `Material` is an organism before anything was retrained; a `Case` adds the subsets and the outcomes. This
file knows no attribution method.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from examples.organism.train import Recipe
from service.contracts import Completion, Content, Example, PlainText
from service.datasets import example_id
from service.terms import Pooling

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Vector = NDArray[np.float32]

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the full run: where its models are kept


@dataclass(frozen=True)
class Truth:
    """Outcomes of retraining, each (training seeds, M): f_v(Q) by both concept functions, and mean L(Q)."""

    f_dot: Floats
    f_cosine: Floats
    loss: Floats


@dataclass(frozen=True)
class Ood:
    """The concept learnt on some topics, the data from others.

    `direction` (d,) is fitted on positive and negative of `topics` alone, `queries` are those of Q about
    them; `rows` (N,) are the training examples about other topics. `truth` is f_direction(queries) and
    L(queries) after the same retrainings as in the case.
    """

    topics: tuple[str, ...]
    positive: tuple[Example, ...]
    negative: tuple[Example, ...]
    direction: Vector
    queries: tuple[Example, ...]
    rows: Bools
    truth: Truth


@dataclass(frozen=True)
class Case:
    """One organism of one seed. N training examples, M subsets, d the width of the model."""

    name: str
    seed: int
    points: tuple[tuple[float, Path], ...]  # (share of the full run, HF folder): the base first, the end last
    examples: tuple[Example, ...]  # N, in order; metadata has planted (bool), topic and group (str)
    queries: tuple[Example, ...]  # Q
    layer: int  # where the concept lives; modules of blocks 1..layer are tracked
    pooling: Pooling
    positive: tuple[Example, ...]  # what the direction is fitted on: twins of negative, in no training data
    negative: tuple[Example, ...]
    direction: Vector  # (d,) unit: difference of means at `layer` of the end model
    planted: Bools  # (N,)
    subsets: Bools  # (M, N)
    training_seeds: tuple[int, ...]  # of the retrainings, two
    f_dot: Floats  # (training seeds, M)
    f_cosine: Floats  # (training seeds, M)
    loss: Floats  # (training seeds, M)
    along: Truth  # each (1, len(points)): the full run at its points
    ood: Ood
    recipe: Recipe  # of the full run and of every retraining


@dataclass(frozen=True)
class Lists:
    """The examples of an organism. Each carries its `topic`; training examples `planted` and `group` as well."""

    examples: tuple[Example, ...]
    queries: tuple[Example, ...]
    positive: tuple[Example, ...]
    negative: tuple[Example, ...]


@dataclass(frozen=True)
class Material:
    """An organism before anything is retrained."""

    points: tuple[tuple[float, Path], ...]
    lists: Lists
    recipe: Recipe
    layer: int
    pooling: Pooling
    ood_topics: tuple[str, ...]


def ceiling(values: Floats) -> float:
    """Spearman between two training seeds over the same subsets, (2, M): no prediction can agree better."""
    first, second = values
    return spearman(first, second)


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    result: Any = spearmanr(first, second)
    return float(result.statistic)


def example(content: Content, **metadata: object) -> Example:
    return Example(example_id(content), content, metadata, ())


def about(examples: Iterable[Example], topics: Sequence[str]) -> tuple[Example, ...]:
    return tuple(one for one in examples if one.metadata["topic"] in topics)


def folders(home: Path, shares: Sequence[float] = SHARES) -> tuple[tuple[float, Path], ...]:
    """Where the points of the full run lie."""
    return tuple((share, home / "points" / f"{share:.0%}".rstrip("%").zfill(3)) for share in shares)


def write(home: Path, lists: Lists, design: str) -> None:
    """The lists as JSONL; `design.json`, written last, says that all of it is there, and by which design."""
    for field in fields(Lists):
        examples: tuple[Example, ...] = getattr(lists, field.name)
        lines = [json.dumps({**asdict(one.content), **one.metadata}) + "\n" for one in examples]
        (home / f"{field.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (home / "design.json").write_text(design, encoding="utf-8")


def read(home: Path, design: str) -> Lists | None:
    """What `write` left by this design, or None."""
    mark = home / "design.json"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != design:
        mark.unlink(missing_ok=True)
        return None
    return Lists(*(tuple(map(_example, _lines(home / f"{field.name}.jsonl"))) for field in fields(Lists)))


def fingerprint(*files: Path) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _example(line: str) -> Example:
    row: dict[str, Any] = json.loads(line)
    if "text" in row:
        return example(PlainText(row.pop("text")), **row)
    return example(Completion(row.pop("prompt"), row.pop("completion")), **row)
