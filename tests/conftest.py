"""Fixtures on real parts: a Redis server, storage in a folder, a tiny model, the whole stack as processes."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run side by side; tests of threads set their number
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = (
    "250"  # of rich and typer: what a test looks for stays in one line
)

import pytest
from redis import ConnectionPool, Redis, UnixDomainSocketConnection

from api.client import Client
from api.up import Stack, free_port
from service import kernels
from service.jobs import Jobs
from service.redis_server import EmbeddedRedis, connect
from service.registry import Registry
from service.settings import Settings
from service.storage import Storage
from tests import s3

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


_LONGEST = ("test_recovery.py", "test_readme.py")  # minutes, most of them spent waiting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files run side by side and the last to end decides when all do: long ones begin, then those of many tests."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _LONGEST, -tests[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Before any test: numba's compiler, in a thread of the api, would undo filters of warnings that pytest is just
    setting, and a third party's warning would be an error of whatever test comes next.
    """
    kernels.warm()


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


@pytest.fixture
def server(
    redis_server: EmbeddedRedis, redis: Redis, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of an api in this process, on the Redis and the storage of the test; no dispatcher."""
    import uvicorn

    from api.main import create_app

    monkeypatch.setenv("WHENCE_REDIS_URL", redis_server.url)
    port = free_port()
    app = create_app(Settings(storage_url=storage.root))
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()
    app.state.services.redis.close()


class Counted(UnixDomainSocketConnection):
    """Counts what is sent: a pipeline is one."""

    sent = 0

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        Counted.sent += 1
        super().send_packed_command(command, check_health)


@pytest.fixture
def counted(redis_server: EmbeddedRedis, redis: Redis, storage: Storage) -> Iterator[Registry]:
    """A registry whose round trips to Redis are counted."""
    pool = ConnectionPool(connection_class=Counted, path=str(redis_server.socket), decode_responses=True)
    client = Redis(connection_pool=pool)
    client.ping()
    yield Registry(client, storage)
    client.close()
    pool.disconnect()


def trips(act: Callable[[], object]) -> int:
    before = Counted.sent
    act()
    return Counted.sent - before
