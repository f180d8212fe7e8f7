"""Exact inner-product search over stored rows: blocks of float16 in FAISS, searched side by side by a few threads.

A scan runs at memory speed and its recall is that of float16 rounding; approximate indexes can lose a quarter of
the true top 100 on inner products (docs/decisions/0003). Blocks that are asked again are kept in 8 bits as well,
which say of nearly all rows that they are none of the best (``service/screening.py``). Where they do not, one query
is FAISS's; several at once, and the scores of all rows, are computed by ``service/kernels.py`` on the same memory
(docs/decisions/0012). What ranks best is scored again in float64, so that answers depend neither on who else asked
at the same moment nor on what is in memory.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from service import kernels, screening
from service.errors import Invalid
from service.int8 import some_dots
from service.rows import F16, F32, I16, unpack
from service.screening import Screen

Mask = NDArray[np.bool_]
T = TypeVar("T")
R = TypeVar("R")

BLOCK_BYTES = 128 << 20  # of float16 rows: large enough to be scanned at full speed, small enough to spread
_HEADROOM = 8  # rows up to 2^8 times the typical size share the common scale
_ALIGNED = 64  # rows begin at a cache line
_NTOTAL = 8  # where FAISS writes the number of rows: behind its four letters and d
_EXPONENTS = 60  # beyond which scores in float32 may leave its range
_CROWD = 8  # a screen is of no use where more than every eighth row is wanted, or left by it
_PATIENCE = 64  # queries after which a screen that fails half of them is given up
_MARGIN = 16  # more candidates than asked for: rounding to float32 may swap neighbours at the edge


@dataclass(frozen=True)
class TopK:
    """The best rows, best first: ``rows`` (k,) int64 positions, ``scores`` (k,) float32."""

    rows: NDArray[np.int64]
    scores: F32


Found = tuple[NDArray[np.int64], F32]  # rows that may be among the best, in no order, and their scores


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
        self._looks = self._lost = 0  # queries that the screen was asked, and those it could not narrow down

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

    @property
    def screenable(self) -> bool:
        """Whether a screen would make this block faster."""
        helps = self._lost <= self._looks // 2 or self._looks < _PATIENCE
        return helps and abs(self.exponent) <= _EXPONENTS and screening.worthwhile(self.n, self.d)

    def make_screen(self) -> None:
        """Once, however many versions share the block."""
        screening.warm()
        with self._screening:
            if self._screen is None and self.screenable:
                self._screen = Screen(self.rows, outliers=self.outliers, exponent=self.exponent)

    def narrowed(
        self, queries: F32, ks: Sequence[int], masks: Sequence[Mask | None], bars: F32
    ) -> list[Found] | None:
        """``search`` for every query, by the screen; None: there is none, or none for so many candidates."""
        screen = self._screen
        if screen is None or _CROWD * max(ks) > self.n:
            return None
        found = screen.candidates(queries, ks, masks, bars)
        self._looks += len(found)
        self._lost += sum(one.rows is None or _CROWD * len(one.rows) > self.n for one in found)
        if not self.screenable:
            self._screen = None
        return [
            self.search(query, k, mask) if one.rows is None else (one.rows, self.some_scores(one.rows, query))
            for query, k, mask, one in zip(queries, ks, masks, found, strict=True)
        ]

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
        found = np.ldexp(self.rows[rows].astype(np.float64) @ query.astype(np.float64), self.exponent)
        if len(self.outliers):
            there, outliers = self._outliers_among(rows)
            found[there] = outliers.astype(np.float64) @ query.astype(np.float64)
        return found

    def some_scores(self, rows: NDArray[np.int64], query: F32) -> F32:
        """Of some rows, (len(rows),), in float32."""
        scores = self._scaled(some_dots(self.rows, rows, query))
        if len(self.outliers):
            there, outliers = self._outliers_among(rows)
            scores[there] = outliers @ query
        return scores

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


class VectorIndex:
    """n rows of d numbers in blocks, immutable. Thread-safe; the GIL is released while it searches."""

    def __init__(self, packed: F16, exponents: I16, *, threads: int, screened: bool = False) -> None:
        """``packed`` (n, d) and ``exponents`` (n,) as ``service.rows.pack`` makes them. ``screened``: the rows are
        encoded in 8 bits as well, behind the first search.
        """
        n, d = packed.shape
        made = []
        for start, stop in spans(n, d, threads):
            block = Block(stop - start, d)
            block.rows[:] = packed[start:stop]
            made.append(block.finish(exponents[start:stop]))
        self._keep(made, d, threads, screened)

    @classmethod
    def of(cls, blocks: Sequence[Block], d: int, *, threads: int, screened: bool = False) -> "VectorIndex":
        """Of finished blocks, which other versions of an index may share."""
        made = cls.__new__(cls)
        made._keep(blocks, d, threads, screened)
        return made

    def _keep(self, blocks: Sequence[Block], d: int, threads: int, screened: bool) -> None:
        self.d = d
        self.blocks = tuple(block for block in blocks if block.n)
        self._starts = np.cumsum([0, *(block.n for block in self.blocks)])
        self.n = int(self._starts[-1])
        self._threads = threads
        self._screened = screened
        self._to_screen = list(self.blocks) if screened else []

    @property
    def bytes(self) -> int:
        """Of memory, with what the screens take or will take."""
        rows = sum(block.bytes for block in self.blocks)
        return rows + (screening.bytes_of([block.n for block in self.blocks], self.d) if self._screened else 0)

    def screen(self) -> None:
        """Encode the rows in 8 bits now; otherwise that is done behind the first search."""
        for block in self.blocks:
            block.make_screen()
        self._to_screen = []

    def search(self, query: F32, k: int, mask: Mask | None = None) -> TopK:
        """The k rows with the largest ⟨query, row⟩ among those that ``mask`` (n,) allows; ``query`` (d,) finite."""
        return self.search_many([query], [k], [mask])[0]

    def search_many(
        self, queries: Sequence[F32], ks: Sequence[int], masks: Sequence[Mask | None] | None = None
    ) -> list[TopK]:
        """``search`` for several queries in one pass over the rows."""
        masks = masks or [None] * len(queries)
        ks = [min(k, self.n) for k in ks]
        asked = [number for number, k in enumerate(ks) if k > 0]
        answers = [_NOTHING] * len(queries)
        if not asked:
            return answers
        together = np.stack([self._check(queries[number]) for number in asked])
        wanted = [ks[number] + _MARGIN for number in asked]
        # The k-th best so far: rows below it need no second look. Threads may read an older one, which is lower.
        least = np.full(len(asked), -np.inf, dtype=np.float32)

        def one(number: int) -> list[Found]:
            parts = [self._part(masks[each], number) for each in asked]
            found = self._of_block(self.blocks[number], together, wanted, parts, least)
            return [(rows + self._starts[number], scores) for rows, scores in found]

        found = self._each(one, range(len(self.blocks)))
        for place, number in enumerate(asked):
            rows, scores = (np.concatenate(each) for each in zip(*(of[place] for of in found), strict=True))
            answers[number] = self._ranked(together[place], rows, scores, ks[number])
        for block in self._to_screen:
            _behind().submit(block.make_screen)
        self._to_screen = []
        return answers

    def _of_block(
        self, block: Block, queries: F32, ks: Sequence[int], masks: Sequence[Mask | None], least: F32
    ) -> list[Found]:
        """Of every query the rows of a block that may be among its k best of all."""
        if (found := block.narrowed(queries, ks, masks, least)) is not None:
            return found
        if len(queries) == 1:
            return [block.search(queries[0], ks[0], masks[0])]
        scores = block.many_scores(queries)
        return [_best(scores[at], ks[at], mask, least, at) for at, mask in enumerate(masks)]

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


def _best(scores: F32, k: int, mask: Mask | None, least: F32, asked: int) -> Found:
    """At most k rows of a block that may be among the k best of all; raises ``least``."""
    allowed = scores >= least[asked]
    if mask is not None:
        allowed &= mask
    rows = np.flatnonzero(allowed)
    values = scores[rows]
    if len(rows) > k:
        best = np.argpartition(-values, k - 1)[:k]
        rows, values = rows[best], values[best]
    if len(rows) == k:
        least[asked] = max(least[asked], values.min())
    return rows, values


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


@cache
def _behind() -> ThreadPoolExecutor:
    """The thread that encodes rows while others search."""
    return ThreadPoolExecutor(1, thread_name_prefix="screen")


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
