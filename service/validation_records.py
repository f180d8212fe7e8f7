"""What a validation asks for and what it says: plain records, shared by server, workers and client."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Arm(StrEnum):
    """What a retraining is for."""

    BASE = "base"  # nothing is trained
    FULL = "full"
    MOST = "most"  # the highest scores are removed
    LEAST = "least"
    RANDOM = "random"
    SUBSET = "subset"


@dataclass(frozen=True)
class Design:
    """``subsets`` 0: no LDS; ``seeds`` 0: no curves. Groups are those of a metadata field, or drawn."""

    subsets: int = 40
    keep: float = 0.5
    group_by: str | None = None
    group_size: int | None = None  # None: so that there are 40 random groups
    subset_seeds: int = 2
    fractions: tuple[float, ...] = (0.25,)
    seeds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """None: no bound. ``minutes`` of retraining, on all workers together, by the clock on the wall."""

    runs: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Plan:
    """How much of a design fits the budget, decided once and then kept. ``seconds`` None: not told."""

    runs: int
    wanted: int
    seeds: int
    subsets: int
    there: int  # of ``runs``: trained already, by this validation or another
    run_s: float  # the measured first run, on all examples
    estimate_s: float  # of what is left to train
    workers: int
    cut: tuple[str, ...]  # in words; empty: everything fits


class Finding(StrEnum):
    PREDICTS = "predicts"
    IN_PART = "predicts_in_part"
    DOES_NOT = "does_not_predict"
    OPPOSITE = "predicts_the_opposite"
    TOO_NOISY = "too_noisy_to_say"


@dataclass(frozen=True)
class Outcome:
    """One retraining and what came of it. ``predicted``: sum of the scores of what it trained on."""

    arm: Arm
    seed: int
    fraction: float  # of the examples that were left out
    number: int  # of the subset
    kept: int
    predicted: float
    outcome: float
    f_v: float | None
    loss: float
    trait_rate: float | None
    run: str  # key of the artifact


@dataclass(frozen=True)
class Lds:
    """Spearman over random subsets of predicted and actual outcome, the latter averaged over seeds.

    ``se``: bootstrap over subsets. ``ceiling``: Spearman between two seeds of the same subsets, averaged over
    pairs; None with one seed. ``by_size``: the same as ``value`` for the number of examples alone;
    ``given_size``: the partial rank correlation that is left of ``value`` among subsets of one size, with the error
    ``given_size_se``.
    """

    value: float
    se: float
    ceiling: float | None
    by_size: float
    given_size: float
    subsets: int
    seeds: int
    given_size_se: float = 0.0  # not told by reports from before it was measured


@dataclass(frozen=True)
class CurvePoint:
    """Mean over seeds of one measure after ``fraction`` was removed; ``se`` None with one seed."""

    arm: Arm
    fraction: float
    measure: str  # outcome, f_v, loss, trait_rate
    mean: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """``a`` minus ``b`` under the same seeds; ``in_se`` is the mean in standard errors."""

    a: Arm
    b: Arm
    fraction: float
    measure: str
    mean: float
    se: float | None
    in_se: float | None
    n: int


@dataclass(frozen=True)
class Part:
    """What one comparison says. ``low`` to ``high``: the 95 % interval of ``value``, by Student's t over paired
    seeds, by two bootstrap errors of an LDS.
    """

    about: str
    finding: Finding
    value: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    words: str
    parts: tuple[Part, ...]
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """Everything a validation found. ``about``: question, recipe, design and budget, as they were asked for."""

    about: Mapping[str, Any]
    examples: int
    left_out: int  # of the datasets, but not in the index: no run trains on them
    plan: Plan
    base: float  # outcome without any training, and after training on everything
    full: float
    trait_threshold: float | None
    lds: Lds | None
    curves: tuple[CurvePoint, ...]
    differences: tuple[Difference, ...]
    verdict: Verdict
    warnings: tuple[str, ...]
    runs: tuple[Outcome, ...]
