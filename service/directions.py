"""What a dataset does to a model when nobody has named the concept: the main directions of its embeddings.

A job computes them once; answering needs no model: which registered concepts lie along each, and which examples
push furthest either way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from service import artifacts, codec, concepts, damage, indexes
from service.cache import LoadingCache
from service.contracts import ArrayInfo, ConceptRecord, DatasetRecord, Example, IndexRecord, JobRecord
from service.errors import Damaged, Invalid, NotFound
from service.jobs import Jobs
from service.loading import IndexLoader
from service.matching import DEFAULT_DAMPING
from service.registry import CONCEPTS, DATASETS, Registry
from service.rows import F32
from service.specs import DirectionsSpec
from service.spectrum import Spectrum
from service.storage import Storage
from service.terms import ConceptFunction, IndexKind, JobKind

FILE = "directions"
_CONCEPTS_CACHED = 4096


@dataclass(frozen=True)
class DirectionsRequest:
    """Which embedding of the index (the fields may be left out where there is one only), and how much of it."""

    index: str
    query_set: str | None
    layer: int | None
    concept_function: ConceptFunction | None
    damping: float | None
    count: int
    examples: int
    concepts: int
    seed: int


@dataclass(frozen=True)
class Aligned:
    """The cosine of a concept's v̂ with a direction, in the residual stream."""

    concept: ConceptRecord
    cosine: float


@dataclass(frozen=True)
class Extreme:
    score: float
    example: Example


@dataclass(frozen=True)
class Direction:
    """``vector`` (d,) in the residual stream; ``share`` of ‖m‖² summed over the dataset."""

    number: int
    value: float
    share: float
    cumulative: float
    vector: F32
    concepts: tuple[Aligned, ...]
    most: tuple[Extreme, ...]
    least: tuple[Extreme, ...]


@dataclass(frozen=True)
class Directions:
    """``mean``: what training on an average example does; ``mean_share`` what centring would have taken away."""

    index: IndexRecord
    array: ArrayInfo
    rows: int
    directions: tuple[Direction, ...]
    mean_norm: float
    mean_share: float
    mean_concepts: tuple[Aligned, ...]
    seconds: float
    warnings: tuple[str, ...]


class DirectionsService:
    def __init__(self, registry: Registry, storage: Storage, jobs: Jobs, loader: IndexLoader) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._vectors: LoadingCache[F32] = LoadingCache(_CONCEPTS_CACHED)

    @damage.told
    def run(self, request: DirectionsRequest) -> Directions | JobRecord:
        """The directions, or the job that finds them. Raises NotFound and Invalid naming the field, and Damaged."""
        index = indexes.resolve(self._registry, request.index)
        query_set = None
        if request.query_set is not None:
            query_set = self._registry.get(DATASETS, request.query_set, param="query_set")
        array = choose(index, query_set, request)
        spec = plan(index, array, request.count, request.seed)
        known = artifacts.find_answer(self._storage, spec.key, FILE)
        if known is None:
            return self._jobs.submit_once(spec.key, JobKind.DIRECTIONS, spec)
        found, seconds = unpack(*known)
        r = self._rows_of_r(array)
        near, warnings = self._lineage(index, array, r)

        def aligned(vector: F32) -> tuple[Aligned, ...]:
            """In the span of R a direction is Rᵀu, and ⟨Rᵀu, v̂⟩ = ⟨u, R v̂⟩."""
            cosines = [Aligned(concept, float(vector @ (v if r is None else r @ v))) for concept, v in near]
            return tuple(sorted(cosines, key=lambda each: -abs(each.cosine))[: request.concepts])

        directions = []
        for number, (value, share, u) in enumerate(zip(found.values, found.shares, found.directions, strict=True)):
            most, least = self._extremes(index, array, u, request.examples)
            total = float(found.shares[: number + 1].sum())
            vector = u if r is None else u @ r
            about = (number + 1, float(value), float(share), total, vector, aligned(u))
            directions.append(Direction(*about, most, least))
        norm = float(np.linalg.norm(found.mean))
        unit = (found.mean / (norm or 1.0)).astype(np.float32)
        return Directions(
            index=index,
            array=array,
            rows=found.rows,
            directions=tuple(directions),
            mean_norm=norm,
            mean_share=found.rows * norm**2 / found.energy if found.energy else 0.0,
            mean_concepts=aligned(unit),
            seconds=seconds,
            warnings=tuple(warnings),
        )

    def _rows_of_r(self, array: ArrayInfo) -> F32 | None:
        assert array.embedding is not None  # noqa: S101  (``choose`` picks embeddings)
        key = array.embedding.directions
        if key is None:
            return None
        held = artifacts.read(self._storage, artifacts.get(self._storage, key), "directions")
        return held["rows"].astype(np.float32)

    def _lineage(
        self, index: IndexRecord, array: ArrayInfo, r: F32 | None
    ) -> tuple[list[tuple[ConceptRecord, F32]], list[str]]:
        """Concepts that mean something in this residual stream at this layer, with their directions; and which of
        them are left out, as nobody can read them: others' concepts are no reason to answer nothing.
        """
        about = (index.lineage, array.layer, array.dims if r is None else r.shape[1])
        found, left_out = [], []
        records, damaged = self._registry.survey(CONCEPTS)
        for each in records:
            if (each.lineage, each.layer, each.width) != about:
                continue
            try:
                found.append((each, self._vectors.get(each.sha256, self._load(each))))
            except (Damaged, NotFound) as error:
                left_out.append(f"Concept {each.id!r} is left out: {damage.explained(error, None).detail}")
        if damaged:
            left_out.append(f"Concepts whose records are damaged are left out: {', '.join(damaged)}.")
        return found, left_out

    def _load(self, concept: ConceptRecord) -> Callable[[], F32]:
        return lambda: concepts.direction(self._storage, concept)

    def _extremes(
        self, index: IndexRecord, array: ArrayInfo, u: F32, count: int
    ) -> tuple[tuple[Extreme, ...], tuple[Extreme, ...]]:
        """The examples furthest along the direction, and furthest against it."""
        if not count:
            return (), ()
        rows = self._loader.rows(index, array)
        examples = self._loader.examples(index)
        sides = []
        for sign in (1.0, -1.0):
            top = rows.index.search(np.float32(sign) * u, count, rows.alive)
            held = examples.take(rows.positions[top.rows])
            pairs = zip(top.scores, held, strict=True)
            sides.append(tuple(Extreme(sign * float(score), example) for score, example in pairs))
        return sides[0], sides[1]


def plan(index: IndexRecord, array: ArrayInfo, count: int, seed: int) -> DirectionsSpec:
    """The job's specification; its key covers everything that decides the result."""
    key = codec.digest(["directions of", index.manifest_sha256, codec.to_plain(array), count, seed])
    return DirectionsSpec(key, index.id, array, count, seed)


def pack(found: Spectrum, seconds: float) -> tuple[dict[str, dict[str, Any]], dict[str, float | int | str]]:
    """Tensors by file, and facts, as ``artifacts.publish`` takes them."""
    tensors = {"values": found.values, "rows": found.directions, "mean": found.mean}
    return {FILE: tensors}, {"energy": found.energy, "rows": found.rows, "seconds": round(seconds, 3)}


def unpack(stored: Any, tensors: dict[str, Any]) -> tuple[Spectrum, float]:
    """What ``pack`` made, and the seconds that it took."""
    energy, rows = float(stored.facts["energy"]), int(stored.facts["rows"])
    spectrum = Spectrum(tensors["values"], tensors["rows"], energy, tensors["mean"], rows)
    return spectrum, float(stored.facts["seconds"])


def choose(index: IndexRecord, query_set: DatasetRecord | None, request: DirectionsRequest) -> ArrayInfo:
    """The embedding that the fields name; where they leave several, dot, the default damping and the longest sum
    are taken. Raises Invalid with what there is.
    """
    found = embeddings(index)
    for name, read, given, default in _fields(query_set, request):
        held = {read(array): None for array in found}
        wanted = given
        if given is None and len(held) > 1:
            if default not in held:
                shown = _shown(found, name)
                detail = f"Index {index.id} has embeddings of several {name}s: {shown}. Name one in {name!r}."
                raise Invalid(f"{name}_needed", detail, param=name, context={"available": shown.split(", ")})
            wanted = default
        left = [array for array in found if wanted is None or read(array) == wanted]
        if not left:
            shown = _shown(found, name)
            detail = f"Index {index.id} has no influence embeddings for this {name}; it has: {shown}."
            raise Invalid(f"{name}_not_indexed", detail, param=name, context={"available": shown.split(", ")})
        found = left
    return max(found, key=lambda array: (_about(array).points, _about(array).rank is None, array.dims))


def embeddings(index: IndexRecord) -> list[ArrayInfo]:
    """What training on each example does, as the index holds it. Raises Invalid where it holds nothing of that."""
    found = [array for array in index.arrays if array.kind == IndexKind.INFLUENCE]
    if not found:
        detail = (
            f"Index {index.id} holds no influence embeddings, which say what training on an example does: "
            "build it with kind 'influence', or extend a gradient index (POST /v1/indexes/{reference}/query-sets)."
        )
        raise Invalid("kind_not_indexed", detail, param="index")
    return found


def _fields(query_set: DatasetRecord | None, request: DirectionsRequest) -> list[tuple[str, Callable, Any, Any]]:
    """Name of a field, how an array answers it, what is asked for, and what is taken when nothing is."""
    fingerprint = query_set.fingerprint if query_set else None
    return [
        ("query_set", lambda array: _about(array).query_set_fingerprint, fingerprint, None),
        ("layer", lambda array: array.layer, request.layer, None),
        ("concept_function", lambda array: _about(array).function, request.concept_function, ConceptFunction.DOT),
        ("damping", lambda array: _about(array).damping, request.damping, DEFAULT_DAMPING),
    ]


def _shown(arrays: list[ArrayInfo], name: str) -> str:
    labels: dict[str, Callable[[ArrayInfo], object]] = {
        "query_set": lambda array: _about(array).query_set,
        "layer": lambda array: array.layer,
        "concept_function": lambda array: _about(array).function,
        "damping": lambda array: _about(array).damping,
    }
    return ", ".join(dict.fromkeys(str(labels[name](array)) for array in arrays))


def _about(array: ArrayInfo) -> Any:
    return array.embedding
