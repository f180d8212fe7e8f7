"""Rows of float16 as FAISS searches them, without a copy, and in 8 bits beside that where it pays.

Rows of one block share a power of two, so that their products can be compared; the few that do not fit it are kept
in float32 (docs/decisions/0012).
"""

import threading
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from service import kernels, screening
from service.rows import F16, F32, I16, unpack
from service.screening import Mask, Screen

F64 = NDArray[np.float64]
# Rows that may be among the best, in no order, and their scores: in float64 none is missing, and answers hold them.
Found = tuple[NDArray[np.int64], F32 | F64]

BLOCK_BYTES = 128 << 20  # of float16 rows: large enough to be scanned at full speed, small enough to spread
_HEADROOM = 8  # rows up to 2^8 times the typical size share the common scale
_ALIGNED = 64  # rows begin at a cache line
_NTOTAL = 8  # where FAISS writes the number of rows: behind its four letters and d
_EXPONENTS = 60  # beyond which scores in float32 may leave its range
_CROWD = 8  # a screen is of no use where more than every eighth row is wanted, or left by it
PATIENCE = 64  # queries in a row of which a screen may fail half before it is given up


class Block:
    """Up to ``BLOCK_BYTES`` of rows. Fill ``rows``, call ``finish``, change no more. FAISS searches this memory."""

    def __init__(self, n: int, d: int) -> None:
        self.n, self.d = n, d
        head = _faiss_head(n, d)
        # numpy asks for huge pages and writes no zeros: four times as fast as memory that FAISS allocates itself
        memory = np.empty(len(head) + 2 * n * d + _ALIGNED, dtype=np.uint8)
        skipped = -(memory.ctypes.data + len(head)) % _ALIGNED
        self._file = memory[skipped : skipped + len(head) + 2 * n * d]
        self._file[: len(head)] = head
        self.rows: F16 = self._file[len(head) :].view(np.float16).reshape(n, d)
        self.exponent = 0  # rows ≈ ``rows`` · 2^exponent
        self.outliers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._outlier_rows: F32 = np.zeros((0, d), dtype=np.float32)
        self._screen: Screen | None = None
        self._screening = threading.Lock()
        self._given_up = False
        self._looks = self._lost = 0  # queries that the screen was asked lately, and those it did not narrow down

    @cached_property
    def _faiss(self) -> Any:
        """The index that the memory is, read as a file without a copy."""
        zero_copy: Any = faiss.ZeroCopyIOReader  # pyright: ignore[reportAttributeAccessIssue]
        reader = zero_copy(faiss.swig_ptr(self._file), self._file.size)
        index: Any = faiss.read_index(reader)
        if (index.ntotal, index.d, index.codes.is_owned) != (self.n, self.d, False):
            raise RuntimeError(f"FAISS {faiss.__version__} reads another layout of float16 rows")
        return index

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.d

    def finish(self, exponents: I16) -> "Block":
        """Give all rows one scale, so that FAISS compares like with like; ``exponents`` (n,) as ``rows.pack`` makes
        them. The few rows far above it would overflow float16 (or, if they set the scale, crush all others to
        zero): those are kept in float32.
        """
        sizes = exponents[_not_zero(self.rows, exponents)]
        self.exponent = int(min(sizes.max(), np.median(sizes) + _HEADROOM)) if len(sizes) else 0
        self.outliers = np.flatnonzero(exponents > self.exponent)
        if len(self.outliers):
            self._outlier_rows = unpack(self.rows[self.outliers], exponents[self.outliers])
            self.rows[self.outliers] = 0
        shift = (exponents - self.exponent).astype(np.int32)
        below = np.flatnonzero(shift < 0)
        if len(below):
            self.rows[below] = np.ldexp(self.rows[below], shift[below, None])
        return self

    def make_screen(self) -> None:
        """Once, however many versions share the block; not where it would not help, or has been given up."""
        if abs(self.exponent) > _EXPONENTS or not screening.worthwhile(self.n, self.d):
            return
        screening.warm()
        with self._screening:
            if self._screen is None and not self._given_up:
                self._screen = Screen(self.rows, outliers=self.outliers, exponent=self.exponent)

    def give_up_screen(self) -> None:
        """Have no screen from now on, nor its memory."""
        with self._screening:
            self._screen, self._given_up = None, True

    def narrowed(
        self, queries: F32, ks: Sequence[int], masks: Sequence[Mask | None], bars: F32, given: Sequence[F32] | F32
    ) -> list[Found | None]:
        """``search`` for every query, by the screen: all rows that can be among the k best, and their scores as
        ``rescore`` has them for the query as it was ``given``. None for those that the screen does not help.

        ``bars`` (q,): scores that k rows are known to reach; raised by what is found here.
        """
        screen = self._screen
        few = [at for at, k in enumerate(ks) if _CROWD * k <= self.n]
        answers: list[Found | None] = [None] * len(ks)
        if screen is None or not few:
            return answers
        of_few = bars[few]
        found = screen.candidates(queries[few], [ks[at] for at in few], [masks[at] for at in few], of_few)
        bars[few] = np.maximum(bars[few], of_few)
        for at, rows in zip(few, found, strict=True):
            if rows is not None:
                answers[at] = rows, self.rescore(rows, given[at])
        self._looks += len(found)
        self._lost += sum(rows is None or _CROWD * len(rows) > self.n for rows in found)
        if self._looks >= PATIENCE:
            if 2 * self._lost > self._looks:
                self.give_up_screen()
            self._looks = self._lost = 0
        return answers

    def search(self, query: F32, k: int, mask: Mask | None) -> Found:
        """Candidates for the k best rows that ``mask`` (n,) allows, and their scores in float32; in no order."""
        faiss.omp_set_num_threads(1)  # of this thread: blocks run side by side instead
        wanted = min(k + len(self.outliers), self.n)
        if mask is None:
            scores, rows = self._faiss.search(query[None], wanted)
        else:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(self.n, faiss.swig_ptr(bits))
            only: Any = faiss.SearchParameters(sel=selector)  # pyright: ignore[reportCallIssue]
            scores, rows = self._faiss.search(query[None], wanted, params=only)
        found = rows[0] >= 0
        return self._with_outliers(query, rows[0][found], self._scaled(scores[0][found]), mask)

    def scores(self, query: F32) -> F32:
        """Of every row, (n,)."""
        return self._exact_outliers(query, self._scaled(kernels.dots(self.rows, query)))

    def many_scores(self, queries: F32) -> F32:
        """Of every query and row, (q, n)."""
        scores = self._scaled(kernels.many_dots(self.rows, queries))
        if len(self.outliers):
            scores[:, self.outliers] = queries @ self._outlier_rows.T
        return scores

    def rescore(self, rows: NDArray[np.int64], query: F32) -> NDArray[np.float64]:
        """⟨query, row⟩ in float64 from what is stored: the scores that answers hold."""
        found = np.ldexp(kernels.some_dots(self.rows, rows, query.astype(np.float64)), self.exponent)
        if len(self.outliers):
            there, outliers = self._outliers_among(rows)
            found[there] = outliers.astype(np.float64) @ query.astype(np.float64)
        return found

    def products(self, row: int, query: F32) -> float:
        """Σ|q_j x_j| over one row: what the rounding of its score is in proportion to."""
        there, outliers = self._outliers_among(np.array([row]))
        exponent = 0 if there[0] else self.exponent
        own = outliers[0] if there[0] else self.rows[row]
        return float(np.ldexp(np.abs(own.astype(np.float64)) @ np.abs(query.astype(np.float64)), exponent))

    def _outliers_among(self, rows: NDArray[np.int64]) -> tuple[Mask, F32]:
        """Which of the rows are outliers, and the numbers of those."""
        place = np.searchsorted(self.outliers, rows)
        there = place < len(self.outliers)
        there[there] = self.outliers[place[there]] == rows[there]
        return there, self._outlier_rows[place[there]]

    def take(self, rows: NDArray[np.int64]) -> F32:
        """Some rows in float32, (len(rows), d)."""
        found = np.ldexp(self.rows[rows].astype(np.float32), np.int32(self.exponent))
        place = {int(row): number for number, row in enumerate(self.outliers)}
        for at, row in enumerate(rows.tolist()):
            if row in place:
                found[at] = self._outlier_rows[place[row]]
        return found

    def excerpt(self, rows: NDArray[np.int64]) -> "Block":
        """Some rows as a block of their own."""
        made = Block(len(rows), self.d)
        made.rows[:] = self.rows[rows]
        made.exponent = self.exponent
        _, own, place = np.intersect1d(rows, self.outliers, return_indices=True)
        made.outliers, made._outlier_rows = own.astype(np.int64), self._outlier_rows[place]
        return made

    def _scaled(self, scores: F32) -> F32:
        return np.ldexp(scores, np.int32(self.exponent)) if self.exponent else scores

    def _exact_outliers(self, query: F32, scores: F32) -> F32:
        if len(self.outliers):
            scores[self.outliers] = self._outlier_rows @ query
        return scores

    def _with_outliers(self, query: F32, rows: NDArray[np.int64], scores: F32, mask: Mask | None) -> Found:
        if not len(self.outliers):
            return rows, scores
        inliers = ~np.isin(rows, self.outliers)
        allowed = np.ones(len(self.outliers), dtype=bool) if mask is None else mask[self.outliers]
        rows = np.concatenate([rows[inliers], self.outliers[allowed]])
        return rows, np.concatenate([scores[inliers], self._outlier_rows[allowed] @ query]).astype(np.float32)


@cache
def _faiss_head(n: int, d: int) -> NDArray[np.uint8]:
    """What FAISS writes before the codes of n float16 rows: that of one row, with its two counts replaced."""
    one: Any = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    one.add_sa_codes(np.zeros((1, 2 * d), dtype=np.uint8))
    head = faiss.serialize_index(one)[: -2 * d].copy()
    rows, size = head[_NTOTAL : _NTOTAL + 8].view(np.int64), head[-8:].view(np.int64)
    if (rows[0], size[0]) != (1, 2 * d):
        raise RuntimeError(f"FAISS {faiss.__version__} writes another layout of float16 rows")
    rows[0], size[0] = n, 2 * n * d
    return head


def _not_zero(packed: F16, exponents: I16) -> Mask:
    """Rows with a number in them; zero rows have exponent 0, which says nothing about size."""
    mask = exponents != 0
    mask[~mask] = packed[~mask].any(axis=1)
    return mask
