"""Readers never see a half-published version, nor half a switch: many queries during many publishes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from redis import Redis

from api.client import Client
from api.schemas import QueryOut
from service import aliases, indexes
from service.aliases import Condition
from service.jobs import Jobs
from service.loading import IndexLoader
from service.queries import Answer, QueryService
from service.questions import Query
from service.redis_server import EmbeddedRedis, connect
from service.registry import Registry
from service.storage import Storage
from service.terms import Method, Order
from tests import shelf
from tests.conftest import trips

QUERIES, PUBLISHES, READERS = 1000, 50, 4


def query(index: str) -> Query:
    return Query(index, "c", Method.VECTOR_FILTER, Order.MOST, shelf.ROWS)


def service(registry: Registry, redis: Redis, storage: Storage) -> QueryService:
    loader = IndexLoader(registry, storage, threads=1)
    return QueryService(registry, storage, Jobs(redis), loader, shard_size=shelf.SHARD)


def whole(version: int, ids: list[str], scores: list[float], name: str = "sft") -> int:
    """The version that an answer says it is of, when every row of it is."""
    assert len(set(ids)) == shelf.ROWS
    assert scores == [version] * shelf.ROWS, f"{name}@v{version}"
    return version


@dataclass
class Progress:
    """What has been published and switched to so far: a reader who starts now may not get less."""

    newest: int = 1
    alias: int = 1
    done: bool = False


def publish_all(redis_server: EmbeddedRedis, root: str, progress: Progress) -> None:
    """As another process: its own client of Redis, its own registry. The alias follows every version."""
    client, storage = connect(redis_server.url), Storage(root)
    registry = Registry(client, storage)
    publish = shelf.publisher(registry, storage, "sft")
    try:
        for version in range(2, 2 + PUBLISHES):
            record = publish(version)
            progress.newest = version
            aliases.switch(registry, client, "prod", record, Condition(revisions=(version - 1,)))
            progress.alias = version
    finally:
        progress.done = True
        client.close()


def test_every_answer_is_of_one_version_while_others_publish_and_switch(
    redis_server: EmbeddedRedis, redis: Redis, storage: Storage, registry: Registry
) -> None:
    shelf.furnish(registry, storage)
    first = shelf.publisher(registry, storage, "sft")(1)
    aliases.switch(registry, redis, "prod", first, Condition())
    queries, progress = service(Registry(redis, storage), redis, storage), Progress()

    def read(number: int) -> set[int]:
        """Ask by name and by alias in turn, until everything is published and asked often enough."""
        seen, last, asked = set(), {"sft": 0, "prod": 0}, 0
        while asked < QUERIES // READERS or not progress.done:
            name = ("sft", "prod")[(asked + number) % 2]
            published = progress.newest if name == "sft" else progress.alias
            answer = queries.run(query(name))
            assert isinstance(answer, Answer)
            hits = answer.hits
            version = whole(answer.index.version, [h.example.id for h in hits], [h.score for h in hits])
            assert version >= max(last[name], published), f"{name} went back"
            last[name] = version
            seen.add(version)
            asked += 1
        return seen

    with ThreadPoolExecutor(READERS + 1) as pool:
        readers = [pool.submit(read, number) for number in range(READERS)]
        pool.submit(publish_all, redis_server, storage.root, progress).result()
        seen = set().union(*(reader.result() for reader in readers))
    assert (progress.newest, progress.alias) == (1 + PUBLISHES, 1 + PUBLISHES)
    assert len(seen) > PUBLISHES // 2  # readers were there while it happened
    assert aliases.get(registry, "prod").revision == 1 + PUBLISHES


def test_the_same_over_http_while_redis_is_flushed(
    server: str, redis: Redis, storage: Storage, registry: Registry
) -> None:
    shelf.furnish(registry, storage)
    publish = shelf.publisher(registry, storage, "sft")
    with Client(server) as client:
        publish(1)
        client.set_alias("prod", "sft@v1")
        stop = threading.Event()

        def read(name: str) -> int:
            asked = last = 0
            while not stop.is_set():
                answer = client.query(index=name, concept="c", k=shelf.ROWS)
                assert isinstance(answer, QueryOut)
                version = int(answer.index.removeprefix("sft@v"))
                whole(version, [hit.example_id for hit in answer.hits], [hit.score for hit in answer.hits])
                assert version >= last, f"{name} went back"
                last, asked = version, asked + 1
            return asked

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read, name) for name in ("sft", "prod")]
            try:
                for version in range(2, 10):
                    publish(version)
                    client.set_alias("prod", f"sft@v{version}", if_revision=version - 1)
                    if version % 3 == 0:
                        redis.flushall()
            finally:
                stop.set()
            assert min(reader.result() for reader in readers) >= 5


def test_a_query_for_a_version_that_was_asked_before_needs_no_redis(
    counted: Registry, redis: Redis, storage: Storage, registry: Registry
) -> None:
    shelf.furnish(registry, storage)
    registry.rebuild()
    aliases.switch(registry, redis, "prod", shelf.publisher(registry, storage, "sft")(1), Condition())
    queries = service(counted, redis, storage)
    for reference, least in (("sft@v1", 0), ("sft", 1), ("prod", 1)):
        queries.run(query(reference))
        assert trips(lambda reference=reference: queries.run(query(reference))) == least
    assert indexes.resolve(counted, "prod").version == 1
