"""Queries of one index that come at the same time are searched together, in one pass over its rows.

Nobody waits for company: a query that finds the index idle runs at once. Those that arrive while it runs are
taken together as soon as it is done, after a moment in which the clients just answered may ask again.
"""

import threading
import time
from dataclasses import dataclass, field

from service.blocks import Mask
from service.rows import F32
from service.search import TopK, VectorIndex

_MOST = 32  # queries of one pass: beyond that a pass takes longer than its members would like to wait
_GATHER_S = 0.003  # where others have just been asking at the same time


@dataclass
class _Asked:
    query: F32
    k: int
    mask: Mask | None
    turn: threading.Event = field(default_factory=threading.Event)  # there is an answer, or it has to lead
    answer: TopK | None = None
    error: BaseException | None = None


class Batcher:
    """One for every loaded array. Thread-safe."""

    def __init__(self, index: VectorIndex) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._waiting: list[_Asked] = []
        self._busy = False

    def search(self, query: F32, k: int, mask: Mask | None = None) -> TopK:
        """``VectorIndex.search``, in one pass with whoever else is asking."""
        asked = _Asked(query, k, mask)
        with self._lock:
            self._waiting.append(asked)
            leads, self._busy = not self._busy, True
        if not leads:
            asked.turn.wait()
        if asked.answer is None and asked.error is None:
            self._lead(asked, gather=not leads)
        if asked.error is not None:
            raise asked.error
        assert asked.answer is not None  # noqa: S101
        return asked.answer

    def _lead(self, own: _Asked, *, gather: bool) -> None:
        """Search for all that wait, ``own`` among them, and hand over to the first of those that came meanwhile."""
        if gather:
            time.sleep(_GATHER_S)
        with self._lock:
            self._waiting.remove(own)
            together = [own, *self._waiting[: _MOST - 1]]
            del self._waiting[: _MOST - 1]
        try:
            self._answer(together)
        finally:
            for asked in together[1:]:
                asked.turn.set()
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._busy = following is not None
            if following is not None:
                following.turn.set()

    def _answer(self, together: list[_Asked]) -> None:
        try:
            found = self._index.search_many(
                [asked.query for asked in together],
                [asked.k for asked in together],
                [asked.mask for asked in together],
            )
            for asked, answer in zip(together, found, strict=True):
                asked.answer = answer
        except Exception as error:
            if len(together) == 1:
                together[0].error = error
                return
            for asked in together:  # one bad query must not fail the others
                self._answer([asked])
