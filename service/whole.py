"""Questions about whole rankings: the score of every example, of groups of them, and two rankings side by side.

What is scored with what is decided as for a query (``QueryService.prepare``); then every row is scored, where a
query stops at the best k.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from service.cache import LoadingCache
from service.contracts import Example, JobRecord
from service.errors import DomainError
from service.examples import Examples
from service.loading import IndexLoader
from service.queries import Prepared, QueryService, check_finite
from service.questions import Query
from service.rankings import I64, Comparison, Mover, compared, strengths
from service.rows import F32
from service.terms import Order

_KEPT_BYTES = 256 << 20  # of scores in memory: 64 rankings of a million examples


@dataclass(frozen=True)
class Scored:
    """The m examples that are ranked. ``scores`` (m,) float32 and ``positions`` (m,) among ``examples``."""

    prepared: Prepared
    order: Order
    examples: Examples
    scores: F32
    positions: I64


@dataclass(frozen=True)
class Moved:
    """An example that two rankings put at different places."""

    mover: Mover
    example: Example


@dataclass(frozen=True)
class Compared:
    """``found`` is about the examples that both rank; ``only_a`` and ``only_b`` counts the others."""

    a: Scored
    b: Scored
    found: Comparison
    only_a: int
    only_b: int
    up: tuple[Moved, ...]
    down: tuple[Moved, ...]


class WholeRankings:
    """Thread-safe. Raises as ``QueryService.run``: NotFound, Invalid, Damaged."""

    def __init__(self, queries: QueryService, loader: IndexLoader) -> None:
        self._queries = queries
        self._loader = loader
        self._kept: LoadingCache[F32] = LoadingCache(_KEPT_BYTES, lambda scores: scores.nbytes)

    def scores(self, query: Query) -> Scored | JobRecord:
        """The score of every example that the query ranks, whatever its ``k``; or the job that must end first."""
        ready = self._queries.prepare(query)
        return ready if isinstance(ready, JobRecord) else self._score(ready, query.order)

    def compare(self, a: Query, b: Query, *, k: int, movers: int) -> Compared | JobRecord:
        """Two rankings on the examples that both hold, or the job that one of them needs first.

        An error names its side: ``param`` is ``b.concept`` and the like.
        """
        with _blaming("a"):
            ready_a = self._queries.prepare(a)
        with _blaming("b"):
            ready_b = self._queries.prepare(b)
        for ready in (ready_a, ready_b):
            if isinstance(ready, JobRecord):  # the other's, if it needs one too, is queued as well
                return ready
        assert isinstance(ready_a, Prepared) and isinstance(ready_b, Prepared)  # noqa: S101
        with _blaming("a"):
            scored_a = self._score(ready_a, a.order)
        with _blaming("b"):
            scored_b = self._score(ready_b, b.order)
        in_a, in_b = _common(scored_a, scored_b)
        found = compared(
            strengths(scored_a.scores[in_a], a.order), strengths(scored_b.scores[in_b], b.order), k, movers
        )
        positions = scored_a.positions[in_a]
        return Compared(
            a=scored_a,
            b=scored_b,
            found=found,
            only_a=len(scored_a.scores) - len(in_a),
            only_b=len(scored_b.scores) - len(in_b),
            up=_with_examples(scored_a.examples, positions, found.up),
            down=_with_examples(scored_a.examples, positions, found.down),
        )

    def _score(self, ready: Prepared, order: Order) -> Scored:
        rows, u = ready.rows, np.ascontiguousarray(ready.matched.u)
        version = (ready.index.id, ready.index.manifest_sha256)
        key = (*version, ready.matched.array, hashlib.sha256(u.tobytes()).digest())
        scores = self._kept.get(key, lambda: _all_finite(rows.index.scores(u)))
        ranked = slice(None) if ready.mask is None else np.flatnonzero(ready.mask)
        examples = self._loader.examples(ready.index)
        return Scored(ready, order, examples, scores[ranked], rows.positions[ranked])


def _all_finite(scores: F32) -> F32:
    """The scores, never to be written to again: others read them too."""
    check_finite(scores)
    scores.flags.writeable = False
    return scores


def _common(a: Scored, b: Scored) -> tuple[I64, I64]:
    """Places in ``a`` and in ``b`` of the examples that both rank, in the order of ``a``."""
    positions = a.positions
    if a.examples is not b.examples:
        positions = b.examples.positions(a.examples.ids[a.positions])
    place = np.full(len(b.examples) + 1, -1)  # one more, for those that b does not know: position −1
    place[b.positions] = np.arange(len(b.positions))
    in_b = place[positions]
    in_a = np.flatnonzero(in_b >= 0)
    return in_a, in_b[in_a]


def _with_examples(examples: Examples, positions: I64, movers: tuple[Mover, ...]) -> tuple[Moved, ...]:
    rows = np.array([mover.row for mover in movers], dtype=np.int64)
    return tuple(map(Moved, movers, examples.take(positions[rows])))


@contextmanager
def _blaming(side: str) -> Iterator[None]:
    """Errors in here are about one side of the request, or about a field of it."""
    try:
        yield
    except DomainError as error:
        error.param = f"{side}.{error.param}" if error.param else side
        raise
