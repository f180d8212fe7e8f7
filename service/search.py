"""Exact inner-product search over stored rows with FAISS: a float16 scan, one thread per shard of rows.

A scan runs at memory speed and its recall is that of float16 rounding; approximate indexes can lose a
quarter of the true top 100 on inner products (docs/decisions/0003).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from service.errors import Invalid
from service.rows import F16, F32, I16, unpack

_BLOCK = 4096  # rows decoded at a time
_HEADROOM = 8  # rows up to 2^8 times the typical size share the common scale


@dataclass(frozen=True)
class TopK:
    """The best rows, best first: ``rows`` (k,) int64 positions, ``scores`` (k,) float32."""

    rows: NDArray[np.int64]
    scores: F32


class VectorIndex:
    """n rows of d numbers, immutable. Thread-safe; FAISS releases the GIL while it searches."""

    def __init__(self, packed: F16, exponents: I16, *, threads: int) -> None:
        """``packed`` (n, d) and ``exponents`` (n,) as ``service.rows.pack`` makes them."""
        self.n, self.d = packed.shape
        # One scale for all rows, so that FAISS compares like with like. The few rows far above it would
        # overflow float16 (or, if they set the scale, crush all others to zero): those are kept in float32.
        sizes = exponents[_not_zero(packed, exponents)]
        self._exponent = int(min(sizes.max(), np.median(sizes) + _HEADROOM)) if len(sizes) else 0
        self._outliers = np.flatnonzero(exponents > self._exponent)
        self._outlier_rows = unpack(packed[self._outliers], exponents[self._outliers])
        shift = (exponents - self._exponent).astype(np.int32)
        if shift.any():
            packed = packed.copy()
            packed[self._outliers] = 0
            below = np.flatnonzero(shift < 0)
            packed[below] = np.ldexp(packed[below], shift[below, None])
        self._packed = np.array(packed)
        self._faiss = _flat_fp16(packed, threads)

    def search(self, query: F32, k: int) -> TopK:
        """The k rows with the largest ⟨query, row⟩; ``query`` (d,) finite."""
        query = self._check(query)
        k = min(k, self.n)
        if k == 0:
            return TopK(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        scores, rows = self._faiss.search(query[None], min(k + len(self._outliers), self.n))
        keep = rows[0] >= 0
        found, values = rows[0][keep], np.ldexp(scores[0][keep], self._exponent)
        if len(self._outliers):
            inliers = ~np.isin(found, self._outliers)
            found = np.concatenate([found[inliers], self._outliers])
            values = np.concatenate([values[inliers], self._outlier_rows @ query])
            order = np.argsort(-values, kind="stable")[:k]
            found, values = found[order], values[order]
        return TopK(found, values.astype(np.float32))

    def scores(self, query: F32) -> F32:
        """⟨query, row⟩ of every row, (n,) float32."""
        query = self._check(query)
        return np.concatenate([np.zeros(0, np.float32), *(block @ query for block in self._blocks())])

    def _blocks(self) -> Iterator[F32]:
        for start in range(0, self.n, _BLOCK):
            stop = min(start + _BLOCK, self.n)
            rows = unpack(self._packed[start:stop], np.full(stop - start, self._exponent, dtype=np.int16))
            here = (self._outliers >= start) & (self._outliers < stop)
            rows[self._outliers[here] - start] = self._outlier_rows[here]
            yield rows

    def _check(self, query: F32) -> F32:
        if query.shape != (self.d,) or not np.isfinite(query).all():
            raise Invalid("bad_query_vector", f"A query needs {self.d} finite numbers, got shape {query.shape}.")
        return np.ascontiguousarray(query, dtype=np.float32)


def _not_zero(packed: F16, exponents: I16) -> NDArray[np.bool_]:
    """Rows with a number in them; zero rows have exponent 0, which says nothing about size."""
    mask = exponents != 0
    mask[~mask] = packed[~mask].any(axis=1)
    return mask


def _flat_fp16(packed: F16, threads: int) -> Any:
    """FAISS shards over contiguous runs of rows, ids numbered through; no copy through float32."""
    n, d = packed.shape
    shards: Any = faiss.IndexShards(d, True, True)  # pyright: ignore[reportCallIssue]  # threaded, successive ids
    shards.own_indices = True
    for part in np.array_split(packed, max(1, min(threads, n))):
        flat: Any = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        flat.add_sa_codes(np.ascontiguousarray(part).view(np.uint8).reshape(len(part), 2 * d))
        flat.this.disown()  # the shards own it now
        shards.add_shard(flat)
    return shards
