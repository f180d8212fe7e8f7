"""Concepts as files that another server, or another library, can read: safetensors and a JSON sidecar.

The sidecar is the record as it stands here. What decides whether it may be used elsewhere is in it: the lineage
(the fingerprint of the base model), width, layer and pooling.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from service import codec, concepts, derived
from service.contracts import ConceptRecord, ModelRecord
from service.errors import Invalid
from service.registry import MODELS, Registry
from service.storage import Storage, sha256_bytes
from service.terms import Pooling

IMPORTED = "imported"
FORMAT = "whence-concept-1"


def sidecar(record: ConceptRecord) -> dict[str, Any]:
    """What stands beside the safetensors file of a concept."""
    return {"format": FORMAT, **codec.to_plain(record)}


def bring(
    storage: Storage,
    registry: Registry,
    new_id: str | None,
    tensor: bytes,
    about: Mapping[str, Any],
    *,
    model: str | None = None,
) -> ConceptRecord:
    """Register a concept that was exported here or elsewhere; ``new_id`` None: under its own id.

    ``model``: the registered model that it shall belong to; None: one of its lineage. Raises Invalid when file and
    sidecar do not belong together, and when the concept was fitted on a model that is no relation of that one.
    """
    told = _read(about)
    if sha256_bytes(tensor) != told.sha256:
        detail = (
            "The safetensors file is not the one of this sidecar: its sha256 differs. Export the concept again."
        )
        raise Invalid("other_safetensors", detail, param="safetensors")
    vector = read_tensor(tensor)
    home = _home(registry, told, model)
    if told.width != home.width or vector.shape != (told.width,):
        raise Invalid(
            "concept_of_other_width",
            f"The file holds {vector.size} numbers and the sidecar says {told.width}; model {home.id!r} has "
            f"{home.width} hidden dimensions.",
            param="safetensors",
        )
    derived.check_layer(home, told.layer)
    named = replace(told, id=new_id or told.id)
    if (told.model, told.model_fingerprint) != (home.id, home.fingerprint):
        origin = {"model": told.model, "model_fingerprint": told.model_fingerprint, "method": told.method}
        provenance = {"exported": origin, **told.provenance}
        named = replace(named, model=home.id, method=IMPORTED, provenance=provenance)
    return _kept(storage, registry, named, vector, told.norm)


def bring_foreign(
    storage: Storage, registry: Registry, new_id: str, tensor: bytes, *, model: str, layer: int, pooling: Pooling
) -> ConceptRecord:
    """Register a vector of a safetensors file that has no sidecar: whoever sends it says where it lies."""
    home = registry.get(MODELS, model, param="model")
    about = {"safetensors_sha256": sha256_bytes(tensor)}
    return derived.give(storage, registry, new_id, home, layer, pooling, read_tensor(tensor), provenance=about)


def read_tensor(data: bytes) -> NDArray[np.float64]:
    """(d,) the vector of a safetensors file: the tensor ``direction``, or the only one. Raises Invalid."""
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # KeyError: a dtype that numpy lacks
        detail = f"This is no safetensors file of float32, float16 or float64 numbers ({error!s:.200})."
        raise Invalid("bad_safetensors", detail, param="safetensors") from error
    if concepts.TENSOR not in tensors and len(tensors) != 1:
        names = sorted(tensors)[:20]
        detail = f"A concept is one vector, named {concepts.TENSOR!r} or alone in its file; found {names}."
        raise Invalid("bad_safetensors", detail, param="safetensors")
    found = tensors.get(concepts.TENSOR, next(iter(tensors.values())))
    if not np.issubdtype(found.dtype, np.floating):
        raise Invalid("bad_safetensors", f"The vector holds {found.dtype}, not floats.", param="safetensors")
    if found.size != max(found.shape, default=1):  # (d,), (1, d) and the like are vectors
        detail = f"A concept is one vector; the file holds a tensor of shape {list(found.shape)}."
        raise Invalid("bad_safetensors", detail, param="safetensors")
    return found.astype(np.float64).reshape(-1)


def _read(about: Mapping[str, Any]) -> ConceptRecord:
    plain = {name: value for name, value in about.items() if name != "format"}
    if about.get("format") != FORMAT:
        detail = f"The sidecar has format {about.get('format')!r}; this server reads {FORMAT!r}."
        raise Invalid("other_format", detail, param="concept.format")
    try:
        codec.canonical(plain)
    except (ValueError, RecursionError) as error:  # NaN and half a character are no JSON: no record could keep them
        raise Invalid("bad_sidecar", f"The sidecar is not what JSON can say: {error}.", param="concept") from error
    try:
        told = codec.from_plain(ConceptRecord, plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid("bad_sidecar", f"{where}: {first['msg']}.", param=f"concept.{where}") from error
    _check_figures(told)
    return told


def _check_figures(told: ConceptRecord) -> None:
    """What answers say of the concept is read off its record: it must make sense. Raises Invalid."""
    area, evidence = told.auroc_held_out, told.evidence
    wrong = None
    if area is not None and not 0 <= area <= 1:
        wrong = "auroc_held_out", f"{area:g} is no AUROC"
    elif min(told.n_positive, told.n_negative) < 0:
        wrong = "n_positive", "there cannot be fewer than no examples"
    elif not told.norm >= 0:
        wrong = "norm", f"{told.norm:g} is no length"
    elif evidence is not None and told.layer != evidence.layer:
        wrong = "evidence.layer", f"the concept lies at layer {told.layer}, its evidence is of {evidence.layer}"
    elif evidence is not None and evidence.layer not in {each.layer for each in evidence.layers}:
        wrong = "evidence.layers", f"layer {evidence.layer} is not among them"
    if wrong is not None:
        raise Invalid("bad_sidecar", f"{wrong[0]}: {wrong[1]}.", param=f"concept.{wrong[0]}")


def _home(registry: Registry, told: ConceptRecord, model: str | None) -> ModelRecord:
    """The model here that the concept belongs to."""
    if model is not None:
        home = registry.get(MODELS, model, param="model")
        if home.lineage == told.lineage:
            return home
        raise Invalid(
            "concept_of_other_lineage",
            f"Concept {told.id!r} was fitted on {told.model!r}, which shares no declared base with {home.id!r}: "
            "their residual streams have nothing to do with each other.",
            param="model",
        )
    related = [each for each in registry.all(MODELS) if each.lineage == told.lineage]
    if not related:
        raise Invalid(
            "concept_of_other_lineage",
            f"No model here is of the lineage of {told.model!r}, on which concept {told.id!r} was fitted. Register "
            f"that model, or its base (fingerprint {told.lineage[:16]}…), first.",
            param="concept.lineage",
        )
    return next((each for each in related if each.fingerprint == told.model_fingerprint), related[0])


def _kept(
    storage: Storage, registry: Registry, record: ConceptRecord, vector: NDArray[np.float64], norm: float
) -> ConceptRecord:
    found = float(np.linalg.norm(vector))
    if not abs(found - 1) < 1e-3:
        detail = f"An exported direction has length 1; this one has {found:g}."
        raise Invalid("bad_vector", detail, param="safetensors")
    return derived.register(storage, registry, record, vector, norm=norm)
