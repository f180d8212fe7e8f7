"""Published indexes: immutable versions, their manifests, and the loaded form that queries search.

A version is a manifest that names shards; it holds no rows of its own. The manifest is decided by the
inputs alone; who built it and when stands beside it in ``build.json``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from redis import Redis

from service import codec, datasets, keys, members, shards, tombstones
from service.cache import LoadingCache
from service.contracts import ArrayInfo, DatasetRecord, Example, IndexRecord, Place, Quarantined
from service.errors import Conflict, NotFound
from service.registry import DATASETS, INDEXES, Registry
from service.search import VectorIndex
from service.specs import IndexManifest
from service.storage import Storage, sha256_bytes
from service.terms import LossReduction, Pooling
from service.work import FORMAT

# The counter may be lost or restored from a backup; what is published is not.
_NEXT = """
local number = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], number)
return number
"""
_LOADED = 8  # vector indexes kept in memory


def next_version(redis: Redis, registry: Registry, name: str) -> int:
    """A version number nobody else gets, above all that are published."""
    parts = (item_id.rpartition("@v") for item_id in registry.stored_ids(INDEXES))
    published = max((int(number) for stem, _, number in parts if stem == name and number.isdigit()), default=0)
    number: Any = redis.eval(_NEXT, 1, keys.index_versions(name), str(published))
    return int(number)


def versions(registry: Registry, name: str) -> list[IndexRecord]:
    """Published versions of an index, oldest first."""
    return sorted((record for record in registry.all(INDEXES) if record.name == name), key=lambda r: r.version)


def resolve(registry: Registry, reference: str) -> IndexRecord:
    """``name`` → its newest version, ``name@v3`` → that one. Raises NotFound."""
    if "@" in reference:
        return registry.get(INDEXES, reference, param="index")
    found = versions(registry, reference)
    if not found:
        names = ", ".join(sorted({record.name for record in registry.all(INDEXES)})[:10]) or "none yet"
        raise NotFound(
            "index_not_found", f"There is no published index {reference!r}. Known: {names}.", param="index"
        )
    return found[-1]


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


def publish(
    storage: Storage, registry: Registry, record: IndexRecord, manifest: IndexManifest, build: dict[str, Any]
) -> None:
    """Manifest last, then the record that makes the version visible.

    Publishing the same again is no error; Conflict when the version holds something else.
    """
    folder = f"indexes/{record.id}"
    data = codec.encode(manifest).encode()
    if storage.exists(f"{folder}/manifest.json") and storage.read(f"{folder}/manifest.json") != data:
        raise Conflict("version_exists", f"Index {record.id} is published with other content.", param="name")
    record = replace(record, manifest_sha256=sha256_bytes(data))
    storage.publish(folder, {"build.json": codec.canonical(build)}, ("manifest.json", data))
    try:
        registry.add(INDEXES, record.id, record)
    except Conflict:  # a paused holder of the job, or an earlier attempt, has published the same
        if registry.get(INDEXES, record.id).manifest_sha256 != record.manifest_sha256:
            raise


def read_manifest(storage: Storage, record: IndexRecord) -> IndexManifest:
    """Raises Damaged, and Conflict for a version that another release has written."""
    data = storage.read(f"indexes/{record.id}/manifest.json", sha256=record.manifest_sha256)
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


class Rows:
    """One array of one index version, in memory: search positions and the example ids they mean."""

    def __init__(self, index: VectorIndex, ids: Sequence[str]) -> None:
        self.index = index
        self.ids = ids


class IndexLoader:
    """Loads what queries ask for, once, and keeps the most recently used in memory."""

    def __init__(self, storage: Storage, *, threads: int) -> None:
        self._storage = storage
        self._threads = threads
        self._rows: LoadingCache[Rows] = LoadingCache(_LOADED)
        self._examples: LoadingCache[ExampleTable] = LoadingCache(_LOADED)
        self._manifests: LoadingCache[IndexManifest] = LoadingCache(_LOADED)

    def rows(self, record: IndexRecord, array: ArrayInfo) -> Rows:
        """One array of ``record.arrays``. Raises Damaged when a file is corrupt."""
        return self._rows.get((record.id, array), lambda: self._load(record, array))

    def examples(self, dataset: DatasetRecord) -> "ExampleTable":
        return self._examples.get(dataset.id, lambda: ExampleTable(datasets.read_table(self._storage, dataset)))

    def manifest(self, record: IndexRecord) -> IndexManifest:
        return self._manifests.get(record.id, lambda: read_manifest(self._storage, record))

    def _load(self, record: IndexRecord, array: ArrayInfo) -> Rows:
        ids: list[str] = []
        packed, exponents = [], []
        sections = self.manifest(record).sections
        own = next(number for number, section in enumerate(sections) if array in section.arrays)
        deleted = tombstones.read(self._storage, self.manifest(record).deleted)
        for references in zip(*(section.shards for section in sections), strict=True):
            manifests = [shards.read_manifest(self._storage, ref.key, sha256=ref.sha256) for ref in references]
            rows, powers = shards.read_packed(self._storage, manifests[own], array)
            held = members.in_all((manifests[own], *manifests)) - deleted
            kept = [row for row, item in enumerate(manifests[own].ids) if item in held]
            packed.append(rows[kept] if len(kept) < len(rows) else rows)
            exponents.append(powers[kept] if len(kept) < len(rows) else powers)
            ids += [manifests[own].ids[row] for row in kept]
        index = VectorIndex(np.concatenate(packed), np.concatenate(exponents), threads=self._threads)
        return Rows(index, ids)


class ExampleTable:
    """Texts and metadata of a dataset by example id."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._row = {item_id: row for row, item_id in enumerate(table.column("id").to_pylist())}

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._row

    def take(self, ids: Sequence[str]) -> list[Example]:
        """The examples with these ids, in this order."""
        return datasets.to_examples(self._table.take([self._row[item_id] for item_id in ids]))
