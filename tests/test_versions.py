"""Which version a name stands for: asked in one round trip, never an older one, whatever Redis has forgotten."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from service import aliases, indexes, keys, results
from service.aliases import Condition
from service.errors import Damaged, NotFound, Unavailable
from service.registry import ALL, INDEXES, MODELS, Registry
from service.storage import Storage
from tests import shelf
from tests.conftest import trips
from tests.test_registry import model


def of(registry: Registry, name: str) -> str:
    return indexes.resolve(registry, name).id


def alias(registry: Registry, redis: Redis, name: str, target: str) -> None:
    record = indexes.resolve(registry, target)
    known = registry.pointed(name).alias
    aliases.switch(registry, redis, name, record, Condition(present=True) if known else Condition())


# --- what it costs ------------------------------------------------------------------------------------


def test_a_name_costs_one_round_trip_and_a_version_seen_before_none(
    registry: Registry, redis: Redis, counted: Registry
) -> None:
    shelf.add(registry, *(f"a@v{version}" for version in range(1, 12)))
    registry.add(MODELS, "m", model("m"))
    alias(registry, redis, "prod", "a@v2")
    registry.rebuild()
    for reference, least in (("a", 1), ("prod", 1), ("a@v11", 0), ("a@v2", 0)):
        of(counted, reference)
        assert trips(lambda reference=reference: of(counted, reference)) == least
    counted.get(MODELS, "m")
    assert trips(lambda: counted.get(MODELS, "m")) == 0


def test_what_a_name_stands_for_is_never_remembered(registry: Registry, redis: Redis, counted: Registry) -> None:
    shelf.add(registry, "a@v1")
    alias(registry, redis, "prod", "a@v1")
    assert (of(counted, "a"), of(counted, "prod")) == ("a@v1", "a@v1")
    shelf.add(registry, "a@v2")
    assert (of(counted, "a"), of(counted, "prod")) == ("a@v2", "a@v1")
    alias(registry, redis, "prod", "a@v2")
    assert of(counted, "prod") == "a@v2"


def test_records_are_kept_by_one_registry_and_not_without_bound(
    registry: Registry, redis: Redis, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.registry._KEPT", 3)
    for number in range(5):
        registry.add(MODELS, f"m{number}", model(f"m{number}"))
        registry.get(MODELS, f"m{number}")
    assert len(registry._kept) == 3
    redis.flushall()
    with pytest.raises(NotFound):
        Registry(redis, Storage(str(tmp_path / "another"))).get(MODELS, "m4")


# --- never an older one -------------------------------------------------------------------------------


def lose_everything(redis: Redis) -> None:
    redis.flushall()


def lose_newest(redis: Redis) -> None:
    redis.delete(keys.NEWEST)


def lose_name(redis: Redis) -> None:
    redis.hdel(keys.NEWEST, "a")


LOSSES = pytest.mark.parametrize("lose", [lose_everything, lose_newest, lose_name])


@LOSSES
@pytest.mark.parametrize("filled", [True, False])
def test_a_forgotten_name_is_looked_for_in_storage_once(
    registry: Registry, redis: Redis, counted: Registry, filled: bool, lose: Callable[[Redis], None]
) -> None:
    shelf.add(registry, "a@v1", "a@v10", "a@v9", "ab@v11")
    if filled:
        registry.rebuild()
    lose(redis)
    assert of(counted, "a") == "a@v10"
    assert trips(lambda: of(counted, "a")) == 1


@LOSSES
@pytest.mark.parametrize("filled", [True, False])
def test_a_late_publish_of_an_older_version_does_not_become_the_newest(
    registry: Registry, redis: Redis, lose: Callable[[Redis], None], filled: bool
) -> None:
    shelf.add(registry, "a@v5")
    if filled:
        registry.rebuild()
    lose(redis)
    shelf.add(registry, "a@v3")
    assert of(registry, "a") == "a@v5"
    shelf.add(registry, "a@v4")
    assert of(registry, "a") == "a@v5"
    shelf.add(registry, "a@v6")
    assert of(registry, "a") == "a@v6"


@LOSSES
def test_asking_for_an_old_version_first_does_not_make_it_the_newest(
    registry: Registry, redis: Redis, storage: Storage, lose: Callable[[Redis], None]
) -> None:
    shelf.add(registry, "a@v1", "a@v2")
    registry.rebuild()
    lose(redis)
    redis.delete(keys.records("indexes"))
    fresh = Registry(redis, storage)
    assert of(fresh, "a@v1") == "a@v1"
    assert of(fresh, "a") == "a@v2"


def test_a_version_whose_publisher_died_before_telling_redis_is_the_newest_once_it_is_seen(
    registry: Registry, redis: Redis, storage: Storage
) -> None:
    shelf.add(registry, "a@v1")
    registry.rebuild()
    storage.write("indexes/a@v2/record.json", results.sealed(shelf.record("a", 2)))
    assert of(registry, "a") == "a@v1"
    assert of(registry, "a@v2") == "a@v2"
    assert of(registry, "a") == "a@v2"


def test_a_folder_without_a_record_is_no_version_yet(registry: Registry, redis: Redis, storage: Storage) -> None:
    shelf.add(registry, "a@v1")
    storage.write("indexes/a@v2/manifest.json", b"half published")
    storage.write("indexes/b@v1/manifest.json", b"half published")
    for _ in range(2):
        assert of(registry, "a") == "a@v1"
        with pytest.raises(NotFound):
            of(registry, "b")
        redis.flushall()
    registry.rebuild()
    redis.delete(keys.NEWEST)
    assert of(registry, "a") == "a@v1"
    assert redis.hgetall(keys.NEWEST) == {"a": "1"}


def test_a_newest_version_that_cannot_be_read_is_damage_and_not_an_older_answer(
    registry: Registry, redis: Redis, storage: Storage
) -> None:
    shelf.add(registry, "a@v1", "a@v2")
    storage.write("indexes/a@v2/record.json", b"{")
    redis.flushall()
    for _ in range(2):
        with pytest.raises(Damaged, match="a@v2"):
            of(registry, "a")
        assert registry.rebuild().damaged == ("indexes/a@v2",)
    assert of(registry, "a@v1") == "a@v1"


# --- rebuild ------------------------------------------------------------------------------------------


def everything(redis: Redis) -> dict[str, dict[str, str]]:
    hashes = [keys.NEWEST, keys.ALIASES, *(keys.records(collection.name) for collection in ALL)]
    return {name: redis.hgetall(name) for name in hashes}


@pytest.mark.parametrize("lost", ["everything", "nothing", "newer"])
def test_a_rebuild_makes_redis_what_it_was(registry: Registry, redis: Redis, storage: Storage, lost: str) -> None:
    shelf.furnish(registry, storage)
    shelf.add(registry, "a@v1", "a@v2", "b@v7")
    for target in ("a@v1", "a@v2", "b"):
        alias(registry, redis, "prod", target)
    alias(registry, redis, "next", "a@v2")
    alias(registry, redis, "old", "a@v1")
    backup = {"a": "1", "b": "7"}, redis.hgetall(keys.ALIASES)
    alias(registry, redis, "next", "a@v1")
    aliases.remove(registry, "old", Condition(present=True))
    before = everything(redis)
    assert before[keys.NEWEST] == {"a": "2", "b": "7"}
    assert sorted(before[keys.ALIASES]) == ["next", "prod"]
    if lost == "everything":
        redis.flushall()
    if lost == "newer":  # a backup of Redis was put back
        redis.hset(keys.NEWEST, mapping=backup[0])
        redis.hset(keys.ALIASES, mapping=backup[1])
        redis.hdel(keys.records("indexes"), "a@v2")
    done = registry.rebuild()
    assert (done.records, done.newest, done.aliases, done.damaged) == (6, 2, 2, ())
    assert everything(redis) == before
    assert registry.pointed("prod").alias.revision == 3


class Flushing(Storage):
    """Redis is flushed, the first ``times`` times that somebody looks for aliases: the last thing of a rebuild."""

    def __init__(self, root: str, redis: Redis, times: int) -> None:
        super().__init__(root)
        self._redis, self._times = redis, times

    def folders(self, key: str) -> list[str]:
        if key == "aliases" and self._times:
            self._times -= 1
            self._redis.flushall()
        return super().folders(key)


def test_a_flush_in_the_middle_of_a_rebuild_is_noticed(registry: Registry, redis: Redis, storage: Storage) -> None:
    shelf.add(registry, "a@v1", "a@v2", "b@v1")
    before = everything(redis)
    Registry(redis, Flushing(storage.root, redis, 2)).rebuild()
    assert everything(redis) == before
    with pytest.raises(Unavailable, match="Try again"):
        Registry(redis, Flushing(storage.root, redis, 99)).rebuild()
    assert not redis.exists(keys.REGISTRY_FILLED)  # nobody takes the half for the whole
    assert of(registry, "a") == "a@v2"


def test_of_many_who_find_redis_empty_all_get_the_right_answer(
    registry: Registry, redis: Redis, storage: Storage
) -> None:
    shelf.add(registry, "a@v1", "a@v2")
    alias(registry, redis, "prod", "a@v1")
    for _ in range(5):
        redis.flushall()
        start = threading.Barrier(6)

        def ask(number: int, start: threading.Barrier = start) -> tuple[str, str]:
            mine = registry if number % 2 else Registry(redis, storage)
            start.wait()
            return of(mine, "a"), of(mine, "prod")

        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(ask, range(6))) == {("a@v2", "a@v1")}
    assert [record.id for record in registry.all(INDEXES)] == ["a@v1", "a@v2"]
