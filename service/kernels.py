"""Inner products of queries with float16 rows, compiled by numba for the processor at hand; the GIL is released.

FAISS scans float16 rows one query at a time, so sixteen queries cost sixteen scans; here a row is read and
converted once for four queries, and every row's score can be had at the price of one scan (docs/decisions/0012).
What a number *means* (scales, outliers, order) is not known here.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from service.rows import F16, F32

TILE = 4  # queries at a time; their number is padded to a multiple

# No reassociation across a row's end, but within a row: sums may run in any order, as in any BLAS.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


@intrinsic
def single(_context: Any, half: Any) -> Any:
    """The float32 of a float16 that is given by its bits: numba has no float16 on CPUs, LLVM does."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@njit(**_OPTIONS)
def _one(rows: Any, query: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        row = rows[i]
        total = np.float32(0)
        for j in range(row.shape[0]):
            total += single(row[j]) * query[j]
        out[i] = total


@njit(**_OPTIONS)
def _four(rows: Any, queries: Any, first: int, out: Any) -> None:
    """Tiles of four rows by four queries: sixteen sums in registers, every number loaded once for four of them."""
    n, d = rows.shape
    q0, q1, q2, q3 = queries[first], queries[first + 1], queries[first + 2], queries[first + 3]
    for i in range(0, n - 3, 4):
        a, b, c, e = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = e0 = e1 = e2 = e3 = np.float32(0)
        for j in range(d):
            w, x, y, z = single(a[j]), single(b[j]), single(c[j]), single(e[j])
            k0, k1, k2, k3 = q0[j], q1[j], q2[j], q3[j]
            a0 += w * k0
            a1 += w * k1
            a2 += w * k2
            a3 += w * k3
            b0 += x * k0
            b1 += x * k1
            b2 += x * k2
            b3 += x * k3
            c0 += y * k0
            c1 += y * k1
            c2 += y * k2
            c3 += y * k3
            e0 += z * k0
            e1 += z * k1
            e2 += z * k2
            e3 += z * k3
        out[first, i], out[first, i + 1], out[first, i + 2], out[first, i + 3] = a0, b0, c0, e0
        out[first + 1, i], out[first + 1, i + 1], out[first + 1, i + 2], out[first + 1, i + 3] = a1, b1, c1, e1
        out[first + 2, i], out[first + 2, i + 1], out[first + 2, i + 2], out[first + 2, i + 3] = a2, b2, c2, e2
        out[first + 3, i], out[first + 3, i + 1], out[first + 3, i + 2], out[first + 3, i + 3] = a3, b3, c3, e3
    for i in range(n - n % 4, n):
        a = rows[i]
        a0 = a1 = a2 = a3 = np.float32(0)
        for j in range(d):
            w = single(a[j])
            a0 += w * q0[j]
            a1 += w * q1[j]
            a2 += w * q2[j]
            a3 += w * q3[j]
        out[first, i], out[first + 1, i], out[first + 2, i], out[first + 3, i] = a0, a1, a2, a3


_CHUNK = 256  # rows that stay in cache while all tiles of queries read them


def dots(rows: F16, query: F32) -> F32:
    """⟨row, query⟩ of every row: (n, d) float16 and (d,) float32 → (n,) float32, summed in float32."""
    out = np.empty(len(rows), dtype=np.float32)
    _one(rows.view(np.uint16), query, out)
    return out


def many_dots(rows: F16, queries: F32) -> F32:
    """⟨row, query⟩ of every row and query: (n, d) float16 and (q, d) float32 → (q, n) float32."""
    count, n = len(queries), len(rows)
    padded = np.zeros((-(-count // TILE) * TILE, queries.shape[1]), dtype=np.float32)
    padded[:count] = queries
    out = np.empty((len(padded), n), dtype=np.float32)
    bits = rows.view(np.uint16)
    for start in range(0, n, _CHUNK):
        for first in range(0, len(padded), TILE):
            _four(bits[start : start + _CHUNK], padded, first, out[:, start : start + _CHUNK])
    return out[:count]


@njit(**_OPTIONS)
def _some(bits: Any, at: Any, query: Any, out: Any) -> None:
    for i in range(len(at)):
        row = bits[at[i]]
        total = np.float64(0)
        for j in range(row.shape[0]):
            total += np.float64(single(row[j])) * query[j]
        out[i] = total


def some_dots(rows: F16, at: NDArray[np.int64], query: NDArray[np.float64]) -> NDArray[np.float64]:
    """⟨row, query⟩ of some rows, summed in float64: (n, d) float16, (m,) positions, (d,) → (m,). A row's number
    is the same whoever else is asked for.
    """
    out = np.empty(len(at), dtype=np.float64)
    _some(rows.view(np.uint16), at, query, out)
    return out


def warm() -> None:
    """Compile now (two seconds), rather than when the first user waits."""
    rows: NDArray[np.float16] = np.zeros((TILE, 8), dtype=np.float16)
    dots(rows, np.zeros(8, dtype=np.float32))
    many_dots(rows, np.zeros((2, 8), dtype=np.float32))
    some_dots(rows, np.zeros(1, dtype=np.int64), np.zeros(8))
