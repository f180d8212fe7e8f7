"""A first look at rows in 8 bits: half the bytes of a scan, and no row is lost by it.

Beside its float16 form a row x is kept as x ≈ s · (c ∘ b): b (d,) int8, s a scale of the row, c (d,) powers of two
that level the columns of a block. With q' = c ∘ q, itself rounded to t · p with p of 15 bits,

    ⟨q, x⟩ = s t ⟨p, b⟩ + ⟨q' − t p, s b⟩ + ⟨q', x/c − s b⟩,

and by Cauchy–Schwarz the last two are at most ‖q' − t p‖ · ‖s b‖ + ‖q'‖ · ‖x/c − s b‖. Both norms of the row are
computed when it is encoded, so every score has a lower and an upper bound, and a row whose upper bound lies below
the k-th best lower bound is none of the k best. The few that remain are scored from float16 as always: no recall is
traded (docs/decisions/0018).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from service import int8
from service.rows import F16, F32

Mask = NDArray[np.bool_]

_SAMPLE = 512  # rows that level the columns
_ROUNDING = 2e-6  # of ‖q'‖ ‖x/c‖: more than float32 arithmetic loses on the way
_NUMBERS = 12  # bytes of the three numbers that a row has beside its codes
_LEAST = 1 << 23  # numbers of a block: smaller ones are scanned in a millisecond
_FACTOR, _SPARE = 4, 2048  # candidates that find room: so many for each of the k, and more


def worthwhile(n: int, d: int) -> bool:
    """Whether rows of this shape are read faster in 8 bits."""
    return 4 * (_width(d) + _NUMBERS) < 3 * 2 * d and n * d >= _LEAST and d <= int8.WIDEST


def bytes_of(blocks: Sequence[int], d: int) -> int:
    """Of memory that the screens of blocks of so many rows take."""
    return sum(n * (_width(d) + _NUMBERS) for n in blocks if worthwhile(n, d))


class Screen:
    """The rows of a block in 8 bits."""

    def __init__(self, rows: F16, *, outliers: NDArray[np.int64], exponent: int) -> None:
        """``rows`` (n, d) times 2^``exponent``; ``outliers``: rows whose numbers are not these."""
        n, d = rows.shape
        self.n, self.d = n, d
        tiles, lanes = -(-n // int8.TILE), _width(d) // int8.LANES
        self._codes: int8.Codes = np.zeros((tiles, lanes, int8.TILE, int8.LANES), dtype=np.uint8)
        self._levels = _levels(rows)
        self._scale, self._slack, self._size = int8.encode(rows, np.float32(1) / self._levels, self._codes)
        self._slack += _ROUNDING * (self._slack + self._size)
        self._slack[outliers] = np.inf  # nothing is known: they are looked at always, and set no bar
        self._exponent = exponent

    def candidates(
        self, queries: F32, ks: Sequence[int], masks: Sequence[Mask | None], bars: F32
    ) -> list[NDArray[np.int64] | None]:
        """Of each query (q, d) the rows (m,) that may be among its k best, of those that its mask (n,) allows.

        None: they are too many to be worth a second look.

        ``bars`` (q,): scores that k rows are known to reach; raised by what is found here.
        """
        count = len(queries)
        planes, shift, step, reach, blur = self._rounded(queries)
        most = _FACTOR * max(ks) + _SPARE
        rows = np.empty((count, most), dtype=np.int32)
        upper, lower = (np.empty((count, most), dtype=np.float32) for _ in range(2))
        counts = np.zeros(count, dtype=np.int64)
        whole = np.ones(self.n, dtype=bool) if any(mask is not None for mask in masks) else None
        allowed = np.zeros((0, 0), dtype=bool)
        if whole is not None:
            allowed = np.stack([whole if mask is None else mask for mask in masks])
        int8.scan(min(count, 2))(
            self._codes,
            self._scale,
            self._slack,
            self._size,
            planes,
            shift,
            step,
            reach,
            blur,
            allowed,
            bars,
            np.asarray(ks, dtype=np.int64),
            rows,
            upper,
            lower,
            counts,
        )
        return [
            rows[at, :found].astype(np.int64) if found <= most else None for at, found in enumerate(counts.tolist())
        ]

    def _rounded(self, queries: F32) -> tuple[int8.Planes, NDArray[np.int64], F32, F32, F32]:
        """Of each query: two planes of 8 bits, what the offset of the codes adds to its products, t, ‖q'‖, and how
        far a row of size 1 may be off for the query's own rounding and that of float32.
        """
        # An even number of queries, so that they can be taken in pairs; what is added is not looked at.
        planes = np.zeros((len(queries) + len(queries) % 2, int8.PLANES, _width(self.d)), dtype=np.int8)
        rounded = [int8.round_query(query, self._levels, own) for query, own in zip(queries, planes, strict=False)]
        t, total, reach, missed = (np.array(each) for each in zip(*rounded, strict=True))
        shift = int8.OFFSET * total.astype(np.int64)
        numbers = (t, reach, missed + _ROUNDING * reach)
        step, reach, blur = (np.ldexp(each, self._exponent).astype(np.float32) for each in numbers)
        # ‖q'‖ of no query is 0, so that it may be multiplied with infinity
        return planes, shift, step, np.maximum(reach, np.finfo(np.float32).tiny), blur


def _width(d: int) -> int:
    return -(-d // int8.LANES) * int8.LANES


def _levels(rows: F16) -> F32:
    """(d,) powers of two, exact to multiply with, near the root mean square of each column over some rows."""
    some = rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(np.int64)].astype(np.float64)
    size = np.sqrt(np.mean(some * some, axis=0))
    typical = float(np.median(size[size > 0])) if size.any() else 1.0
    size = np.clip(size, typical / 256, typical * 256)
    return np.exp2(np.rint(np.log2(size))).astype(np.float32)


@cache
def warm() -> None:
    """Compile, which takes some seconds, before anybody waits for it."""
    screen = Screen(np.ones((1, 1), dtype=np.float16), outliers=np.zeros(0, dtype=np.int64), exponent=0)
    for count in (1, 2):
        bars = np.full(count, -np.inf, dtype=np.float32)
        screen.candidates(np.ones((count, 1), dtype=np.float32), [1] * count, [None] * count, bars)
