"""Sets of example ids at rest: what was deleted from an index, or is to be.

An artifact with one tensor: the hexadecimal digits of the ids as ASCII bytes, sorted. It is named by its content.
"""

from collections.abc import Collection

import numpy as np

from service import artifacts, codec
from service.errors import Damaged
from service.storage import Storage, sha256_bytes
from service.work import FORMAT

STEM = "deleted"
REASON = "deleted"  # of an example that is counted as quarantined because somebody took it out
DIGITS = 64  # of an example id


def store(storage: Storage, ids: Collection[str]) -> str:
    """The artifact that holds these ids, each once; one that is there already stays as it is."""
    packed = np.array(sorted(set(ids)), dtype=f"S{DIGITS}").view(np.uint8).reshape(-1, DIGITS)
    key = _key(packed.tobytes())
    if artifacts.find(storage, key) is None:
        artifacts.publish(storage, key, {STEM: {"ids": packed}}, facts={"ids": len(packed)})
    return key


def read(storage: Storage, key: str | None) -> frozenset[str]:
    """The ids of the artifact; none where there is none. Raises Damaged."""
    if key is None:
        return frozenset()
    data = artifacts.read(storage, artifacts.get(storage, key), STEM)["ids"].tobytes()
    if _key(data) != key:
        raise Damaged("damaged_file", f"Artifact {key} holds other ids than its name says.", param=key)
    digits = data.decode("ascii")
    return frozenset(digits[start : start + DIGITS] for start in range(0, len(digits), DIGITS))


def _key(data: bytes) -> str:
    return codec.digest([FORMAT, STEM, sha256_bytes(data)])
