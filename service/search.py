"""Exact inner-product search over stored rows: blocks of float16 in FAISS, searched side by side by a few threads.

A scan runs at memory speed and its recall is that of float16 rounding; approximate indexes can lose a quarter of
the true top 100 on inner products (docs/decisions/0003). One query is FAISS's; several at once, and the scores of
all rows, are computed by ``service/kernels.py`` on the same memory (docs/decisions/0012). What ranks best is scored
again in float64, so that an answer does not depend on who else asked at the same moment.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from service import kernels
from service.errors import Invalid
from service.rows import F16, F32, I16, unpack

Mask = NDArray[np.bool_]
T = TypeVar("T")
R = TypeVar("R")

BLOCK_BYTES = 128 << 20  # of float16 rows: large enough to be scanned at full speed, small enough to spread
_HEADROOM = 8  # rows up to 2^8 times the typical size share the common scale
_ALIGNED = 64  # rows begin at a cache line
_NTOTAL = 8  # where FAISS writes the number of rows: behind its four letters and d
_MARGIN = 16  # more candidates than asked for: rounding to float32 may swap neighbours at the edge


@dataclass(frozen=True)
class TopK:
    """The best rows, best first: ``rows`` (k,) int64 positions, ``scores`` (k,) float32."""

    rows: NDArray[np.int64]
    scores: F32


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

    def search(self, query: F32, k: int, mask: Mask | None) -> tuple[NDArray[np.int64], F32]:
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
        found = np.ldexp(self.rows[rows].astype(np.float64) @ query.astype(np.float64), self.exponent)
        if len(self.outliers):
            place = np.searchsorted(self.outliers, rows)
            there = place < len(self.outliers)
            there[there] = self.outliers[place[there]] == rows[there]
            exact = self._outlier_rows[place[there]].astype(np.float64) @ query.astype(np.float64)
            found[there] = exact
        return found

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

    def _with_outliers(
        self, query: F32, rows: NDArray[np.int64], scores: F32, mask: Mask | None
    ) -> tuple[NDArray[np.int64], F32]:
        if not len(self.outliers):
            return rows, scores
        inliers = ~np.isin(rows, self.outliers)
        allowed = np.ones(len(self.outliers), dtype=bool) if mask is None else mask[self.outliers]
        rows = np.concatenate([rows[inliers], self.outliers[allowed]])
        return rows, np.concatenate([scores[inliers], self._outlier_rows[allowed] @ query]).astype(np.float32)


class VectorIndex:
    """n rows of d numbers in blocks, immutable. Thread-safe; the GIL is released while it searches."""

    def __init__(self, packed: F16, exponents: I16, *, threads: int) -> None:
        """``packed`` (n, d) and ``exponents`` (n,) as ``service.rows.pack`` makes them."""
        n, d = packed.shape
        made = []
        for start, stop in spans(n, d, threads):
            block = Block(stop - start, d)
            block.rows[:] = packed[start:stop]
            made.append(block.finish(exponents[start:stop]))
        self._keep(made, d, threads)

    @classmethod
    def of(cls, blocks: Sequence[Block], d: int, *, threads: int) -> "VectorIndex":
        """Of finished blocks, which other versions of an index may share."""
        made = cls.__new__(cls)
        made._keep(blocks, d, threads)
        return made

    def _keep(self, blocks: Sequence[Block], d: int, threads: int) -> None:
        self.d = d
        self.blocks = tuple(block for block in blocks if block.n)
        self._starts = np.cumsum([0, *(block.n for block in self.blocks)])
        self.n = int(self._starts[-1])
        self._threads = threads

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self.blocks)

    def search(self, query: F32, k: int, mask: Mask | None = None) -> TopK:
        """The k rows with the largest ⟨query, row⟩ among those that ``mask`` (n,) allows; ``query`` (d,) finite."""
        query = self._check(query)
        k = min(k, self.n)
        if k <= 0:
            return _NOTHING
        wanted = k + _MARGIN

        def one(number: int) -> tuple[NDArray[np.int64], F32]:
            rows, scores = self.blocks[number].search(query, wanted, self._part(mask, number))
            return rows + self._starts[number], scores

        found = self._each(one, range(len(self.blocks)))
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._ranked(query, rows, scores, k)

    def search_many(
        self, queries: Sequence[F32], ks: Sequence[int], masks: Sequence[Mask | None] | None = None
    ) -> list[TopK]:
        """``search`` for several queries in one pass over the rows."""
        masks = masks or [None] * len(queries)
        if len(queries) == 1:
            return [self.search(queries[0], ks[0], masks[0])]
        together = np.stack([self._check(query) for query in queries])
        wanted = [min(k, self.n) + _MARGIN for k in ks]
        # The k-th best so far: rows below it need no second look. Threads may read an older one, which is lower.
        least = np.full(len(queries), -np.inf, dtype=np.float32)

        def one(number: int) -> list[tuple[NDArray[np.int64], F32]]:
            scores = self.blocks[number].many_scores(together)
            return [
                self._candidates(scores[asked], number, masks[asked], wanted[asked], least, asked)
                for asked in range(len(queries))
            ]

        found = self._each(one, range(len(self.blocks)))
        answers = []
        for asked, query in enumerate(together):
            parts = [of_block[asked] for of_block in found]
            rows, scores = (np.concatenate(each) for each in zip(*parts, strict=True)) if parts else ((), ())
            k = min(ks[asked], self.n)
            answers.append(self._ranked(query, np.asarray(rows, np.int64), np.asarray(scores), k))
        return answers

    def scores(self, query: F32) -> F32:
        """⟨query, row⟩ of every row, (n,) float32: one pass over the rows."""
        query = self._check(query)
        found = self._each(lambda number: self.blocks[number].scores(query), range(len(self.blocks)))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def take(self, rows: NDArray[np.int64]) -> F32:
        """Some rows in float32, (len(rows), d), in this order."""
        out = np.empty((len(rows), self.d), dtype=np.float32)
        for number, at in self._by_block(rows):
            out[at] = self.blocks[number].take(rows[at] - self._starts[number])
        return out

    def excerpt(self, rows: NDArray[np.int64]) -> "VectorIndex":
        """Some rows, ascending, as an index of their own."""
        blocks = []
        for number, at in self._by_block(rows):
            blocks.append(self.blocks[number].excerpt(rows[at] - self._starts[number]))
        return VectorIndex.of(blocks, self.d, threads=self._threads)

    def _candidates(
        self, scores: F32, number: int, mask: Mask | None, k: int, least: F32, asked: int
    ) -> tuple[NDArray[np.int64], F32]:
        """At most k rows of a block that may be among the k best of all."""
        allowed = scores >= least[asked]
        if mask is not None:
            allowed &= self._part(mask, number)
        rows = np.flatnonzero(allowed)
        values = scores[rows]
        if len(rows) > k:
            best = np.argpartition(-values, k - 1)[:k]
            rows, values = rows[best], values[best]
        if len(rows) == k:
            least[asked] = max(least[asked], values.min())
        return rows + self._starts[number], values

    def _ranked(self, query: F32, rows: NDArray[np.int64], scores: F32, k: int) -> TopK:
        """The k best of the candidates by their float64 scores; of equal ones the first row."""
        if len(rows) > k + _MARGIN:
            rows = rows[np.argpartition(-scores, k + _MARGIN - 1)[: k + _MARGIN]]
        exact = np.empty(len(rows), dtype=np.float64)
        for number, at in self._by_block(rows):
            exact[at] = self.blocks[number].rescore(rows[at] - self._starts[number], query)
        order = np.lexsort((rows, -exact))[:k]
        with np.errstate(over="ignore"):
            return TopK(rows[order], exact[order].astype(np.float32))

    def _by_block(self, rows: NDArray[np.int64]) -> Iterable[tuple[int, NDArray[np.int64]]]:
        """(block, positions in ``rows`` of those that it holds)."""
        held = np.searchsorted(self._starts, rows, side="right") - 1
        return [(int(number), np.flatnonzero(held == number)) for number in np.unique(held)]

    def _part(self, mask: Mask | None, number: int) -> Mask | None:
        return None if mask is None else mask[self._starts[number] : self._starts[number + 1]]

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if self._threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        return list(pool(self._threads).map(work, items))

    def _check(self, query: F32) -> F32:
        if query.shape != (self.d,) or not np.isfinite(query).all():
            raise Invalid("bad_query_vector", f"A query needs {self.d} finite numbers, got shape {query.shape}.")
        return np.ascontiguousarray(query, dtype=np.float32)


_NOTHING = TopK(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


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


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """The threads that all searches of this process share: blocks of queries at once take turns."""
    return ThreadPoolExecutor(threads, thread_name_prefix="search")


def spans(n: int, d: int, threads: int = 1) -> list[tuple[int, int]]:
    """Rows of each block: as many as fit, and no fewer blocks than threads where rows are enough."""
    most = max(1, BLOCK_BYTES // max(1, 2 * d))
    size = max(1, min(most, -(-n // threads)))
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _not_zero(packed: F16, exponents: I16) -> Mask:
    """Rows with a number in them; zero rows have exponent 0, which says nothing about size."""
    mask = exponents != 0
    mask[~mask] = packed[~mask].any(axis=1)
    return mask
