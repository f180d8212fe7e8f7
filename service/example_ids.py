"""Example ids as fixed-width bytes, (n,) 'S64': a million are 64 MB and no Python object; finding some of many.

Numbers are compared as eight 64-bit words of a row; numpy's own comparison of strings takes ten times as long.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service.cache import Once

Ids = NDArray[np.bytes_]  # (n,) 'S64'
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

WIDTH = 64
_LEAST, _MOST = 1 << 9, 1 << 15  # ids compared at once: few behind a gap, at most what the cache holds
_NEAR = 64  # ids looked through for the next one before all of them are
_JUMPS = 8  # how often all of them are: an index of several datasets has a jump for each
_MIX = np.uint64(0x9E3779B97F4A7C15)


def of(texts: Sequence[str]) -> Ids:
    """Ids from anywhere; what can be no id becomes the empty one, which no example has."""
    return np.array([text if len(text) <= WIDTH and text.isascii() else "" for text in texts], dtype=f"S{WIDTH}")


def pack(ids: Sequence[str]) -> bytes:
    """A .npy file of (n,) 'S64'."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, of(ids), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def unpack(data: bytes) -> Ids:
    """The ids of such a file, without a copy of them."""
    stream = io.BytesIO(data)  # shares the bytes
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return np.frombuffer(data, dtype=dtype, count=shape[0], offset=stream.tell())


def to_arrow(ids: Ids) -> pa.Array:
    """The same as Arrow strings."""
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), len(ids), [None, pa.py_buffer(ids)])
    return fixed.cast(pa.binary()).cast(pa.string())


class Finder:
    """Where ids stand among ``ids``, which are all different. Thread-safe."""

    def __init__(self, ids: Ids) -> None:
        self._words = _words(ids)
        self._sorted = Once(self._sort)

    def positions(self, asked: Ids) -> I64:
        """(m,) of them, −1 for an id that is not there; equal ids may be asked for more than once."""
        words = _words(asked)
        found = _in_order(self._words, words)
        return self._looked_up(words) if found is None else found

    def _sort(self) -> tuple[U64, I64]:
        """Keys in order, and the positions they are of."""
        keys = _keys(self._words)
        order = np.argsort(keys)
        return keys[order], order

    def _looked_up(self, words: U64) -> I64:
        keys, order = self._sorted()
        wanted = _keys(words)
        by_key = np.argsort(
            wanted
        )  # in the order of the table, so that each look finds its part of it in the cache
        at = np.empty(len(wanted), dtype=np.int64)
        at[by_key] = np.searchsorted(keys, wanted[by_key])
        found = np.full(len(wanted), -1, dtype=np.int64)
        left = np.arange(len(wanted))
        while len(left):  # once, and again where two ids share a key
            left = left[at[left] < len(keys)]
            left = left[keys[at[left]] == wanted[left]]
            where = order[at[left]]
            same = (self._words[where] == words[left]).all(axis=1)
            found[left[same]] = where[same]
            left = left[~same]
            at[left] += 1
        return found


def _words(ids: Ids) -> U64:
    """(n, 8): the bytes of each id."""
    return np.ascontiguousarray(ids, dtype=f"S{WIDTH}").view(np.uint64).reshape(-1, WIDTH // 8)


def _keys(words: U64) -> U64:
    """(n,) almost always different for different ids; order means nothing."""
    with np.errstate(over="ignore"):
        return words[:, 0] * _MIX ^ words[:, 1]


def _in_order(held: U64, asked: U64) -> I64 | None:
    """(m,) positions of ids that stand in the order in which they are held, with few gaps: an index and its
    dataset. None for all others, and when one is missing."""
    gaps, jumps = _NEAR + len(asked) // 100, _JUMPS
    found = np.empty(len(asked), dtype=np.int64)
    done = at = 0
    block = _LEAST
    while done < len(asked):
        length = min(block, len(asked) - done, len(held) - at)
        run = _same(held[at : at + length], asked[done : done + length])
        found[done : done + run] = np.arange(at, at + run)
        done, at = done + run, at + run
        if run == length and length:
            block = min(2 * block, _MOST)
            continue
        block = _LEAST
        start = _find(held[at : at + _NEAR], asked[done])
        if start is None and jumps:
            jumps -= 1
            at, start = 0, _find(held, asked[done])
        if start is None or not gaps:
            return None
        gaps -= 1
        at += start
    return found


def _same(a: U64, b: U64) -> int:
    """How many rows are equal before the first that differs."""
    equal = a.ravel() == b.ravel()
    first = int(equal.argmin()) if len(equal) else 0
    return len(a) if not len(equal) or equal[first] else first // a.shape[1]


def _find(held: U64, one: U64) -> int | None:
    """The row that equals ``one``."""
    for near in np.flatnonzero(held[:, 0] == one[0]).tolist():
        if (held[near] == one).all():
            return near
    return None
