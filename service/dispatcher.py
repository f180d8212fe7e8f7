"""Takes jobs from the queue, keeps their lease alive, lets the engine run them, records how they end.

Knows nothing of models or Ray: the engine is handed in by the composition root (``workers/main.py``).
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.contracts import Engine, Progress
from service.errors import Cancelled, DomainError, Interrupted, LeaseLost
from service.jobs import Claim, Jobs
from service.terms import JobState

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.25


class Dispatcher:
    """One job at a time; run several dispatchers to run several jobs."""

    def __init__(self, jobs: Jobs, engine: Engine, *, name: str, lease_s: float, max_attempts: int) -> None:
        self._jobs = jobs
        self._engine = engine
        self._name = name
        self._lease_s = lease_s
        self._max_attempts = max_attempts

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set; an outage of Redis is waited out."""
        while not stop.is_set():
            try:
                self._jobs.announce(self._name, self._lease_s)
                claim = self._jobs.claim(self._name, self._lease_s)
                if claim is not None:
                    self._run_claim(claim, stop)
            except RedisError as error:
                log.warning("redis does not answer, trying again: %s", error)
                stop.wait(1.0)

    def _run_claim(self, claim: Claim, stop: threading.Event) -> None:
        job = claim.job
        log.info("job %s (%s): attempt %d, epoch %d", job.id, job.kind, job.attempts, job.epoch)
        try:
            try:
                state, fields = self._work(claim, stop)
                self._patiently(lambda: self._jobs.finish(claim, state, **fields))
            except Interrupted:
                log.info("job %s goes back to the queue", job.id)
                self._jobs.release(claim)
            except (LeaseLost, RedisError):
                raise
            except Exception as error:
                log.exception("job %s failed", job.id)
                self._jobs.finish(claim, JobState.FAILED, error=_unexpected(error))
        except LeaseLost as error:
            log.warning("%s", error)

    def _patiently(self, write: Callable[[], None]) -> None:
        """Ride out an outage of Redis for as long as nobody else may hold the job."""
        deadline = time.monotonic() + self._lease_s
        while True:
            try:
                return write()
            except (RedisConnectionError, RedisTimeoutError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _work(self, claim: Claim, stop: threading.Event) -> tuple[JobState, dict[str, Any]]:
        """How the job ends, as far as the engine can tell: its state and its result or error."""
        job = claim.job
        try:
            if job.attempts > self._max_attempts:
                raise DomainError(
                    "too_many_attempts",
                    f"The dispatcher died {self._max_attempts} times on this job; its log says why. "
                    "What was finished is kept: submit it again once the cause is gone.",
                )
            with _Context(self._jobs, claim, self._name, self._lease_s, stop) as context:
                result = self._engine.run(job, context)
            return JobState.SUCCEEDED, {"result": result}
        except (LeaseLost, Interrupted):
            raise
        except Cancelled:
            return JobState.CANCELLED, {}
        except DomainError as error:
            log.warning("job %s failed: %s", job.id, error)
            return JobState.FAILED, {"error": error.as_dict()}


class _Context:
    """The JobContext of one claim; beats the heart of the lease in a thread while it is entered."""

    def __init__(self, jobs: Jobs, claim: Claim, name: str, lease_s: float, stop: threading.Event) -> None:
        self._jobs, self._claim, self._name, self._lease_s, self._stop = jobs, claim, name, lease_s, stop
        self._done = threading.Event()
        self._lost = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._stage, self._stage_began, self._last_sent = "", 0.0, 0.0

    def __enter__(self) -> "_Context":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def progress(
        self,
        stage: str,
        done: int,
        total: int,
        *,
        unit: str = "examples",
        resumed: int = 0,
        quarantined: int = 0,
        tokens: int = 0,
    ) -> None:
        self.check()
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began = stage, now
        elif done < total and now - self._last_sent < _PROGRESS_EVERY_S:
            return
        self._last_sent = now
        elapsed, own = now - self._stage_began, done - resumed
        rate = own / elapsed if own > 0 and elapsed > 0 else None
        eta_s = (total - done) / rate if rate else None
        tokens_per_s = tokens / elapsed if tokens and elapsed > 0 else None
        progress = Progress(stage, done, total, unit, rate, eta_s, quarantined, tokens_per_s)
        self._tell("progress", _rounded(progress), progress=progress)

    def log(self, message: str, **data: Any) -> None:
        self.check()
        self._tell("log", {"message": message, **data})

    def _tell(self, event: str, data: dict[str, Any], **fields: Any) -> None:
        """Worth an attempt, not worth the job: whether the work may go on is for the heartbeat to find out."""
        try:
            self._jobs.record(self._claim, event, data, **fields)
        except (RedisConnectionError, RedisTimeoutError) as error:
            log.warning("redis does not answer, %s left out: %s", event, error)

    def check(self) -> None:
        job = self._claim.job.id
        if self._lost.is_set():
            raise LeaseLost("lease_lost", f"Job {job} was taken over by another dispatcher.")
        if self._cancelled.is_set():
            raise Cancelled("cancelled", f"Job {job} was cancelled.")
        if self._stop.is_set():
            raise Interrupted("interrupted", f"The dispatcher stops; job {job} goes back to the queue.")

    def _beat(self) -> None:
        interval = self._lease_s / 5
        renewed = time.monotonic()
        while not self._done.wait(interval):
            try:
                self._jobs.renew(self._claim)
                self._jobs.announce(self._name, self._lease_s)
                renewed = time.monotonic()
                job = self._jobs.find(self._claim.job.id)
                if job is not None and job.cancel_requested:
                    self._cancelled.set()
            except RedisError:
                # Within the lease nobody else may hold the job; after it, somebody may.
                if time.monotonic() - renewed > self._lease_s:
                    self._lost.set()
                    return
            except DomainError:  # the lease is lost, or the job's record is damaged: either way not ours
                self._lost.set()
                return


def _rounded(progress: Progress) -> dict[str, Any]:
    rate = None if progress.rate is None else round(progress.rate, 2)
    eta_s = None if progress.eta_s is None else round(progress.eta_s, 1)
    tokens_per_s = None if progress.tokens_per_s is None else round(progress.tokens_per_s, 1)
    return {
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "unit": progress.unit,
        "rate": rate,
        "eta_s": eta_s,
        "quarantined": progress.quarantined,
        "tokens_per_s": tokens_per_s,
    }


def _unexpected(error: Exception) -> dict[str, Any]:
    """A bug or a broken machine: tell where it happened, the whole trace is in the dispatcher's log."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return {
        "code": "internal_error",
        "detail": f"{type(error).__name__}: {error} (in {frame.name}, {frame.filename.rsplit('/', 1)[-1]}:"
        f"{frame.lineno}). The dispatcher's log has the whole trace.",
        "param": None,
    }
