"""Concepts at rest, and the rule which model's concept may be asked of which index."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from service import codec, saes
from service.contracts import ConceptRecord, IndexRecord
from service.errors import Conflict, Damaged, Invalid, NotFound
from service.evidence import FEW
from service.registry import CONCEPTS, SAES, Registry, check_id
from service.rows import F32
from service.storage import Storage, sha256_bytes
from service.terms import IndexKind, Pooling

TENSOR = "direction"

_POOR = 0.7  # held-out AUROC


def to_safetensors(direction: F32) -> bytes:
    """A unit vector (d,) float32 as the bytes of a safetensors file."""
    return save_safetensors({TENSOR: np.ascontiguousarray(direction, dtype=np.float32)})


def publish(storage: Storage, registry: Registry, record: ConceptRecord, tensor: bytes) -> None:
    """Store the direction, then the record (its sidecar) that makes it visible. Raises Conflict."""
    storage.write(_tensor_key(record.id, record.sha256), tensor)
    registry.add(CONCEPTS, record.id, record)


def get(
    registry: Registry, concept_id: str, *, param: str = "concept", pooling: Pooling | None = None
) -> ConceptRecord:
    """A registered concept, or the feature of an SAE: ``sae:ID/N``, with ``pooling`` where the SAE has none.

    Raises NotFound, and Invalid for a feature without a direction.
    """
    feature = saes.split(concept_id)
    if feature is None:
        return registry.get(CONCEPTS, concept_id, param=param)
    return saes.concept(registry, *feature, param=param, pooling=pooling)


def mend(storage: Storage, record: ConceptRecord, tensor: bytes) -> None:
    """Put the direction back where its file is damaged or gone; ``tensor`` is what the record names."""
    try:
        storage.read(_tensor_key(record.id, record.sha256), sha256=record.sha256, cached=False)
    except (NotFound, Damaged):
        storage.write(_tensor_key(record.id, record.sha256), tensor)


def direction(storage: Storage, record: ConceptRecord) -> F32:
    """v̂, (width,) float32 with unit norm; Damaged when the file is not what was registered."""
    if saes.split(record.id) is not None:
        return saes.direction(storage, record)
    return load_safetensors(tensor_file(storage, record))[TENSOR]


def tensor_file(storage: Storage, record: ConceptRecord) -> bytes:
    """The safetensors file that holds it, checked as by ``direction``."""
    return storage.read(_tensor_key(record.id, record.sha256), sha256=record.sha256)


def publish_feature(
    registry: Registry, concept_id: str, sae_id: str, feature: int, *, pooling: Pooling | None, param: str
) -> ConceptRecord:
    """A feature of an SAE as a registered concept. The same one again is no error; raises Conflict, NotFound,
    Invalid.
    """
    check_id(concept_id, param="id")
    made = saes.concept(registry, sae_id, feature, param=param, pooling=pooling)
    if pooling not in {None, made.pooling}:
        detail = f"SAE {sae_id!r} was trained on rows pooled by {made.pooling}, not by {pooling}."
        raise Invalid("sae_of_other_pooling", detail, param="pooling")
    tensor = to_safetensors(saes.direction(registry.storage, made))
    label = saes.labels(registry.storage, registry.get(SAES, sae_id)).of(feature)
    provenance = {**made.provenance, **({"label": label} if label else {})}
    about = {"provenance": provenance, "sha256": sha256_bytes(tensor), "created_at": codec.now()}
    record = replace(made, id=concept_id, **about)
    known = registry.find(CONCEPTS, concept_id)
    if known is None:
        try:
            publish(registry.storage, registry, record, tensor)
        except Conflict:  # at the same moment by somebody else
            known = registry.get(CONCEPTS, concept_id)
    if known is None:
        return record
    if (known.sha256, known.provenance.get("sae"), known.pooling) != (record.sha256, sae_id, record.pooling):
        detail = f"There is another concept {concept_id!r} already, and it never changes. Choose another id."
        raise Conflict("concept_exists", detail, param="id")
    mend(registry.storage, known, tensor)
    return known


def doubts(concept: ConceptRecord) -> list[str]:
    """What the reader of a ranking should know of the concept behind it; nothing of one that was not fitted."""
    auroc = concept.auroc_held_out
    if auroc is None:
        return []
    said = []
    interval = concept.evidence.chosen.auroc_interval if concept.evidence else None
    of_choice = concept.evidence.auroc_of_choice if concept.evidence else None
    if auroc < _POOR:
        said.append(
            f"Concept {concept.id!r} separates its own examples poorly (held-out AUROC {auroc:.2f}): the ranking "
            "may mean little."
        )
    elif of_choice is not None and of_choice < _POOR:
        said.append(
            f"The layer of concept {concept.id!r} was chosen as the best of several. With the choice held out too, "
            f"its AUROC is {of_choice:.2f}, not {auroc:.2f}: the ranking may mean little."
        )
    if interval is not None and interval[0] <= 0.5:
        said.append(
            f"The held-out AUROC of concept {concept.id!r}, {auroc:.2f}, may be chance: its 95 % interval is "
            f"{interval[0]:.2f} to {interval[1]:.2f}. Fit it on more examples."
        )
    n, m = concept.n_positive, concept.n_negative
    if 0 < min(n, m) < FEW:
        said.append(
            f"Concept {concept.id!r} was fitted on {n} positive and {m} negative examples: with fewer than {FEW} a "
            "side its direction and its AUROC are rough. 100 a side are good."
        )
    return said


def check_fits(
    concept: ConceptRecord, index: IndexRecord, width: int, kind: IndexKind, *, param: str = "concept"
) -> None:
    """Raise Invalid unless the concept may be asked of this index: same lineage and width, and, where
    activations are compared, the same pooling.

    A direction fitted on one fine-tune is meaningful for others of the same base; between unrelated
    models the coordinates of the residual stream have nothing to do with each other.
    """
    if concept.lineage != index.lineage:
        raise Invalid(
            "concept_of_other_lineage",
            f"Concept {concept.id!r} was fitted on model {concept.model!r}, which shares no declared base with "
            f"{index.model!r}, the model of index {index.id}. Fit it on {index.model!r}, or declare the base.",
            param=param,
        )
    if concept.width != width:
        raise Invalid(
            "concept_of_other_width",
            f"Concept {concept.id!r} has {concept.width} dimensions, the index {width}.",
            param=param,
        )
    if kind in {IndexKind.ACTIVATION, IndexKind.DIFFERENCE} and concept.pooling != index.pooling:
        raise Invalid(
            "concept_of_other_pooling",
            f"Concept {concept.id!r} was fitted with pooling {concept.pooling}, index {index.id} is built with "
            f"{index.pooling}: their activations are not comparable.",
            param=param,
        )


def check_alike(found: Sequence[ConceptRecord], *, param: str, skip: int = 0) -> None:
    """Raise Invalid unless all lie in the same space as the first: what is added up must have one meaning.

    ``param`` with a place for the number of the one that does not, counted from ``skip``.
    """
    first = found[0]
    for number, record in enumerate(found):
        for name in ("lineage", "width", "layer", "pooling"):
            if getattr(record, name) != getattr(first, name):
                told = [f"{each.id!r} {_said(each, name)}" for each in (first, record)]
                raise Invalid(
                    f"concepts_of_different_{name}",
                    f"Concepts that are put together must be of one {name}: {told[0]}, {told[1]}.",
                    param=param.format(number - skip),
                )


def _said(record: ConceptRecord, name: str) -> str:
    return f"was fitted on {record.model!r}" if name == "lineage" else f"has {name} {getattr(record, name)}"


def _tensor_key(concept_id: str, sha256: str) -> str:
    return f"concepts/{concept_id}/direction-{sha256[:16]}.safetensors"
