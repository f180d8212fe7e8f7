"""The numeric formats of stored rows: float16 with one power of two per row, int8 with one scale per row.

``half``: gradients of one index span many orders of magnitude, so plain float16 would underflow (small losses) or
overflow (outliers). A power of two costs no precision, and it is rounded to a multiple of 8, so that
rows of similar size share it and search can use their bytes as they are.
"""

import io

import numpy as np
from numpy.typing import NDArray

from service.errors import Invalid

_TOP = 15  # the largest number of a row ends below 2^15; float16 holds up to 65504
_STEP = 8
_LARGEST = np.finfo(np.float32).max

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
I16 = NDArray[np.int16]


def pack(rows: F32) -> tuple[F16, I16]:
    """(n, d) finite float32 → (n, d) float16 and (n,) exponents: rows ≈ packed · 2^exponent.

    Relative error of an entry ≤ 2^-11 as long as it is within 2^-21 of the largest of its row.
    Raises Invalid when an entry is NaN or infinite: such a row must be quarantined before.
    """
    if not np.isfinite(rows).all():
        raise Invalid("not_finite", "Rows to be stored hold NaN or infinity.")
    largest = np.abs(rows).max(axis=1, initial=0.0)
    _, exponent = np.frexp(largest)  # largest = m · 2^exponent, 1/2 ≤ m < 1
    exponent = np.ceil((exponent - _TOP) / _STEP).astype(np.int16) * np.int16(_STEP)
    exponent[largest == 0] = 0
    packed = np.ldexp(rows, -exponent[:, None].astype(np.int32)).astype(np.float16)
    return packed, exponent


def unpack(packed: F16, exponent: I16) -> F32:
    """The float32 rows that ``pack`` stored, to float16 precision."""
    with np.errstate(over="ignore"):  # the largest float32 may have been rounded up
        rows = np.ldexp(packed.astype(np.float32), exponent[:, None].astype(np.int32))
    return np.clip(rows, -_LARGEST, _LARGEST)


def quantise(rows: F32) -> tuple[I8, F32]:
    """(n, d) finite float32 → (n, d) int8 and (n,) float32 scales: rows ≈ int8 · scale.

    One scale per row, not per dimension: rows are heavy-tailed (DESIGN section 1). Error of an entry ≤ 1/254 of
    the largest of its row. Raises Invalid when an entry is NaN or infinite.
    """
    if not np.isfinite(rows).all():
        raise Invalid("not_finite", "Rows to be stored hold NaN or infinity.")
    largest = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32)
    scale = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(rows / scale[:, None]).clip(-127, 127).astype(np.int8), scale


def dequantise(packed: I8, scale: F32) -> F32:
    """The float32 rows that ``quantise`` stored, to int8 precision."""
    with np.errstate(over="ignore"):  # the largest float32 may have been rounded up
        rows = packed.astype(np.float32) * scale[:, None]
    return np.clip(rows, -_LARGEST, _LARGEST)


def to_npy(array: NDArray[np.generic]) -> bytes:
    """The array as the bytes of an .npy file."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(array), allow_pickle=False)
    return sink.getvalue()


def from_npy(data: bytes) -> NDArray[np.generic]:
    """The array in the bytes of an .npy file; never unpickles."""
    return np.load(io.BytesIO(data), allow_pickle=False)
