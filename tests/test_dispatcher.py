"""The dispatcher with small real engines: every end of a run is recorded once, by whoever holds the job."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service import keys
from service.contracts import JobContext, JobRecord
from service.dispatcher import Dispatcher
from service.errors import Cancelled, Damaged, DomainError, Interrupted, Invalid, LeaseLost, NotFound
from service.jobs import Claim, Jobs
from service.redis_server import EmbeddedRedis, connect
from service.terms import JobKind, JobState
from service.work import GradientSpec, Tracked

ROOT = Path(__file__).resolve().parents[1]
SPEC = GradientSpec(Tracked(2))
LEASE_S = 2.0
AT_ONCE = 0.0  # as a lease: whoever holds the job, it is taken over


@dataclass
class Script:
    """An engine that does what the test says."""

    act: Callable[[JobRecord, JobContext], Mapping[str, Any]]
    runs: int = 0

    def run(self, job: JobRecord, context: JobContext) -> Mapping[str, Any]:
        self.runs += 1
        return self.act(job, context)


@dataclass
class Running:
    stop: threading.Event
    serving: Future[None]
    engine: Script

    def lives(self) -> bool:
        return not self.serving.done()

    def finishes(self, jobs: Jobs, job_id: str) -> JobRecord:
        """The job once it has ended; what the dispatcher died of, if it did."""
        until(lambda: self.serving.done() or jobs.get(job_id).finished_at)
        if self.serving.done():
            self.serving.result()
        return jobs.get(job_id)


@contextmanager
def dispatcher(
    url: str, act: Callable[..., Any], *, name: str = "one", lease_s: float = LEASE_S, most: int = 5
) -> Iterator[Running]:
    """A dispatcher in a thread; leaving the block stops it, and raises what it died of."""
    client, stop, engine = connect(url), threading.Event(), Script(act)
    dispatch = Dispatcher(Jobs(client), engine, name=name, lease_s=lease_s, max_attempts=most)
    with ThreadPoolExecutor(1) as pool:
        running = Running(stop, pool.submit(dispatch.run, stop), engine)
        try:
            yield running
        finally:
            stop.set()
            until(lambda: running.serving.done() or wake(client))
            client.close()
    running.serving.result()


def wake(client: Redis) -> None:
    """End the second that an idle dispatcher waits for a job."""
    for other in client.client_list():
        if other["cmd"] == "xreadgroup":
            client.client_unblock(int(other["id"]))


@pytest.fixture
def url(redis_server: EmbeddedRedis) -> str:
    return redis_server.url


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
    return found


def submit(jobs: Jobs) -> str:
    return jobs.submit(JobKind.BUILD_INDEX, SPEC).id


def ended(jobs: Jobs, job_id: str) -> JobRecord:
    return until(lambda: (job := jobs.get(job_id)).finished_at and job)


def steal(jobs: Jobs) -> Claim:
    return until(lambda: jobs.claim("thief", AT_ONCE, block_s=0.01))


def die(jobs: Jobs) -> None:
    """A holder takes the job and is silent for longer than a lease of 0.3 s."""
    steal(jobs)
    time.sleep(0.35)


def snapshot(redis: Redis, job_id: str) -> Any:
    return redis.hgetall(keys.job(job_id)), redis.xrange(keys.job_events(job_id))


def done(*_: Any) -> Mapping[str, Any]:
    return {"done": True}


# --- how a run ends -----------------------------------------------------------------------------------


def test_a_job_runs_and_its_result_and_words_are_kept(jobs: Jobs, url: str) -> None:
    def act(job: JobRecord, context: JobContext) -> Any:
        assert job.spec["tracked"]["blocks"] == 2
        context.log("half way", shard=3)
        context.progress("build", 10, 10, quarantined=2)
        return {"index": "a@v1"}

    with dispatcher(url, act):
        job = ended(jobs, submit(jobs))
    assert (job.state, job.attempts, job.result, job.error) == (JobState.SUCCEEDED, 1, {"index": "a@v1"}, None)
    assert job.progress is not None
    assert (job.progress.done, job.progress.total, job.progress.quarantined) == (10, 10, 2)
    events = [(event.type, event.data) for event in jobs.events(job.id)]
    assert ("log", {"message": "half way", "shard": 3}) in events
    assert [data["state"] for kind, data in events if kind == "state"] == ["queued", "running", "succeeded"]
    assert next(data["dispatcher"] for _, data in events if data.get("state") == "running") == "one"


@pytest.mark.parametrize("kind", [Invalid, NotFound, Damaged, DomainError])
def test_a_domain_error_fails_the_job_with_its_code_and_param(jobs: Jobs, url: str, kind: type) -> None:
    def act(*_: Any) -> Any:
        raise kind("bad_layer", "Layer 9 does not exist.", param="layers[0]", context={"n_layers": 4})

    with dispatcher(url, act):
        job = ended(jobs, submit(jobs))
    assert (job.state, job.attempts, job.result) == (JobState.FAILED, 1, None)
    assert job.error == {
        "code": "bad_layer",
        "detail": "Layer 9 does not exist.",
        "param": "layers[0]",
        "n_layers": 4,
    }


@pytest.mark.parametrize("how", ["raises", "returns what is no JSON", "raises with a context that is no JSON"])
def test_a_bug_fails_the_job_and_the_next_one_runs(jobs: Jobs, url: str, how: str) -> None:
    def act(*_: Any) -> Any:
        if engine.runs > 1:
            return {}
        if how == "raises":
            raise ZeroDivisionError("of width by 0")
        if how == "returns what is no JSON":
            return {"tensor": object()}
        raise Invalid("bad", "Bad.", context={"tensor": object()})

    with dispatcher(url, act) as running:
        engine = running.engine
        first, second = submit(jobs), submit(jobs)
        job = running.finishes(jobs, first)
        assert running.finishes(jobs, second).state == JobState.SUCCEEDED
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.error is not None
    if how == "raises":
        assert job.error["code"] == "internal_error"
        assert "ZeroDivisionError: of width by 0" in job.error["detail"]
        assert "test_dispatcher.py:" in job.error["detail"]


def test_a_job_that_killed_its_dispatchers_too_often_is_failed_unrun(jobs: Jobs, url: str) -> None:
    job_id = submit(jobs)
    for _ in range(2):
        die(jobs)
    with dispatcher(url, done, lease_s=0.3, most=2) as running:
        job = ended(jobs, job_id)
    assert (job.state, job.attempts, running.engine.runs) == (JobState.FAILED, 3, 0)
    assert job.error is not None
    assert job.error["code"] == "too_many_attempts"


def test_the_last_allowed_attempt_is_run(jobs: Jobs, url: str) -> None:
    job_id = submit(jobs)
    die(jobs)
    with dispatcher(url, done, lease_s=0.3, most=2):
        job = ended(jobs, job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 2)


# --- progress -----------------------------------------------------------------------------------------


def test_progress_is_thinned_out_but_ends_at_the_total(jobs: Jobs, url: str) -> None:
    def act(_: JobRecord, context: JobContext) -> Any:
        for number in range(500):
            context.progress("build", number + 1, 500)
        return {}

    with dispatcher(url, act):
        job = ended(jobs, submit(jobs))
    sent = [event.data["done"] for event in jobs.events(job.id) if event.type == "progress"]
    assert sent[-1] == 500
    assert len(sent) < 50
    assert job.progress is not None
    assert job.progress.done == 500


def test_rate_and_eta_count_only_what_this_attempt_has_done(jobs: Jobs, url: str) -> None:
    def act(_: JobRecord, context: JobContext) -> Any:
        context.progress("build", 900, 1000, resumed=900)
        time.sleep(0.5)
        context.progress("build", 950, 1000, resumed=900)
        return {}

    with dispatcher(url, act):
        job = ended(jobs, submit(jobs))
    first, second = [event.data for event in jobs.events(job.id) if event.type == "progress"]
    assert (first["rate"], first["eta_s"]) == (None, None)
    assert 10 < second["rate"] <= 100  # 50 in half a second, more on a busy machine; 900 more would be 1900
    assert second["eta_s"] == pytest.approx(50 / second["rate"], abs=0.1)


# --- stop, cancel, lose -------------------------------------------------------------------------------


def test_a_stopping_dispatcher_puts_its_job_back_for_the_next(jobs: Jobs, url: str) -> None:
    job_id = submit(jobs)

    def act(_: JobRecord, context: JobContext) -> Any:
        running.stop.set()
        context.log("not said any more")

    with dispatcher(url, act) as running:
        running.serving.result(timeout=20)
    assert (jobs.get(job_id).state, jobs.get(job_id).attempts) == (JobState.QUEUED, 0)
    with dispatcher(url, done, name="two"):
        job = ended(jobs, job_id)
    assert (job.state, job.attempts, job.epoch) == (JobState.SUCCEEDED, 1, 2)
    assert "log" not in [event.type for event in jobs.events(job_id)]


def test_a_cancelled_run_stops_at_its_next_word(jobs: Jobs, url: str) -> None:
    started = threading.Event()

    def act(_: JobRecord, context: JobContext) -> Any:
        started.set()
        while True:
            context.check()
            time.sleep(0.01)

    with dispatcher(url, act) as running:
        job_id = submit(jobs)
        assert started.wait(20)
        jobs.cancel(job_id)
        job = ended(jobs, job_id)
        assert (job.state, job.result, job.error) == (JobState.CANCELLED, None, None)
        assert running.lives()


def test_a_run_that_has_published_before_it_noticed_the_cancel_has_succeeded(jobs: Jobs, url: str) -> None:
    started, noticed = threading.Event(), threading.Event()

    def act(*_: Any) -> Any:
        started.set()
        assert noticed.wait(20)
        return {"index": "published"}

    with dispatcher(url, act, lease_s=1.0):
        job_id = submit(jobs)
        assert started.wait(20)
        jobs.cancel(job_id)
        time.sleep(0.6)  # three heartbeats
        noticed.set()
        job = ended(jobs, job_id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, {"index": "published"})


def test_a_job_cancelled_before_it_was_taken_over_is_not_run_again(jobs: Jobs, url: str) -> None:
    job_id = submit(jobs)
    steal(jobs)
    jobs.cancel(job_id)  # and its holder dies before it notices
    time.sleep(0.35)
    with dispatcher(url, done, lease_s=0.3) as running:
        job = ended(jobs, job_id)
    assert (job.state, running.engine.runs) == (JobState.CANCELLED, 0)


def fail(error: BaseException) -> Any:
    raise error


AFTER_THE_LOSS = {
    "returns": lambda _: {"late": True},
    "logs": lambda context: context.log("late"),
    "reports progress": lambda context: context.progress("late", 1, 2),
    "raises a domain error": lambda _: fail(Invalid("late", "Late.")),
    "raises a bug": lambda _: fail(ValueError("late")),
    "is interrupted": lambda _: fail(Interrupted("late", "Late.")),
    "is cancelled": lambda _: fail(Cancelled("late", "Late.")),
    "checks until it notices": lambda context: [(context.check(), time.sleep(0.01)) for _ in range(2000)],
}


@pytest.mark.parametrize("what", AFTER_THE_LOSS)
def test_who_lost_the_lease_records_nothing_and_serves_on(jobs: Jobs, redis: Redis, url: str, what: str) -> None:
    taken: list[Any] = []
    noticed: list[BaseException] = []

    def act(job: JobRecord, context: JobContext) -> Any:
        if taken:
            return {}
        steal(jobs)
        taken.append(snapshot(redis, job.id))
        try:
            return AFTER_THE_LOSS[what](context)
        except BaseException as error:
            noticed.append(error)
            raise

    lost, other = submit(jobs), submit(jobs)
    with dispatcher(url, act) as running:
        assert running.finishes(jobs, other).state == JobState.SUCCEEDED
        assert snapshot(redis, lost) == taken[0]
        assert (jobs.get(lost).state, jobs.get(lost).epoch) == (JobState.RUNNING, 2)
    if what in {"logs", "reports progress", "checks until it notices"}:
        assert isinstance(noticed[0], LeaseLost)


def test_a_silent_engine_keeps_its_job_beyond_the_lease(jobs: Jobs, url: str) -> None:
    def act(*_: Any) -> Any:
        time.sleep(1.5)
        return {}

    job_id = submit(jobs)
    with (
        dispatcher(url, act, name="one", lease_s=1.0) as one,
        dispatcher(url, act, name="two", lease_s=1.0) as two,
    ):
        job = ended(jobs, job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)
    assert one.engine.runs + two.engine.runs == 1


def test_a_record_that_cannot_be_read_does_not_stop_the_queue(jobs: Jobs, redis: Redis, url: str) -> None:
    # FACTS.md: a flipped byte in the append-only file is loaded silently.
    broken, other = submit(jobs), submit(jobs)
    redis.hset(keys.job(broken), "kind", "build_inde\x18")
    with dispatcher(url, done) as running:
        assert running.finishes(jobs, other).state == JobState.SUCCEEDED


def test_an_outage_of_redis_is_ridden_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = EmbeddedRedis(tmp_path_factory.mktemp("outage"))
    server.start()
    working, go_on = threading.Event(), threading.Event()

    def act(_: JobRecord, context: JobContext) -> Any:
        context.progress("build", 1, 2)
        working.set()
        assert go_on.wait(20)
        context.progress("build", 2, 2)
        return {}

    client = connect(server.url)
    try:
        jobs = Jobs(client)
        with dispatcher(server.url, act, lease_s=10.0):
            job_id = submit(jobs)
            assert working.wait(20)
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            server.start()
            go_on.set()
            job = ended(jobs, job_id)
            assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)
            assert ended(jobs, submit(jobs)).state == JobState.SUCCEEDED
    finally:
        client.close()
        server.stop()


# --- real processes -----------------------------------------------------------------------------------

PROCESS = """
import sys, threading, time
from pathlib import Path
from service.dispatcher import Dispatcher
from service.jobs import Jobs
from service.redis_server import connect

url, folder, name = sys.argv[1:]

class Steps:  # a finished step is a file, as a shard is
    def run(self, job, context):
        for step in range(20):
            mark = Path(folder, f"{job.id}.{step}")
            if mark.exists():
                continue
            time.sleep(0.04)
            context.progress("work", step, 20)
            context.check()
            with Path(folder, "log").open("a") as log:
                log.write(f"{job.id} {step} {name}\\n")
            mark.touch()
        return {"by": name}

Dispatcher(Jobs(connect(url)), Steps(), name=name, lease_s=1.0, max_attempts=9).run(threading.Event())
"""


@contextmanager
def process(url: str, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", PROCESS, url, str(folder), name], cwd=ROOT) as child:
        try:
            yield child
        finally:
            child.kill()


def test_kill_9_of_its_dispatcher_costs_a_job_an_attempt_and_no_finished_step(
    jobs: Jobs, url: str, tmp_path: Path
) -> None:
    job_id = submit(jobs)
    with process(url, tmp_path, "first") as first:
        until(lambda: len(list(tmp_path.glob("*.[0-9]"))) >= 3)
        time.sleep(random.Random(3).uniform(0.0, 0.2))
        first.kill()
    assert jobs.get(job_id).state == JobState.RUNNING
    with process(url, tmp_path, "second"):
        job = ended(jobs, job_id)
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert (job.state, job.attempts, job.epoch) == (JobState.SUCCEEDED, 2, 2)
    assert job.result == {"by": "second"}
    assert {name for _, _, name in log} == {"first", "second"}
    assert {int(step) for _, step, _ in log} == set(range(20))
    assert len(log) <= 21  # only the step in which it was killed may be done again


def test_a_dispatcher_that_wakes_up_late_changes_nothing(
    jobs: Jobs, redis: Redis, url: str, tmp_path: Path
) -> None:
    job_id = submit(jobs)
    with process(url, tmp_path, "sleeper") as sleeper:
        until(lambda: len(list(tmp_path.glob("*.[0-9]"))) >= 3)
        os.kill(sleeper.pid, signal.SIGSTOP)
        with process(url, tmp_path, "second"):
            job = ended(jobs, job_id)
        assert (job.attempts, job.result) == (2, {"by": "second"})
        before = snapshot(redis, job_id)
        os.kill(sleeper.pid, signal.SIGCONT)
        other = submit(jobs)
        assert ended(jobs, other).result == {"by": "sleeper"}
        assert snapshot(redis, job_id) == before
