"""Building an index: every point of the training run, one pass each, then the sums.

The end point's pass carries all kinds at once: pooled activations, gradient coordinates and its share of
the influence embeddings come from the same forward and backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from service import members, models, shards
from service.basis import STORED_DAMPING
from service.contracts import ArrayInfo, Counts, DatasetRecord, Embedding, ModelRecord, Point
from service.errors import Invalid
from service.registry import DATASETS, Registry
from service.specs import BuildIndexSpec, CachedJacobian, DifferencePlan, IndexManifest, InfluencePlan, Section
from service.storage import Storage
from service.tasks import ShardManifest
from service.terms import ConceptFunction, IndexKind, LongExamples, Lora
from service.work import (
    ActivationSpec,
    BasisWork,
    Eigen,
    GatherWork,
    GradientSpec,
    Head,
    HeadWork,
    InfluenceSpec,
    Location,
    LossRowsWork,
    PassSpec,
    Reading,
    ScoutWork,
    SumSpec,
)
from workers import directions, fidelity
from workers.derive import summed
from workers.stages import Stages, grouped
from workers.works.choice import HELD


@dataclass(frozen=True)
class Question:
    """What an embedding is about, before the damping is chosen: f_v on a query set at a layer."""

    query_set: DatasetRecord = field(hash=False)  # holds dicts
    layer: int
    function: ConceptFunction


@dataclass(frozen=True)
class AtPoint:
    """What has been made at one point of the run."""

    reading: Reading
    location: Location
    weight: float
    curvature: str | None  # with the eigenvectors that are kept
    wide: fidelity.Wide
    jacobians: dict[Question, tuple[str, ...]]
    shards: list[ShardManifest]


class Build:
    def __init__(
        self, stages: Stages, registry: Registry, spec: BuildIndexSpec, model: ModelRecord, dataset: DatasetRecord
    ) -> None:
        self._stages = stages
        self._registry = registry
        self._spec = spec
        self._model = model
        self._dataset = dataset
        # R by layer, the same at every point: else rows could not be summed.
        self._r: dict[int, directions.Directions] = {}

    def run(self) -> IndexManifest:
        """Everything up to publishing. Raises Invalid when nothing could be indexed."""
        spec = self._spec
        questions = list_questions(self._registry, spec.influence)
        if spec.influence is not None:
            reading, location = _at(self._model, spec, spec.points[-1])
            self._r = directions.choose(
                self._stages, self._registry, location, reading, spec, self._dataset, self._model
            )
        made: list[AtPoint] = []
        for number, point in enumerate(spec.points, start=1):
            several = len(spec.points) > 1
            self._stages.prefix = f"checkpoint {number} of {len(spec.points)}: " if several else ""
            made.append(self._point(point, questions, end=number == len(spec.points)))
        self._stages.prefix = ""
        sections = [self._own_section(made[-1])]
        if questions:
            sections.append(self._summed(made, questions))
        if spec.difference is not None:
            sections.append(self._differences(made[-1], spec.difference))
        sections = [section for section in sections if section.arrays]
        end = made[-1]
        gradient = end_gradient(end)
        jacobians = self._cached(end, gradient) if gradient is not None else ()
        manifest = self._manifest(end, tuple(sections), jacobians)
        measured = fidelity.measure(
            self._stages, manifest, made, self._dataset, self._r, spec.curvature, size=spec.shard_size
        )
        return replace(manifest, fidelity=measured)

    # --- one point of the run -------------------------------------------------------------------------

    def _point(self, point: Point, questions: Sequence[Question], *, end: bool) -> AtPoint:
        spec = self._spec
        reading, location = _at(self._model, spec, point)
        eigen = spec.gradient is not None and spec.gradient.projection is None
        curvature = None
        if questions or (end and eigen):
            curvature = self._stages.curvature(
                location, reading, spec.tracked, spec.curvature, self._dataset, most_bytes=spec.curvature_bytes
            )
        scouts = self._scouts(location, reading, curvature, questions) if spec.p and curvature else ()
        whole, curvature = curvature, self._stages.narrowed(curvature, spec.p, scouts) if curvature else None
        jacobians = {}
        for question in questions:
            assert curvature is not None and spec.influence is not None  # noqa: S101
            r = self._r.get(question.layer)
            jacobians[question] = self._stages.jacobian(
                location,
                reading,
                question.query_set,
                curvature=curvature,
                layer=question.layer,
                pooling=spec.influence.pooling,
                function=question.function,
                directions=r.artifact if r else None,
                count=r.count if r else self._model.width,
            )
        gradient = None
        if end and spec.gradient is not None:
            projection = spec.gradient.projection
            if projection is None:
                assert curvature is not None  # noqa: S101
                basis = self._basis(location, reading, curvature, jacobians, spec.gradient.coordinates)
                projection = Eigen(curvature, basis)
            gradient = GradientSpec(spec.tracked, projection, spec.loss_reduction)
        influence = None
        if questions:
            assert curvature is not None and spec.influence is not None  # noqa: S101
            heads = self._heads(curvature, jacobians)
            influence = InfluenceSpec(curvature, heads, spec.loss_reduction)
        activation = ActivationSpec(spec.layers, spec.pooling) if end and spec.activation else None
        work = PassSpec(
            **vars(reading), activation=activation, gradient=gradient, objective=None, influence=influence
        )
        found = self._stages.rows("rows", location, work, self._dataset, size=spec.shard_size)
        wide = fidelity.Wide(None, None) if whole is None else fidelity.Wide(whole, spec.p, scouts)
        return AtPoint(reading, location, point.weight, curvature, wide, jacobians, found)

    def _scouts(
        self, location: Location, reading: Reading, curvature: str, questions: Sequence[Question]
    ) -> tuple[tuple[str, ...], ...]:
        """What says which eigenvectors are worth keeping: for every question, by groups of modules that fit into
        memory with all of theirs.
        """
        plan, spec = self._spec.influence, self._spec
        if plan is None:
            return ()
        works, sources, counts = [], [], []
        for question in questions:
            shapes = self._stages.shapes(location, reading, spec.tracked, blocks=question.layer)
            groups = grouped(shapes, spec.curvature_bytes, HELD)
            about = (question.layer, plan.pooling, question.function, plan.dampings[0])
            works += [ScoutWork(reading, curvature, group, *about) for group in groups]
            sources += [(question.query_set, range(question.query_set.examples))] * len(groups)
            counts.append(len(groups))
        found = iter(self._stages.artifacts("scouting eigenvectors", works, location=location, sources=sources))
        return tuple(tuple(next(found).key for _ in range(count)) for count in counts)

    def _basis(
        self,
        location: Location,
        reading: Reading,
        curvature: str,
        jacobians: dict[Question, tuple[str, ...]],
        coordinates: int,
    ) -> str:
        """Which coordinates the gradient kind keeps: with query sets at hand, what matters to those."""
        sets = {question.query_set.id: question.query_set for question in jacobians}
        work = LossRowsWork(reading, curvature, self._spec.loss_reduction, mean=True)
        losses = self._stages.artifacts(
            "loss gradients of the query sets",
            [work] * len(sets),
            location=location,
            sources=[(each, range(each.examples)) for each in sets.values()],
        )
        keys = tuple(artifact.key for artifact in losses)
        choice = BasisWork(curvature, coordinates, STORED_DAMPING, tuple(jacobians.values()), keys)
        (basis,) = self._stages.artifacts("choosing coordinates", [choice])
        return basis.key

    def _heads(self, curvature: str, jacobians: dict[Question, tuple[str, ...]]) -> tuple[Head, ...]:
        plan = self._spec.influence
        assert plan is not None  # noqa: S101
        arrays, works = [], []
        for question, rows in jacobians.items():
            for damping in plan.dampings:
                info = self._array(question, plan, damping)
                arrays.append(info)
                most = plan.coordinates or max(1, plan.head_bytes // (4 * info.dims))
                works.append(HeadWork(curvature, rows, damping, most))
        found = self._stages.artifacts("heads", works)
        return tuple(Head(info, artifact.key) for info, artifact in zip(arrays, found, strict=True))

    def _array(self, question: Question, plan: InfluencePlan, damping: float) -> ArrayInfo:
        r = self._r.get(question.layer)
        return embedding_array(question, plan, damping, r.count if r else self._model.width, r)

    # --- what is published ----------------------------------------------------------------------------

    def _own_section(self, end: AtPoint) -> Section:
        arrays = tuple(array.info for array in end.shards[0].arrays if array.info.kind != IndexKind.INFLUENCE)
        return Section(arrays, tuple(shards.reference(item) for item in end.shards))

    def _summed(self, made: Sequence[AtPoint], questions: Sequence[Question]) -> Section:
        plan = self._spec.influence
        assert plan is not None  # noqa: S101
        single = tuple(self._array(question, plan, damping) for question in questions for damping in plan.dampings)
        works = [
            SumSpec(tuple((point.shards[number].key, point.weight) for point in made), single)
            for number in range(len(made[0].shards))
        ]
        found = self._stages.derive("summing embeddings", works)
        arrays = tuple(summed(info, len(made)) for info in single)
        return Section(arrays, tuple(shards.reference(item) for item in found))

    def _differences(self, end: AtPoint, plan: DifferencePlan) -> Section:
        spec, answerer = self._spec, models.location(self._model, plan.answerer)
        found = self._stages.differences(
            end.location,
            replace(end.reading, lora=Lora.MERGED),
            plan,
            answerer,
            self._dataset,
            layers=spec.layers,
            pooling=spec.pooling,
            size=spec.shard_size,
        )
        arrays = tuple(array.info for array in found[0].arrays)
        return Section(arrays, tuple(shards.reference(item) for item in found))

    def _cached(self, end: AtPoint, gradient: GradientSpec) -> tuple[CachedJacobian, ...]:
        if not isinstance(gradient.projection, Eigen) or not end.jacobians:
            return ()
        works = [GatherWork(gradient.projection.basis, rows) for rows in end.jacobians.values()]
        found = self._stages.artifacts("Jacobian of the index", works)
        plan = self._spec.influence
        assert plan is not None  # noqa: S101
        known = [
            cached(question, plan, artifact.key, self._r.get(question.layer))
            for question, artifact in zip(end.jacobians, found, strict=True)
        ]
        return tuple(dict.fromkeys(known))  # one query set may have two names

    def _manifest(
        self, end: AtPoint, sections: tuple[Section, ...], jacobians: tuple[CachedJacobian, ...]
    ) -> IndexManifest:
        spec, model, dataset = self._spec, self._model, self._dataset
        counts, reasons = account(self._stages.storage, dataset, sections, end.shards)
        if counts.indexed == 0:
            raise Invalid(
                "nothing_indexed",
                f"Every example of {dataset.id!r} was set aside: {reasons}. Nothing was published.",
                param="dataset",
                context={"quarantine_reasons": reasons},
            )
        work = end.shards[0].work
        assert isinstance(work, PassSpec)  # noqa: S101
        return IndexManifest(
            name=spec.name,
            version=spec.version,
            model=model.id,
            model_fingerprint=model.fingerprint,
            lineage=model.lineage,
            dataset=dataset.id,
            dataset_fingerprint=dataset.fingerprint,
            chat_template_sha256=model.chat_template_sha256,
            spec=work,
            points=spec.points if spec.influence is not None else spec.points[-1:],
            curvature=spec.curvature if end.curvature is not None else None,
            p=spec.p if end.curvature is not None else None,
            sections=sections,
            counts=counts,
            quarantine_reasons=reasons,
            jacobians=jacobians,
            difference=spec.difference,
            tracked=spec.tracked if spec.gradient is not None or spec.influence is not None else None,
        )


def _at(model: ModelRecord, spec: BuildIndexSpec, point: Point) -> tuple[Reading, Location]:
    """Checkpoints are read with the tokenizer of the model: a run has one."""
    reading = replace(spec.reading, model_fingerprint=point.fingerprint)
    return reading, models.location(model, point)


def end_gradient(end: AtPoint) -> GradientSpec | None:
    work = end.shards[0].work
    return work.gradient if isinstance(work, PassSpec) else None


def list_questions(registry: Registry, plan: InfluencePlan | None) -> list[Question]:
    if plan is None:
        return []
    sets = [registry.get(DATASETS, name, param="query_sets") for name in plan.query_sets]
    return [
        Question(query_set, layer, function)
        for query_set in sets
        for layer in plan.layers
        for function in plan.functions
    ]


def embedding_array(
    question: Question, plan: InfluencePlan, damping: float, dims: int, r: directions.Directions | None
) -> ArrayInfo:
    embedding = Embedding(
        query_set=question.query_set.id,
        query_set_fingerprint=question.query_set.fingerprint,
        pooling=plan.pooling,
        function=question.function,
        damping=damping,
        rank=r.count if r else None,
        directions=r.artifact if r else None,
    )
    return ArrayInfo(IndexKind.INFLUENCE, question.layer, dims, embedding)


def cached(
    question: Question, plan: InfluencePlan, artifact: str, r: directions.Directions | None
) -> CachedJacobian:
    return CachedJacobian(
        query_set_fingerprint=question.query_set.fingerprint,
        layer=question.layer,
        pooling=plan.pooling,
        function=question.function,
        artifact=artifact,
        directions=r.artifact if r else None,
    )


def account(
    storage: Storage, dataset: DatasetRecord, sections: Sequence[Section], own: Sequence[ShardManifest]
) -> tuple[Counts, dict[str, int]]:
    """Where every line of the source went: an example is indexed when every section has it."""
    found = members.members(storage, sections)
    long = len(found.indexed.intersection(item for manifest in own for item in manifest.long))
    split = any(
        isinstance(manifest.work, PassSpec) and manifest.work.long_examples == LongExamples.SPLIT_AND_SUM
        for manifest in own
    )
    reasons = dict(dataset.quarantine_reasons)
    for item in found.aside.values():
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    counts = Counts(
        lines=dataset.lines,
        indexed=len(found.indexed),
        duplicates=dataset.duplicates,
        quarantined=dataset.quarantined + len(found.aside),
        truncated=0 if split else long,
        split=long if split else 0,
    )
    return counts, dict(sorted(reasons.items()))
