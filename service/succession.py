"""Versions that are made from others: which one comes before, and how two that are made at once do not lose each
other.

A job that is told a bare name works on the newest version and publishes only while that is still the newest;
otherwise it starts again from the one that came in between (what it has computed is found again by its key). So
appends that were submitted together stack, whoever runs them. ``name@v3`` means exactly that version.
"""

from dataclasses import replace
from typing import Any

from redis import Redis

from service import indexes, keys
from service.contracts import IndexRecord, JobContext
from service.registry import INDEXES, Registry
from service.specs import IndexManifest
from service.storage import Storage


def made_by(registry: Registry, reference: str, job: str) -> IndexRecord | None:
    """The version that an earlier attempt of the job has published already."""
    name = reference.partition("@")[0]
    for item_id in registry.stored_ids(INDEXES):
        if item_id.rpartition("@v")[0] == name:
            record = registry.find(INDEXES, item_id)
            if record is not None and record.job == job:
                return record
    return None


def publish(
    storage: Storage,
    registry: Registry,
    redis: Redis,
    *,
    reference: str,
    parent: IndexRecord,
    manifest: IndexManifest,
    context: JobContext,
    build: dict[str, Any],
) -> IndexRecord | None:
    """The new version of ``parent``'s name; None: ``reference`` names a newer version than ``parent`` by now."""
    with redis.lock(keys.lock(f"versions:{parent.name}"), timeout=keys.LOCK_TTL_S):
        if indexes.resolve(registry, reference).id != parent.id:
            return None
        version = indexes.next_version(redis, registry, parent.name)
        manifest = replace(manifest, name=parent.name, version=version, parent=parent.id)
        record = indexes.describe(manifest, job=build["job"])
        context.check()
        indexes.publish(storage, registry, record, manifest, {**build, "created_at": record.created_at})
        return registry.get(INDEXES, record.id)
