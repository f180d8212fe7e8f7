"""Deleting: a version with the same rows and the ids of those that must not be ranked any more."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from service import members, tombstones
from service.contracts import IndexRecord
from service.errors import Invalid
from service.life import some
from service.specs import IndexManifest
from service.storage import Storage
from workers.stages import Stages


@dataclass(frozen=True)
class Told:
    """Where the ids went: indexed until now, deleted before, in the datasets but set aside when they were read."""

    deleted: frozenset[str]
    before: frozenset[str]
    aside: frozenset[str]


def delete(
    stages: Stages, source: IndexManifest, parent: IndexRecord, ids: Collection[str], *, param: str
) -> IndexManifest:
    """The same sections with more tombstones. Raises Invalid for unknown ids, and when none or all would go;
    ``param``: the field of the request that they come from.
    """
    storage = stages.storage
    told = sort(storage, source, parent, ids)
    if not told.deleted:
        detail = (
            f"None of these {len(ids)} examples is ranked by index {parent.id}: {len(told.before)} were deleted "
            f"before, {len(told.aside)} could not be indexed. Nothing was published."
        )
        if not ids:
            detail = f"The filter keeps no example of index {parent.id}. Nothing was published."
        raise Invalid("nothing_to_delete", detail, param=param)
    counts, gone = source.counts, len(told.deleted)
    if gone == counts.indexed:
        detail = (
            f"These are all {gone} examples that index {parent.id} ranks; an index without any answers nothing. "
            "Build another one instead. Nothing was published."
        )
        raise Invalid("deletes_everything", detail, param=param)
    cut = _long(storage, source, told.deleted) if counts.truncated or counts.split else 0
    reasons = dict(source.quarantine_reasons)
    reasons[tombstones.REASON] = reasons.get(tombstones.REASON, 0) + gone
    return replace(
        source,
        deleted=tombstones.store(storage, tombstones.read(storage, source.deleted) | told.deleted),
        counts=replace(
            counts,
            indexed=counts.indexed - gone,
            quarantined=counts.quarantined + gone,
            truncated=counts.truncated - cut if counts.truncated else 0,
            split=counts.split - cut if counts.split else 0,
        ),
        quarantine_reasons=dict(sorted(reasons.items())),
    )


def sort(storage: Storage, source: IndexManifest, parent: IndexRecord, ids: Collection[str]) -> Told:
    """What would become of the ids. Raises Invalid naming those that the index's datasets do not hold."""
    held, before = members.members(storage, source.sections), tombstones.read(storage, source.deleted)
    asked = frozenset(ids)
    told = Told((asked & held.indexed) - before, asked & before, asked & held.aside.keys())
    if unknown := sorted(asked - told.deleted - told.before - told.aside):
        detail = (
            f"Index {parent.id} holds no example {some(unknown)}. Ids are those that hits name. "
            "Nothing was published."
        )
        raise Invalid("example_not_found", detail, param="ids", context={"unknown": len(unknown)})
    return told


def _long(storage: Storage, source: IndexManifest, ids: Collection[str]) -> int:
    """How many of the ids are of examples that were cut, or split."""
    found: set[str] = set()
    for ref in source.sections[0].shards:
        manifest = members.read(storage, ref)
        if not found.issuperset(ids) and not set(manifest.ids).isdisjoint(ids):
            found |= members.long(storage, manifest) & set(ids)
    return len(found)
