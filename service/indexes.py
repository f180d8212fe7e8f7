"""Published indexes: immutable versions, their manifests, and the loaded form that queries search.

A version is a manifest that names shards; it holds no rows of its own. The manifest is decided by the
inputs alone; who built it and when stands beside it in ``build.json``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
from redis import Redis

from service import aliases, codec, datasets, keys, results, shards, tombstones
from service.contracts import AliasRecord, DatasetRecord, IndexRecord, Place, Quarantined
from service.errors import Conflict, Damaged, DomainError, NotFound
from service.registry import DATASETS, INDEXES, Registry, record_file
from service.specs import Built, IndexManifest
from service.storage import Storage, sha256_bytes
from service.terms import LossReduction, Pooling
from service.work import FORMAT

# The counter may be lost or restored from a backup; what is published is not.
_NEXT = """
local number = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], number)
return number
"""
MANIFEST, BUILD = "manifest.json", "build.json"


def next_version(redis: Redis, registry: Registry, name: str) -> int:
    """A version number nobody else gets, above all that are published. Raises Conflict for the name of an alias."""
    with registry.pointers.held(name):  # from now on no alias can take it
        aliases.check_not_alias(registry, name)
        # An alias may point at a version whose files are lost: it must not come to mean another one.
        named = [*registry.stored_ids(INDEXES), *(alias.index for alias in registry.aliases())]
        parts = (item_id.rpartition("@v") for item_id in named)
        published = max((int(number) for stem, _, number in parts if stem == name and number.isdigit()), default=0)
        number: Any = redis.eval(_NEXT, 1, keys.index_versions(name), str(published))
        return int(number)


def versions(registry: Registry, name: str) -> list[IndexRecord]:
    """Published versions of an index, oldest first."""
    return sorted((record for record in registry.all(INDEXES) if record.name == name), key=lambda r: r.version)


def resolve(registry: Registry, reference: str) -> IndexRecord:
    """``name`` → its newest version, an alias → what it points at now, ``name@v3`` → that one. Raises NotFound, and
    Damaged where an alias points at what is gone.

    One round trip to Redis for a name or an alias, none for a version that was asked for before.
    """
    if "@" in reference:
        return registry.get(INDEXES, reference, param="index")
    found = registry.pointed(reference)
    if found.alias is not None:
        record = registry.find(INDEXES, found.alias.index)
        if record is None:
            raise _gone(found.alias)
        return record
    if found.newest is not None:
        return registry.get(INDEXES, f"{reference}@v{found.newest}", param="index")
    known = ", ".join(registry.pointers.names()[:10]) or "none yet"
    raise NotFound(
        "index_not_found", f"There is no published index or alias {reference!r}. Known: {known}.", param="index"
    )


def _gone(alias: AliasRecord) -> Damaged:
    file, repair = record_file(INDEXES, alias.index), f"whence indexes repair {alias.index}"
    return Damaged(
        "missing_file",
        f"Alias {alias.name!r} points at {alias.index}, and {file} is missing. Point the alias at another version, "
        f"or put the folder of this one back from a backup; `{repair}` writes the record alone again.",
        param=file,
        context={"file": file, "index": alias.index, "repair": repair},
    )


def describe(manifest: IndexManifest, *, job: str) -> IndexRecord:
    """The record under which a manifest is published."""
    activation, gradient = manifest.spec.activation, manifest.spec.gradient or manifest.spec.influence
    embedding = next((array.embedding for array in manifest.arrays if array.embedding), None)
    pooled = activation or embedding
    return IndexRecord(
        name=manifest.name,
        version=manifest.version,
        model=manifest.model,
        model_fingerprint=manifest.model_fingerprint,
        lineage=manifest.lineage,
        dataset=manifest.dataset,
        dataset_fingerprint=manifest.dataset_fingerprint,
        pooling=pooled.pooling if pooled else Pooling.RESPONSE_MEAN,
        loss_reduction=gradient.loss_reduction if gradient else LossReduction.MEAN,
        arrays=manifest.arrays,
        counts=manifest.counts,
        quarantine_reasons=manifest.quarantine_reasons,
        bytes=sum(shards.bytes_per_row(array) * manifest.counts.indexed for array in manifest.arrays),
        job=job,
        created_at=codec.now(),
        points=manifest.points,
        fidelity=manifest.fidelity,
        max_length=manifest.spec.max_length,
        long_examples=manifest.spec.long_examples,
        blocks=manifest.tracked.blocks if manifest.tracked else None,
        modules=manifest.tracked.modules if manifest.tracked else None,
        stride=manifest.tracked.stride if manifest.tracked else 1,
        lora=manifest.spec.lora,
        answerer=manifest.difference.answerer.name if manifest.difference else None,
        appended=manifest.appended,
        parent=manifest.parent,
    )


def read_build(storage: Storage, index_id: str) -> Built:
    """Who built a version, when, and from what. Raises NotFound or Damaged."""
    return results.read_sealed(storage, f"indexes/{index_id}/{BUILD}", Built)


def publish(
    storage: Storage, registry: Registry, record: IndexRecord, manifest: IndexManifest, build: dict[str, Any]
) -> None:
    """Manifest last, then the record that makes the version visible.

    Publishing the same again is no error; Conflict when the version holds something else. Raises DomainError when a
    line of the sources is neither indexed, nor a duplicate, nor in quarantine under a reason.
    """
    _accounted(record.id, manifest)
    folder = f"indexes/{record.id}"
    data = codec.encode(manifest).encode()
    if storage.exists(f"{folder}/{MANIFEST}") and storage.read(f"{folder}/{MANIFEST}") != data:
        raise Conflict("version_exists", f"Index {record.id} is published with other content.", param="name")
    record = replace(record, manifest_sha256=sha256_bytes(data))
    storage.publish(folder, {BUILD: codec.seal(codec.canonical(build).decode()).encode()}, (MANIFEST, data))
    try:
        registry.add(INDEXES, record.id, record)
    except Conflict:  # a paused holder of the job, or an earlier attempt, has published the same
        if registry.get(INDEXES, record.id).manifest_sha256 != record.manifest_sha256:
            raise


def _accounted(index: str, manifest: IndexManifest) -> None:
    counts, reasons = manifest.counts, sum(manifest.quarantine_reasons.values())
    missing = counts.lines - counts.indexed - counts.duplicates - counts.quarantined
    if missing or reasons != counts.quarantined:
        raise DomainError(
            "lines_unaccounted",
            f"Index {index} would hold {counts.indexed} examples of {counts.lines} lines, with {counts.duplicates} "
            f"duplicates and {counts.quarantined} in quarantine ({reasons} with a reason): {missing} lines are "
            "unaccounted for. Nothing was published. This is a defect of Whence: please report it with the log.",
        )


def read_manifest(storage: Storage, record: IndexRecord) -> IndexManifest:
    """Raises Damaged, and Conflict for a version that another release has written."""
    data = storage.read(f"indexes/{record.id}/{MANIFEST}", sha256=record.manifest_sha256)
    if (found := json.loads(data).get("format")) != FORMAT:
        raise Conflict(
            "other_format",
            f"Index {record.id} was built by another release, in format {found}; this one reads format {FORMAT}. "
            f"Build {record.name!r} again from dataset {record.dataset!r}: its new version can be queried.",
            param="index",
        )
    return codec.decode(IndexManifest, data)


def quarantined(storage: Storage, registry: Registry, record: IndexRecord) -> list[Quarantined]:
    """Everything of the sources that is not in the index: set aside on reading, then on building, then deleted."""
    parts = [registry.get(DATASETS, name) for name in record.datasets]
    found = [
        item for part in parts for item in datasets.to_quarantined(datasets.read_table(storage, part, "quarantine"))
    ]
    index = read_manifest(storage, record)
    told: dict[str | None, Quarantined] = {}
    for section in index.sections:
        for reference in section.shards:
            manifest = shards.read_manifest(storage, reference.key, sha256=reference.sha256)
            for item in manifest.quarantined:
                told.setdefault(item.id, item)
    for deleted in sorted(tombstones.read(storage, index.deleted)):
        told.setdefault(deleted, Quarantined(deleted, tombstones.REASON, "Deleted from the index."))
    places = _places(storage, parts, [item for item in told if item is not None])
    return found + [replace(item, places=tuple(places.get(item.id or "", ()))) for item in told.values()]


def _places(storage: Storage, parts: Sequence[DatasetRecord], ids: Sequence[str]) -> dict[str, list[Place]]:
    """Every line that holds one of the examples, in whichever part."""
    found: dict[str, list[Place]] = {}
    for part in parts if ids else ():
        table = datasets.read_table(storage, part).select(["id", "places"])
        for row in table.filter(pc.field("id").isin(ids)).to_pylist():
            found.setdefault(row["id"], []).extend(Place(**place) for place in row["places"])
    return found
