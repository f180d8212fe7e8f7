"""Appending: the passes of an index over the examples that it does not hold yet.

How rows are made is read off one old shard of every section; curvature, heads, bases and Jacobians are found by
their keys. Of the old examples only the ids are read, so that the cost is that of what is new.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service import members, models, shards, tombstones
from service.contracts import Counts, DatasetPart, DatasetRecord, IndexRecord, ModelRecord, Point
from service.errors import Invalid
from service.life import refuse_part
from service.specs import IndexManifest, Section
from service.storage import Storage
from service.tasks import ShardManifest
from service.work import DifferenceSpec, PassSpec, ReadOffSpec, ShardWork, SumSpec
from workers.build import account
from workers.stages import Stages


@dataclass(frozen=True)
class Pass:
    """What one point of the run has done, and does again on new examples."""

    point: Point
    weight: float
    spec: PassSpec


def passes_of(storage: Storage, manifest: IndexManifest) -> list[Pass]:
    """Of every point of the run that rows come from, the model itself last."""
    for work in works_of(storage, manifest):
        if isinstance(work, SumSpec):
            found = []
            for point, (key, weight) in zip(manifest.points, work.sources, strict=True):
                spec = shards.read_manifest(storage, key).work
                assert isinstance(spec, PassSpec)  # noqa: S101  (sums are of passes)
                found.append(Pass(point, weight, spec))
            return found
    return [Pass(manifest.points[-1], 1.0, manifest.spec)]


def works_of(storage: Storage, manifest: IndexManifest) -> list[ShardWork]:
    """How the rows of every section are made."""
    firsts = [members.read(storage, section.shards[0]) for section in manifest.sections]
    return [members.origin(storage, first).work for first in firsts]


def append(
    stages: Stages,
    source: IndexManifest,
    parent: IndexRecord,
    model: ModelRecord,
    dataset: DatasetRecord,
    *,
    size: int,
) -> IndexManifest:
    """The sections of ``source`` with shards for the new examples. Raises Invalid when there are none."""
    refuse_part(parent, dataset.id, dataset.fingerprint)
    storage = stages.storage
    ids, held = stages.ids(dataset), members.known(storage, source)
    rows = [row for row, item in enumerate(ids) if item not in held]
    if not rows:
        gone = len(tombstones.read(storage, source.deleted).intersection(ids))
        but = f" {gone} of its examples were deleted, and stay so." if gone else ""
        raise Invalid(
            "nothing_to_append",
            f"Index {parent.id} knows every example of {dataset.id!r} already, from {_listed(parent.datasets)}: "
            f"all {dataset.lines - dataset.quarantined} lines are duplicates.{but} Nothing was published.",
            param="dataset",
            context={"duplicates": dataset.lines - dataset.quarantined, "held_by": list(parent.datasets)},
        )
    known = dataset.examples - len(rows)
    lines = dataset.duplicates + known
    stages.context.log(f"{len(rows)} of {dataset.examples} examples are new; {lines} lines are duplicates.")
    made = _passes(stages, source, model, dataset, rows, size)
    added = [
        Section(section.arrays, tuple(map(shards.reference, found)))
        for section, found in zip(
            source.sections, _sections(stages, source, model, dataset, rows, size, made), strict=True
        )
    ]
    counts, reasons = account(storage, dataset, added, made[-1])
    if counts.indexed == 0:
        raise Invalid(
            "nothing_to_append",
            f"Every new example of {dataset.id!r} was set aside: {reasons}. Nothing was published.",
            param="dataset",
            context={"quarantine_reasons": reasons},
        )
    for reason, count in source.quarantine_reasons.items():
        reasons[reason] = reasons.get(reason, 0) + count
    return replace(
        source,
        sections=tuple(
            replace(section, shards=section.shards + more.shards)
            for section, more in zip(source.sections, added, strict=True)
        ),
        counts=_sum(source.counts, replace(counts, duplicates=lines)),
        quarantine_reasons=dict(sorted(reasons.items())),
        appended=(*source.appended, DatasetPart(dataset.id, dataset.fingerprint)),
    )


def _passes(
    stages: Stages,
    source: IndexManifest,
    model: ModelRecord,
    dataset: DatasetRecord,
    rows: Sequence[int],
    size: int,
) -> list[list[ShardManifest]]:
    """The shards of every point's pass over the new rows."""
    passes, made = passes_of(stages.storage, source), []
    for number, each in enumerate(passes, start=1):
        stages.prefix = f"checkpoint {number} of {len(passes)}: " if len(passes) > 1 else ""
        location = models.location(model, each.point)
        made.append(stages.rows("rows", location, each.spec, dataset, size=size, chosen=rows))
    stages.prefix = ""
    return made


def _sections(
    stages: Stages,
    source: IndexManifest,
    model: ModelRecord,
    dataset: DatasetRecord,
    rows: Sequence[int],
    size: int,
    made: Sequence[Sequence[ShardManifest]],
) -> list[Sequence[ShardManifest]]:
    """The new shards of every section, cut at the same examples."""
    own, found = made[-1], []
    for work in works_of(stages.storage, source):
        match work:
            case PassSpec():
                found.append(own)
            case SumSpec(sources=sources):
                weights = [weight for _, weight in sources]
                keys = zip(*([shard.key for shard in point] for point in made), strict=True)
                works = [replace(work, sources=tuple(zip(each, weights, strict=True))) for each in keys]
                found.append(stages.derive("summing embeddings", works))
            case ReadOffSpec():
                works = [replace(work, source=shard.key) for shard in own]
                found.append(stages.derive(f"embeddings of layer {work.array.layer}", works))
            case DifferenceSpec():
                assert source.difference is not None  # noqa: S101  (it was planned)
                found.append(
                    stages.differences(
                        models.location(model, source.points[-1]),
                        work.reading,
                        source.difference,
                        models.location(model, source.difference.answerer),
                        dataset,
                        layers=work.layers,
                        pooling=work.pooling,
                        size=size,
                        chosen=rows,
                    )
                )
            case _:
                raise TypeError(f"{type(work).__name__} makes no rows of its own")
    return found


def _sum(one: Counts, other: Counts) -> Counts:
    return Counts(**{name: value + getattr(other, name) for name, value in vars(one).items()})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
