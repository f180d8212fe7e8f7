"""Compacting: the same rows in few large shards, without those that are never ranked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from service import members, shards, tombstones
from service.contracts import IndexRecord
from service.errors import Invalid
from service.specs import IndexManifest, Section
from service.storage import Storage
from service.tasks import ShardManifest, ShardRef
from service.work import CompactSpec
from workers.stages import Stages


@dataclass(frozen=True)
class Run:
    """Neighbouring shards (by their place in every section) that become one, and the ids that do not come along."""

    places: tuple[int, ...]
    rows: int
    dropped: frozenset[str]

    @property
    def stays(self) -> bool:
        return len(self.places) == 1 and not self.dropped


def compact(stages: Stages, source: IndexManifest, parent: IndexRecord, *, rows_per_shard: int) -> IndexManifest:
    """The sections of ``source`` in shards of about ``rows_per_shard`` rows; those that are so already stay.

    Raises Invalid when all are.
    """
    storage = stages.storage
    runs = list(_runs(storage, source, rows_per_shard))
    if all(run.stays for run in runs):
        raise Invalid(
            "nothing_to_compact",
            f"Index {parent.id} lies in {len(runs)} shards of up to {rows_per_shard:,} rows, and every row of them "
            "is ranked. Nothing was published.",
            param="rows_per_shard",
        )
    without = [tombstones.store(storage, run.dropped) if run.dropped else None for run in runs]
    works = [
        CompactSpec(tuple(section.shards[place].key for place in run.places), section.arrays, dropped)
        for section in source.sections
        for run, dropped in zip(runs, without, strict=True)
        if not run.stays
    ]
    made = iter(stages.derive("compacting", works))
    return replace(source, sections=tuple(_section(section, runs, made) for section in source.sections))


def _section(section: Section, runs: Sequence[Run], made: Iterator[ShardManifest]) -> Section:
    found: list[ShardRef] = []
    for run in runs:
        found.append(section.shards[run.places[0]] if run.stays else shards.reference(next(made)))
    return replace(section, shards=tuple(found))


def _runs(storage: Storage, source: IndexManifest, most: int) -> Iterator[Run]:
    """From the first shard on, as many as fit. What has no row left goes with its neighbour: what was set aside
    there is still told.
    """
    deleted = tombstones.read(storage, source.deleted)
    places: tuple[int, ...] = ()
    rows, dropped = 0, frozenset[str]()
    for place, group in enumerate(members.groups(storage, source.sections)):
        ranked = members.in_all(group) - deleted
        unranked = frozenset(item for manifest in group for item in manifest.ids) - ranked
        if rows and ranked and rows + len(ranked) > most:
            yield Run(places, rows, dropped)
            places, rows, dropped = (), 0, frozenset()
        places, rows, dropped = (*places, place), rows + len(ranked), dropped | unranked
    yield Run(places, rows, dropped)
