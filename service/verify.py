"""Is everything that an index version stands on what was written? A walk over storage, manifest by manifest.

The record says the sha256 of the index manifest, that of the shards' manifests, and those of the files; records,
artifacts and ``build.json`` carry a seal of their own. Nothing is believed before it has been checked, so what lies
behind a damaged manifest is not looked at: it is found when that one has been mended.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from service import artifacts, codec, indexes, saes, shards
from service.contracts import ConceptRecord, DatasetRecord, IndexRecord
from service.errors import Damaged, NotFound
from service.registry import CONCEPTS, DATASETS, INDEXES, MODELS, SAES, Collection, record_file
from service.results import read_sealed
from service.sae_records import Labels, SaeRecord
from service.specs import Built, IndexManifest
from service.storage import Storage, sha256_bytes
from service.tasks import Artifact, ShardManifest
from service.work import CompactSpec, DifferenceSpec, Eigen, PassSpec, ReadOffSpec, ShardWork, SumSpec

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")

MISSING, CHANGED, UNREADABLE = "missing", "changed", "unreadable"
RECORD, MANIFEST, SHARD, ARTIFACT, DATASET, CONCEPT, SAE = (
    "record",
    "manifest",
    "shard",
    "artifact",
    "dataset",
    "concept",
    "sae",
)
_THREADS = 8
_REFERS = ("eigen:", "lambda:")  # facts of a curvature that name artifacts of its modules

_Call = tuple[str, type[Any], str, str, str | None]  # a sealed file: key, type, belongs to, owner, pinned sha256
OnProgress = Callable[[str, int, int, str], None]  # stage, done, total, unit


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written. ``owner``: the key or id of what it belongs to."""

    file: str
    what: str  # missing | changed | unreadable
    belongs_to: str  # record | manifest | shard | artifact | dataset | concept | sae
    owner: str
    pinned: str | None = None  # of a shard's manifest: the sha256 by which the index names it


@dataclass(frozen=True)
class Report:
    index: str
    files: int
    bytes: int
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class _File:
    """A file whose sha256 is known."""

    name: str
    sha256: str
    belongs_to: str
    owner: str


@dataclass(frozen=True)
class _Ref:
    """A shard or an artifact, by its key; ``sha256`` of its manifest where an index pins it."""

    belongs_to: str
    key: str
    sha256: str | None = None

    @property
    def call(self) -> _Call:
        if self.belongs_to == SHARD:
            return f"{shards.folder(self.key)}/{shards.MANIFEST}", ShardManifest, SHARD, self.key, self.sha256
        return f"{artifacts.folder(self.key)}/{artifacts.MANIFEST}", Artifact, ARTIFACT, self.key, None


def verify(
    storage: Storage,
    index_id: str,
    *,
    known: IndexRecord | None = None,
    threads: int | None = None,
    progress: OnProgress = lambda *_: None,
) -> Report:
    """Read and check every file of a version. ``known``: its record as Redis has it, for when storage's is damaged.

    ``progress`` is called from this thread alone, and may raise to stop.
    """
    with ThreadPoolExecutor(threads or min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            return _Walk(storage, pool, progress).run(index_id, known)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Walk:
    def __init__(self, storage: Storage, pool: ThreadPoolExecutor, progress: OnProgress) -> None:
        self._storage = storage
        self._pool = pool
        self._progress = progress
        self._damage: dict[str, Damage] = {}
        self._sealed: set[str] = set()  # sealed files that have been read
        self._files: dict[str, _File] = {}

    def run(self, index_id: str, known: IndexRecord | None) -> Report:
        folder = f"indexes/{index_id}"
        record = self._record(INDEXES, index_id) or known
        self._read(f"{folder}/{indexes.BUILD}", Built, RECORD, index_id)
        manifest = self._manifest(f"{folder}/{indexes.MANIFEST}", record, index_id)
        if record is not None:
            self._record(MODELS, record.model)
            self._concepts(record)
            self._saes(record)
        if manifest is not None:
            self._datasets(manifest)
            self._results(manifest, believed=record is not None)
        read = self._hash()
        found = sorted(self._damage.values(), key=lambda each: each.file)
        return Report(index_id, len(self._sealed | self._files.keys()), read, tuple(found))

    # --- what says what the rest should be ------------------------------------------------------------

    def _record(self, collection: Collection[T], item_id: str) -> T | None:
        return self._read(record_file(collection, item_id), collection.record, RECORD, item_id)

    def _manifest(self, file: str, record: IndexRecord | None, index_id: str) -> IndexManifest | None:
        """Raises Conflict for a version of another release."""
        self._sealed.add(file)
        try:
            if record is not None:
                return indexes.read_manifest(self._storage, record)
            return codec.decode(IndexManifest, self._storage.read(file))
        except NotFound:
            return self._found(file, MISSING, MANIFEST, index_id)
        except Damaged:
            return self._found(file, CHANGED, MANIFEST, index_id)
        except ValueError:
            return self._found(file, UNREADABLE, MANIFEST, index_id)

    def _concepts(self, record: IndexRecord) -> None:
        """Those that may be asked of the index."""
        every = self._map("concepts", self._load, self._sealed_of(CONCEPTS), "records")
        for concept in every:
            if isinstance(concept, ConceptRecord) and concept.lineage == record.lineage:
                file = f"concepts/{concept.id}/direction-{concept.sha256[:16]}.safetensors"
                self._add(file, concept.sha256, CONCEPT, concept.id)

    def _saes(self, record: IndexRecord) -> None:
        """Those whose features may be asked of the index, with what has been said of them."""
        for held in self._map("saes", self._load, self._sealed_of(SAES), "records"):
            if isinstance(held, SaeRecord) and held.lineage == record.lineage:
                for name, sha256 in held.files.items():
                    self._add(f"{saes.folder(held)}/{name}", sha256, SAE, held.id)
                if self._storage.exists(labels := saes.labels_file(held.id)):
                    self._read(labels, Labels, SAE, held.id)

    def _datasets(self, manifest: IndexManifest) -> None:
        """The parts whose examples are shown, and the query sets."""
        parts = [manifest.dataset, *(part.dataset for part in manifest.appended)]
        embedded = [array.embedding for array in manifest.arrays if array.embedding is not None]
        asked = {each.query_set_fingerprint: each.query_set for each in embedded}
        others = {each.query_set_fingerprint for each in manifest.jacobians} - asked.keys()
        records = {name: self._record(DATASETS, name) for name in dict.fromkeys([*parts, *asked.values()])}
        if others:  # known by fingerprint alone
            for record in self._map("datasets", self._load, self._sealed_of(DATASETS), "records"):
                if isinstance(record, DatasetRecord) and record.fingerprint in others:
                    records.setdefault(record.id, record)
        for name, record in records.items():
            for file, sha256 in (record.files if record else {}).items():
                self._add(f"datasets/{name}/{file}", sha256, DATASET, name)

    def _sealed_of(self, collection: Collection[Any]) -> list[_Call]:
        """What the folders of a collection hold, as arguments of ``_load``; those without a record are nothing."""
        ids = self._storage.folders(collection.name)
        calls = [(record_file(collection, each), collection.record, RECORD, each, None) for each in ids]
        return [call for call in calls if self._storage.exists(call[0])]

    # --- shards and artifacts, until nothing new is referred to ---------------------------------------

    def _results(self, manifest: IndexManifest, *, believed: bool) -> None:
        """``believed``: a record vouches for the manifest. What one says that may be damaged itself makes no shard
        damaged that agrees with its own seal.
        """
        refs = [ref for section in manifest.sections for ref in section.shards]
        pinned = [_Ref(SHARD, ref.key, ref.sha256 if believed else None) for ref in refs]
        waiting = [*pinned, *_named_by(manifest)]
        seen: set[tuple[str, str]] = set()
        while waiting:
            fresh = {
                (ref.belongs_to, ref.key): ref for ref in waiting[::-1]
            }  # a pinned one before the same unpinned
            fresh = {key: ref for key, ref in fresh.items() if key not in seen}
            seen |= fresh.keys()
            waiting = []
            for found in self._map("manifests", self._load, [ref.call for ref in fresh.values()], "manifests"):
                if isinstance(found, ShardManifest):
                    self._add_all(shards.folder(found.key), found, SHARD)
                    waiting += _of_work(found.work)
                elif isinstance(found, Artifact):
                    self._add_all(artifacts.folder(found.key), found, ARTIFACT)
                    named = (str(key) for fact, key in found.facts.items() if fact.startswith(_REFERS))
                    waiting += [_Ref(ARTIFACT, key) for key in named]

    def _add_all(self, folder: str, found: ShardManifest | Artifact, belongs_to: str) -> None:
        for name, sha256 in found.files.items():
            self._add(f"{folder}/{name}", sha256, belongs_to, found.key)

    # --- files ----------------------------------------------------------------------------------------

    def _read(self, file: str, kind: type[T], belongs_to: str, owner: str) -> T | None:
        found = self._load((file, kind, belongs_to, owner, None))
        return found if isinstance(found, kind) else None

    def _load(self, call: _Call) -> Any:
        """A sealed file, or None when it is damaged: each is told once."""
        file, kind, belongs_to, owner, sha256 = call
        self._sealed.add(file)
        try:
            found = read_sealed(self._storage, file, kind, sha256=sha256)
        except NotFound:
            return self._found(file, MISSING, belongs_to, owner, sha256)
        except Damaged:
            return self._found(file, UNREADABLE, belongs_to, owner, sha256)
        if getattr(found, "key", owner) != owner or getattr(found, "id", owner) != owner:
            return self._found(file, CHANGED, belongs_to, owner, sha256)
        return found

    def _add(self, file: str, sha256: str, belongs_to: str, owner: str) -> None:
        self._files[file] = _File(file, sha256, belongs_to, owner)

    def _found(self, file: str, what: str, belongs_to: str, owner: str, pinned: str | None = None) -> None:
        self._damage[file] = Damage(file, what, belongs_to, owner, pinned)

    def _hash(self) -> int:
        """Check every file whose sha256 is known; the bytes that were read."""
        files = list(self._files.values())
        found = self._map("sizes", lambda each: self._storage.size(each.name), files, "files")
        sizes = dict(zip(files, found, strict=True))
        total, done = sum(size or 0 for size in sizes.values()), 0
        self._progress("files", 0, total, "bytes")
        for file, what in self._each(self._check, files):
            done += sizes[file] or 0
            self._progress("files", done, total, "bytes")
            if what is not None:
                self._found(file.name, what, file.belongs_to, file.owner)
        return total

    def _check(self, file: _File) -> tuple[_File, str | None]:
        try:
            data = self._storage.read(file.name)
        except NotFound:
            return file, MISSING
        except Damaged:  # the disk has it and cannot give it back
            return file, UNREADABLE
        return file, None if sha256_bytes(data) == file.sha256 else CHANGED

    def _map(self, stage: str, work: Callable[[A], B], items: Sequence[A], unit: str) -> list[B]:
        """``work`` on every item in threads, in order."""
        futures = [self._pool.submit(work, item) for item in items]
        found = []
        for number, future in enumerate(futures, start=1):
            found.append(future.result())
            self._progress(stage, number, len(items), unit)
        return found

    def _each(self, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """The results as they come, a few at a time: a file is in memory while it is hashed."""
        left = iter(items)
        running: set[Future[B]] = set()
        while True:
            running |= {self._pool.submit(work, item) for item in islice(left, 2 * _THREADS - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _named_by(manifest: IndexManifest) -> list[_Ref]:
    """Artifacts that queries of the version read, or that are behind its rows."""
    named = [each for known in manifest.jacobians for each in (known.artifact, known.directions)]
    named += [array.embedding.directions for array in manifest.arrays if array.embedding is not None]
    named += [manifest.deleted]
    return [*(_Ref(ARTIFACT, each) for each in named if each is not None), *_of_work(manifest.spec)]


def _of_work(work: ShardWork) -> list[_Ref]:
    """What a shard was computed from, as far as it says so."""
    named: list[str] = []
    match work:
        case PassSpec():
            if work.gradient is not None and isinstance(work.gradient.projection, Eigen):
                named += [work.gradient.projection.curvature, work.gradient.projection.basis]
            if work.influence is not None:
                named += [work.influence.curvature, *(head.artifact for head in work.influence.heads)]
        case SumSpec():
            return [_Ref(SHARD, key) for key, _weight in work.sources]
        case ReadOffSpec():
            return [_Ref(SHARD, work.source), _Ref(ARTIFACT, work.basis), _Ref(ARTIFACT, work.jacobian)]
        case CompactSpec():  # an append reads off the first of them how rows are made
            return [_Ref(SHARD, work.sources[0])]
        case DifferenceSpec():
            named += work.answers
    return [_Ref(ARTIFACT, key) for key in named]
