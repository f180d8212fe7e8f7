"""What a user asks of an index, and its names resolved to records, directions and numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from service import codec, concepts
from service.contracts import ConceptRecord, IndexRecord
from service.errors import Invalid
from service.filters import Filter
from service.matching import DIRECT, Asked
from service.registry import DATASETS, MODELS, Registry
from service.rows import F32
from service.storage import sha256_bytes
from service.terms import ConceptFunction, IndexKind, Method, Order, Pooling

Direction = Callable[[ConceptRecord], F32]  # where the v̂ of a registered concept is read

INLINE = "inline"  # id of a direction that came with the question

# What a method makes no use of: given all the same, the answer would not be the one that was asked for.
_NOT_USED = {
    Method.VECTOR_FILTER: ("query_set", "damping", "concept_function", "through"),
    Method.PROJECTION_DIFFERENCE: ("query_set", "damping", "concept_function", "through"),
    Method.CONCEPT_INFLUENCE: (),
    Method.INFLUENCE_FUNCTION: ("concept", "concepts", "vector", "layer", "pooling", "concept_function"),
}
_WHY_NOT = {
    Method.VECTOR_FILTER: "vector_filter compares activations with the concept's direction, and no gradient",
    Method.PROJECTION_DIFFERENCE: "projection_difference compares activations with the concept's direction, and no "
    "gradient",
    Method.INFLUENCE_FUNCTION: "influence_function asks about the loss on a query set, not about a concept",
}
_THROUGH = {
    Method.CONCEPT_INFLUENCE: (IndexKind.GRADIENT, IndexKind.INFLUENCE),
    Method.INFLUENCE_FUNCTION: (IndexKind.GRADIENT,),
}


@dataclass(frozen=True)
class Weighted:
    """A registered concept in a sum Σ w v̂: its score is the sum of theirs."""

    id: str
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """``concept``, ``concepts`` and ``vector``: three ways to say the direction. A vector needs its ``layer``."""

    index: str
    concept: str | None
    method: Method
    order: Order
    k: int
    query_set: str | None = None
    damping: float | None = None
    concept_function: ConceptFunction | None = None  # None: dot
    through: IndexKind | None = None
    concepts: tuple[Weighted, ...] | None = None
    vector: tuple[float, ...] | None = None
    layer: int | None = None
    pooling: Pooling | None = None  # of a vector; None: that of the index
    filter: Filter | None = None  # which examples are ranked


def resolve(query: Query, index: IndexRecord, registry: Registry, direction: Direction) -> Asked:
    """Names to records; whether they belong together. Raises NotFound, and Invalid naming the field."""
    _check_used(query)
    query_set = None
    if query.query_set is not None:
        query_set = registry.get(DATASETS, query.query_set, param="query_set")
    concept, vector = None, None
    if query.method != Method.INFLUENCE_FUNCTION:
        concept, vector = _direction(query, index, registry, direction)
    function = query.concept_function or ConceptFunction.DOT
    return Asked(query.method, concept, vector, query_set, function, query.damping, query.through)


def _direction(
    query: Query, index: IndexRecord, registry: Registry, direction: Direction
) -> tuple[ConceptRecord, F32]:
    given = [name for name in ("concept", "concepts", "vector") if getattr(query, name) is not None]
    if len(given) != 1:
        named = " and ".join(given) if given else "none of them"
        detail = f"{query.method} needs a direction: one of 'concept', 'concepts' or 'vector'; found {named}."
        raise Invalid("concept_needed", detail, param=given[1] if given else "concept")
    if query.vector is None and (query.layer is not None or query.pooling is not None):
        name = "layer" if query.layer is not None else "pooling"
        detail = f"'{name}' belongs to an inline 'vector'; a registered concept has its own."
        raise Invalid(f"{name}_not_used", detail, param=name)
    width = registry.get(MODELS, index.model).width
    if query.vector is not None:
        return _inline(query.vector, query, index, width)
    kind = DIRECT.get(query.method, IndexKind.GRADIENT)
    wanted = query.concepts or (Weighted(query.concept or ""),)
    found: list[tuple[ConceptRecord, F32]] = []
    for number, one in enumerate(wanted):
        param = "concept" if query.concepts is None else f"concepts[{number}]"
        record = concepts.get(registry, one.id, param=param, pooling=pooling_of(index, query.method))
        concepts.check_fits(record, index, width, kind, param=param)
        found.append((record, direction(record)))
    if query.concepts is None:
        return found[0]
    return _summed(found, wanted)


def _summed(found: list[tuple[ConceptRecord, F32]], wanted: tuple[Weighted, ...]) -> tuple[ConceptRecord, F32]:
    """Σ w v̂, not normalised: its scores are the weighted sums of the concepts' own."""
    first = found[0][0]
    concepts.check_alike([record for record, _ in found], param="concepts[{}]")
    vectors = [np.float64(each.weight) * one for each, (_, one) in zip(wanted, found, strict=True)]
    total = np.sum(vectors, axis=0).astype(np.float32)
    if not total.any():
        raise Invalid("zero_direction", "The weighted concepts cancel each other out.", param="concepts")
    name = " + ".join(each.id if each.weight == 1 else f"{each.weight:g}·{each.id}" for each in wanted)
    weighted = [[record.sha256, each.weight] for each, (record, _) in zip(wanted, found, strict=True)]
    aurocs = [record.auroc_held_out for record, _ in found if record.auroc_held_out is not None]
    return (
        replace(
            first,
            id=name,
            method="weighted_sum",
            norm=float(np.linalg.norm(total)),
            auroc_held_out=min(aurocs, default=None),
            sha256=codec.digest(["sum of concepts", weighted]),
            provenance={"concepts": {each.id: each.weight for each in wanted}},
        ),
        total,
    )


def _inline(values: tuple[float, ...], query: Query, index: IndexRecord, width: int) -> tuple[ConceptRecord, F32]:
    """A direction given as numbers, normalised like any concept."""
    if query.layer is None:
        layers = sorted({array.layer for array in index.arrays if array.layer is not None})
        detail = f"An inline vector needs its 'layer' (block output); index {index.id} has rows at layers {layers}."
        raise Invalid("layer_needed", detail, param="layer", context={"layers": layers})
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (width,):
        raise Invalid(
            "vector_of_other_width",
            f"The vector has {vector.size} numbers; model {index.model!r} has {width} hidden dimensions.",
            param="vector",
            context={"width": width},
        )
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm == 0:
        detail = "The vector must have a direction: finite numbers that are not all zero."
        raise Invalid("bad_vector", detail, param="vector")
    unit = (vector / norm).astype(np.float32)
    record = ConceptRecord(
        id=INLINE,
        model=index.model,
        model_fingerprint=index.model_fingerprint,
        lineage=index.lineage,
        layer=query.layer,
        pooling=query.pooling or pooling_of(index, query.method),
        width=width,
        method=INLINE,
        norm=norm,
        auroc_held_out=None,
        n_positive=0,
        n_negative=0,
        provenance={},
        sha256=sha256_bytes(unit.tobytes()),
        created_at=codec.now(),
    )
    kind = DIRECT.get(query.method, IndexKind.GRADIENT)
    concepts.check_fits(record, index, width, kind, param="pooling")
    return record, unit


def pooling_of(index: IndexRecord, method: Method) -> Pooling:
    """That of what will be compared with: embeddings may be pooled otherwise than activations."""
    pooled = {array.embedding.pooling for array in index.arrays if array.embedding}
    if method == Method.CONCEPT_INFLUENCE and len(pooled) == 1:
        return pooled.pop()
    return index.pooling


def _check_used(query: Query) -> None:
    """Raises Invalid for a field that the method makes no use of, and for kinds that cannot answer it."""
    for name in _NOT_USED[query.method]:
        if getattr(query, name) is not None:
            detail = f"{_WHY_NOT[query.method]}: leave '{name}' out."
            raise Invalid(f"{name}_not_used", detail, param=name)
    if query.through is not None and query.through not in _THROUGH[query.method]:
        usable = " or ".join(f"'{kind}'" for kind in _THROUGH[query.method])
        detail = f"{query.method} is answered through {usable}, not through '{query.through}'."
        raise Invalid("bad_through", detail, param="through")
