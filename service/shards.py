"""Shards: how work is cut, how their files are named, written and read.

A shard's name is the hash of what decides its bytes (model, tokenizer, settings, example ids), so a
finished one is found again by every job that needs it: a resumed build, a rebuild, a concept fitted on
the same data. It exists when its manifest does.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from service import codec, example_ids, results
from service.contracts import ArrayInfo, DatasetRecord, Quarantined
from service.errors import Damaged
from service.example_ids import Ids
from service.rows import F16, F32, I16, dequantise, from_npy, pack, quantise, to_npy, unpack
from service.storage import Storage, on_disk, sha256_bytes
from service.tasks import ShardArray, ShardManifest, ShardRef, Task, identity
from service.work import DifferenceSpec, Location, PassSpec, ShardWork

MANIFEST = "shard.json"
_IDS = b'"ids":"'
_PIECE = 1 << 18  # bytes that are hashed while they are still in cache
HALF, INT8, SINGLE = "half", "int8", "single"


@dataclass(frozen=True)
class Stored:
    """Rows of one array as they lie in a file: ``packed`` (n, dims), ``scales`` (n,) or None for ``single``."""

    info: ArrayInfo
    encoding: str
    packed: NDArray[np.generic]
    scales: NDArray[np.generic] | None


def cut(
    location: Location,
    spec: PassSpec | DifferenceSpec,
    dataset: DatasetRecord,
    ids: Sequence[str],
    rows: Sequence[int],
    size: int,
    *,
    first: int = 0,
) -> list[Task]:
    """``rows`` of the dataset in runs of at most ``size``, counted from ``first``; ``ids`` are those of the whole
    dataset. Pure.
    """
    return [
        Task(
            key=codec.digest([identity(spec), [ids[row] for row in rows[start : start + size]]]),
            title=f"shard {number} ({_span(rows[start : start + size])} of dataset {dataset.id!r})",
            work=spec,
            location=location,
            dataset=dataset,
            rows=tuple(rows[start : start + size]),
        )
        for number, start in enumerate(range(0, len(rows), size), start=first)
    ]


def derived(work: ShardWork, title: str) -> Task:
    """A shard that is computed from other shards."""
    return Task(key=codec.digest([identity(work)]), title=title, work=work)


def folder(key: str) -> str:
    return f"shards/{key[:2]}/{key}"


def exists(storage: Storage, key: str) -> bool:
    return storage.exists(f"{folder(key)}/{MANIFEST}")


def publish(
    storage: Storage,
    task: Task,
    *,
    ids: Sequence[str],
    arrays: Mapping[ArrayInfo, F32],
    encoding: str,
    quarantined: Sequence[Quarantined] = (),
    long: Sequence[str] = (),
    tokens: int = 0,
    versions: Mapping[str, str],
) -> ShardManifest:
    """Store the rows (finite float32, one per id) of every array and then the manifest."""
    return publish_stored(
        storage,
        task,
        ids=ids,
        arrays=[_encoded(info, rows, encoding) for info, rows in arrays.items()],
        quarantined=quarantined,
        long=long,
        tokens=tokens,
        versions=versions,
    )


def publish_stored(
    storage: Storage,
    task: Task,
    *,
    ids: Sequence[str],
    arrays: Iterable[Stored],
    quarantined: Sequence[Quarantined] = (),
    long: Sequence[str] = (),
    tokens: int = 0,
    versions: Mapping[str, str],
) -> ShardManifest:
    """Store rows that are encoded already, and then the manifest."""
    assert isinstance(task.work, ShardWork)  # noqa: S101
    files: dict[str, bytes] = {}
    stored = []
    for number, array in enumerate(arrays):
        info = array.info
        name = f"{number:02d}.{info.kind}" + (f".l{info.layer}" if info.layer is not None else "")
        scale = None if array.scales is None else f"{name}.scale.npy"
        stored.append(ShardArray(info, array.encoding, f"{name}.npy", scale))
        files[f"{name}.npy"] = to_npy(array.packed)
        if scale is not None and array.scales is not None:
            files[scale] = to_npy(array.scales)
    manifest = ShardManifest(
        key=task.key,
        work=task.work,
        ids=tuple(ids),
        quarantined=tuple(quarantined),
        long=tuple(long),
        tokens=tokens,
        arrays=tuple(stored),
        files={name: sha256_bytes(data) for name, data in files.items()},
        versions=dict(versions),
    )
    return results.publish(storage, folder(task.key), MANIFEST, manifest, files, named=True)


def made(storage: Storage, key: str) -> ShardManifest | None:
    """A shard's manifest for those who make what is missing: None as well when it cannot be read, or is marked."""
    manifest = results.made(storage, folder(key), MANIFEST, ShardManifest)
    return manifest if manifest is not None and manifest.key == key else None


def read_manifest(storage: Storage, key: str, *, sha256: str | None = None) -> ShardManifest:
    """A shard's manifest, checked against its seal and the hash by which an index names it. Raises NotFound or
    Damaged.
    """
    name = f"{folder(key)}/{MANIFEST}"
    manifest = results.read_sealed(storage, name, ShardManifest, sha256=sha256)
    if manifest.key != key:
        raise Damaged("damaged_file", f"{name} is the manifest of another shard.", param=name)
    return manifest


def read_head(storage: Storage, ref: ShardRef) -> tuple[ShardManifest, Ids]:
    """What ``read_manifest`` reads, as search needs it: the ids as an array instead of a string each, which takes a
    twentieth of the time; in the manifest itself there are none. Raises NotFound or Damaged.
    """
    name = f"{folder(ref.key)}/{MANIFEST}"
    text = results.read_text(storage, name, sha256=ref.sha256)
    start = text.find(_IDS) + len(_IDS)  # in no string of the record: a quotation mark is escaped there
    stop = text.find(b'"', start)
    ids = text[start:stop]
    if len(ids) != ref.rows * (example_ids.WIDTH + 1) - 1:  # none, or ids of other lengths
        manifest = read_manifest(storage, ref.key, sha256=ref.sha256)
        return replace(manifest, ids=()), example_ids.of(manifest.ids)
    manifest = codec.decode(ShardManifest, text[:start] + text[stop:])
    if manifest.key != ref.key:
        raise Damaged("damaged_file", f"{name} is the manifest of another shard.", param=name)
    rows = np.frombuffer(ids + b",", dtype=np.uint8).reshape(ref.rows, -1)[:, : example_ids.WIDTH]
    return manifest, np.ascontiguousarray(rows).view(f"S{example_ids.WIDTH}").reshape(-1)


def reference(manifest: ShardManifest) -> ShardRef:
    """How an index manifest names the shard."""
    return ShardRef(manifest.key, sha256_bytes(codec.encode(manifest).encode()), len(manifest.ids))


def read_into(storage: Storage, manifest: ShardManifest, info: ArrayInfo, out: F16) -> I16:
    """Fill ``out`` (rows, dims) with one array as search uses it; returns the exponents (rows,). Raises Damaged.

    Float16 rows on a local disk are hashed as they arrive in their final place: no second copy, no second look.
    """
    array = _find(manifest, info)
    path = storage.local_path(f"{folder(manifest.key)}/{array.file}")
    if array.encoding != HALF or path is None:
        packed, exponents = read_packed(storage, manifest, info, rows=len(out))
        out[:] = packed
        return exponents
    _stream(path, out, array.file, manifest)
    assert array.scale is not None  # noqa: S101  (half has one)
    exponents = _read(storage, manifest, array.scale)
    if exponents.shape != (len(out),):
        name = f"{folder(manifest.key)}/{array.scale}"
        raise Damaged("damaged_file", f"{name} has shape {exponents.shape}.", param=name)
    return exponents.astype(np.int16, copy=False)


def _stream(path: Path, out: F16, name: str, manifest: ShardManifest) -> None:
    """An .npy file into ``out``, checked against its sha256 on the way; nothing of it is parsed before that."""
    key = f"{folder(manifest.key)}/{name}"
    with on_disk(key), path.open("rb", buffering=0) as file:
        head = file.read(len(expected := _header(out.shape)))
        hasher = hashlib.sha256(head)
        left = memoryview(cast(Any, out.reshape(-1).view(np.uint8)))
        while left and (count := file.readinto(left[:_PIECE])):
            hasher.update(left[:count])
            left = left[count:]
        while rest := file.read(_PIECE):
            hasher.update(rest)
    if hasher.hexdigest() != manifest.files[name]:
        detail = f"{key} is not what its manifest says (sha256 differs). Rebuild it."
        raise Damaged("damaged_file", detail, param=key)
    if head != expected or len(left):
        raise Damaged("damaged_file", f"{key} does not hold {out.shape[0]} × {out.shape[1]} numbers.", param=key)


@cache
def _header(shape: tuple[int, ...]) -> bytes:
    """What stands before a float16 matrix of this shape in a file that ``to_npy`` made."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return sink.getvalue()


def read_packed(
    storage: Storage, manifest: ShardManifest, info: ArrayInfo, *, rows: int | None = None
) -> tuple[F16, I16]:
    """(rows, dims) float16 and (rows,) exponents of one array, as search uses them. Raises Damaged."""
    array = _find(manifest, info)
    if array.encoding != HALF:
        return pack(read_rows(storage, manifest, info, rows=rows))
    packed, exponents = _stored(storage, manifest, array, rows)
    return packed.astype(np.float16, copy=False), exponents.astype(np.int16, copy=False)


def read_rows(storage: Storage, manifest: ShardManifest, info: ArrayInfo, *, rows: int | None = None) -> F32:
    """(rows, dims) float32 of one array, whichever way it is stored. Raises Damaged."""
    array = _find(manifest, info)
    packed, scales = _stored(storage, manifest, array, rows)
    match array.encoding:
        case "half":
            return unpack(packed.astype(np.float16, copy=False), scales.astype(np.int16, copy=False))
        case "int8":
            return dequantise(packed.astype(np.int8, copy=False), scales.astype(np.float32, copy=False))
        case _:
            return packed.astype(np.float32, copy=False)


def read_stored(storage: Storage, manifest: ShardManifest, info: ArrayInfo) -> Stored:
    """One array with the numbers that are in its files. Raises Damaged."""
    array = _find(manifest, info)
    packed, scales = _stored(storage, manifest, array)
    return Stored(info, array.encoding, packed, None if array.scale is None else scales)


def bytes_per_row(array: ArrayInfo) -> int:
    """What an example costs at rest in this array."""
    return array.dims + 4 if array.embedding is not None else 2 * array.dims + 2


def _encoded(info: ArrayInfo, rows: F32, encoding: str) -> Stored:
    if encoding == SINGLE:
        return Stored(info, encoding, rows.astype(np.float32), None)
    return Stored(info, encoding, *(pack(rows) if encoding == HALF else quantise(rows)))


def _find(manifest: ShardManifest, info: ArrayInfo) -> ShardArray:
    return next(array for array in manifest.arrays if array.info == info)


def _stored(
    storage: Storage, manifest: ShardManifest, array: ShardArray, rows: int | None = None
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    packed = _read(storage, manifest, array.file)
    if packed.shape != (len(manifest.ids) if rows is None else rows, array.info.dims):
        name = f"{folder(manifest.key)}/{array.file}"
        raise Damaged("damaged_file", f"{name} has shape {packed.shape}.", param=name)
    return packed, packed[:0] if array.scale is None else _read(storage, manifest, array.scale)


def _read(storage: Storage, manifest: ShardManifest, name: str) -> NDArray[np.generic]:
    return from_npy(storage.read(f"{folder(manifest.key)}/{name}", sha256=manifest.files[name]))


def _span(rows: Sequence[int]) -> str:
    whole = len(rows) == rows[-1] - rows[0] + 1
    return f"examples {rows[0]} to {rows[-1]}" if whole else f"{len(rows)} chosen examples"
