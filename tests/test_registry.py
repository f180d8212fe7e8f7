"""The registry: an id is taken once and for ever, Redis is a copy that storage restores."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from service import codec, keys
from service.contracts import ConceptRecord, DatasetRecord, IndexRecord, ModelRecord
from service.errors import Conflict, Damaged, Invalid, NotFound, Unavailable
from service.redis_server import EmbeddedRedis, connect
from service.registry import ALL, CONCEPTS, DATASETS, INDEXES, MODELS, Collection, Registry, check_id
from service.storage import Storage
from service.terms import Pooling
from tests import shelf


def model(model_id: str, path: str = "/models/m") -> ModelRecord:
    return ModelRecord(model_id, path, "f", "t", None, "LlamaForCausalLM", 4, 64, None, None, "f", (), codec.now())


def dataset(dataset_id: str) -> DatasetRecord:
    return DatasetRecord(dataset_id, "f", "é.jsonl", 3, 1, 1, 1, {"blank_line": 1}, {"a.parquet": "0"}, codec.now())


def concept(concept_id: str) -> ConceptRecord:
    return ConceptRecord(
        concept_id, "m", "f", "f", 2, Pooling.LAST_TOKEN, 64, "d", 1.5, 0.9, 5, 6, {"x": {"y": 1}}, "0", codec.now()
    )


def test_a_record_comes_back_as_it_was_from_redis_and_from_storage(
    registry: Registry, redis: Redis, storage: Storage
) -> None:
    record = concept("c")
    registry.add(CONCEPTS, "c", record)
    assert registry.find(CONCEPTS, "c") == record
    redis.flushall()
    assert registry.find(CONCEPTS, "c") == record
    assert Registry(redis, Storage(storage.root)).get(CONCEPTS, "c") == record


def test_ids_belong_to_their_collection(registry: Registry) -> None:
    registry.add(MODELS, "same", model("same"))
    registry.add(DATASETS, "same", dataset("same"))
    assert isinstance(registry.get(MODELS, "same"), ModelRecord)
    assert isinstance(registry.get(DATASETS, "same"), DatasetRecord)
    assert registry.find(CONCEPTS, "same") is None


def test_all_are_listed_by_id(registry: Registry) -> None:
    for name in ("b", "a", "B", "a-1"):
        registry.add(MODELS, name, model(name))
    assert [record.id for record in registry.all(MODELS)] == ["B", "a", "a-1", "b"]
    assert registry.all(INDEXES) == []


def test_get_says_what_there_is(registry: Registry) -> None:
    with pytest.raises(NotFound, match="none yet"):
        registry.get(MODELS, "bot")
    registry.add(MODELS, "robot", model("robot"))
    with pytest.raises(NotFound, match="Known: robot") as missing:
        registry.get(MODELS, "bot", param="model")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_taken_id_is_refused_and_nothing_changes(registry: Registry, redis: Redis, forgotten: bool) -> None:
    first = model("m", "/first")
    registry.add(MODELS, "m", first)
    if forgotten:
        redis.flushall()
    with pytest.raises(Conflict) as taken:
        registry.add(MODELS, "m", model("m", "/second"))
    assert (taken.value.code, taken.value.param) == ("model_exists", "id")
    assert registry.find(MODELS, "m") == first
    redis.flushall()
    assert registry.find(MODELS, "m") == first


def test_of_those_that_add_an_id_at_once_exactly_one_wins(
    redis_server: EmbeddedRedis, redis: Redis, storage: Storage
) -> None:
    clients = [connect(redis_server.url) for _ in range(3)]

    def race(item: str) -> list[str]:
        """The paths of the winners."""
        start = threading.Barrier(len(clients))

        def add(client: Redis, path: str) -> str | None:
            start.wait()
            try:
                Registry(client, storage).add(MODELS, item, model(item, path))
            except Conflict:
                return None
            return path

        with ThreadPoolExecutor(len(clients)) as pool:
            paths = pool.map(add, clients, (f"/{number}" for number in range(len(clients))))
            return [path for path in paths if path]

    for number in range(6):
        (winner,) = race(f"m{number}")
        redis.flushall()
        assert Registry(redis, storage).get(MODELS, f"m{number}").path == winner
    for client in clients:
        client.close()


def test_rebuild_restores_everything_that_redis_forgot(registry: Registry, redis: Redis) -> None:
    def everything() -> list[object]:
        return [record for collection in ALL for record in registry.all(collection)]

    for name in ("a", "b"):
        registry.add(MODELS, name, model(name))
        registry.add(DATASETS, name, dataset(name))
    registry.add(CONCEPTS, "c", concept("c"))
    before = everything()
    redis.flushall()
    assert registry.rebuild().records == 5
    assert everything() == before
    assert registry.rebuild().records == 5
    assert everything() == before


def test_a_list_is_whole_even_when_redis_forgot_and_learned_some_again(registry: Registry, redis: Redis) -> None:
    for name in ("a", "b", "c"):
        registry.add(MODELS, name, model(name))
    redis.flushall()
    registry.get(MODELS, "b")
    registry.add(MODELS, "d", model("d"))
    assert [record.id for record in registry.all(MODELS)] == ["a", "b", "c", "d"]


def test_a_folder_without_a_record_is_nothing_yet(registry: Registry, storage: Storage) -> None:
    storage.write("datasets/half/examples.parquet", b"published, but never registered")
    assert registry.rebuild().records == 0
    assert registry.find(DATASETS, "half") is None
    registry.add(DATASETS, "half", dataset("half"))
    assert registry.rebuild().records == 1


@pytest.mark.parametrize("data", [b"", b"{oops", b"{}", b"[]", b"\xff"])
def test_a_damaged_record_in_storage_does_not_hide_the_others(
    registry: Registry, redis: Redis, storage: Storage, data: bytes
) -> None:
    for name in ("a", "b", "c"):
        registry.add(MODELS, name, model(name))
    storage.write("models/b/record.json", data)
    redis.flushall()
    assert registry.rebuild().records == 2
    assert [record.id for record in registry.all(MODELS)] == ["a", "c"]
    with pytest.raises(Damaged):
        registry.get(MODELS, "b")
    with pytest.raises((Conflict, Damaged)):
        registry.add(MODELS, "b", model("b"))
    assert storage.read("models/b/record.json") == data


@pytest.mark.parametrize("fails", [False, True])
def test_a_storage_slower_than_a_lock_lives_tells_what_came_of_it(
    redis: Redis, storage: Storage, fails: bool
) -> None:
    class Slow(Storage):
        def write(self, key: str, data: bytes) -> str:
            redis.delete(keys.lock("models:a"))  # as its time to live does
            if fails:
                raise Unavailable("storage_unavailable", "gave up")
            return super().write(key, data)

    slow, record = Registry(redis, Slow(storage.root)), model("a")
    if fails:
        with pytest.raises(Unavailable, match="gave up"):
            slow.add(MODELS, "a", record)
    else:
        slow.add(MODELS, "a", record)
        assert Registry(redis, storage).get(MODELS, "a") == record


def test_the_record_of_another_is_not_believed(registry: Registry, redis: Redis, storage: Storage) -> None:
    """A folder that was copied, or restored to the wrong place."""
    for name in ("a", "b"):
        registry.add(MODELS, name, model(name))
    storage.write("models/b/record.json", storage.read("models/a/record.json"))
    redis.flushall()
    assert registry.rebuild().damaged == ("models/b",)
    with pytest.raises(Damaged, match="is the record of 'a'"):
        registry.get(MODELS, "b")


def test_a_newest_version_that_redis_cannot_tell_is_looked_up_and_set_again(
    registry: Registry, redis: Redis
) -> None:
    shelf.add(registry, "a@v1", "a@v2")
    redis.hset(keys.NEWEST, "a", "2x")
    assert registry.pointed("a").newest == 2
    assert redis.hget(keys.NEWEST, "a") == "2"


BAD_IDS = ["", ".", "..", ".hidden", "../x", "a/b", "/a", "a..b", "-a", "_a", "a b", "a\n", "a\0", "é", "a@v1"]


@pytest.mark.parametrize("bad", [*BAD_IDS, "x" * 129, "x" * 300, "a\\b", "a%2fb", "\ud800", "\u0430"])
def test_an_id_that_is_no_plain_name_is_refused(bad: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_id(bad, param="name")
    assert (refused.value.code, refused.value.param) == ("bad_id", "name")
    assert len(refused.value.detail) < 1000


@pytest.mark.parametrize("good", ["a", "0", "A.b_c-d", "x" * 128, "2024.11", "con"])
def test_a_plain_name_is_an_id(good: str) -> None:
    assert check_id(good, param="id") == good


@pytest.mark.parametrize("asked", [*BAD_IDS, "x" * 300, "m/record.json", "../models/m", "\ud800", "m\0"])
@pytest.mark.parametrize("collection", [MODELS, INDEXES], ids=lambda collection: collection.name)
def test_asking_for_a_bad_id_finds_nothing(registry: Registry, collection: Collection, asked: str) -> None:
    registry.add(MODELS, "m", model("m"))
    assert registry.find(collection, asked) is None
    with pytest.raises(NotFound):
        registry.get(collection, asked)


@pytest.mark.parametrize("alias", ["./m", "m/", "/m", "m/.", "m//"])
def test_a_record_has_one_id_only(registry: Registry, redis: Redis, alias: str) -> None:
    registry.add(MODELS, "m", model("m"))
    assert registry.find(MODELS, alias) is None
    assert redis.hkeys(keys.records("models")) == ["m"]
    assert [record.id for record in registry.all(MODELS)] == ["m"]


@pytest.mark.parametrize("bad", ["../x", "a/../../../x"])
def test_nothing_is_written_outside_the_storage(
    registry: Registry, storage: Storage, tmp_path: Path, bad: str
) -> None:
    with pytest.raises(Invalid):
        registry.add(MODELS, bad, model(bad))
    assert [path.name for path in tmp_path.iterdir()] == ["storage"]
    assert registry.rebuild().records == 0


def test_an_index_record_keeps_its_version_in_its_id(registry: Registry) -> None:
    plain = {
        "name": "n", "version": 3, "model": "m", "model_fingerprint": "f", "lineage": "f", "dataset": "d",
        "dataset_fingerprint": "f", "pooling": "last_token", "loss_reduction": "mean",
        "arrays": [{"kind": "gradient", "layer": None, "dims": 8}],
        "counts": {"lines": 1, "indexed": 1, "duplicates": 0, "quarantined": 0, "truncated": 0},
        "quarantine_reasons": {}, "bytes": 18, "job": "j", "created_at": codec.now(),
    }  # fmt: skip
    record = codec.from_plain(IndexRecord, plain)
    registry.add(INDEXES, record.id, record)
    assert registry.get(INDEXES, "n@v3") == record
