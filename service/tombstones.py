"""Sets of example ids at rest: what was deleted from an index, or is to be.

An artifact with one tensor: the hexadecimal digits of the ids as ASCII bytes, sorted. It is named by its content.
What somebody asked to delete lies apart from what a version has deleted, also where both are the same: nothing else
knows it, and the version's own is made again from it.
"""

from collections.abc import Collection

import numpy as np

from service import artifacts, codec
from service.errors import Damaged, NotFound
from service.storage import Storage, sha256_bytes
from service.work import FORMAT

STEM = "deleted"
ASKED = "asked"  # of a request, as part of its key
REASON = "deleted"  # of an example that is counted as quarantined because somebody took it out
DIGITS = 64  # of an example id


def store(storage: Storage, ids: Collection[str], *, asked: bool = False) -> str:
    """The artifact that holds these ids, each once; one that is there and whole stays as it is.

    ``asked``: they are those of a request.
    """
    packed = np.array(sorted(set(ids)), dtype=f"S{DIGITS}").view(np.uint8).reshape(-1, DIGITS)
    key = _key(packed.tobytes(), ASKED if asked else STEM)
    if artifacts.made(storage, key) is None or not _whole(storage, key):
        artifacts.publish(storage, key, {STEM: {"ids": packed}}, facts={"ids": len(packed)}, by_content=True)
    return key


def read(storage: Storage, key: str | None) -> frozenset[str]:
    """The ids of the artifact; none where there is none. Raises Damaged."""
    if key is None:
        return frozenset()
    data = artifacts.read(storage, artifacts.get(storage, key), STEM)["ids"].tobytes()
    if key not in {_key(data, STEM), _key(data, ASKED)}:
        file = f"{artifacts.folder(key)}/{artifacts.MANIFEST}"
        raise Damaged("damaged_file", f"Artifact {key} holds other ids than its name says.", param=file)
    digits = data.decode("ascii")
    return frozenset(digits[start : start + DIGITS] for start in range(0, len(digits), DIGITS))


def _whole(storage: Storage, key: str) -> bool:
    try:
        read(storage, key)
    except (Damaged, NotFound):
        return False
    return True


def _key(data: bytes, about: str) -> str:
    return codec.digest([FORMAT, about, sha256_bytes(data)])
