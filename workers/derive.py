"""Shards that are computed from other shards: no model runs."""

from dataclasses import replace

import numpy as np

from service import artifacts, basis, shards
from service.contracts import ArrayInfo, Quarantined
from service.rows import F32
from service.storage import Storage
from service.terms import IndexKind
from service.work import ReadOffSpec, SumSpec
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


def summed(info: ArrayInfo, points: int) -> ArrayInfo:
    """The array that holds the sum of ``info`` over so many points of a run."""
    assert info.embedding is not None  # noqa: S101
    return replace(info, embedding=replace(info.embedding, points=points))
