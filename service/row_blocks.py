"""The rows of one array of an index version as they lie in storage, shard by shard: for work that reads all of them
and keeps none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from service import shards, tombstones
from service.contracts import ArrayInfo
from service.rows import F32
from service.specs import IndexManifest
from service.storage import Storage
from service.tasks import ShardManifest

_ID = 64  # hex digits of an example id


def id_bytes(ids: tuple[str, ...]) -> NDArray[np.uint8]:
    """Example ids as a tensor (n, 64): their hex digits in ASCII."""
    return np.frombuffer("".join(ids).encode(), dtype=np.uint8).reshape(len(ids), _ID)


def from_id_bytes(tensor: NDArray[np.uint8]) -> list[str]:
    """The ids in such a tensor."""
    text = tensor.tobytes().decode("ascii")
    return [text[start : start + _ID] for start in range(0, len(text), _ID)]


@dataclass
class RowBlocks:
    """Iterating gives float32 blocks (rows, dims), each time from storage: the rows that every section has and
    nobody has deleted. Raises Damaged.
    """

    storage: Storage
    manifest: IndexManifest
    array: ArrayInfo
    _kept: dict[int, NDArray[np.bool_]] = field(default_factory=dict)  # by number of the shard, where not all are
    _known: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many shards there are, and so how many blocks."""
        return len(self.manifest.sections[0].shards)

    @property
    def rows(self) -> int:
        """How many rows the shards of the array hold, with those that are left out."""
        own = next(section for section in self.manifest.sections if self.array in section.arrays)
        return sum(reference.rows for reference in own.shards)

    def __iter__(self) -> Iterator[F32]:
        return (rows for _, rows in self.with_ids())

    def with_ids(self) -> Iterator[tuple[tuple[str, ...], F32]]:
        """Every block with the ids of its rows."""
        sections = self.manifest.sections
        own = next(number for number, section in enumerate(sections) if self.array in section.arrays)
        gone = (
            frozenset() if len(self._known) == self.count else tombstones.read(self.storage, self.manifest.deleted)
        )
        for number, references in enumerate(zip(*(section.shards for section in sections), strict=True)):
            mine = shards.read_manifest(self.storage, references[own].key, sha256=references[own].sha256)
            if number not in self._known:
                others = [ref for section, ref in enumerate(references) if section != own]
                held = [shards.read_manifest(self.storage, ref.key, sha256=ref.sha256) for ref in others]
                self._keep(number, mine, held, gone)
            rows = shards.read_rows(self.storage, mine, self.array)
            if number not in self._kept:
                yield mine.ids, rows
                continue
            kept = self._kept[number]
            yield tuple(compress(mine.ids, kept)), rows[kept]

    def _keep(self, number: int, mine: ShardManifest, others: list[ShardManifest], gone: frozenset[str]) -> None:
        held = [set(other.ids) for other in others if other.ids != mine.ids]
        if held or gone:
            kept = [item not in gone and all(item in ids for ids in held) for item in mine.ids]
            self._kept[number] = np.array(kept, dtype=bool)
        self._known.add(number)
