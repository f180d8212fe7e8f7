"""Shards that are computed from other shards: no model runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from service import artifacts, basis, members, shards, tombstones
from service.contracts import ArrayInfo, Quarantined
from service.rows import F32
from service.shards import Stored
from service.storage import Storage
from service.tasks import ShardManifest, Task
from service.terms import IndexKind
from service.work import CompactSpec, ReadOffSpec, SumSpec
from workers.passes import PassResult


def total(storage: Storage, work: SumSpec) -> PassResult:
    """m_z = Σ_c w_c m_z^c over the checkpoints of a run, for the examples that every checkpoint has."""
    manifests = [(shards.read_manifest(storage, key), weight) for key, weight in work.sources]
    aside: dict[str, Quarantined] = {}
    for manifest, _ in manifests:
        for item in manifest.quarantined:
            aside.setdefault(item.id or "", item)
    ids = tuple(item for item in manifests[0][0].ids if item not in aside)
    sums: dict[ArrayInfo, F32] = {}
    for info in work.arrays:
        rows = np.zeros((len(ids), info.dims), dtype=np.float32)
        for manifest, weight in manifests:
            place = {item: row for row, item in enumerate(manifest.ids)}
            found = shards.read_rows(storage, manifest, info)
            rows += np.float32(weight) * found[[place[item] for item in ids]].reshape(len(ids), info.dims)
        sums[summed(info, len(work.sources))] = rows
    return PassResult(ids, sums, tuple(aside.values()), long=(), tokens=0)


def read_off(storage: Storage, work: ReadOffSpec) -> PassResult:
    """m_z = −J H⁻¹ c_z from stored coordinates c_z/√(λ+δ₀), exact within the kept coordinates."""
    assert work.array.embedding is not None  # noqa: S101
    manifest = shards.read_manifest(storage, work.source)
    info = next(array.info for array in manifest.arrays if array.info.kind == IndexKind.GRADIENT)
    jacobian = artifacts.read(storage, artifacts.get(storage, work.jacobian), "jacobian")["rows"]
    head = -basis.damped(storage, work.basis, jacobian, work.array.embedding.damping)
    rows = shards.read_rows(storage, manifest, info) @ head.T
    return PassResult(manifest.ids, {work.array: rows}, (), long=(), tokens=0)


def compact(storage: Storage, task: Task, work: CompactSpec, versions: Mapping[str, str]) -> ShardManifest:
    """Stored numbers and scales of several shards as they are, published as one; an array in memory at a time."""
    gone = tombstones.read(storage, work.deleted)
    manifests = [shards.read_manifest(storage, key) for key in work.sources]
    kept = [[row for row, item in enumerate(each.ids) if item not in gone] for each in manifests]
    ids = [each.ids[row] for each, rows in zip(manifests, kept, strict=True) for row in rows]
    cut = set().union(*(members.long(storage, each) for each in manifests))
    aside = {item.id: item for each in manifests for item in each.quarantined}
    return shards.publish_stored(
        storage,
        task,
        ids=ids,
        arrays=(_joined(storage, manifests, kept, info) for info in work.arrays),
        quarantined=tuple(aside.values()),
        long=tuple(item for item in ids if item in cut),
        versions=versions,
    )


def _joined(
    storage: Storage, manifests: Sequence[ShardManifest], kept: Sequence[Sequence[int]], info: ArrayInfo
) -> Stored:
    count, start = sum(map(len, kept)), 0
    packed = scales = None
    encoding = ""
    for manifest, rows in zip(manifests, kept, strict=True):
        part = shards.read_stored(storage, manifest, info)
        assert encoding in {"", part.encoding}  # noqa: S101  (one encoding for each kind of work)
        if packed is None:
            encoding = part.encoding
            packed = np.empty((count, info.dims), dtype=part.packed.dtype)
            scales = None if part.scales is None else np.empty(count, dtype=part.scales.dtype)
        stop = start + len(rows)
        packed[start:stop] = part.packed[rows]
        if scales is not None and part.scales is not None:
            scales[start:stop] = part.scales[rows]
        start = stop
    assert packed is not None  # noqa: S101  (a compaction has sources)
    return Stored(info, encoding, packed, scales)


def summed(info: ArrayInfo, points: int) -> ArrayInfo:
    """The array that holds the sum of ``info`` over so many points of a run."""
    assert info.embedding is not None  # noqa: S101
    return replace(info, embedding=replace(info.embedding, points=points))
