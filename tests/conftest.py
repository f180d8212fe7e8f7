"""Fixtures on real parts: a Redis server, storage in a folder, a tiny model, the whole stack as processes."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from redis import Redis

from api.client import Client
from api.up import Stack, free_port
from service.jobs import Jobs
from service.redis_server import EmbeddedRedis, connect
from service.registry import Registry
from service.storage import Storage
from tests import s3

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(redis_server: EmbeddedRedis) -> Iterator[Redis]:
    """A client of an empty Redis."""
    client = connect(redis_server.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def registry(redis: Redis, storage: Storage) -> Registry:
    return Registry(redis, storage)


@pytest.fixture
def jobs(redis: Redis) -> Jobs:
    return Jobs(redis)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and data that lie beside some checkouts; tests that need them say so when they skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: tests on real data need it")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Moto]:
    server = s3.Moto(tmp_path_factory.mktemp("s3") / "moto.log")
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: s3.Moto, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a prefix in an empty bucket; the environment says where it is and who we are."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3.environment(s3_server.url).items():
        monkeypatch.setenv(name, value)
    s3_server.forget_everything()
    s3_server.boto().create_bucket(Bucket="whence-test")
    return "s3://whence-test/some/prefix"


FAST = {"WHENCE_LEASE_S": "3", "WHENCE_SHARD_SIZE": "64", "WHENCE_WORKERS": "2"}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis, dispatcher with Ray, and api as processes, shared by all tests that only add to it."""
    home = tmp_path_factory.mktemp("stack")
    roots = [tmp_path_factory.getbasetemp(), SHARED_DATA]
    with Stack(home, host="127.0.0.1", port=free_port(), roots=roots, settings=FAST) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as connected:
        yield connected
