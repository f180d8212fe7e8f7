"""Pages of a ranking: a cursor says where the last page ended, and of which version.

Versions never change, so pages fit together whoever publishes meanwhile: the cursor pins the version that the first
page was read from. A cursor of another question is refused.
"""

import base64
import json
from dataclasses import dataclass, fields, replace

from service import codec
from service.contracts import IndexRecord
from service.errors import Invalid
from service.questions import Query


@dataclass(frozen=True)
class Page:
    """Hits ``start`` … ``stop`` − 1 of a ranking; ``following``: the cursor of the next page."""

    limit: int | None = None  # None: all of them
    cursor: str | None = None
    start: int = 0
    stop: int = 0
    following: str | None = None

    def pinned(self, query: Query) -> Query:
        """The question, asked of the version that the cursor was made on."""
        return query if self.cursor is None else replace(query, index=self._read(query)[0])

    def of(self, query: Query, index: IndexRecord, hits: int) -> "Page":
        """This page of the question's ``hits`` hits."""
        start = 0 if self.cursor is None else self._read(query)[1]
        stop = hits if self.limit is None else min(hits, start + self.limit)
        following = _write(index.id, stop, query) if stop < hits else None
        return replace(self, start=start, stop=stop, following=following)

    def _read(self, query: Query) -> tuple[str, int]:
        try:
            index, start, about = json.loads(base64.urlsafe_b64decode((self.cursor or "").encode()))
            known = isinstance(index, str) and type(start) is int and start >= 0
        except (ValueError, TypeError, RecursionError):  # of text that nobody here has written
            known = False
        if not known or about != _digest(query):  # pyright: ignore[reportPossiblyUnboundVariable]
            raise Invalid(
                "bad_cursor",
                "The cursor is not one of this question: send the body of the first page again, with its cursor.",
                param="cursor",
            )
        return index, start  # pyright: ignore[reportPossiblyUnboundVariable]


def _write(index: str, start: int, query: Query) -> str:
    return base64.urlsafe_b64encode(json.dumps([index, start, _digest(query)]).encode()).decode()


def _digest(query: Query) -> str:
    """Of everything that decides the ranking, as it was asked; the same in every process that may serve a page."""
    asked = {each.name: repr(getattr(query, each.name)) for each in fields(query) if each.name != "filter"}
    return codec.digest([asked, query.filter_key])[
        :16
    ]  # the repr of a filter's sets differs from process to process
