"""Published indexes: immutable versions, their manifests, and the loaded form that queries search.

A version is a manifest that names shards; it holds no rows of its own. The manifest is decided by the
inputs alone; who built it and when stands beside it in ``build.json``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from redis import Redis

from service import codec, datasets, keys, shards
from service.cache import LoadingCache
from service.contracts import (
    DatasetRecord,
    Example,
    IndexKind,
    IndexManifest,
    IndexRecord,
    LossReduction,
    Pooling,
    Quarantined,
)
from service.errors import Conflict, Invalid, NotFound
from service.registry import DATASETS, INDEXES, Registry
from service.search import VectorIndex
from service.storage import Storage, sha256_bytes

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
    activation, gradient = manifest.spec.activation, manifest.spec.gradient
    return IndexRecord(
        name=manifest.name,
        version=manifest.version,
        model=manifest.model,
        model_fingerprint=manifest.model_fingerprint,
        lineage=manifest.lineage,
        dataset=manifest.dataset,
        dataset_fingerprint=manifest.dataset_fingerprint,
        pooling=activation.pooling if activation else Pooling.RESPONSE_MEAN,
        loss_reduction=gradient.loss_reduction if gradient else LossReduction.MEAN,
        arrays=manifest.arrays,
        counts=manifest.counts,
        quarantine_reasons=manifest.quarantine_reasons,
        bytes=sum((2 * array.dims + 2) * manifest.counts.indexed for array in manifest.arrays),
        job=job,
        created_at=codec.now(),
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
    data = storage.read(f"indexes/{record.id}/manifest.json", sha256=record.manifest_sha256)
    return codec.decode(IndexManifest, data)


def quarantined(storage: Storage, registry: Registry, record: IndexRecord) -> list[Quarantined]:
    """Everything of the source that is not in the index: set aside on reading, then on building."""
    dataset = registry.get(DATASETS, record.dataset)
    aside = datasets.to_quarantined(datasets.read_table(storage, dataset, "quarantine"))
    places = {
        row["id"]: tuple(codec.from_plain(Quarantined, {**row, "reason": "", "detail": ""}).places)
        for row in datasets.read_table(storage, dataset).select(["id", "places"]).to_pylist()
    }
    for reference in read_manifest(storage, record).shards:
        manifest = shards.read_manifest(storage, reference.key, sha256=reference.sha256)
        aside += [
            Quarantined(item.id, item.reason, item.detail, places.get(item.id or "", ()))
            for item in manifest.quarantined
        ]
    return aside


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

    def rows(self, record: IndexRecord, kind: IndexKind, layer: int | None) -> Rows:
        """Raises Invalid when the index does not hold this kind and layer, Damaged when a file is corrupt."""
        held = [array for array in record.arrays if array.kind == kind]
        if not any(array.layer == layer for array in held):
            layers = ", ".join(str(array.layer) for array in held)
            raise Invalid(
                "kind_not_indexed" if not held else "layer_not_indexed",
                f"Index {record.id} holds no {kind} rows"
                + (f" at layer {layer}; it has layers {layers}." if held else "; build it with that kind."),
                param="concept" if held else "method",
                context={"layers": [array.layer for array in held]},
            )
        return self._rows.get((record.id, kind, layer), lambda: self._load(record, kind, layer))

    def examples(self, dataset: DatasetRecord) -> "ExampleTable":
        return self._examples.get(dataset.id, lambda: ExampleTable(datasets.read_table(self._storage, dataset)))

    def _load(self, record: IndexRecord, kind: IndexKind, layer: int | None) -> Rows:
        ids: list[str] = []
        packed, exponents = [], []
        for reference in read_manifest(self._storage, record).shards:
            manifest = shards.read_manifest(self._storage, reference.key, sha256=reference.sha256)
            rows, powers = shards.read_packed(self._storage, manifest, kind, layer)
            packed.append(rows)
            exponents.append(powers)
            ids += manifest.ids
        index = VectorIndex(np.concatenate(packed), np.concatenate(exponents), threads=self._threads)
        return Rows(index, ids)


class ExampleTable:
    """Texts and metadata of a dataset by example id."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._row = {item_id: row for row, item_id in enumerate(table.column("id").to_pylist())}

    def take(self, ids: Sequence[str]) -> list[Example]:
        """The examples with these ids, in this order."""
        return datasets.to_examples(self._table.take([self._row[item_id] for item_id in ids]))
