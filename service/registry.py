"""Models, datasets, concepts and indexes by id: published to storage first, then copied to Redis.

Storage is the truth. Redis answers lists and look-ups quickly; when it has forgotten something
(flushed, replaced), ``get`` falls back to storage and ``rebuild`` restores everything.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from redis import Redis

from service import codec, keys, results
from service.contracts import ConceptRecord, DatasetRecord, IndexRecord, ModelRecord
from service.errors import Conflict, Damaged, Invalid, NotFound
from service.storage import Storage

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DAMAGED = ""  # in Redis, for a record that storage holds, and nobody can read
_RECORD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,140}")  # an index version is name@v3


@dataclass(frozen=True)
class Collection(Generic[T]):
    """What is registered under one roof: its folder and Redis key, the word for one of it, its record."""

    name: str
    noun: str
    record: type[T]


MODELS = Collection("models", "model", ModelRecord)
DATASETS = Collection("datasets", "dataset", DatasetRecord)
CONCEPTS = Collection("concepts", "concept", ConceptRecord)
INDEXES = Collection("indexes", "index", IndexRecord)
ALL: tuple[Collection[Any], ...] = (MODELS, DATASETS, CONCEPTS, INDEXES)


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

    def add(self, collection: Collection[T], item_id: str, record: T) -> None:
        """Publish a new record. Raises Conflict when the id is taken; records are never replaced."""
        if not _RECORD_ID.fullmatch(item_id):
            raise Invalid("bad_id", f"{item_id[:140]!r} is no valid id.", param="id")
        with self._redis.lock(keys.lock(f"{collection.name}:{item_id}"), timeout=keys.LOCK_TTL_S):
            if self.find(collection, item_id) is not None:
                raise Conflict(
                    f"{collection.noun}_exists",
                    f"There is a {collection.noun} {item_id!r} already, and it never changes. Choose another id.",
                    param="id",
                )
            self._write(collection, item_id, record)

    def restore(self, collection: Collection[T], item_id: str, record: T) -> None:
        """Put a record back whose file is missing or damaged. Raises Conflict when storage holds another one."""
        with self._redis.lock(keys.lock(f"{collection.name}:{item_id}"), timeout=keys.LOCK_TTL_S):
            held = results.intact(self._storage, record_file(collection, item_id), collection.record)
            if held is not None and held != record:
                detail = f"The record of {collection.noun} {item_id!r} is intact, and another one."
                raise Conflict(f"{collection.noun}_exists", detail, param="id")
            self._write(collection, item_id, record)

    def remembered(self, collection: Collection[T], item_id: str) -> T | None:
        """The copy in Redis, whatever storage holds: sealed as well, so a damaged file can be put back from it."""
        cached: Any = self._redis.hget(keys.records(collection.name), item_id)
        return _decode(collection, cached) if cached else None

    def _write(self, collection: Collection[T], item_id: str, record: T) -> None:
        data = results.sealed(record)
        self._storage.write(record_file(collection, item_id), data)
        self._redis.hset(keys.records(collection.name), item_id, data)

    def find(self, collection: Collection[T], item_id: str) -> T | None:
        """The record of ``item_id``, or None. Raises Damaged when storage holds something unreadable."""
        if not _RECORD_ID.fullmatch(item_id):
            return None
        cached: Any = self._redis.hget(keys.records(collection.name), item_id)
        if cached is not None and (known := _decode(collection, cached)) is not None:
            return known
        file = record_file(collection, item_id)
        try:
            record = results.read_sealed(self._storage, file, collection.record)
        except (NotFound, Invalid):
            return None
        except Damaged as error:
            # Remembered by name: without it the newest version of an index would seem to be the one before.
            self._redis.hset(keys.records(collection.name), item_id, _DAMAGED)
            raise Damaged("damaged_record", error.detail, param=file, context=error.context) from error
        self._redis.hset(keys.records(collection.name), item_id, results.sealed(record))
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
            self.rebuild()
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

    def rebuild(self) -> int:
        """Copy every record that storage holds into Redis; returns how many. Damaged ones are logged."""
        restored = 0
        for collection in ALL:
            for item_id in self.stored_ids(collection):
                try:
                    restored += self.find(collection, item_id) is not None
                except Damaged as error:
                    log.error("left out: %s", error)
        self._redis.set(keys.REGISTRY_FILLED, 1)
        return restored


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
