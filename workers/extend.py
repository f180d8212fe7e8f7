"""More questions for an index that stands: embeddings from stored gradient coordinates.

The training data is not read again, except for the few hundred examples on which fidelity is measured.
"""

from dataclasses import replace

from service import members, models, shards
from service.contracts import DatasetRecord, ModelRecord
from service.errors import Invalid
from service.registry import Registry
from service.specs import CachedJacobian, ExtendIndexSpec, IndexManifest, Section
from service.terms import IndexKind
from service.work import Eigen, GatherWork, PassSpec, ReadOffSpec
from workers import fidelity
from workers.build import AtPoint, Question, cached, embedding_array, list_questions
from workers.stages import Stages


def extend(
    stages: Stages,
    registry: Registry,
    spec: ExtendIndexSpec,
    source: IndexManifest,
    model: ModelRecord,
    dataset: DatasetRecord,
) -> IndexManifest:
    """The manifest of the new version: every section of the old one, and one with the new embeddings."""
    gradient = source.spec.gradient
    if gradient is None or not isinstance(gradient.projection, Eigen):
        detail = f"Index {spec.source} holds no EK-FAC gradient coordinates to read embeddings off."
        raise Invalid("kind_not_indexed", detail, param="index")
    projection = gradient.projection
    reading = source.spec.reading
    location = models.location(model)
    number, own = next(
        (number, section)
        for number, section in enumerate(source.sections)
        if any(array.kind == IndexKind.GRADIENT for array in section.arrays)
    )
    jacobians: dict[Question, tuple[str, ...]] = {}
    arrays, known = [], list(source.jacobians)
    works: list[list[ReadOffSpec]] = []
    for question in list_questions(registry, spec.influence):
        rows = stages.jacobian(
            location,
            reading,
            question.query_set,
            curvature=projection.curvature,
            layer=question.layer,
            pooling=spec.influence.pooling,
            function=question.function,
            directions=None,
            count=model.width,
        )
        (gathered,) = stages.artifacts("Jacobian of the index", [GatherWork(projection.basis, rows)])
        known.append(cached(question, spec.influence, gathered.key, None))
        for damping in spec.influence.dampings:
            info = embedding_array(question, spec.influence, damping, model.width, None)
            if info in source.arrays:
                continue
            arrays.append(info)
            jacobians[question] = rows
            works.append([ReadOffSpec(ref.key, projection.basis, gathered.key, info) for ref in own.shards])
    if not arrays:
        detail = f"Index {spec.source} has all of these embeddings already. Nothing was published."
        raise Invalid("nothing_to_add", detail, param="query_sets")
    sections = list(source.sections)
    for info, each in zip(arrays, works, strict=True):
        found = stages.derive(f"embeddings of layer {info.layer}", each)
        sections.append(Section((info,), tuple(shards.reference(item) for item in found)))
    # Every stored row has its embedding: what is indexed, and what was set aside, stays as it was.
    manifest = replace(
        source,
        name=spec.name,
        version=spec.version,
        sections=tuple(sections),
        jacobians=_unique(known),
        parent=spec.source,
    )
    held = [members.origin(stages.storage, members.read(stages.storage, own.shards[0]))]
    wide = fidelity.Wide(projection.curvature, None)
    end = AtPoint(reading, location, 1.0, projection.curvature, wide, jacobians, held)
    only_new = replace(manifest, sections=(sections[number], *sections[len(source.sections) :]))
    assert source.curvature is not None  # noqa: S101  (eigen-coordinates have one)
    only_new = replace(only_new, spec=own_pass(held[0].work))
    measured = fidelity.measure(stages, only_new, [end], dataset, {}, source.curvature, size=spec.shard_size)
    return replace(manifest, fidelity=(*source.fidelity, *(each for each in measured if each.query == "concept")))


def own_pass(work: object) -> PassSpec:
    assert isinstance(work, PassSpec)  # noqa: S101  (gradient rows come from a pass)
    return work


def _unique(known: list[CachedJacobian]) -> tuple[CachedJacobian, ...]:
    return tuple(dict.fromkeys(known))
