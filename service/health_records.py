"""What a concept health report holds, and the job that makes one. Numbers only: what they mean is said by
``service/health_doubts.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from service.contracts import ArrayInfo, ConceptRecord, Point
from service.terms import ConceptFunction, Pooling


@dataclass(frozen=True)
class HealthSpec:
    """``direction``: artifact that holds v̂ as one row. ``sides``: datasets that the concept was fitted on."""

    key: str
    index: str
    concept: ConceptRecord
    direction: str
    query_set: str | None
    function: ConceptFunction
    damping: float
    points: tuple[Point, ...]
    sides: tuple[str, ...]
    shard_size: int


@dataclass(frozen=True)
class Estimate:
    """A mean over examples with its standard error and 95 % interval (Student's t); no error for one example."""

    value: float
    error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Change:
    """f_v(Q) at the end less at the base, or at the first point that could be read. ``p_value``: of the mean being
    zero, by flipping signs of examples.

    ``spread``: standard deviation of f_v over the examples at that point; ``effect``: the change in units of it.
    """

    mean: Estimate
    p_value: float
    spread: float
    effect: float | None  # None: no spread


@dataclass(frozen=True)
class Turn:
    """The point inside the run where f_v lies furthest outside what is between base and end.

    ``rise``: from the base to it, ``back``: from it to the end. ``p_value``: of the weaker of both, times the
    points and directions it was chosen from.
    """

    point: int
    rise: float
    back: float
    p_value: float


@dataclass(frozen=True)
class AtPoint:
    """f_v(Q) at one point of the run."""

    name: str
    f: Estimate


@dataclass(frozen=True)
class Movement:
    """f_v(Q) along the run, base first, end last. ``left_out``: points that could not be read, and why."""

    examples: int
    quarantined: int
    points: tuple[AtPoint, ...]
    change: Change | None
    turn: Turn | None
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Domain:
    """Pooled activations of ``name`` against those of the index, the concept's direction removed, at equal lengths.

    ``alike``: share of the texts of ``name`` for which the index has one of the same length, however many share
    it. Lengths are medians, in characters of what is pooled.
    """

    name: str
    examples: int
    against: int
    auroc: float
    p_value: float
    alike: float
    length: float
    length_index: float


@dataclass(frozen=True)
class Agreement:
    """Two rankings of all examples of the index: by gradients (``array``) and by activations. ``overlap``: share of
    the first ``k`` of either that is among those of the other; k/n is by chance.
    """

    array: ArrayInfo
    examples: int
    spearman: float | None  # None: one of them ranks nothing
    k: int
    overlap: float
    by_chance: float


@dataclass(frozen=True)
class Report:
    """``absent``: of each part that could not be made, why."""

    index: str
    concept: str
    concept_sha256: str
    layer: int
    pooling: Pooling
    query_set: str | None
    function: ConceptFunction
    points: int  # of the run that the index's influence embeddings add up; 0: it has none for this question
    movement: Movement | None
    domain: Domain | None  # of Q
    concept_domain: Domain | None  # of the examples that the concept was fitted on
    agreement: Agreement | None
    absent: Mapping[str, str]
    seconds: float
