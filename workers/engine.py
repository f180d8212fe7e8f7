"""The Engine: what each kind of job does, in terms of stages over the worker pool."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from redis import Redis

from service import artifacts, codec, concepts, indexes, models, succession
from service.contracts import IndexRecord, JobContext, JobRecord, ModelRecord
from service.damage import asking
from service.errors import Invalid
from service.health_records import HealthSpec
from service.matching import Asked, Missing, match
from service.personas import PersonaSpec
from service.questions import pooling_of
from service.registry import DATASETS, INDEXES, MODELS, Registry
from service.sae_records import EncodeFeaturesSpec, TrainSaeSpec
from service.settings import Settings
from service.specs import (
    BuildIndexSpec,
    ClustersSpec,
    DirectionsSpec,
    EstimateSpec,
    ExtendIndexSpec,
    FitConceptSpec,
    IndexManifest,
    QueryGradientSpec,
    RepairSpec,
    RerankSpec,
    SuggestSpec,
    TokenSharesSpec,
    ValidateSpec,
    VerifySpec,
)
from service.storage import Storage
from service.terms import JobKind
from service.work import ConceptObjective, Reading
from workers import (
    clusters,
    concept_health,
    directions_job,
    fit_concept,
    persona_job,
    repair,
    rerank,
    sae_jobs,
    suggest,
    tokens,
)
from workers.build import Build
from workers.estimates.estimate import estimate
from workers.extend import extend
from workers.life import SPECS, Life, described
from workers.pool import Pool
from workers.stages import Stages
from workers.validation import Validating


class RayEngine:
    """Implements service.contracts.Engine. Everything it publishes is decided by the job's specification."""

    def __init__(
        self, redis: Redis, registry: Registry, storage: Storage, pool: Pool, settings: Settings | None = None
    ) -> None:
        """``settings``: of this process; None: no judge may be called."""
        self._settings = settings
        self._redis = redis
        self._registry = registry
        self._storage = storage
        self._pool = pool

    def run(self, job: JobRecord, context: JobContext) -> Mapping[str, Any]:
        match job.kind:
            case JobKind.VERIFY_INDEX:
                spec = codec.from_plain(VerifySpec, job.spec)
                return repair.summary(repair.check(self._storage, self._registry, spec.index, context))
            case JobKind.REPAIR_INDEX:
                return self._repair_index(codec.from_plain(RepairSpec, job.spec), context)
            case JobKind.ESTIMATE_INDEX:  # changes nothing in storage, so it mends nothing
                return self._estimate_index(codec.from_plain(EstimateSpec, job.spec), context)
        with asking(lambda: job.spec.get("index") or job.spec.get("source")):
            return repair.healing(self._storage, context, lambda careful: self._run(job, context, careful))

    def _run(self, job: JobRecord, context: JobContext, careful: bool) -> Mapping[str, Any]:
        stages = Stages(self._storage, self._pool, context, careful=careful)
        match job.kind:
            case JobKind.BUILD_INDEX | JobKind.EXTEND_INDEX:
                return self._publish(job, self._manifest(job.kind, job.spec, stages), stages)
            case JobKind.APPEND_INDEX | JobKind.DELETE_EXAMPLES | JobKind.COMPACT_INDEX:
                return Life(stages, self._registry, self._redis).run(job)
            case JobKind.FIT_CONCEPT:
                spec = codec.from_plain(FitConceptSpec, job.spec)
                return fit_concept.compute(stages, self._registry, spec, self._model(spec.model, spec.pass_spec))
            case JobKind.PERSONA_VECTOR:
                spec = codec.from_plain(PersonaSpec, job.spec)
                model = self._model(spec.model, spec.reading)
                return persona_job.compute(stages, self._registry, spec, model, self._settings)
            case JobKind.TRAIN_SAE:
                spec = codec.from_plain(TrainSaeSpec, job.spec)
                return sae_jobs.train(stages, self._registry, spec, self._registry.get(INDEXES, spec.index))
        return self._answer(job, stages)

    def _answer(self, job: JobRecord, stages: Stages) -> Mapping[str, Any]:  # noqa: PLR0911
        """What a question needs: an artifact under the key of its specification."""
        match job.kind:
            case JobKind.QUERY_GRADIENT:
                return self._query_gradient(codec.from_plain(QueryGradientSpec, job.spec), stages)
            case JobKind.TOKEN_SHARES:
                return self._token_shares(codec.from_plain(TokenSharesSpec, job.spec), stages)
            case JobKind.DIRECTIONS:
                return self._directions(codec.from_plain(DirectionsSpec, job.spec), stages)
            case JobKind.CLUSTERS:
                return self._clusters(codec.from_plain(ClustersSpec, job.spec), stages)
            case JobKind.ENCODE_FEATURES:
                return self._encode_features(codec.from_plain(EncodeFeaturesSpec, job.spec), stages)
            case JobKind.SUGGEST_CONCEPTS:
                spec = codec.from_plain(SuggestSpec, job.spec)
                return suggest.compute(stages, self._registry, spec, self._model(spec.model, spec.pass_spec))
            case JobKind.RERANK:
                return self._rerank(codec.from_plain(RerankSpec, job.spec), stages)
            case JobKind.VALIDATE:
                return self._validate(codec.from_plain(ValidateSpec, job.spec), stages)
            case JobKind.CONCEPT_HEALTH:
                return self._concept_health(codec.from_plain(HealthSpec, job.spec), stages)
        raise Invalid(
            "unknown_job", f"This dispatcher knows no jobs of kind {job.kind}; it may be older than the api."
        )

    # --- jobs ---------------------------------------------------------------------------------------

    def _manifest(self, kind: JobKind, spec: Mapping[str, Any], stages: Stages) -> IndexManifest:
        """What a job of this kind publishes: everything but the publishing, so that a repair can run it again."""
        match kind:
            case JobKind.BUILD_INDEX:
                return self._build_index(codec.from_plain(BuildIndexSpec, spec), stages)
            case JobKind.EXTEND_INDEX:
                return self._extend_index(codec.from_plain(ExtendIndexSpec, spec), stages)
        raise Invalid("no_index_job", f"A job of kind {kind} builds no index.")

    def _build_index(self, spec: BuildIndexSpec, stages: Stages) -> IndexManifest:
        model = self._run_of(spec)
        dataset = self._registry.get(DATASETS, spec.dataset)
        return Build(stages, self._registry, spec, model, dataset).run()

    def _repair_index(self, spec: RepairSpec, context: JobContext) -> Mapping[str, Any]:
        def make(kind: JobKind, of_job: Mapping[str, Any], version: str) -> IndexManifest:
            stages = Stages(self._storage, self._pool, context, careful=True)
            if kind in SPECS:
                return Life(stages, self._registry, self._redis).again(kind, of_job, version)
            return self._manifest(kind, of_job, stages)

        return repair.Repair(self._redis, self._registry, self._storage, context, spec.index, make).run()

    def _estimate_index(self, spec: EstimateSpec, context: JobContext) -> Mapping[str, Any]:
        model, dataset = self._run_of(spec.build), self._registry.get(DATASETS, spec.build.dataset)
        return estimate(self._storage, self._registry, self._pool, spec.build, model, dataset, context)

    def _run_of(self, spec: BuildIndexSpec) -> ModelRecord:
        """The model, if the weights of every point of its run are those that were registered."""
        model = self._model(spec.model, spec.reading)
        for point in spec.points[:-1] if spec.influence is not None else ():
            reading = replace(spec.reading, model_fingerprint=point.fingerprint)
            models.check_fingerprints(models.location(model, point), reading, self._redis)
        return model

    def _extend_index(self, spec: ExtendIndexSpec, stages: Stages) -> IndexManifest:
        source = indexes.read_manifest(self._storage, self._registry.get(INDEXES, spec.source))
        model = self._model(spec.model, source.spec)
        dataset = self._registry.get(DATASETS, source.dataset)
        return extend(stages, self._registry, spec, source, model, dataset)

    def _publish(self, job: JobRecord, manifest: IndexManifest, stages: Stages) -> Mapping[str, Any]:
        record: IndexRecord = indexes.describe(manifest, job=job.id)
        build = {**described(job), "created_at": record.created_at}
        with succession.turn(self._redis, record.name):  # an append that is about to be published looks for this
            stages.context.check()
            indexes.publish(self._storage, self._registry, record, manifest, build)
        reasons = dict(record.quarantine_reasons)
        return {"index": record.id, **codec.to_plain(record.counts), "quarantine_reasons": reasons}

    def _query_gradient(self, spec: QueryGradientSpec, stages: Stages) -> Mapping[str, Any]:
        location = models.location(self._model(spec.model, spec.pass_spec))
        query_set = self._registry.get(DATASETS, spec.query_set)
        manifests = stages.rows("query set", location, spec.pass_spec, query_set, size=spec.shard_size)
        rows = stages.stored(manifests)
        if not len(rows):
            raise Invalid("empty_query_set", f"No example of {query_set.id!r} can be used.", param="query_set")
        # The sign rule of DESIGN section 1: −∇f_v(Q) for concepts, +∇L(Q) for losses.
        sign = -1.0 if isinstance(spec.pass_spec.objective, ConceptObjective) else 1.0
        vector = (sign * rows.mean(axis=0, dtype=np.float64)).astype(np.float32)
        facts = {"examples": len(rows), "quarantined": sum(len(manifest.quarantined) for manifest in manifests)}
        stages.context.check()
        artifacts.publish(self._storage, spec.key, {"query": {"vector": vector}}, facts=facts, answer=True)
        return {"coordinates": spec.key, **facts}

    def _token_shares(self, spec: TokenSharesSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        manifest = indexes.read_manifest(self._storage, index)
        model = self._model(index.model, manifest.spec)
        parts = [self._registry.get(DATASETS, name) for name in index.datasets]
        pooling = pooling_of(index, spec.method)
        concept = concepts.get(self._registry, spec.concept, pooling=pooling) if spec.concept else None
        vector = concepts.direction(self._storage, concept) if concept else None
        query_set = self._registry.get(DATASETS, spec.query_set) if spec.query_set else None
        asked = Asked(spec.method, concept, vector, query_set, spec.function, spec.damping, spec.through)
        found = match(self._storage, index, manifest, asked, shard_size=spec.shard_size)
        if isinstance(found, Missing):
            self._query_gradient(found.spec, stages)
            found = match(self._storage, index, manifest, asked, shard_size=spec.shard_size)
        assert not isinstance(found, Missing)  # noqa: S101  (it has just been made)
        count = tokens.compute(stages, spec.key, manifest, model, parts, found, spec.examples)
        return {"shares": spec.key, "examples": count}

    def _directions(self, spec: DirectionsSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        return directions_job.compute(stages, spec, indexes.read_manifest(self._storage, index))

    def _clusters(self, spec: ClustersSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        return clusters.compute(stages, spec, indexes.read_manifest(self._storage, index))

    def _encode_features(self, spec: EncodeFeaturesSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        return sae_jobs.encode(stages, self._registry, spec, indexes.read_manifest(self._storage, index))

    def _rerank(self, spec: RerankSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        manifest = indexes.read_manifest(self._storage, index)
        return rerank.compute(stages, self._registry, spec, manifest, self._model(index.model, manifest.spec))

    def _validate(self, spec: ValidateSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        model = self._model(spec.model, indexes.read_manifest(self._storage, index).spec)
        models.check_fingerprints(models.location(model, spec.base), spec.reading, self._redis)
        return Validating(stages, self._registry, spec, index, model, self._pool.room()).run()

    def _concept_health(self, spec: HealthSpec, stages: Stages) -> Mapping[str, Any]:
        index = self._registry.get(INDEXES, spec.index)
        manifest = indexes.read_manifest(self._storage, index)
        model = self._model(index.model, manifest.spec)
        missing = partial(self._query_gradient, stages=stages)
        return concept_health.Health(stages, self._registry, spec, index, manifest, model, missing).run()

    def _model(self, model_id: str, reading: Reading) -> ModelRecord:
        """The model, if its folder still holds the weights and the tokenizer that were registered."""
        model = self._registry.get(MODELS, model_id, param="model")
        models.check_fingerprints(models.location(model), reading, self._redis)
        return model
