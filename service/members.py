"""Which examples an index version holds, as the manifests of its shards say: no text and no row is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service import shards, tombstones
from service.contracts import Quarantined
from service.specs import IndexManifest, Section
from service.storage import Storage
from service.tasks import ShardManifest, ShardRef
from service.work import CompactSpec, SumSpec


@dataclass(frozen=True)
class Members:
    """``indexed``: ids that every section has. ``aside``: what a pass could not store, by id."""

    indexed: set[str]
    aside: dict[str, Quarantined]


def read(storage: Storage, ref: ShardRef) -> ShardManifest:
    return shards.read_manifest(storage, ref.key, sha256=ref.sha256)


def groups(storage: Storage, sections: Sequence[Section]) -> Iterator[tuple[ShardManifest, ...]]:
    """The shards of every section that hold the same examples, one group after the other."""
    for references in zip(*(section.shards for section in sections), strict=True):
        yield tuple(read(storage, ref) for ref in references)


def members(storage: Storage, sections: Sequence[Section]) -> Members:
    """Deleted examples are among them as far as their rows are there."""
    indexed: set[str] = set()
    aside: dict[str, Quarantined] = {}
    for group in groups(storage, sections):
        indexed |= in_all(group)
        for manifest in group:
            for item in manifest.quarantined:
                aside.setdefault(item.id or "", item)
    return Members(indexed, aside)


def in_all(group: Sequence[ShardManifest]) -> set[str]:
    """The ids that every shard of the group has."""
    first, *others = group
    found = set(first.ids)
    for other in others:
        if other.ids != first.ids:
            found &= set(other.ids)
    return found


def known(storage: Storage, manifest: IndexManifest) -> set[str]:
    """The ids of all examples that the version's datasets hold: indexed, set aside or deleted.

    A pass names every example it was given, so one section is enough; a compacted shard has left out what another
    section had set aside.
    """
    found = set(tombstones.read(storage, manifest.deleted))
    first, *others = manifest.sections
    for number, ref in enumerate(first.shards):
        own = read(storage, ref)
        beside = [read(storage, each.shards[number]) for each in others] if _compacted(own) else []
        for each in (own, *beside):
            found.update(each.ids)
            found.update(item.id for item in each.quarantined if item.id is not None)
    return found


def long(storage: Storage, manifest: ShardManifest) -> set[str]:
    """Ids of the shard whose texts were longer than the context; of sums the pass over the end of the run knows."""
    if isinstance(manifest.work, SumSpec):
        manifest = shards.read_manifest(storage, manifest.work.sources[-1][0])
    return set(manifest.long)


def origin(storage: Storage, manifest: ShardManifest) -> ShardManifest:
    """The shard itself, or the first of those that were compacted into it: its work says how rows are made."""
    while isinstance(manifest.work, CompactSpec):
        manifest = shards.read_manifest(storage, manifest.work.sources[0])
    return manifest


def _compacted(manifest: ShardManifest) -> bool:
    return isinstance(manifest.work, CompactSpec)
