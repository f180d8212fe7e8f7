"""Published rows in memory: what queries search, shared by all versions that hold the same shards."""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service import artifacts, indexes, shards
from service.batching import Batcher
from service.blocks import BLOCK_BYTES, Block, Mask
from service.cache import LoadingCache, Once
from service.contracts import ArrayInfo, IndexRecord
from service.errors import Damaged, NotFound, Unavailable
from service.example_ids import Finder, Ids
from service.examples import Examples
from service.registry import DATASETS, Registry, record_file
from service.rows import F16
from service.screening import bytes_of
from service.search import VectorIndex
from service.specs import IndexManifest
from service.spread import SAMPLE, Sample
from service.storage import Storage
from service.tasks import ShardManifest, ShardRef

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_SMALL = 8  # manifests and example tables kept
DELETED = "deleted"


@dataclass(frozen=True)
class Piece:
    """Consecutive shards of one array as a block, and the ids of its rows."""

    block: Block
    ids: Ids


class Rows:
    """One array of one index version, in memory: search positions and the example ids they mean."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        d: int,
        deleted: Ids | None,
        examples: Callable[[], Examples],
        *,
        threads: int,
        screened: bool = False,
    ) -> None:
        self._pieces = pieces
        self._examples = examples
        self._begun = False
        self.index = VectorIndex.of([piece.block for piece in pieces], d, threads=threads, screened=screened)
        self.alive: Mask | None = None  # None: all
        if deleted is not None and len(deleted):
            self.alive = Finder(deleted).positions(self.ids) < 0
        self.batcher = Batcher(self.index)
        # Of what they need, not of self: in a circle, evicted rows would stay until the collector comes by.
        self._positions = Once(partial(_positions, examples, pieces))
        self._sample = Once(partial(_sampled, self.index, self.alive))

    @property
    def n(self) -> int:
        """Rows that may be ranked."""
        return self.index.n if self.alive is None else int(self.alive.sum())

    @property
    def bytes(self) -> int:
        return self.index.bytes + sum(piece.ids.nbytes for piece in self._pieces)

    @property
    def ids(self) -> Ids:
        """(n,) of every row, put together anew: they are kept by piece."""
        return _ids(self._pieces)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Place of every row among the examples of the index."""
        return self._positions()

    @property
    def sample(self) -> Sample:
        """Every so many-th row that may be ranked, once more: how the scores of a query lie is told by these."""
        return self._sample()

    def ahead(self) -> None:
        """Begin with what the first answer needs beside the rows, while they are searched. What fails here fails
        again for whoever asks for it, and is told there.
        """
        if self._begun:
            return
        self._begun = True
        with suppress(RuntimeError):  # no thread to be had: whoever asks does it
            for work in (self._open_texts, self._prepare_spread):
                threading.Thread(target=work, name="ahead", daemon=True).start()

    def allowed(self, mask: Mask | None) -> Mask | None:
        """``mask`` (n,) less what was deleted."""
        if mask is None or self.alive is None:
            return self.alive if mask is None else mask
        return mask & self.alive

    def _open_texts(self) -> None:
        try:
            self._examples().open()
            self._positions()
        except Exception:
            log.debug("texts could not be read ahead", exc_info=True)

    def _prepare_spread(self) -> None:
        try:
            self.sample.prepare()
        except Exception:
            log.debug("moments could not be computed ahead", exc_info=True)


def _ids(pieces: Sequence[Piece]) -> Ids:
    return np.concatenate([piece.ids for piece in pieces]) if pieces else np.zeros(0, "S64")


def _positions(examples: Callable[[], Examples], pieces: Sequence[Piece]) -> NDArray[np.int64]:
    return examples().positions(_ids(pieces))


def _sampled(index: VectorIndex, alive: Mask | None) -> Sample:
    rows = np.arange(index.n) if alive is None else np.flatnonzero(alive)
    if len(rows) > SAMPLE:
        rows = rows[np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)]
    return Sample(index.excerpt(rows))


class IndexLoader:
    """Loads what queries ask for, once, and keeps the most recently used rows, up to ``most_bytes`` of them."""

    def __init__(self, registry: Registry, storage: Storage, *, threads: int, most_bytes: int = 1 << 40) -> None:
        self._registry = registry
        self._storage = storage
        self._threads = threads
        self._most_bytes = most_bytes
        self._rows: LoadingCache[Rows] = LoadingCache(most_bytes, lambda rows: rows.bytes)
        # Alive while any loaded version uses them: an appended version loads what is new.
        self._pieces: weakref.WeakValueDictionary[tuple[object, ...], Piece] = weakref.WeakValueDictionary()
        self._examples: LoadingCache[Examples] = LoadingCache(_SMALL)
        self._manifests: LoadingCache[IndexManifest] = LoadingCache(_SMALL)
        self._reading = ThreadPoolExecutor(max(2, threads), thread_name_prefix="load")
        self._lock = threading.Lock()

    def rows(self, record: IndexRecord, array: ArrayInfo) -> Rows:
        """One array of ``record.arrays``. Raises Damaged when a file is corrupt, Unavailable beyond the memory."""
        return self._rows.get((record.id, record.manifest_sha256, array), lambda: self._load(record, array))

    def examples(self, record: IndexRecord) -> Examples:
        """The examples of all datasets of a version; versions of the same datasets share them."""
        return self._examples.get((record.datasets, record.dataset_fingerprint), lambda: self._open(record))

    def manifest(self, record: IndexRecord) -> IndexManifest:
        return self._manifests.get(
            (record.id, record.manifest_sha256), lambda: indexes.read_manifest(self._storage, record)
        )

    def _open(self, record: IndexRecord) -> Examples:
        wanted = {record.dataset: record.dataset_fingerprint}
        wanted |= {part.dataset: part.fingerprint for part in record.appended}
        found = [self._registry.get(DATASETS, name) for name in wanted]
        for dataset in found:
            if dataset.fingerprint != wanted[dataset.id]:
                detail = f"Dataset {dataset.id!r} is not the one that index {record.id} was built from."
                raise Damaged("damaged_record", detail, param=record_file(DATASETS, dataset.id))
        return Examples(self._storage, found)

    def _load(self, record: IndexRecord, array: ArrayInfo) -> Rows:
        try:
            return self._read(record, array)
        except NotFound as error:  # the version names the file, so it should be there
            raise Damaged(error.code, error.detail, param=error.param) from error

    def _read(self, record: IndexRecord, array: ArrayInfo) -> Rows:
        manifest = self.manifest(record)
        self._check_memory(record, array)
        own = next(number for number, section in enumerate(manifest.sections) if array in section.arrays)
        aligned = list(zip(*(section.shards for section in manifest.sections), strict=True))
        groups = grouped([references[own].rows for references in aligned], array.dims)
        with self._lock:  # two versions that share pieces load them once
            pieces = self._pieces_of(array, own, [tuple(aligned[start:stop]) for start, stop in groups])
        deleted = None
        if manifest.deleted is not None:
            held = artifacts.read(self._storage, artifacts.get(self._storage, manifest.deleted), DELETED)["ids"]
            deleted = np.ascontiguousarray(held).view("S64").reshape(-1)
        blocks = [piece.block.n for piece in pieces]
        screened = sum(blocks) * 2 * array.dims + bytes_of(blocks, array.dims) <= self._most_bytes
        if not screened:  # other versions may have made some that this one is not counted with
            for piece in pieces:
                piece.block.give_up_screen()
        return Rows(
            pieces,
            array.dims,
            deleted,
            lambda: self.examples(record),
            threads=self._threads,
            screened=screened,
        )

    def _check_memory(self, record: IndexRecord, array: ArrayInfo) -> None:
        needed = 2 * array.dims * record.counts.indexed
        if needed > self._most_bytes:
            raise Unavailable(
                "index_too_large",
                f"{array.kind} rows of {record.id} take {needed / 2**30:.1f} GiB of memory, and this server keeps "
                f"{self._most_bytes / 2**30:.1f} GiB. Raise WHENCE_SEARCH_BYTES on a machine that has it.",
                param="index",
            )

    def _pieces_of(
        self, array: ArrayInfo, own: int, groups: Sequence[tuple[tuple[ShardRef, ...], ...]]
    ) -> list[Piece]:
        """A block for every group of aligned shards; those in memory already are taken from there."""
        keys = [(array, own, *((ref.key, ref.sha256) for shard in group for ref in shard)) for group in groups]
        found = {key: piece for key in keys if (piece := self._pieces.get(key)) is not None}
        fresh = [(key, group) for key, group in zip(keys, groups, strict=True) if key not in found]
        plans = [_Plan(self._storage, array, own, group) for _, group in fresh]
        # All shards of all groups at once: reading and hashing keeps every thread busy to the end.
        self._all([shard.read_head for plan in plans for shard in plan.shards])
        self._all([plan.allocate for plan in plans])
        self._all([shard.read_rows for plan in plans for shard in plan.shards])
        for (key, _), piece in zip(fresh, self._all([plan.finish for plan in plans]), strict=True):
            self._pieces[key] = found[key] = piece
        return [found[key] for key in keys]

    def _all(self, works: Sequence[Callable[[], R]]) -> list[R]:
        return list(self._reading.map(lambda work: work(), works))


class _Shard:
    """One shard of a group on its way into memory."""

    def __init__(self, storage: Storage, array: ArrayInfo, own: int, references: tuple[ShardRef, ...]) -> None:
        self._storage, self._array, self._own, self._references = storage, array, own, references
        self._manifest: ShardManifest | None = None  # without its ids
        self._rows = references[own].rows
        self._kept: NDArray[np.int64] | None = None  # None: every row
        self.ids: Ids = np.zeros(0, "S64")
        self.out: F16 = np.zeros((0, array.dims), np.float16)
        self.exponents: NDArray[np.int16] = np.zeros(0, np.int16)

    def read_head(self) -> None:
        """Which rows there are: those that every section has."""
        read = [shards.read_head(self._storage, ref) for ref in self._references]
        self._manifest, self.ids = read[self._own]
        others = [ids for _, ids in read if not np.array_equal(ids, self.ids)]
        if others:
            held = [Finder(ids).positions(self.ids) >= 0 for ids in others]
            self._kept = np.flatnonzero(np.logical_and.reduce(held))
            self.ids = self.ids[self._kept]

    def read_rows(self) -> None:
        assert self._manifest is not None  # noqa: S101
        if self._kept is None:
            self.exponents = shards.read_into(self._storage, self._manifest, self._array, self.out)
            return
        packed, exponents = shards.read_packed(self._storage, self._manifest, self._array, rows=self._rows)
        self.out[:], self.exponents = packed[self._kept], exponents[self._kept]


class _Plan:
    """A group of shards on its way to be a block."""

    def __init__(self, storage: Storage, array: ArrayInfo, own: int, group: Sequence[tuple[ShardRef, ...]]) -> None:
        self._dims = array.dims
        self._block: Block | None = None
        self.shards = [_Shard(storage, array, own, references) for references in group]

    def allocate(self) -> None:
        self._block = Block(sum(len(shard.ids) for shard in self.shards), self._dims)
        start = 0
        for shard in self.shards:
            shard.out = self._block.rows[start : start + len(shard.ids)]
            start += len(shard.ids)

    def finish(self) -> Piece:
        assert self._block is not None  # noqa: S101
        self._block.finish(np.concatenate([shard.exponents for shard in self.shards]))
        return Piece(self._block, np.concatenate([shard.ids for shard in self.shards]))


def grouped(rows: Sequence[int], dims: int) -> list[tuple[int, int]]:
    """Consecutive shards of so many rows in groups [start, stop) of a block each, counted from the first: what is
    appended later leaves all groups but the last as they are.
    """
    most = max(1, BLOCK_BYTES // max(1, 2 * dims))
    groups, start, held = [], 0, 0
    for number, count in enumerate(rows):
        if held and held + count > most:
            groups.append((start, number))
            start, held = number, 0
        held += count
    return [*groups, (start, len(rows))] if len(rows) else []
