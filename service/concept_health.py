"""Concept health: what speaks for and against an attribution, computed once by a job and found again by its key.

A query answers with the warnings of a report that is there, and says how to get one where there is none: it never
waits for a model. One report serves every method: it is about index, direction, query set, function and damping.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from service import artifacts, codec, concepts, damage, indexes
from service.cache import LoadingCache
from service.contracts import ArrayInfo, ConceptRecord, DatasetRecord, IndexRecord, JobRecord, ModelRecord, Point
from service.errors import Invalid, Unavailable
from service.health_doubts import doubts, without_doubts
from service.health_records import HealthSpec, Report
from service.jobs import Jobs
from service.matching import DEFAULT_DAMPING, Asked
from service.models import end_point
from service.planning import points_of
from service.questions import INLINE, Query, Weighted, resolve
from service.registry import DATASETS, MODELS, Registry
from service.rows import F32
from service.storage import Storage, sha256_bytes
from service.terms import Checkpoints, ConceptFunction, JobKind, Lora, Method, Order, Pooling
from service.work import FORMAT

FILE = "report"
_VERSION = 2  # of how reports are computed
_KEPT, _ABSENT_S = 1024, 10.0  # reports in memory; how long "there is none" is believed
_MOST_ABSENT = 4096


@dataclass(frozen=True)
class HealthRequest:
    """A direction, said as in a query, and what it is asked of. ``query_set`` may be left out where there is
    one."""

    index: str
    concept: str | None
    query_set: str | None = None
    concept_function: ConceptFunction | None = None
    damping: float | None = None
    vector: tuple[float, ...] | None = None
    layer: int | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True)
class Subject:
    """What a report is about, beside the index. ``query_set`` None: there is none, or ``several``."""

    query_set: str | None
    fingerprint: str | None
    damping: float
    several: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hint:
    """Of a query: whether a report on its question exists, what it warns of, and how to get one."""

    known: bool
    warnings: tuple[str, ...]
    said: str


@dataclass(frozen=True)
class Known:
    """A report with the record of its concept, whose own evidence it repeats."""

    report: Report
    concept: ConceptRecord
    index: IndexRecord


# --- what a report is about -------------------------------------------------------------------------------


def subject(index: IndexRecord, asked: Asked) -> Subject:
    """The query set and damping that a question means: those named, else the only ones that the index has
    embeddings for.
    """
    assert asked.concept is not None  # noqa: S101
    found = [array for array in index.arrays if _about(array, asked)]
    sets = {array.embedding.query_set_fingerprint: array.embedding.query_set for array in found if array.embedding}
    damping = _damping(found, asked.damping)
    if asked.query_set is not None:
        return Subject(asked.query_set.id, asked.query_set.fingerprint, damping)
    if len(sets) == 1:
        ((fingerprint, name),) = sets.items()
        return Subject(name, fingerprint, damping)
    return Subject(None, None, damping, tuple(sets.values()))


def _about(array: ArrayInfo, asked: Asked) -> bool:
    concept, about = asked.concept, array.embedding
    return (
        concept is not None
        and about is not None
        and (array.layer, about.pooling, about.function) == (concept.layer, concept.pooling, asked.function)
    )


def _damping(found: list[ArrayInfo], asked: float | None) -> float:
    held = sorted({array.embedding.damping for array in found if array.embedding})
    if asked is not None:
        return asked
    return DEFAULT_DAMPING if DEFAULT_DAMPING in held or not held else held[0]


def key_of(index: IndexRecord, asked: Asked, about: Subject) -> str:
    """The report's name: the hash of everything that decides it. The manifest decides model and rows."""
    concept, vector = asked.concept, asked.vector
    assert concept is not None and vector is not None  # noqa: S101
    sides = [concept.provenance.get(side) for side in ("positive", "negative", "labels")]
    direction = sha256_bytes(np.ascontiguousarray(vector).tobytes())
    said = [index.id, index.manifest_sha256, concept.id, concept.layer, concept.pooling, direction, sides]
    return codec.digest([FORMAT, _VERSION, "health", *said, about.fingerprint, asked.function, about.damping])


# --- reports that are there -------------------------------------------------------------------------------


class _Absent(Exception):
    """No such report; never leaves this file."""


class Reports:
    """Reads reports, and remembers for a while that there is none. Thread-safe."""

    def __init__(self, storage: Storage, now: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._now = now
        self._kept: LoadingCache[Report] = LoadingCache(_KEPT)
        self._absent: dict[str, float] = {}  # until when it is believed
        self._lock = threading.Lock()

    def find(self, key: str, *, fresh: bool = False) -> Report | None:
        """``fresh``: look again, whatever was true a moment ago."""

        def load() -> Report:
            with self._lock:
                if not fresh and self._absent.get(key, 0.0) > self._now():
                    raise _Absent
            found = artifacts.find_answer(self._storage, key, FILE)
            if found is None:
                self._note(key)
                raise _Absent
            return codec.decode(Report, found[1]["json"].tobytes())

        try:
            return self._kept.get(key, load)
        except _Absent:
            return None

    def hint(self, index: IndexRecord, asked: Asked) -> Hint | None:
        """What a query says of the health of its question; None for a loss query, which is about no concept, and
        while storage does not answer: a ranking that is in memory needs none.
        """
        if asked.concept is None or asked.vector is None:
            return None
        about = subject(index, asked)
        key = key_of(index, asked, about)
        try:
            report = self.find(key)
        except Unavailable:
            self._note(key)
            return None
        if report is None:
            return Hint(False, (), f"No health report on this question yet: {_how(index, asked, about)}.")
        said = tuple(each.said for each in doubts(report))
        change = report.movement.change if report.movement else None
        nothing = without_doubts(change, report.domain, report.concept_domain, report.agreement)
        found = f"{len(said)} warning{'s' if len(said) != 1 else ''}" if said else nothing
        return Hint(True, said, f"Health report: {found} ({_how(index, asked, about)}).")

    def _note(self, key: str) -> None:
        with self._lock:
            if len(self._absent) >= _MOST_ABSENT:
                self._absent.clear()
            self._absent[key] = self._now() + _ABSENT_S


def _how(index: IndexRecord, asked: Asked, about: Subject) -> str:
    concept = asked.concept
    assert concept is not None  # noqa: S101
    if concept.id == INLINE or concept.method == "weighted_sum":
        return "POST /v1/queries/health with the same direction"
    words = ["whence concepts health", concept.id, "--index", index.id]
    if about.query_set is not None:
        words += ["--query-set", about.query_set]
    elif about.several:
        words += ["--query-set", about.several[0]]
    if asked.function != ConceptFunction.DOT:
        words += ["--concept-function", asked.function]
    if about.damping != DEFAULT_DAMPING:
        words += ["--damping", f"{about.damping:g}"]
    return f"`{' '.join(words)}`"


# --- asking for one ---------------------------------------------------------------------------------------


class ConceptHealth:
    """Raises NotFound and Invalid naming the field, and Damaged."""

    def __init__(
        self, registry: Registry, storage: Storage, jobs: Jobs, reports: Reports, *, shard_size: int
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._reports = reports
        self._shard_size = shard_size

    @damage.told
    def run(self, query: Query) -> Known | JobRecord:
        """The report on a question (``question`` makes one), or the job that makes it."""
        index = indexes.resolve(self._registry, query.index)
        asked = resolve(query, index, self._registry, self._direction)
        assert asked.concept is not None and asked.vector is not None  # noqa: S101  (``question`` asks for one)
        about = subject(index, asked)
        if about.several:
            names = ", ".join(about.several)
            detail = f"Index {index.id} has embeddings for several query sets: {names}. Name one in 'query_set'."
            context = {"available": list(about.several)}
            raise Invalid("query_set_needed", detail, param="query_set", context=context)
        key = key_of(index, asked, about)
        report = self._reports.find(key, fresh=True)
        if report is None:
            return self._jobs.submit_once(key, JobKind.CONCEPT_HEALTH, self._spec(key, index, asked, about))
        return Known(report, asked.concept, index)

    def _spec(self, key: str, index: IndexRecord, asked: Asked, about: Subject) -> HealthSpec:
        concept, vector = asked.concept, asked.vector
        assert concept is not None and vector is not None  # noqa: S101
        model = self._registry.get(MODELS, index.model, param="index")
        rows = np.ascontiguousarray(vector[None])
        direction = codec.digest([FORMAT, "health", "direction", sha256_bytes(rows.tobytes())])
        if artifacts.find_answer(self._storage, direction, "directions") is None:
            artifacts.publish(self._storage, direction, {"directions": {"rows": rows}}, by_content=True)
        query_set = self._query_set(asked, about)
        return HealthSpec(
            key=key,
            index=index.id,
            concept=replace(concept, evidence=None),
            direction=direction,
            query_set=query_set.id if query_set else None,
            function=asked.function,
            damping=about.damping,
            points=run_of(model, self._registry) if query_set else (),
            sides=fitted_on(concept, self._registry),
            shard_size=self._shard_size,
        )

    def _query_set(self, asked: Asked, about: Subject) -> DatasetRecord | None:
        if asked.query_set is not None:
            return asked.query_set
        found = self._registry.find(DATASETS, about.query_set) if about.query_set is not None else None
        return found if found is not None and found.fingerprint == about.fingerprint else None

    def _direction(self, concept: ConceptRecord) -> F32:
        return concepts.direction(self._storage, concept)


def question(request: HealthRequest, terms: tuple[Weighted, ...] | None = None) -> Query:
    """The question whose health is asked: gradients, as they need all that a report is about."""
    return Query(
        index=request.index,
        concept=request.concept,
        concepts=terms,
        method=Method.CONCEPT_INFLUENCE,
        order=Order.MOST,
        k=1,
        query_set=request.query_set,
        damping=request.damping,
        concept_function=request.concept_function,
        vector=request.vector,
        layer=request.layer,
        pooling=request.pooling,
    )


def run_of(model: ModelRecord, registry: Registry) -> tuple[Point, ...]:
    """The points at which f_v is measured: the base, where it is declared, then the checkpoints, then the end."""
    points = points_of(model, Checkpoints.ALL, Lora.MERGED, registry)
    base = registry.find(MODELS, model.base) if model.base is not None else None
    if base is None or base.fingerprint in {point.fingerprint for point in points}:
        return points
    return (end_point(base), *points)


def fitted_on(concept: ConceptRecord, registry: Registry) -> tuple[str, ...]:
    """The datasets that a concept was fitted on, as far as they are still what they were."""
    found = []
    for side in ("positive", "negative"):
        said = concept.provenance.get(side)
        if not isinstance(said, Mapping) or not isinstance(said.get("dataset"), str):
            continue
        record = registry.find(DATASETS, said["dataset"])
        if record is not None and record.fingerprint == said.get("fingerprint"):
            found.append(record.id)
    return tuple(dict.fromkeys(found))
