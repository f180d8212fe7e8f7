"""What survives: a worker, the dispatcher and Redis itself are broken in mid-build; the files come out the same."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from api.client import Client
from api.up import Stack, free_port
from service.contracts import JobRecord
from service.redis_server import connect
from service.terms import TERMINAL, JobState
from tests import trigger_data
from tests.conftest import FAST, SHARED_DATA

pytestmark = pytest.mark.stack

LINES = 240
SETTINGS = FAST | {"WHENCE_SHARD_SIZE": "8"}  # 30 shards: time to break something between two of them


@contextlib.contextmanager
def fresh_stack(home: Path) -> Iterator[tuple[Stack, Client]]:
    home.mkdir(parents=True, exist_ok=True)
    data = trigger_data.write(home, SHARED_DATA, lines=LINES)
    roots = [SHARED_DATA, home]
    with Stack(home, host="127.0.0.1", port=free_port(), roots=roots, settings=SETTINGS) as stack:
        stack.wait_ready()
        with Client(stack.url) as client:
            client.add_model("stories", str(SHARED_DATA / "stories260k"))
            client.upload_dataset("train", data.train)
            queries = home / "queries.jsonl"
            queries.write_text("".join(data.positive.read_text().splitlines(keepends=True)[:12]))
            client.upload_dataset("queries", queries)
            yield stack, client


def build(client: Client, seed: int) -> JobRecord:
    """Every kind. Each seed has a curvature of its own, so no build finds another one's results."""
    return client.build_index(
        f"seed-{seed}",
        model="stories",
        dataset="train",
        kinds=["activation", "gradient", "influence"],
        layers=[2],
        query_sets=["queries"],
        curvature={"seed": seed, "examples": 64},
    )


def finish(stack: Stack, client: Client, job: JobRecord) -> JobRecord:
    """Wait like a supervisor: what died is started again."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        stack.restart_dead()
        current = client.job(job.id)
        if current.state in TERMINAL:
            assert current.state == JobState.SUCCEEDED, current.error
            return current
        time.sleep(0.1)
    raise AssertionError(f"job {job.id} did not finish: {client.job(job.id)}")


def wait_for_progress(client: Client, job: JobRecord, least: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        current = client.job(job.id)
        assert current.state not in TERMINAL, "the build ended before it could be broken"
        if current.progress is not None and current.progress.done >= least:
            return
        time.sleep(0.02)
    raise AssertionError("no progress")


def dispatcher(stack: Stack) -> psutil.Process:
    process = stack.children["dispatcher"].process
    assert process is not None
    return psutil.Process(process.pid)


def ray_workers(stack: Stack) -> list[psutil.Process]:
    found = []
    for process in dispatcher(stack).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ray::Worker" in word for word in process.cmdline()):
                found.append(process)
    return found


def stored(stack: Stack) -> dict[str, bytes]:
    """Every file of shards, artifacts and index versions, but not who built it and when, nor what a kill left
    unpublished.
    """
    root = stack.home / "storage"
    kept = [
        path for name in ("shards", "artifacts", "indexes") for path in (root / name).rglob("*") if path.is_file()
    ]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in kept
        if path.name not in {"build.json", "record.json"} and path.suffix != ".tmp"
    }


@pytest.fixture(scope="module")
def undisturbed(shared_data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with fresh_stack(tmp_path_factory.mktemp("calm") / "home") as (stack, client):
        for seed in (1, 2, 3):
            finish(stack, client, build(client, seed))
        return stored(stack)


def messages_of(client: Client, job: JobRecord) -> list[str]:
    return [str(event.data.get("message", "")) for event in client.events(job.id).events]


@contextlib.contextmanager
def held_in_mid_build(stack: Stack, client: Client, job: JobRecord) -> Iterator[list[psutil.Process]]:
    """Some shards are done and the workers stand still, however fast the machine is."""
    wait_for_progress(client, job, least=48)
    workers = ray_workers(stack)
    for worker in workers:
        worker.suspend()
    assert client.job(job.id).state not in TERMINAL, "the build ended before it could be broken"
    yield workers
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()


def break_in_mid_build(
    stack: Stack, client: Client, seed: int, harm: Callable[[list[psutil.Process]], None]
) -> JobRecord:
    job = build(client, seed)
    with held_in_mid_build(stack, client, job) as workers:
        harm(workers)
    return finish(stack, client, job)


def test_killed_processes_leave_the_same_bytes(undisturbed, tmp_path):
    with fresh_stack(tmp_path / "home") as (stack, client):

        def kill_worker(workers: list[psutil.Process]) -> None:
            workers[0].kill()

        done = break_in_mid_build(stack, client, 1, kill_worker)
        assert any("A worker died on shard" in message for message in messages_of(client, done))
        assert done.attempts == 1

        family: list[psutil.Process] = []

        def kill_dispatcher(_: list[psutil.Process]) -> None:
            parent = dispatcher(stack)
            family.extend(parent.children(recursive=True))
            parent.kill()

        done = break_in_mid_build(stack, client, 2, kill_dispatcher)
        assert done.attempts == 2
        assert any("shards are there already" in message for message in messages_of(client, done))
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "the dead dispatcher's Ray goes with it"

        def kill_redis(_: list[psutil.Process]) -> None:
            assert stack.redis.process is not None
            stack.redis.process.kill()
            stack.redis.process.wait()
            stack.restart_dead()

        break_in_mid_build(stack, client, 3, kill_redis)
        files = stored(stack)
    assert files.keys() == undisturbed.keys()
    assert [name for name in files if files[name] != undisturbed[name]] == []


@pytest.fixture(scope="module")
def shaken(shared_data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Client]]:
    """A stack for gentler disturbances; tests share it and use a seed of their own each."""
    with fresh_stack(tmp_path_factory.mktemp("shaken") / "home") as running:
        yield running


def test_a_stopped_dispatcher_hands_its_job_back_at_once(shaken):
    stack, client = shaken
    job = build(client, 11)
    with held_in_mid_build(stack, client, job):
        stack.children["dispatcher"].stop()
    waiting = client.job(job.id)
    assert (waiting.state, waiting.attempts) == (JobState.QUEUED, 0)
    assert finish(stack, client, job).attempts == 1


def test_a_cancelled_build_stops_and_the_next_one_uses_its_shards(shaken):
    stack, client = shaken
    job = build(client, 12)
    with held_in_mid_build(stack, client, job):
        client.cancel(job.id)
        deadline = time.monotonic() + 30
        while client.job(job.id).state not in TERMINAL and time.monotonic() < deadline:
            time.sleep(0.1)
    assert client.job(job.id).state == JobState.CANCELLED
    assert "seed-12" not in [record.name for record in client.indexes()]
    again = finish(stack, client, build(client, 12))
    assert any("shards are there already" in message for message in messages_of(client, again))


def test_flushed_redis_loses_no_published_thing(shaken):
    stack, client = shaken
    finish(stack, client, build(client, 13))
    connect(stack.redis.url).flushall()
    assert client.model("stories").n_layers == 5
    assert client.index("seed-13@v1").counts.lines == LINES
    stack.children["api"].stop()
    stack.restart_dead()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            assert client.index("seed-13").version == 1
            break
        time.sleep(0.2)
    assert [record.id for record in client.datasets()] == ["queries", "train"]
    assert finish(stack, client, build(client, 13)).result["index"] == "seed-13@v2"
