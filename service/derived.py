"""New concepts from numbers and from other concepts: sums, averages, projections. No model runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import codec, concepts, saes
from service.contracts import ConceptRecord, ModelRecord
from service.errors import Conflict, Invalid
from service.questions import Weighted
from service.registry import CONCEPTS, Registry, check_id
from service.rows import F32
from service.storage import Storage, sha256_bytes
from service.terms import Pooling

GIVEN, DERIVED = "given", "derived"

# Of the sum of the weights: less is what rounding unit vectors to float32 leaves of a sum that cancels.
_LEAST_LENGTH = 1e-5
_ROUNDING = 1e-6  # of the length of a unit vector in float32


@dataclass(frozen=True)
class Recipe:
    """Σ w v̂ over ``terms``, then without what lies in the span of ``project_out``."""

    terms: tuple[Weighted, ...]
    project_out: tuple[str, ...] = ()


def combine(vectors: F32, weights: Sequence[float], out: F32) -> NDArray[np.float64]:
    """Σ w v less its projection on the rows of ``out``: (n, d), (n,), (m, d) → (d,) float64."""
    total = np.asarray(weights, dtype=np.float64) @ vectors.astype(np.float64)
    if not len(out):
        return total
    # An orthonormal basis of the span, whatever the rows have in common.
    _, sizes, basis = np.linalg.svd(out.astype(np.float64), full_matrices=False)
    basis = basis[sizes > 1e-6 * sizes[0]]
    return total - basis.T @ (basis @ total)


def derive(storage: Storage, registry: Registry, new_id: str, recipe: Recipe) -> ConceptRecord:
    """Register what the recipe gives, as a concept that keeps it; the same again answers what is there.

    Raises NotFound, Conflict, and Invalid where concepts do not belong together or cancel each other out.
    """
    named = [(each.id, f"terms[{n}].concept") for n, each in enumerate(recipe.terms)]
    named += [(name, f"project_out[{n}]") for n, name in enumerate(recipe.project_out)]
    # A feature of an SAE of single positions takes the pooling of what it is put together with.
    told = (registry.find(CONCEPTS, name) for name, _ in named if saes.split(name) is None)
    pooling = next((each.pooling for each in told if each is not None), None)
    found = [concepts.get(registry, name, param=param, pooling=pooling) for name, param in named]
    terms, out = found[: len(recipe.terms)], found[len(recipe.terms) :]
    first = terms[0]
    concepts.check_alike(terms, param="terms[{}].concept")
    concepts.check_alike([first, *out], param="project_out[{}]", skip=1)
    vectors, removed = (
        np.array([concepts.direction(storage, each) for each in some]).reshape(len(some), first.width)
        for some in (terms, out)
    )
    weights = [each.weight for each in recipe.terms]
    total = combine(vectors, weights, removed)
    if not float(np.linalg.norm(total)) > _LEAST_LENGTH * sum(map(abs, weights)):
        detail = "Nothing is left: the concepts cancel each other out, or lie in the span of what is projected out."
        raise Invalid("zero_direction", detail, param="project_out" if out else "terms")
    provenance = {
        "terms": [
            {"concept": record.id, "sha256": record.sha256, "weight": weight}
            for record, weight in zip(terms, weights, strict=True)
        ],
        "project_out": [{"concept": record.id, "sha256": record.sha256} for record in out],
    }
    return register(storage, registry, _like(first, new_id, DERIVED, provenance), total)


def give(
    storage: Storage,
    registry: Registry,
    new_id: str,
    model: ModelRecord,
    layer: int,
    pooling: Pooling,
    vector: NDArray[np.floating],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> ConceptRecord:
    """Register a direction of a model's residual stream that was made elsewhere. Raises Conflict and Invalid."""
    check_layer(model, layer)
    if vector.shape != (model.width,):
        raise Invalid(
            "vector_of_other_width",
            f"The vector has shape {list(vector.shape)}; model {model.id!r} has {model.width} hidden dimensions.",
            param="vector",
            context={"width": model.width},
        )
    record = ConceptRecord(
        id=new_id,
        model=model.id,
        model_fingerprint=model.fingerprint,
        lineage=model.lineage,
        layer=layer,
        pooling=pooling,
        width=model.width,
        method=GIVEN,
        norm=0.0,
        auroc_held_out=None,
        n_positive=0,
        n_negative=0,
        provenance=dict(provenance or {}),
        sha256="",
        created_at="",
    )
    return register(storage, registry, record, vector)


def check_layer(model: ModelRecord, layer: int) -> None:
    if not 1 <= layer <= model.n_layers:
        raise Invalid(
            "layer_out_of_range",
            f"Layer {layer} does not exist: model {model.id!r} has layers 1 to {model.n_layers} "
            "(the output of each block).",
            param="layer",
            context={"n_layers": model.n_layers},
        )


def register(
    storage: Storage,
    registry: Registry,
    record: ConceptRecord,
    vector: NDArray[np.floating],
    *,
    norm: float | None = None,
) -> ConceptRecord:
    """Publish ``record`` with this direction (d,), of any length but none. ``sha256``, time and ``norm`` are set
    here, the last to the vector's own unless it is told.

    A request that is sent again answers what it registered before, and puts its file back where that is damaged or
    gone. Raises Conflict where the id is another one's.
    """
    check_id(record.id, param="id")
    vector = np.asarray(vector, dtype=np.float64)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        detail = "The vector must have a direction: finite numbers that are not all zero."
        raise Invalid("bad_vector", detail, param="vector")
    # A direction that was read from a file keeps its bytes.
    unit = vector if abs(length - 1) < _ROUNDING else vector / length
    tensor = concepts.to_safetensors(unit.astype(np.float32))
    made = {"norm": length if norm is None else norm, "sha256": sha256_bytes(tensor), "created_at": codec.now()}
    record = codec.from_plain(ConceptRecord, codec.to_plain(record) | made)
    known = registry.find(CONCEPTS, record.id)
    if known is not None and _same(known, record):
        concepts.mend(storage, known, tensor)
        return known
    if known is not None:
        detail = f"There is another concept {record.id!r} already, and it never changes. Choose another id."
        raise Conflict("concept_exists", detail, param="id")
    try:
        concepts.publish(storage, registry, record, tensor)
    except Conflict:  # at the same moment by somebody else
        known = registry.find(CONCEPTS, record.id)
        if known is None or not _same(known, record):
            raise
        return known
    return record


def _same(known: ConceptRecord, record: ConceptRecord) -> bool:
    return codec.to_plain(known) | {"created_at": ""} == codec.to_plain(record) | {"created_at": ""}


def _like(first: ConceptRecord, new_id: str, method: str, provenance: Mapping[str, Any]) -> ConceptRecord:
    fields = {"id": new_id, "method": method, "provenance": provenance, "auroc_held_out": None, "evidence": None}
    return codec.from_plain(ConceptRecord, codec.to_plain(first) | fields | {"n_positive": 0, "n_negative": 0})
