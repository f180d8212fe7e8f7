"""Sets of example ids at rest: what was deleted from an index, or is to be.

An artifact with one tensor: the hexadecimal digits of the ids as ASCII bytes, sorted. It is named by its content.
"""

from collections.abc import Collection

import numpy as np

from service import artifacts, codec
from service.storage import Storage, sha256_bytes
from service.work import FORMAT

STEM = "deleted"
REASON = "deleted"  # of an example that is counted as quarantined because somebody took it out
DIGITS = 64  # of an example id


def store(storage: Storage, ids: Collection[str]) -> str:
    """The artifact that holds these ids, each once; one that is there already stays as it is."""
    packed = np.array(sorted(set(ids)), dtype=f"S{DIGITS}").view(np.uint8).reshape(-1, DIGITS)
    key = codec.digest([FORMAT, STEM, sha256_bytes(packed.tobytes())])
    if artifacts.find(storage, key) is None:
        artifacts.publish(storage, key, {STEM: {"ids": packed}}, facts={"ids": len(packed)})
    return key


def read(storage: Storage, key: str | None) -> frozenset[str]:
    """The ids of the artifact; none where there is none. Raises Damaged."""
    if key is None:
        return frozenset()
    packed = artifacts.read(storage, artifacts.get(storage, key), STEM)["ids"]
    return frozenset(packed.tobytes()[start : start + DIGITS].decode() for start in range(0, packed.size, DIGITS))
