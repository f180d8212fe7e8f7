"""Jobs that make a version of an index from another: append, delete, compact.

The version that a bare name means is looked up when the job runs, and again when it publishes: see
``service/succession.py``.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from redis import Redis

from service import codec, indexes, life, models, succession, tombstones
from service.contracts import IndexRecord, JobRecord, ModelRecord
from service.errors import Damaged
from service.registry import DATASETS, INDEXES, MODELS, Registry
from service.specs import AppendIndexSpec, CompactIndexSpec, DeleteExamplesSpec, IndexManifest
from service.storage import Storage
from service.terms import JobKind
from workers import passes
from workers.append import append, passes_of
from workers.compact import compact
from workers.delete import delete, sort
from workers.stages import Stages

LifeSpec = AppendIndexSpec | DeleteExamplesSpec | CompactIndexSpec
SPECS: Mapping[JobKind, type[LifeSpec]] = {
    JobKind.APPEND_INDEX: AppendIndexSpec,
    JobKind.DELETE_EXAMPLES: DeleteExamplesSpec,
    JobKind.COMPACT_INDEX: CompactIndexSpec,
}


class Life:
    def __init__(self, stages: Stages, registry: Registry, redis: Redis) -> None:
        self._stages = stages
        self._storage: Storage = stages.storage
        self._registry = registry
        self._redis = redis

    def run(self, job: JobRecord) -> Mapping[str, Any]:
        """Publish the new version; what it says follows from it and its parent, so that a job that died after
        publishing says the same.
        """
        spec: LifeSpec = codec.from_plain(SPECS[job.kind], job.spec)
        record = succession.made_by(self._registry, spec.reference, job.id)
        while record is None:
            parent = indexes.resolve(self._registry, spec.reference)
            source = indexes.read_manifest(self._storage, parent)
            manifest = self._make(spec, source, parent)
            record = succession.publish(
                self._storage,
                self._registry,
                self._redis,
                reference=spec.reference,
                parent=parent,
                manifest=manifest,
                context=self._stages.context,
                build=described(job),
            )
            if record is None:
                self._stages.context.log(
                    f"A newer version than {parent.id} was published meanwhile: starting from it."
                )
        assert record.parent is not None  # noqa: S101
        about = {"index": record.id, "parent": record.parent, **codec.to_plain(record.counts)}
        about["quarantine_reasons"] = dict(record.quarantine_reasons)
        return about | self._tell(spec, record, self._registry.get(INDEXES, record.parent))

    def again(self, kind: JobKind, of_job: Mapping[str, Any], version: str) -> IndexManifest:
        """The manifest of a published version once more, from the parent that it was made from: for repairs.

        Raises Damaged where nothing says any more which one that is.
        """
        before = succession.parent_of(self._storage, self._registry, version)
        if before is None:
            file = f"indexes/{version}/{indexes.MANIFEST}"
            detail = (
                f"Neither the record of {version} nor its manifest can be read: nobody knows which version it was "
                "made from. Put one of them back from a backup, or make a new version."
            )
            raise Damaged("cannot_repair", detail, param=file, context={"file": file})
        parent = self._registry.get(INDEXES, before)
        source = indexes.read_manifest(self._storage, parent)
        made = self._make(codec.from_plain(SPECS[kind], of_job), source, parent)
        return replace(made, name=parent.name, version=int(version.rpartition("@v")[2]), parent=parent.id)

    def _make(self, spec: LifeSpec, source: IndexManifest, parent: IndexRecord) -> IndexManifest:
        match spec:
            case AppendIndexSpec():
                model = self._unchanged(source)
                dataset = self._registry.get(DATASETS, spec.dataset, param="dataset")
                return append(self._stages, source, parent, model, dataset, size=spec.shard_size)
            case DeleteExamplesSpec():
                param = "ids" if spec.filter is None else "filter"
                return delete(self._stages, source, parent, self._chosen(spec, parent), param=param)
            case CompactIndexSpec():
                return compact(self._stages, source, parent, rows_per_shard=spec.rows_per_shard)

    def _unchanged(self, source: IndexManifest) -> ModelRecord:
        """The model, if the weights of every point that rows come from are still those that were registered."""
        model = self._registry.get(MODELS, source.model, param="index")
        for each in passes_of(self._storage, source):
            models.check_fingerprints(models.location(model, each.point), each.spec, self._redis)
        return model

    def _chosen(self, spec: DeleteExamplesSpec, parent: IndexRecord) -> Collection[str]:
        """The ids to delete from this version: those named, or those that the filter keeps of it now."""
        if spec.filter is not None:
            return life.chosen(parent, spec.filter, self._registry, self._storage)
        return tombstones.read(self._storage, spec.ids)

    def _tell(self, spec: LifeSpec, record: IndexRecord, parent: IndexRecord) -> dict[str, Any]:
        now, then = record.counts, parent.counts
        match spec:
            case AppendIndexSpec():
                return {
                    "lines_new": now.lines - then.lines,
                    "indexed_new": now.indexed - then.indexed,
                    "duplicates_new": now.duplicates - then.duplicates,
                    "quarantined_new": now.quarantined - then.quarantined,
                }
            case DeleteExamplesSpec():
                source = indexes.read_manifest(self._storage, parent)
                told = sort(self._storage, source, parent, self._chosen(spec, parent))
                return {
                    "deleted": len(told.deleted),
                    "deleted_before": len(told.before),
                    "not_indexed": len(told.aside),
                }
            case CompactIndexSpec():
                manifests = [indexes.read_manifest(self._storage, each) for each in (parent, record)]
                before, after = (sum(len(section.shards) for section in each.sections) for each in manifests)
                dropped = _rows(manifests[0]) - _rows(manifests[1])
                return {"shards_before": before, "shards_after": after, "rows_dropped": dropped}


def described(job: JobRecord) -> dict[str, Any]:
    """What stands beside a manifest: who made it, when and with what, and what it takes to make it again."""
    return {"job": job.id, "kind": job.kind, "spec": dict(job.spec), "versions": passes.versions()}


def _rows(manifest: IndexManifest) -> int:
    """Stored, over all sections."""
    return sum(ref.rows for section in manifest.sections for ref in section.shards)
