"""Exact inner-product search over stored rows: blocks of float16 in FAISS, searched side by side by a few threads.

A scan runs at memory speed and its recall is that of float16 rounding; approximate indexes can lose a quarter of
the true top 100 on inner products (docs/decisions/0003). Blocks that are asked again are kept in 8 bits as well,
which say of nearly all rows that they are none of the best (``service/screening.py``). Where they do not, one query
is FAISS's; several at once, and the scores of all rows, are computed by ``service/kernels.py`` on the same memory
(docs/decisions/0012). What ranks best is scored again in float64, so that answers depend neither on who else asked
at the same moment nor on what is in memory.
"""

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service import blocks, screening
from service.blocks import F64, Block, Found, Mask
from service.errors import Invalid
from service.rows import F16, F32, I16

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# More candidates than asked for, and a share of k: rounding to float32 may swap neighbours at the edge. Where these
# are not certainly enough, a second pass takes many more.
_MARGIN, _MARGIN_SHARE, _WIDE_MARGIN = 16, 16, 1 << 12
_UNIT = 2.0**-24  # rounding of float32


@dataclass(frozen=True)
class TopK:
    """The best rows, best first: ``rows`` (k,) int64 positions, ``scores`` (k,) float32."""

    rows: NDArray[np.int64]
    scores: F32


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
        self._to_screen: Sequence[Block] = self.blocks if screened else ()

    @property
    def bytes(self) -> int:
        """Of memory, with what the screens take or will take."""
        rows = sum(block.bytes for block in self.blocks)
        return rows + (screening.bytes_of([block.n for block in self.blocks], self.d) if self._screened else 0)

    def screen(self) -> None:
        """Encode the rows in 8 bits now; otherwise that is done behind the first search."""
        for block in self.blocks:
            block.make_screen()
        self._to_screen = ()

    def search(self, query: F32, k: int, mask: Mask | None = None) -> TopK:
        """The k rows with the largest ⟨query, row⟩ among those that ``mask`` (n,) allows; ``query`` (d,) finite."""
        return self.search_many([query], [k], [mask])[0]

    def search_many(
        self, queries: Sequence[F32], ks: Sequence[int], masks: Sequence[Mask | None] | None = None
    ) -> list[TopK]:
        """``search`` for several queries in one pass over the rows."""
        masks = masks or [None] * len(queries)
        checked = [self._check(query) for query in queries]
        ks = [min(k, self.n) for k in ks]
        asked = [number for number, k in enumerate(ks) if k > 0]
        answers = [_NOTHING] * len(queries)
        for margin in (_MARGIN, _WIDE_MARGIN):
            if asked:
                asked = self._answer(asked, checked, ks, masks, margin, answers)
        waiting, self._to_screen = self._to_screen, ()
        if waiting:
            _screen_behind(waiting)
        return answers

    def _answer(
        self,
        asked: Sequence[int],
        queries: Sequence[F32],
        ks: Sequence[int],
        masks: Sequence[Mask | None],
        margin: int,
        answers: list[TopK],
    ) -> list[int]:
        """Answer the queries with these numbers, with so many spare candidates; which of them are not certain."""
        # Candidates are found in float32, whose range a tiny or huge query would leave.
        scales = [_size(queries[number]) for number in asked]
        together = np.stack([np.ldexp(queries[each], -scale) for each, scale in zip(asked, scales, strict=True)])
        wanted = [ks[number] + margin + ks[number] // _MARGIN_SHARE for number in asked]
        # The k-th best so far: rows below it need no second look. Threads may read an older one, which is lower.
        least = np.full(len(asked), -np.inf, dtype=np.float32)

        def one(number: int) -> list[Found]:
            parts = [self._part(masks[each], number) for each in asked]
            given = [queries[each] for each in asked]
            found = self._of_block(self.blocks[number], together, wanted, parts, least, given)
            return [(each[0] + self._starts[number], each[1]) for each in found]

        found = self._each(one, range(len(self.blocks)))
        uncertain = []
        for place, number in enumerate(asked):
            parts = [of[place] for of in found]
            rows, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
            certain = all(each.dtype == np.float64 for _, each in parts)  # as the screens of all blocks say it
            if certain:
                answers[number] = _best_of(rows, scores, ks[number])
            else:
                scores = np.concatenate([_rough(each, scales[place]) for _, each in parts])
                answers[number], certain = self._ranked(queries[number], rows, scores, ks[number], wanted[place])
            if not certain:
                uncertain.append(number)
        return uncertain

    def _of_block(
        self,
        block: Block,
        queries: F32,
        ks: Sequence[int],
        masks: Sequence[Mask | None],
        least: F32,
        given: Sequence[F32],
    ) -> list[Found]:
        """Of every query the rows of a block that may be among its k best of all; ``queries`` (q, d) are those
        ``given``, times a power of two.
        """
        found: list[Found | None] = [*block.narrowed(queries, ks, masks, least, given)]
        left = [at for at, one in enumerate(found) if one is None]
        if len(left) == 1:
            (at,) = left
            found[at] = block.search(queries[at], ks[at], masks[at])
        elif left:
            scores = block.many_scores(queries[left])
            for own, at in zip(scores, left, strict=True):
                found[at] = _best(own, ks[at], masks[at], least, at)
        return [one for one in found if one is not None]

    def scores(self, query: F32) -> F32:
        """⟨query, row⟩ of every row, (n,) float32: one pass over the rows."""
        query = self._check(query)
        found = self._each(lambda number: self.blocks[number].scores(query), range(len(self.blocks)))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def nearest(self, queries: F32) -> tuple[NDArray[np.int64], F32]:
        """Of every row the query (q, d) with the largest ⟨query, row⟩ and that score, (n,) each: one pass."""
        together = np.stack([self._check(query) for query in queries])

        def one(number: int) -> Found:
            scores = self.blocks[number].many_scores(together)
            best = scores.argmax(axis=0)
            return best, scores[best, np.arange(len(best))]

        found = self._each(one, range(len(self.blocks)))
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        best, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        return best, scores

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

    def _ranked(self, query: F32, rows: NDArray[np.int64], scores: F32, k: int, wanted: int) -> tuple[TopK, bool]:
        """The k best of ``wanted`` candidates by their float64 scores, of equal ones the first row; and whether no
        row that is no candidate can be one of them.
        """
        rows, scores = _cut(rows, scores, wanted)
        exact = np.empty(len(rows), dtype=np.float64)
        for number, at in self._by_block(rows):
            exact[at] = self.blocks[number].rescore(rows[at] - self._starts[number], query)
        ordered = np.sort(exact)[::-1]
        certain = len(rows) < wanted or ordered[k - 1] == ordered[-1]  # all there are; or copies
        if not certain:
            last = int(scores.argmin())
            beyond = exact[last] + 2 * self._rounding(query, rows[last])  # what is left out scores less than that
            certain = bool(ordered[k - 1] >= beyond)
        return _best_of(rows, exact, k), certain

    def _rounding(self, query: F32, row: np.int64) -> float:
        """How far a sum in float32 over this row may be off: twice as far as random roundings go."""
        ((number, _),) = self._by_block(np.array([row]))
        size = self.blocks[number].products(int(row - self._starts[number]), query)
        return 2 * math.sqrt(self.d) * _UNIT * size

    def _by_block(self, rows: NDArray[np.int64]) -> Iterable[tuple[int, NDArray[np.int64]]]:
        """(block, positions in ``rows`` of those that it holds)."""
        held = np.searchsorted(self._starts, rows, side="right") - 1
        return [(int(number), np.flatnonzero(held == number)) for number in np.unique(held)]

    def _part(self, mask: Mask | None, number: int) -> Mask | None:
        return None if mask is None else mask[self._starts[number] : self._starts[number + 1]]

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``work`` on every item, by this thread and as many others as are wanted: one that is running is there at
        once, one that must be woken comes later.
        """
        left = deque(enumerate(items))
        done: dict[int, R] = {}

        def take() -> None:
            while left:
                try:
                    number, item = left.popleft()
                except IndexError:  # another thread has just taken the last
                    return
                done[number] = work(item)

        helpers = min(self._threads, len(items)) - 1
        others = [pool(self._threads).submit(take) for _ in range(helpers)]
        try:
            take()
        finally:
            left.clear()
            for other in others:
                if not other.cancel():  # it has begun
                    other.result()
        return [done[number] for number in range(len(items))]

    def _check(self, query: F32) -> F32:
        if query.shape != (self.d,) or not np.isfinite(query).all():
            raise Invalid("bad_query_vector", f"A query needs {self.d} finite numbers, got shape {query.shape}.")
        return np.ascontiguousarray(query, dtype=np.float32)


def _best_of(rows: NDArray[np.int64], exact: F64, k: int) -> TopK:
    """The k best by their float64 scores, of equal ones the first row."""
    order = np.lexsort((rows, -exact))[:k]
    with np.errstate(over="ignore"):
        return TopK(rows[order], exact[order].astype(np.float32))


def _size(query: F32) -> np.int32:
    """e such that the largest number of the query lies between 1/2 and 1, times 2^e."""
    _, exponent = np.frexp(np.abs(query).max(initial=0.0))
    return exponent


def _rough(scores: F32 | F64, scale: np.int32) -> F32:
    """Scores of the query divided by 2^scale, in float32: what they are already, if they are no float64."""
    return (np.ldexp(scores, -scale) if scores.dtype == np.float64 else scores).astype(np.float32, copy=False)


def _cut(rows: NDArray[np.int64], scores: F32, k: int) -> tuple[NDArray[np.int64], F32]:
    """The k best; of those that are equal at the edge the first rows, whoever found them."""
    if len(rows) <= k:
        return rows, scores
    edge = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > edge), np.flatnonzero(scores == edge)
    first = equal[np.argsort(rows[equal])][: k - len(above)]
    kept = np.concatenate([above, first])
    return rows[kept], scores[kept]


def _best(scores: F32, k: int, mask: Mask | None, least: F32, asked: int) -> Found:
    """At most k rows of a block that may be among the k best of all; raises ``least``."""
    allowed = scores >= least[asked]
    if mask is not None:
        allowed &= mask
    rows = np.flatnonzero(allowed)
    values = scores[rows]
    rows, values = _cut(rows, values, k)
    if len(rows) == k:
        least[asked] = max(least[asked], values.min())
    return rows, values


_NOTHING = TopK(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """The threads that help all searches of this process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="search")


_encoding = threading.Lock()  # one block at a time, whoever waits: searches want the processors


def _screen_behind(waiting: Sequence[Block]) -> None:
    """Make the screens of blocks while others search; of those that are still in memory when it is their turn."""
    references = [weakref.ref(block) for block in waiting]

    def make() -> None:
        for reference in references:
            with _encoding:
                if (block := reference()) is None:
                    continue
                try:
                    block.make_screen()
                except Exception:  # searches do without, and nobody waits for this one's error
                    log.exception("%d rows of width %d could not be kept in 8 bits", block.n, block.d)
                    return

    with suppress(RuntimeError):  # the process is ending: the answer is still good
        threading.Thread(target=make, name="screen", daemon=True).start()


def spans(n: int, d: int, threads: int = 1) -> list[tuple[int, int]]:
    """Rows of each block: as many as fit, and no fewer blocks than threads where rows are enough."""
    most = max(1, blocks.BLOCK_BYTES // max(1, 2 * d))
    size = max(1, min(most, -(-n // threads)))
    return [(start, min(start + size, n)) for start in range(0, n, size)]
