"""Versions that are made from others: which one comes before, and how two that are made at once do not lose each
other.

A job that is told a bare name works on the newest version and publishes only while that is still the newest;
otherwise it starts again from the one that came in between (what it has computed is found again by its key). So
appends that were submitted together stack, whoever runs them. ``name@v3`` means exactly that version.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from redis import Redis

from service import codec, indexes, keys
from service.contracts import IndexRecord, JobContext
from service.errors import Damaged, NotFound
from service.registry import INDEXES, Registry
from service.specs import IndexManifest
from service.storage import Storage


def made_by(registry: Registry, reference: str, job: str) -> IndexRecord | None:
    """The version that an earlier attempt of the job has published already."""
    name, stored = reference.partition("@")[0], registry.stored_ids(INDEXES)
    own = [item_id for item_id in stored if item_id.rpartition("@v")[0] == name]
    for item_id in own or stored:  # the name of an alias: it may have pointed anywhere then
        record = registry.find(INDEXES, item_id)
        if record is not None and record.job == job:
            return record
    return None


def parent_of(storage: Storage, registry: Registry, version: str) -> str | None:
    """The version that another was made from, as its record says; where that cannot be read, as the manifest does,
    which nothing vouches for then. None: it was built, or nothing can be read.
    """
    with suppress(Damaged):
        if (record := registry.find(INDEXES, version)) is not None:
            return record.parent
    try:
        return codec.decode(IndexManifest, storage.read(f"indexes/{version}/{indexes.MANIFEST}")).parent
    except (NotFound, ValueError):
        return None


@contextmanager
def turn(redis: Redis, name: str) -> Iterator[None]:
    """Nobody else publishes a version of ``name`` meanwhile."""
    with redis.lock(keys.lock(f"versions:{name}"), timeout=keys.LOCK_TTL_S):
        yield


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
    with turn(redis, parent.name):
        if indexes.resolve(registry, reference).id != parent.id:
            return None
        version = indexes.next_version(redis, registry, parent.name)
        manifest = replace(manifest, name=parent.name, version=version, parent=parent.id)
        record = indexes.describe(manifest, job=build["job"])
        context.check()
        indexes.publish(storage, registry, record, manifest, {**build, "created_at": record.created_at})
        return registry.get(INDEXES, record.id)
