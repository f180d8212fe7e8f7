"""Which stored array answers a query, and what it is multiplied with: the u of ⟨u, e_z⟩ (DESIGN section 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from service import artifacts, basis, codec
from service.contracts import ArrayInfo, ConceptRecord, DatasetRecord, IndexRecord
from service.errors import Invalid
from service.rows import F32
from service.specs import IndexManifest, QueryGradientSpec
from service.storage import Storage
from service.tasks import identity
from service.terms import ConceptFunction, IndexKind, LongExamples, Method
from service.work import ConceptObjective, Eigen, LossObjective

DEFAULT_DAMPING = 1.0


@dataclass(frozen=True)
class Asked:
    """What is asked of an index, with every name resolved. ``vector``: v̂ (d,); None for loss queries."""

    method: Method
    concept: ConceptRecord | None
    vector: F32 | None
    query_set: DatasetRecord | None
    function: ConceptFunction
    damping: float | None  # None: the default, or the only one there is
    through: IndexKind | None  # None: embeddings where there are any
    param: str = "concept"  # the field of the question that names the layer


@dataclass(frozen=True)
class Matched:
    """Rows to score and the vector to score them with; ``facts`` say where it comes from."""

    array: ArrayInfo
    u: F32
    damping: float | None = None  # None: H is the identity, or there is none
    captured: float = 1.0  # share of ‖v̂‖² within R
    query_set: str | None = None
    examples: int | None = None  # of the query set, where a job has counted them
    quarantined: int = 0
    points: int = 1


@dataclass(frozen=True)
class Missing:
    """Coordinates that a job must compute first."""

    key: str
    spec: QueryGradientSpec


def match(
    storage: Storage, index: IndexRecord, manifest: IndexManifest, asked: Asked, *, shard_size: int
) -> Matched | Missing:
    """The array and the vector, or the job that must run first. Raises Invalid naming what is available."""
    if asked.method in DIRECT:
        return _direct(index, asked, DIRECT[asked.method])
    if asked.method == Method.CONCEPT_INFLUENCE and asked.through != IndexKind.GRADIENT:
        array = _embedding(index, asked)
        if array is not None:
            return _influence(storage, array, asked)
    return _gradient(storage, index, manifest, asked, shard_size)


# --- activations and embeddings: no model ---------------------------------------------------------------


DIRECT: Mapping[Method, IndexKind] = {  # v̂ itself is the query
    Method.VECTOR_FILTER: IndexKind.ACTIVATION,
    Method.PROJECTION_DIFFERENCE: IndexKind.DIFFERENCE,
}


def _direct(index: IndexRecord, asked: Asked, kind: IndexKind) -> Matched:
    """v̂ itself against rows of hidden dimensions."""
    concept, vector = _concept(asked)
    held = [array for array in index.arrays if array.kind == kind]
    array = next((array for array in held if array.layer == concept.layer), None)
    if array is None:
        raise _not_indexed(index, kind, [array.layer for array in held], asked)
    return Matched(array, vector)


def _embedding(index: IndexRecord, asked: Asked) -> ArrayInfo | None:
    """The embedding that answers; None when coordinates have to."""
    concept, _ = _concept(asked)
    every = [array for array in index.arrays if array.kind == IndexKind.INFLUENCE]
    falls_back = asked.through is None and any(array.kind == IndexKind.GRADIENT for array in index.arrays)
    if not every:
        if falls_back or asked.through is None:
            return None
        raise _not_indexed(index, IndexKind.INFLUENCE, [], asked)
    wanted: list[tuple[str, object, object, str]] = [("layer", lambda a: a.layer, concept.layer, asked.param)]
    pooled = "pooling" if asked.param == "layer" else asked.param
    wanted.append(("pooling", lambda a: a.embedding.pooling, concept.pooling, pooled))
    wanted.append(("concept_function", lambda a: a.embedding.function, asked.function, "concept_function"))
    if asked.query_set is not None:
        fingerprint = asked.query_set.fingerprint
        wanted.append(("query_set", lambda a: a.embedding.query_set_fingerprint, fingerprint, "query_set"))
    if asked.damping is not None:
        wanted.append(("damping", lambda a: a.embedding.damping, asked.damping, "damping"))
    found = every
    for name, read, value, param in wanted:
        left = [array for array in found if read(array) == value]  # pyright: ignore[reportCallIssue]
        if not left:
            if falls_back:
                return None
            shown = sorted({str(_label(array, name)) for array in found})
            raise Invalid(
                f"{name}_not_indexed",
                f"Index {index.id} has no influence embeddings for this {name}; it has: {', '.join(shown)}. "
                "Add them to a gradient index with POST /v1/indexes/{index}/query-sets, or build it with them.",
                param=param,
                context={"available": shown},
            )
        found = left
    return _only(index, found, asked)


def _only(index: IndexRecord, found: list[ArrayInfo], asked: Asked) -> ArrayInfo:
    """One of embeddings that differ in query set or damping only: the default damping, the newest sum."""
    sets = {array.embedding.query_set: None for array in found if array.embedding}
    if len({array.embedding.query_set_fingerprint for array in found if array.embedding}) > 1:
        raise Invalid(
            "query_set_needed",
            f"Index {index.id} has embeddings for several query sets: {', '.join(sets)}. Name one in 'query_set'.",
            param="query_set",
            context={"available": list(sets)},
        )
    dampings = sorted({array.embedding.damping for array in found if array.embedding})
    damping = DEFAULT_DAMPING if DEFAULT_DAMPING in dampings else dampings[0]
    if asked.damping is None and len(dampings) > 1 and DEFAULT_DAMPING not in dampings:
        raise Invalid(
            "damping_needed",
            f"Index {index.id} has embeddings at dampings {', '.join(map(str, dampings))}: name one in 'damping'.",
            param="damping",
            context={"available": dampings},
        )
    same = [array for array in found if array.embedding and array.embedding.damping in {damping, asked.damping}]
    return max(same, key=_reach)


def _reach(array: ArrayInfo) -> tuple[int, bool]:
    """More of the run is better, and then all directions rather than some."""
    embedding = array.embedding
    return (embedding.points, embedding.rank is None) if embedding else (0, False)


def _influence(storage: Storage, array: ArrayInfo, asked: Asked) -> Matched:
    _, vector = _concept(asked)
    embedding = array.embedding
    assert embedding is not None  # noqa: S101
    captured = 1.0
    if embedding.directions is not None:
        vector = _rows_of_r(storage, embedding.directions) @ vector
        captured = _square(vector) / _square(_concept(asked)[1])
    return Matched(
        array,
        vector,
        damping=embedding.damping,
        captured=captured,
        query_set=embedding.query_set,
        points=embedding.points,
    )


# --- gradient coordinates: a model runs once per query set ----------------------------------------------


def _gradient(
    storage: Storage, index: IndexRecord, manifest: IndexManifest, asked: Asked, shard_size: int
) -> Matched | Missing:
    array = next((array for array in index.arrays if array.kind == IndexKind.GRADIENT), None)
    gradient = manifest.spec.gradient
    if array is None or gradient is None:
        raise _not_indexed(index, IndexKind.GRADIENT, [], asked)
    if asked.query_set is None:
        about = "∇f_v(Q)" if asked.concept else "∇L(Q)"
        raise Invalid(
            "query_set_needed",
            f"{asked.method} scores {about}: name the dataset Q in 'query_set' "
            "(prompts with answers on which the behaviour shows).",
            param="query_set",
        )
    eigen = gradient.projection if isinstance(gradient.projection, Eigen) else None
    if eigen is None and asked.damping is not None:
        raise Invalid(
            "no_damping",
            f"Index {index.id} holds random projections, which have no curvature to damp. Leave 'damping' out, "
            "or build the index with projection 'eigen'.",
            param="damping",
        )
    if asked.concept is not None and asked.concept.layer > gradient.tracked.blocks:
        raise Invalid(
            "layer_not_indexed",
            f"Concept {asked.concept.id!r} lies at layer {asked.concept.layer}, but index {index.id} tracks blocks "
            f"1 to {gradient.tracked.blocks} only: part of its gradient would be missing. Build the index with "
            f"layer {asked.concept.layer}.",
            param=asked.param,
        )
    if asked.concept is not None and asked.concept.layer < gradient.tracked.shallowest:
        raise Invalid(
            "layer_not_indexed",
            f"Concept {asked.concept.id!r} lies at layer {asked.concept.layer}, but the first block that index "
            f"{index.id} tracks is {gradient.tracked.shallowest}: there is no gradient to score.",
            param=asked.param,
        )
    found = _coordinates(storage, index, manifest, asked, shard_size)
    if isinstance(found, Missing):
        return found
    coordinates, examples, quarantined, captured = found
    damping = None
    if eigen is not None:
        damping = DEFAULT_DAMPING if asked.damping is None else asked.damping
        coordinates = basis.damped(storage, eigen.basis, coordinates, damping)
    return Matched(
        array,
        coordinates,
        damping=damping,
        captured=captured,
        query_set=asked.query_set.id,
        examples=examples,
        quarantined=quarantined,
    )


def _coordinates(
    storage: Storage, index: IndexRecord, manifest: IndexManifest, asked: Asked, shard_size: int
) -> tuple[F32, int, int, float] | Missing:
    """Coordinates of −∇f_v(Q) or ∇L(Q), used and unused examples of Q, and the captured share of v̂."""
    assert asked.query_set is not None  # noqa: S101
    built = manifest.spec
    objective = LossObjective()
    if asked.concept is not None and asked.vector is not None:
        concept, vector = asked.concept, asked.vector
        same = (asked.query_set.fingerprint, concept.layer, concept.pooling, asked.function)
        for known in sorted(manifest.jacobians, key=lambda known: known.directions is not None):
            if (known.query_set_fingerprint, known.layer, known.pooling, known.function) == same:
                artifact = artifacts.get(storage, known.artifact)
                rows = artifacts.read(storage, artifact, "jacobian")["rows"]
                v = vector if known.directions is None else _rows_of_r(storage, known.directions) @ vector
                facts = artifact.facts
                captured = _square(v) / _square(vector)
                return -(v @ rows), int(facts["examples"]), int(facts["quarantined"]), captured
        objective = ConceptObjective(
            concept.sha256, concept.layer, concept.pooling, tuple(map(float, vector)), asked.function
        )
    rule = built.long_examples
    if isinstance(objective, ConceptObjective) and rule == LongExamples.SPLIT_AND_SUM:
        rule = LongExamples.TRUNCATE_RIGHT  # as the cached Jacobians: one question has one answer
    spec = replace(built, activation=None, influence=None, objective=objective, long_examples=rule)
    key = codec.digest(["query", identity(spec), asked.query_set.fingerprint])
    answered = artifacts.find_answer(storage, key, "query")
    if answered is None:
        return Missing(key, QueryGradientSpec(key, index.id, index.model, asked.query_set.id, spec, shard_size))
    stored, tensors = answered
    return tensors["vector"], int(stored.facts["examples"]), int(stored.facts["quarantined"]), 1.0


# --- what they share ------------------------------------------------------------------------------------


def _concept(asked: Asked) -> tuple[ConceptRecord, F32]:
    assert asked.concept is not None and asked.vector is not None  # noqa: S101
    return asked.concept, asked.vector


def _square(vector: F32) -> float:
    """‖v‖², in float64: of a weighted sum of concepts it may be too small for float32."""
    exact = vector.astype(np.float64)
    return float(exact @ exact)


def _rows_of_r(storage: Storage, key: str) -> F32:
    return artifacts.read(storage, artifacts.get(storage, key), "directions")["rows"].astype(np.float32)


def _label(array: ArrayInfo, name: str) -> object:
    embedding = array.embedding
    assert embedding is not None  # noqa: S101
    labels: dict[str, object] = {
        "layer": array.layer,
        "pooling": embedding.pooling,
        "concept_function": embedding.function,
        "query_set": embedding.query_set,
        "damping": embedding.damping,
    }
    return labels[name]


def _not_indexed(index: IndexRecord, kind: IndexKind, layers: list[int | None], asked: Asked) -> Invalid:
    if not layers:
        held = ", ".join(sorted({str(array.kind) for array in index.arrays}))
        detail = f"Index {index.id} holds no {kind} rows (it has: {held}); build it with that kind."
        return Invalid("kind_not_indexed", detail, param="method", context={"layers": []})
    concept, _ = _concept(asked)
    detail = (
        f"Concept {concept.id!r} lies at layer {concept.layer}, where index {index.id} holds no {kind} rows; it "
        f"has layers {', '.join(map(str, layers))}."
    )
    return Invalid("layer_not_indexed", detail, param=asked.param, context={"layers": layers})
