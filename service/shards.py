"""Shards: how work is cut, how their files are named, written and read.

A shard's name is the hash of what decides its bytes (model, tokenizer, settings, example ids), so a
finished one is found again by every job that needs it: a resumed build, a rebuild, a concept fitted on
the same data. It exists when its manifest does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service import codec
from service.contracts import (
    ArrayInfo,
    DatasetRecord,
    IndexKind,
    PassSpec,
    Quarantined,
    ShardArray,
    ShardManifest,
    ShardRef,
    ShardTask,
)
from service.errors import Damaged
from service.rows import F16, F32, I16, from_npy, pack, to_npy, unpack
from service.storage import Storage, sha256_bytes

MANIFEST = "shard.json"


def cut(model_path: str, spec: PassSpec, dataset: DatasetRecord, ids: Sequence[str], size: int) -> list[ShardTask]:
    """Consecutive runs of at most ``size`` examples; a pure function of its arguments."""
    return [
        ShardTask(
            key=codec.digest([codec.to_plain(spec), list(ids[start : start + size])]),
            number=number,
            model_path=model_path,
            spec=spec,
            dataset=dataset,
            start=start,
            stop=min(start + size, len(ids)),
        )
        for number, start in enumerate(range(0, len(ids), size))
    ]


def folder(key: str) -> str:
    return f"shards/{key[:2]}/{key}"


def exists(storage: Storage, key: str) -> bool:
    return storage.exists(f"{folder(key)}/{MANIFEST}")


def publish(
    storage: Storage,
    task: ShardTask,
    *,
    ids: Sequence[str],
    arrays: Mapping[ArrayInfo, F32],
    quarantined: Sequence[Quarantined],
    truncated: int,
    tokens: int,
    versions: Mapping[str, str],
) -> ShardManifest:
    """Store the rows (finite float32, one per id) of every array and then the manifest."""
    files: dict[str, bytes] = {}
    stored = []
    for info, rows in arrays.items():
        name = f"{info.kind}.l{info.layer}" if info.layer is not None else str(info.kind)
        if task.spec.objective is not None:
            files[f"{name}.npy"] = to_npy(rows.astype(np.float32))
            stored.append(ShardArray(info.kind, info.layer, info.dims, f"{name}.npy", None))
            continue
        packed, exponents = pack(rows)
        files[f"{name}.npy"], files[f"{name}.exponents.npy"] = to_npy(packed), to_npy(exponents)
        stored.append(ShardArray(info.kind, info.layer, info.dims, f"{name}.npy", f"{name}.exponents.npy"))
    manifest = ShardManifest(
        key=task.key,
        spec=task.spec,
        ids=tuple(ids),
        quarantined=tuple(quarantined),
        truncated=truncated,
        tokens=tokens,
        arrays=tuple(stored),
        files={name: sha256_bytes(data) for name, data in files.items()},
        versions=dict(versions),
    )
    storage.publish(folder(task.key), files, (MANIFEST, codec.encode(manifest).encode()))
    return manifest


def read_manifest(storage: Storage, key: str, *, sha256: str | None = None) -> ShardManifest:
    """A shard's manifest, checked against the hash by which an index names it. Raises NotFound or Damaged."""
    name = f"{folder(key)}/{MANIFEST}"
    manifest = codec.decode(ShardManifest, storage.read(name, sha256=sha256))
    if manifest.key != key:
        raise Damaged("damaged_file", f"{name} is the manifest of another shard.", param=key)
    return manifest


def reference(manifest: ShardManifest) -> ShardRef:
    """How an index manifest names the shard."""
    return ShardRef(manifest.key, sha256_bytes(codec.encode(manifest).encode()), len(manifest.ids))


def read_packed(storage: Storage, manifest: ShardManifest, kind: IndexKind, layer: int | None) -> tuple[F16, I16]:
    """(rows, dims) float16 and (rows,) exponents of one array, as search uses them. Raises Damaged."""
    array = _find(manifest, kind, layer)
    if array.exponents is None:
        raise Damaged("damaged_file", f"{array.file} of shard {manifest.key} is not in the packed format.")
    packed, exponents = _read(storage, manifest, array.file), _read(storage, manifest, array.exponents)
    if packed.shape != (len(manifest.ids), array.dims):
        raise Damaged("damaged_file", f"{array.file} of shard {manifest.key} has shape {packed.shape}.")
    return packed.astype(np.float16, copy=False), exponents.astype(np.int16, copy=False)


def read_rows(storage: Storage, manifest: ShardManifest, kind: IndexKind, layer: int | None) -> F32:
    """(rows, dims) float32 of one array, whichever way it is stored. Raises Damaged."""
    array = _find(manifest, kind, layer)
    if array.exponents is None:
        return _read(storage, manifest, array.file).astype(np.float32, copy=False)
    return unpack(*read_packed(storage, manifest, kind, layer))


def _find(manifest: ShardManifest, kind: IndexKind, layer: int | None) -> ShardArray:
    return next(array for array in manifest.arrays if (array.kind, array.layer) == (kind, layer))


def _read(storage: Storage, manifest: ShardManifest, name: str) -> NDArray[np.generic]:
    return from_npy(storage.read(f"{folder(manifest.key)}/{name}", sha256=manifest.files[name]))
