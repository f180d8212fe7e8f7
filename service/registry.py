"""Models, datasets, concepts and indexes by id: published to storage first, then copied to Redis.

Storage is the truth. Redis answers lists and look-ups quickly; when it has forgotten something
(flushed, replaced), ``get`` falls back to storage and ``rebuild`` restores everything. Records never change, so
those that were asked for once are kept in this process; what a name stands for is asked afresh every time.
"""

import contextlib
import logging
import re
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from redis import Redis
from redis.exceptions import LockError

from service import codec, keys, results
from service.contracts import AliasRecord, ConceptRecord, DatasetRecord, IndexRecord, ModelRecord, Rebuilt
from service.errors import Conflict, Damaged, Invalid, NotFound, Unavailable
from service.pointers import Pointed, Pointers
from service.sae_records import SaeRecord
from service.storage import Storage

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DAMAGED = ""  # in Redis, for a record that storage holds, and nobody can read
_RECORD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,140}")  # an index version is name@v3
_VERSION = re.compile(r"(?P<name>[^@]+)@v(?P<version>[1-9][0-9]*)")

_KEPT = 4096  # records in this process
_READERS = 8  # threads that read records from storage, which may be far away
_TRIES = 3  # of a rebuild that a flush of Redis cuts short

# Everything is there: said only if Redis was not flushed since the rebuild began.
_FILLED = """
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], 1)
return 1
"""


@dataclass(frozen=True)
class Collection(Generic[T]):
    """What is registered under one roof: its folder and Redis key, the word for one of it, its record."""

    name: str
    noun: str
    record: type[T]


MODELS = Collection("models", "model", ModelRecord)
DATASETS = Collection("datasets", "dataset", DatasetRecord)
CONCEPTS = Collection("concepts", "concept", ConceptRecord)
SAES = Collection("saes", "sae", SaeRecord)
INDEXES = Collection("indexes", "index", IndexRecord)
ALL: tuple[Collection[Any], ...] = (MODELS, DATASETS, CONCEPTS, SAES, INDEXES)


def check_id(value: str, *, param: str) -> str:
    """``value`` if it may serve as an id (it becomes a folder name), else Invalid."""
    if not _ID.fullmatch(value) or ".." in value:
        raise Invalid(
            "bad_id",
            f"{value[:140]!r} is no valid id: letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, 128 characters at most.",
            param=param,
        )
    return value


class Registry:
    def __init__(self, redis: Redis, storage: Storage) -> None:
        self._redis = redis
        self._storage = storage
        self.pointers = Pointers(redis, storage)
        self._mark_filled = redis.register_script(_FILLED)
        self._kept: dict[tuple[str, str], Any] = {}
        self._keeping = threading.Lock()
        self._filling = threading.Lock()

    @property
    def storage(self) -> Storage:
        """What the records are the entries of."""
        return self._storage

    def add(self, collection: Collection[T], item_id: str, record: T) -> None:
        """Publish a new record. Raises Conflict when the id is taken; records are never replaced."""
        if not _RECORD_ID.fullmatch(item_id):
            raise Invalid("bad_id", f"{item_id[:140]!r} is no valid id.", param="id")
        with self._alone_with(collection, item_id):
            if self.find(collection, item_id) is not None:
                raise Conflict(
                    f"{collection.noun}_exists",
                    f"There is a {collection.noun} {item_id!r} already, and it never changes. Choose another id.",
                    param="id",
                )
            self._write(collection, item_id, record)

    def restore(self, collection: Collection[T], item_id: str, record: T) -> None:
        """Put a record back whose file is missing or damaged. Raises Conflict when storage holds another one."""
        with self._alone_with(collection, item_id):
            held = results.intact(self._storage, record_file(collection, item_id), collection.record)
            if held is not None and held != record:
                detail = f"The record of {collection.noun} {item_id!r} is intact, and another one."
                raise Conflict(f"{collection.noun}_exists", detail, param="id")
            self._write(collection, item_id, record)

    def mend(self, collection: Collection[T], item_id: str, record: T) -> None:
        """Write a record again whose file is damaged or gone; one that is intact stays as it is."""
        if results.intact(self._storage, record_file(collection, item_id), collection.record) is None:
            self.restore(collection, item_id, record)

    def remembered(self, collection: Collection[T], item_id: str) -> T | None:
        """The copy in Redis or in this process, whatever storage holds: a damaged file can be put back from it."""
        cached: Any = self._redis.hget(keys.records(collection.name), item_id)
        return (_decode(collection, cached) if cached else None) or self._kept.get((collection.name, item_id))

    @contextlib.contextmanager
    def _alone_with(self, collection: Collection[Any], item_id: str) -> Iterator[None]:
        """Only one at a time decides what an id is."""
        lock = self._redis.lock(keys.lock(f"{collection.name}:{item_id}"), timeout=keys.LOCK_TTL_S)
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(LockError):  # it ran out while storage was slow, which is no error of its own
                lock.release()

    def _write(self, collection: Collection[T], item_id: str, record: T) -> None:
        data = results.sealed(record)
        self._storage.write(record_file(collection, item_id), data)
        with self._keeping:
            self._kept.pop((collection.name, item_id), None)
        self._tell(collection, item_id, data, make=True)

    def find(self, collection: Collection[T], item_id: str) -> T | None:
        """The record of ``item_id``, or None. Raises Damaged when storage holds something unreadable."""
        if not _RECORD_ID.fullmatch(item_id):
            return None
        if (kept := self._kept.get((collection.name, item_id))) is not None:
            return kept
        cached: Any = self._redis.hget(keys.records(collection.name), item_id)
        record = _decode(collection, cached) if cached is not None else None
        if record is None:
            try:
                stored = self._stored(collection, item_id)
            except Damaged:
                # Remembered by name, so that lists can tell of it.
                self._redis.hset(keys.records(collection.name), item_id, _DAMAGED)
                raise
            if stored is not None:
                record, text = stored
                self._tell(collection, item_id, text, make=False)
        if record is not None:
            with self._keeping:
                self._kept[collection.name, item_id] = record
                while len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        return record

    def get(self, collection: Collection[T], item_id: str, *, param: str | None = None) -> T:
        """The record of ``item_id``; NotFound names the ids there are."""
        record = self.find(collection, item_id)
        if record is None:
            ids: Any = self._redis.hkeys(keys.records(collection.name))
            known = ", ".join(sorted(ids)[:10]) or "none yet"
            raise NotFound(
                f"{collection.noun}_not_found",
                f"There is no {collection.noun} {item_id!r}. Known: {known}.",
                param=param,
            )
        return record

    def all(self, collection: Collection[T]) -> list[T]:
        """Every record of the collection, by id; a Redis that has forgotten them is filled again first. Damaged
        ones are left out.
        """
        return self.survey(collection)[0]

    def survey(self, collection: Collection[T]) -> tuple[list[T], list[str]]:
        """Every record of the collection, and the ids of those that are damaged."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(keys.REGISTRY_FILLED)
        pipe.hgetall(keys.records(collection.name))
        filled, raw = pipe.execute()
        if not filled:
            self._fill()
            raw = self._redis.hgetall(keys.records(collection.name))
        raw = cast("dict[str, str]", raw)
        found, damaged = [], []
        for item_id in sorted(raw):
            try:
                record = _decode(collection, raw[item_id]) or self.find(collection, item_id)
            except Damaged:
                damaged.append(item_id)
                continue
            if record is not None:
                found.append(record)
        return found, damaged

    def stored_ids(self, collection: Collection[T]) -> list[str]:
        """Ids that storage holds, whatever Redis knows."""
        return self._storage.folders(collection.name)

    # --- names that move ----------------------------------------------------------------------------

    def pointed(self, name: str) -> Pointed:
        """What ``name`` stands for now: an alias, an index with its newest version, or nothing.

        One round trip to Redis; what that does not know is looked for in storage. Raises Damaged.
        """
        if not _ID.fullmatch(name):
            return Pointed(None, None, filled=True)
        found = self.pointers.read(name)
        if not found.filled:
            self._fill()
            found = self.pointers.read(name)
        if found.filled and (found.alias or found.newest):  # else it does not know, or was flushed once more
            return found
        newest = self._newest_stored(name)
        if newest is not None:
            self.pointers.raise_newest(name, newest, make=True)
        alias = self.pointers.stored(name) and self.pointers.refresh(name)
        return Pointed(alias, newest, found.filled)

    def aliases(self) -> list[AliasRecord]:
        """Every alias, by name."""
        found, filled = self.pointers.aliases()
        if not filled:
            self._fill()
            found, _ = self.pointers.aliases()
        return found

    def _newest_stored(self, name: str) -> int | None:
        """The newest published version of ``name`` as storage has it, readable or not."""
        versions = (version for stem, version in map(_version, self.stored_ids(INDEXES)) if stem == name)
        published = (
            version
            for version in sorted(versions, reverse=True)
            if self._storage.exists(record_file(INDEXES, f"{name}@v{version}"))
        )
        return next(published, None)

    # --- filling Redis ------------------------------------------------------------------------------

    def rebuild(self) -> Rebuilt:
        """Copy all that storage holds into Redis, and say what that is; what cannot be read is left out and named.

        Raises Unavailable when Redis forgets faster than it is told.
        """
        for _ in range(_TRIES):
            token = keys.registry_filling(secrets.token_hex(8))
            self._redis.set(token, 1, ex=keys.FILLING_TTL_S)
            done = self._copy_everything()
            if self._mark_filled(keys=[token, keys.REGISTRY_FILLED]):
                return done
        raise Unavailable("registry_flushed", "Redis is flushed again and again while it is filled. Try again.")

    def _fill(self) -> None:
        """Rebuild a Redis that has forgotten; of many who notice at once, one does it."""
        with self._filling:
            if not self._redis.exists(keys.REGISTRY_FILLED):
                self.rebuild()

    def _copy_everything(self) -> Rebuilt:
        with self._keeping:
            self._kept.clear()
        counts: dict[str, int] = {}
        damaged: list[str] = []
        newest: dict[str, int] = {}
        for collection in ALL:
            found = 0
            pipe = self._redis.pipeline(transaction=False)
            for item_id, text in self._read_all(collection):
                if text is None:
                    damaged.append(f"{collection.name}/{item_id}")
                    pipe.hsetnx(keys.records(collection.name), item_id, _DAMAGED)  # an intact copy stays
                else:
                    found += 1
                    pipe.hset(keys.records(collection.name), item_id, text)
                name, version = _version(item_id) if collection is INDEXES else ("", 0)
                if version:  # an unreadable one too: its name must not fall back to an older version
                    newest[name] = max(version, newest.get(name, 0))
            pipe.execute()
            counts[collection.name] = found
        pipe = self._redis.pipeline(transaction=False)
        for name, version in newest.items():
            self.pointers.raise_newest(name, version, make=True, pipe=pipe)
        pipe.execute()
        living = 0
        for name in filter(_ID.fullmatch, self.pointers.known_names()):
            try:
                living += self.pointers.refresh(name) is not None
            except Damaged as error:
                log.error("left out: %s", error)
                damaged.append(f"aliases/{name}")
        return Rebuilt(**counts, newest=len(newest), aliases=living, damaged=tuple(damaged))

    def _read_all(self, collection: Collection[Any]) -> Iterator[tuple[str, bytes | None]]:
        """Id and text of every record in storage; None for the text of one that cannot be read."""

        def read(item_id: str) -> tuple[str, bytes | None] | None:
            try:
                stored = self._stored(collection, item_id) if _RECORD_ID.fullmatch(item_id) else None
            except Damaged as error:
                log.error("left out: %s", error)
                return item_id, None
            return None if stored is None else (item_id, stored[1])

        with ThreadPoolExecutor(_READERS) as pool:
            yield from (item for item in pool.map(read, self.stored_ids(collection)) if item is not None)

    def _stored(self, collection: Collection[T], item_id: str) -> tuple[T, bytes] | None:
        """A record as storage has it, with its text. Raises Damaged."""
        file = record_file(collection, item_id)
        try:
            record = results.read_sealed(self._storage, file, collection.record)
        except (NotFound, Invalid):
            return None
        except Damaged as error:
            raise Damaged("damaged_record", error.detail, param=file, context=error.context) from error
        if (held := cast("Any", record).id) != item_id:
            raise Damaged("damaged_record", f"{file} is the record of {held!r}.", param=file)
        return record, results.sealed(record)

    def _tell(self, collection: Collection[Any], item_id: str, text: str | bytes, *, make: bool) -> None:
        """Copy a record to Redis, together with what follows from it for the newest version of its name."""
        name, version = _version(item_id) if collection is INDEXES else ("", 0)
        if version and make and not self.pointers.knows_newest(name):
            version = max(version, self._newest_stored(name) or 0)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(keys.records(collection.name), item_id, text)
        if version:
            self.pointers.raise_newest(name, version, make=make, pipe=pipe)
        pipe.execute()


def _decode(collection: Collection[T], cached: str) -> T | None:
    """A record as Redis holds it; None when it cannot be read (damaged, or of an older release)."""
    if cached == _DAMAGED:
        return None
    try:
        return codec.unseal(collection.record, cached)
    except ValueError as error:
        log.error("redis holds an unreadable %s: %s", collection.noun, error)
        return None


def record_file(collection: Collection[Any], item_id: str) -> str:
    """Where storage keeps the record."""
    return f"{collection.name}/{item_id}/record.json"


def _version(item_id: str) -> tuple[str, int]:
    """Name and version of an index; version 0 for what is none."""
    found = _VERSION.fullmatch(item_id)
    return (found["name"], int(found["version"])) if found else (item_id, 0)
