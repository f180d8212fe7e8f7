"""The query side of gradient methods at rest: coordinates of −∇f_v(Q), computed once by a job.

The sidecar is written last: it names the sha256 of the vector and what of the query set stands behind it.
"""

from dataclasses import dataclass

import numpy as np

from service import codec
from service.rows import F32, from_npy, to_npy
from service.storage import Storage, sha256_bytes


@dataclass(frozen=True)
class Sidecar:
    sha256: str
    examples: int  # of the query set that were averaged
    quarantined: int  # and that were not


def publish(storage: Storage, key: str, vector: F32, *, examples: int, quarantined: int) -> None:
    """Store (k,) float32 under ``key``, the hash of everything that decides it."""
    data = to_npy(vector)
    storage.write(f"{_stem(key)}.npy", data)
    storage.write(f"{_stem(key)}.json", codec.encode(Sidecar(sha256_bytes(data), examples, quarantined)).encode())


def find(storage: Storage, key: str) -> tuple[F32, Sidecar] | None:
    """The stored vector with its sidecar, or None. Raises Damaged."""
    if not storage.exists(f"{_stem(key)}.json"):
        return None
    sidecar = codec.decode(Sidecar, storage.read(f"{_stem(key)}.json"))
    vector = from_npy(storage.read(f"{_stem(key)}.npy", sha256=sidecar.sha256))
    return vector.astype(np.float32, copy=False), sidecar


def _stem(key: str) -> str:
    return f"coordinates/{key[:2]}/{key}"
