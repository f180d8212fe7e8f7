"""The Engine: what each kind of job does, in terms of shards over the worker pool."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from service import codec, concepts, coordinates, datasets, indexes, shards
from service.contracts import (
    ArrayInfo,
    BuildIndexSpec,
    ConceptGradientSpec,
    ConceptRecord,
    Counts,
    DatasetRecord,
    FitConceptSpec,
    IndexKind,
    IndexManifest,
    JobContext,
    JobKind,
    JobRecord,
    ModelRecord,
    PassSpec,
    ShardManifest,
    ShardTask,
)
from service.errors import Invalid
from service.models import check_fingerprints
from service.registry import CONCEPTS, DATASETS, MODELS, Registry
from service.rows import F32
from service.storage import Storage, sha256_bytes
from workers import probes
from workers.pool import WorkerPool


class RayEngine:
    """Implements service.contracts.Engine. Everything it publishes is decided by the job's specification."""

    def __init__(self, redis: Redis, registry: Registry, storage: Storage, pool: WorkerPool) -> None:
        self._redis = redis
        self._registry = registry
        self._storage = storage
        self._pool = pool

    def run(self, job: JobRecord, context: JobContext) -> Mapping[str, Any]:
        match job.kind:
            case JobKind.BUILD_INDEX:
                return self._build_index(job, codec.from_plain(BuildIndexSpec, job.spec), context)
            case JobKind.FIT_CONCEPT:
                return self._fit_concept(codec.from_plain(FitConceptSpec, job.spec), context)
            case JobKind.CONCEPT_GRADIENT:
                return self._concept_gradient(codec.from_plain(ConceptGradientSpec, job.spec), context)

    # --- jobs ---------------------------------------------------------------------------------------

    def _build_index(self, job: JobRecord, spec: BuildIndexSpec, context: JobContext) -> Mapping[str, Any]:
        model, dataset = self._model(spec.model, spec.pass_spec), self._registry.get(DATASETS, spec.dataset)
        manifests = self._shards("build", model, dataset, spec.pass_spec, size=spec.shard_size, context=context)
        indexed = sum(len(manifest.ids) for manifest in manifests)
        if indexed == 0:
            reasons = _reasons(dataset, manifests)
            raise Invalid(
                "nothing_indexed",
                f"Every example of {dataset.id!r} was set aside: {reasons}. Nothing was published.",
                param="dataset",
                context={"quarantine_reasons": reasons},
            )
        counts = Counts(
            lines=dataset.lines,
            indexed=indexed,
            duplicates=dataset.duplicates,
            quarantined=dataset.quarantined + sum(len(manifest.quarantined) for manifest in manifests),
            truncated=sum(manifest.truncated for manifest in manifests),
        )
        arrays = tuple(ArrayInfo(array.kind, array.layer, array.dims) for array in manifests[0].arrays)
        manifest = IndexManifest(
            name=spec.name,
            version=spec.version,
            model=model.id,
            model_fingerprint=model.fingerprint,
            lineage=model.lineage,
            dataset=dataset.id,
            dataset_fingerprint=dataset.fingerprint,
            chat_template_sha256=model.chat_template_sha256,
            spec=spec.pass_spec,
            arrays=arrays,
            shards=tuple(shards.reference(item) for item in manifests),
            counts=counts,
            quarantine_reasons=_reasons(dataset, manifests),
        )
        record = indexes.describe(manifest, job=job.id)
        context.check()
        build = {"job": job.id, "created_at": record.created_at, "versions": dict(manifests[0].versions)}
        indexes.publish(self._storage, self._registry, record, manifest, build)
        return {"index": record.id, **codec.to_plain(counts), "quarantine_reasons": dict(record.quarantine_reasons)}

    def _fit_concept(self, spec: FitConceptSpec, context: JobContext) -> Mapping[str, Any]:
        model = self._model(spec.model, spec.pass_spec)
        positive, negative = (self._registry.get(DATASETS, name) for name in (spec.positive, spec.negative))
        assert spec.pass_spec.activation is not None  # noqa: S101  (the api builds it so)
        (layer,), pooling = spec.pass_spec.activation.layers, spec.pass_spec.activation.pooling
        sides: list[F32] = []
        for stage, dataset in (("positive", positive), ("negative", negative)):
            manifests = self._shards(stage, model, dataset, spec.pass_spec, size=spec.shard_size, context=context)
            sides.append(self._rows(manifests, IndexKind.ACTIVATION, layer))
        probe = probes.fit(*sides)
        tensor = concepts.to_safetensors(probe.direction)
        record = ConceptRecord(
            id=spec.id,
            model=model.id,
            model_fingerprint=model.fingerprint,
            lineage=model.lineage,
            layer=layer,
            pooling=pooling,
            width=model.width,
            method="difference_of_means",
            norm=probe.norm,
            auroc_held_out=probe.auroc_held_out,
            n_positive=len(sides[0]),
            n_negative=len(sides[1]),
            provenance={
                side: {"dataset": dataset.id, "fingerprint": dataset.fingerprint}
                for side, dataset in (("positive", positive), ("negative", negative))
            },
            sha256=sha256_bytes(tensor),
            created_at=codec.now(),
        )
        context.check()
        known = self._registry.find(CONCEPTS, spec.id)
        if known is None or known.sha256 != record.sha256:  # equal: an earlier attempt died after publishing
            concepts.publish(self._storage, self._registry, record, tensor)
        return {"concept": spec.id, "auroc_held_out": probe.auroc_held_out, "norm": probe.norm}

    def _concept_gradient(self, spec: ConceptGradientSpec, context: JobContext) -> Mapping[str, Any]:
        model, query_set = self._model(spec.model, spec.pass_spec), self._registry.get(DATASETS, spec.query_set)
        manifests = self._shards(
            "query set", model, query_set, spec.pass_spec, size=spec.shard_size, context=context
        )
        rows = self._rows(manifests, IndexKind.GRADIENT, None)
        if not len(rows):
            raise Invalid("empty_query_set", f"No example of {query_set.id!r} can be pooled.", param="query_set")
        vector = -rows.mean(axis=0, dtype=np.float64)  # −∇f_v(Q): the sign rule of DESIGN section 1
        aside = sum(len(manifest.quarantined) for manifest in manifests)
        context.check()
        coordinates.publish(
            self._storage, spec.key, vector.astype(np.float32), examples=len(rows), quarantined=aside
        )
        return {"coordinates": spec.key, "examples": len(rows), "quarantined": aside}

    # --- what they share ----------------------------------------------------------------------------

    def _model(self, model_id: str, spec: PassSpec) -> ModelRecord:
        """The model, if its folder still holds the weights and the tokenizer that were registered."""
        model = self._registry.get(MODELS, model_id, param="model")
        check_fingerprints(Path(model.path), spec, self._redis)
        return model

    def _shards(
        self,
        stage: str,
        model: ModelRecord,
        dataset: DatasetRecord,
        spec: PassSpec,
        *,
        size: int,
        context: JobContext,
    ) -> list[ShardManifest]:
        """The manifests of all shards in order; those in storage are not computed again."""
        ids = datasets.read_table(self._storage, dataset).column("id").to_pylist()
        tasks = shards.cut(model.path, spec, dataset, ids, size)
        found = {
            task.key: shards.read_manifest(self._storage, task.key)
            for task in tasks
            if shards.exists(self._storage, task.key)
        }
        done = resumed = sum(task.stop - task.start for task in tasks if task.key in found)
        quarantined = sum(len(manifest.quarantined) for manifest in found.values())
        if found:
            context.log(f"{len(found)} of {len(tasks)} shards are there already.", stage=stage, shards=len(found))
        context.progress(stage, done, len(ids), resumed=resumed, quarantined=quarantined)

        def on_done(task: ShardTask, manifest: ShardManifest) -> None:
            nonlocal done, quarantined
            found[task.key] = manifest
            done += task.stop - task.start
            quarantined += len(manifest.quarantined)
            context.progress(stage, done, len(ids), resumed=resumed, quarantined=quarantined)

        missing = [task for task in tasks if task.key not in found]
        self._pool.run(missing, on_done=on_done, check=context.check, log_event=context.log)
        return [found[task.key] for task in tasks]

    def _rows(self, manifests: Sequence[ShardManifest], kind: IndexKind, layer: int | None) -> F32:
        return np.concatenate([shards.read_rows(self._storage, manifest, kind, layer) for manifest in manifests])


def _reasons(dataset: DatasetRecord, manifests: Sequence[ShardManifest]) -> dict[str, int]:
    """Quarantined examples by reason, from reading the source and from building."""
    counts = dict(dataset.quarantine_reasons)
    for manifest in manifests:
        for item in manifest.quarantined:
            counts[item.reason] = counts.get(item.reason, 0) + 1
    return dict(sorted(counts.items()))
