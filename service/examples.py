"""The examples of an index version over all its datasets."""

from collections.abc import Sequence
from dataclasses import replace

from service.contracts import Example
from service.indexes import ExampleTable


class Examples:
    def __init__(self, parts: Sequence[ExampleTable]) -> None:
        self._parts = parts

    def __contains__(self, item_id: str) -> bool:
        return any(item_id in part for part in self._parts)

    def take(self, ids: Sequence[str]) -> list[Example]:
        """The examples with these ids, in this order, with their places in every part."""
        return [self._one(item_id) for item_id in ids]

    def _one(self, item_id: str) -> Example:
        found = [part.take([item_id])[0] for part in self._parts if item_id in part]
        return replace(found[0], places=tuple(place for each in found for place in each.places))
