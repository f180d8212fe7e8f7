"""The examples of an index version: ids, texts, metadata and places over all the datasets it was made from.

Each example once, at the first dataset that holds it; its places are those in all of them. Nothing is read before
it is asked for, every file is checked against its sha256 then, and a million examples make no Python objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service import columns, datasets, example_ids, masks
from service.cache import LoadingCache, Once
from service.columns import Columns, FieldInfo, FieldKind, Path
from service.contracts import DatasetRecord, Example, Place
from service.example_ids import I64, Finder, Ids
from service.filters import Field, Filter, HasId
from service.masks import Mask
from service.storage import Storage
from service.texts import Text, Texts

_COLUMNS = 32  # decoded ones kept: 8 bytes per example or less, but for texts that are all different


@dataclass(frozen=True)
class _Laid:
    """How the datasets lie in the whole: which rows of each are its own, and where the others stand.

    ``starts`` (parts + 1,): positions at which their own rows begin. Of each part, ``own`` (·,) its rows that no
    part before holds, in order; ``repeated`` (2, ·) positions, ascending, of the others, and their rows.
    """

    ids: Ids
    starts: I64
    own: tuple[I64, ...]
    repeated: tuple[I64, ...]


class _Part:
    """One dataset."""

    def __init__(self, storage: Storage, record: DatasetRecord) -> None:
        self.ids = Once(lambda: example_ids.unpack(datasets.read(storage, record, "ids")))
        self.texts = Once(lambda: Texts(datasets.read(storage, record, "examples")))
        self.columns = Once(lambda: Columns(datasets.read(storage, record, "metadata"), record.examples))


class Examples:
    """Examples by position, 0 to ``len(self)`` − 1. Thread-safe."""

    def __init__(self, storage: Storage, records: Sequence[DatasetRecord]) -> None:
        self._parts = [_Part(storage, record) for record in records]
        self._only = records[0].examples if len(records) == 1 else None
        self._laid = Once(self._lay)
        self._finder = Once(lambda: Finder(self.ids))
        self._fields = Once(lambda: columns.merge([part.columns().fields for part in self._parts]))
        self._columns: LoadingCache[pa.ChunkedArray] = LoadingCache(_COLUMNS)

    def __len__(self) -> int:
        return len(self.ids) if self._only is None else self._only

    @property
    def ids(self) -> Ids:
        """(n,) 'S64'."""
        return self._laid().ids

    def open(self) -> None:
        """Read now what ``take`` and ``positions`` would read at first. Raises Damaged."""
        for part in self._parts:
            part.texts()
        self._finder()

    def positions(self, ids: Ids) -> I64:
        """(m,) where these stand; −1: no example has that id. Fast when they stand in the order of the examples."""
        return self._finder().positions(ids)

    def take(self, positions: NDArray[np.integer] | Sequence[int]) -> list[Example]:
        """The examples at these positions, in this order. Only the blocks that hold them are decoded."""
        at = np.asarray(positions, dtype=np.int64)
        laid = self._laid()
        if len(at) and not (at.min() >= 0 and at.max() < len(laid.ids)):
            raise IndexError(f"positions {at.min()} to {at.max()} among {len(laid.ids)} examples")
        part_of = np.searchsorted(laid.starts, at, side="right") - 1
        found: dict[int, Text] = {}
        for number, part in enumerate(self._parts):
            slots = np.flatnonzero(part_of == number)
            if len(slots):
                rows = laid.own[number][at[slots] - laid.starts[number]]
                found.update(zip(slots.tolist(), part.texts().take(rows.tolist()), strict=True))
        further = self._further_places(laid, at)
        return [
            Example(item.decode(), text.content, text.metadata, text.places + further.get(slot, ()))
            for slot, item in enumerate(laid.ids[at].tolist())
            for text in (found[slot],)
        ]

    def stored(self, names: Sequence[str]) -> pa.Table:
        """Of all examples, as at rest: columns ``metadata`` (JSON text) and ``places`` (lists of file, line)."""
        laid = self._laid()
        tables = [part.texts().table(names) for part in self._parts]
        if len(tables) == 1:
            return tables[0]
        own = [table.take(pa.array(rows)) for table, rows in zip(tables, laid.own, strict=True)]
        found = pa.concat_tables(own)
        if "places" in names:
            places = [pa.concat_arrays(table.column("places").chunks) for table in tables]
            found = found.set_column(found.schema.get_field_index("places"), "places", self._all_places(places))
        return found

    def _all_places(self, places: Sequence[pa.ListArray]) -> pa.ListArray:
        """Of every example the places in all parts, those of an earlier part first."""
        laid = self._laid()
        owners = []
        for number, part in enumerate(places):
            position = np.empty(len(part), dtype=np.int64)
            position[laid.own[number]] = laid.starts[number] + np.arange(len(laid.own[number]))
            there, rows = laid.repeated[number]
            position[rows] = there
            owners.append(np.repeat(position, np.diff(part.offsets.to_numpy())))
        owner = np.concatenate(owners)
        flat = pa.concat_arrays([part.flatten() for part in places])
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(self)))])
        order = np.argsort(owner, kind="stable")
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.take(pa.array(order)))

    def mask(self, wanted: Filter) -> Mask:
        """(n,) which examples a filter keeps.

        Raises Invalid (``unknown_filter_field``, ``filter_kind``) where it does not fit the metadata.
        """
        return masks.evaluate(wanted, self._leaf)

    def fields(self) -> dict[str, FieldKind]:
        """Names that filters and groups may use, and the kind of their values, in the order of the alphabet."""
        infos = [info for info in self._fields().values() if info.kind in columns.FILTERABLE]
        return dict(sorted((columns.name_of(info.path), info.kind) for info in infos))

    def field(self, name: str, *, param: str = "field") -> pa.ChunkedArray:
        """(n,) the values of a field, null where it is absent: bool, int64, double or string, in one chunk.

        Few different strings come as a dictionary and numbers into it. Kind ``mixed`` is JSON text. Raises Invalid
        (``unknown_field``, which names those there are; ``field_kind`` for lists and objects).
        """
        info = self._info(columns.path_of(name, param=param), ("unknown_field", "field_kind"), param)
        return self._column(info)

    def _leaf(self, leaf: Field | HasId) -> Mask:
        if isinstance(leaf, Field):
            param = f"filter.{columns.name_of(leaf.path)}"[:300]
            info = self._info(leaf.path, ("unknown_filter_field", "filter_kind"), param)
            masks.check(leaf, info)
            return masks.matches(leaf.test, info, self._column(info).chunk(0))
        found = self.positions(example_ids.of(sorted(leaf.ids)))
        mask = np.zeros(len(self), dtype=bool)
        mask[found[found >= 0]] = True
        return mask

    def _info(self, path: Path, codes: tuple[str, str], param: str) -> FieldInfo:
        """What is known of a field. Raises Invalid for one that nothing can be asked of."""
        parts = [part.columns().fields for part in self._parts]
        left_out = sum(fields.left_out for fields in parts if path not in fields.known)
        return columns.usable(self._fields().get(path), path, self.fields(), left_out, codes=codes, param=param)

    def _column(self, info: FieldInfo) -> pa.ChunkedArray:
        return self._columns.get(info.path, lambda: pa.chunked_array([self._joined(info)]))

    def _joined(self, info: FieldInfo) -> pa.Array:
        laid = self._laid()
        whole = [part.columns().array(info.path, info.kind) for part in self._parts]
        if len(whole) == 1:
            return whole[0]
        own = [array.take(pa.array(rows)) for array, rows in zip(whole, laid.own, strict=True)]
        if not any(isinstance(array, pa.DictionaryArray) for array in own):
            return pa.concat_arrays(own)
        joined = pa.concat_arrays([array.cast(pa.string()) for array in own])
        coded = joined.dictionary_encode()
        return coded if len(coded.dictionary) <= columns.FEW else joined

    def _further_places(self, laid: _Laid, at: I64) -> dict[int, tuple[Place, ...]]:
        """Of each slot of ``at``, the places in parts behind that which the example is taken from."""
        found: dict[int, tuple[Place, ...]] = {}
        for part, (there, rows) in zip(self._parts, laid.repeated, strict=True):
            if not len(there):
                continue
            near = np.minimum(np.searchsorted(there, at), len(there) - 1)
            slots = np.flatnonzero(there[near] == at)
            texts = part.texts().take(rows[near[slots]].tolist())
            for slot, text in zip(slots.tolist(), texts, strict=True):
                found[slot] = found.get(slot, ()) + text.places
        return found

    def _lay(self) -> _Laid:
        ids = self._parts[0].ids()
        own = [np.arange(len(ids))]
        repeated = [np.zeros((2, 0), dtype=np.int64)]
        starts = [0, len(ids)]
        for part in self._parts[1:]:
            theirs = part.ids()
            known = Finder(ids).positions(theirs)
            rows = np.flatnonzero(known >= 0)
            rows = rows[np.argsort(known[rows], kind="stable")]
            repeated.append(np.stack([known[rows], rows]))
            own.append(np.flatnonzero(known < 0))
            ids = np.concatenate([ids, theirs[own[-1]]])
            starts.append(len(ids))
        return _Laid(ids, np.array(starts), tuple(own), tuple(repeated))


def select_ids(examples: Examples, wanted: Filter) -> list[str]:
    """The ids of what a filter keeps, in the order of the examples."""
    return [item.decode() for item in examples.ids[examples.mask(wanted)].tolist()]
