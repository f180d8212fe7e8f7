"""Tasks over Ray actors: hand out, collect, replace actors that die, give up on a task that kills them."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from service.errors import DomainError
from service.local_cache import CacheAt
from service.tasks import Task
from workers.actor import Manifest, RemoteWorker, Worker

log = logging.getLogger(__name__)

_POLL_S = 0.5
_PING_S = 30.0
_MOST_CPU_WORKERS = 8


class Crew(Protocol):
    """Workers that have just started, as many as a build would have, and do nothing else."""

    @property
    def size(self) -> int: ...

    @property
    def start_s(self) -> float:
        """How long they took to start."""
        ...

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What the method of Worker gives on each of them, all at once."""
        ...


class Runner(Protocol):
    """Who turns tasks into results, or says what they would be."""

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, Manifest], None],
        check: Callable[[], None],
        log_event: Callable[..., None],
    ) -> None: ...


class Pool(Runner, Protocol):
    """Workers."""

    def room(self) -> int:
        """How many tasks run beside each other, as things stand."""
        ...

    def fresh(self, check: Callable[[], None]) -> AbstractContextManager[Crew]:
        """New workers for measuring; the old ones are let go first, and these at the end."""
        ...


class InlinePool:
    """One worker in this process, without Ray: for benchmarks and for tests of what tasks do."""

    def __init__(self, storage_root: str, *, threads: int) -> None:
        self._root, self._threads = storage_root, threads
        self._worker = Worker(storage_root, threads)

    def room(self) -> int:
        return 1

    @contextmanager
    def fresh(self, check: Callable[[], None]) -> Iterator[Crew]:
        yield _Alone(Worker(self._root, self._threads), check)

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, Manifest], None],
        check: Callable[[], None],
        log_event: Callable[..., None],
    ) -> None:
        for task in tasks:
            check()
            on_done(task, self._worker.process(task))


@dataclass(frozen=True)
class _Alone:
    """One worker in this process."""

    worker: Worker
    check: Callable[[], None]
    size: int = 1
    start_s: float = 0.0

    def call(self, method: str, *arguments: Any) -> list[Any]:
        self.check()
        return [getattr(self.worker, method)(*arguments)]


@dataclass(frozen=True)
class _Actors:
    actors: Sequence[Any]
    check: Callable[[], None]
    start_s: float = 0.0

    @property
    def size(self) -> int:
        return len(self.actors)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        running = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        waiting = running
        while waiting:
            self.check()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
        try:
            return ray.get(running)
        except RayActorError as error:
            raise DomainError(
                "estimate_killed_worker",
                f"A worker died while measuring ({str(error)[:300]}), most likely out of memory. Start the api "
                "with a lower WHENCE_TOKEN_BUDGET or WHENCE_CURVATURE_BYTES, or ask for a smaller max_length.",
            ) from error


class WorkerPool:
    """A fixed number of actors, created when first needed and kept between jobs: the model stays loaded."""

    def __init__(
        self,
        storage_root: str,
        *,
        workers: int,
        threads: int,
        cpus_per_worker: float,
        shard_attempts: int,
        gpus_per_worker: int = 1,
        cache: CacheAt | None = None,
    ) -> None:
        self._storage_root = storage_root
        self._cache = cache
        self._wanted = workers
        self._threads = threads
        self._cpus = cpus_per_worker
        self._gpus = gpus_per_worker
        self._attempts = shard_attempts
        self._idle: list[Any] = []

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, Manifest], None],
        check: Callable[[], None],
        log_event: Callable[..., None],
    ) -> None:
        """Process every task; ``on_done`` is called as they finish, in any order.

        ``check`` is called at least every half second and may raise to stop. Raises the DomainError of a
        task, or DomainError ``shard_kills_workers`` when one task has cost ``shard_attempts`` workers.
        """
        self._drop_dead()
        waiting, running = deque(tasks), {}
        deaths: Counter[str] = Counter()
        told = False
        try:
            while waiting or running:
                check()
                while waiting and (actor := self._take(len(running))) is not None:
                    task = waiting.popleft()
                    running[actor.process.remote(task)] = (actor, task)
                if not running:  # no resources yet: nodes may still join
                    if not told:
                        told = True
                        has = ray.cluster_resources()
                        gpus = f" and {self._gpus} GPUs" if has.get("GPU", 0) else ""
                        log_event(
                            f"Waiting for Ray: a worker needs {self._cpus:g} CPUs{gpus}; the cluster has "
                            f"{has.get('CPU', 0):g} and {has.get('GPU', 0):g}."
                        )
                    time.sleep(_POLL_S)
                    continue
                ready, _ = ray.wait(list(running), timeout=_POLL_S)
                for reference in ready:
                    actor, task = running.pop(reference)
                    try:
                        manifest = ray.get(reference)
                    except RayActorError as error:
                        deaths[task.key] += 1
                        log.warning("a worker died on %s (%s)", task.title, error)
                        if deaths[task.key] >= self._attempts:
                            raise _poisonous(task, self._attempts) from error
                        log_event(f"A worker died on {task.title}; it is done again.", key=task.key)
                        waiting.appendleft(task)
                        continue
                    except DomainError:
                        self._idle.append(actor)
                        raise
                    self._idle.append(actor)
                    on_done(task, manifest)
        finally:
            # What still runs is not waited for: its task is idempotent, but the actor is busy with it.
            for actor, _ in running.values():
                ray.kill(actor)

    def room(self) -> int:
        return self._size()

    @contextmanager
    def fresh(self, check: Callable[[], None]) -> Iterator[Crew]:
        self.close()
        actors = []
        try:
            while (wanted := self._size()) < 1:  # nodes may still join
                check()
                time.sleep(_POLL_S)
            began = time.monotonic()
            actors = [self._start() for _ in range(wanted)]
            _Actors(actors, check).call("pid")
            yield _Actors(actors, check, time.monotonic() - began)
        finally:
            for actor in actors:
                ray.kill(actor)

    def close(self) -> None:
        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()

    def _drop_dead(self) -> None:
        """Forget actors that died while idle, so that no task is blamed for them."""
        alive = []
        for actor in self._idle:
            try:
                ray.get(actor.pid.remote(), timeout=_PING_S)
                alive.append(actor)
            except (RayActorError, GetTimeoutError):
                ray.kill(actor)
        self._idle = alive

    def _take(self, running: int) -> Any | None:
        """An idle actor, or a new one while fewer than wanted exist; the one that has worked last comes first."""
        if not self._idle:
            # All at once, although one may be enough for now: they take seconds to start.
            self._idle = [self._start() for _ in range(self._size() - running)]
        return self._idle.pop() if self._idle else None

    def _start(self) -> Any:
        gpus = self._gpus if ray.cluster_resources().get("GPU", 0) else 0
        options = {"num_cpus": self._cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        return RemoteWorker.options(**options).remote(self._storage_root, self._threads, self._cache)

    def _size(self) -> int:
        """How many actors the cluster has room for now; asked again, since nodes come and go."""
        resources = ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
        room = int(gpus // self._gpus) if gpus else min(_MOST_CPU_WORKERS, int(cpus // self._cpus))
        return min(self._wanted, room) if self._wanted else room


def _poisonous(task: Task, attempts: int) -> DomainError:
    return DomainError(
        "shard_kills_workers",
        f"{task.title[:1].upper()}{task.title[1:]} cost {attempts} workers, most likely out of memory. Start the "
        "api with a lower WHENCE_TOKEN_BUDGET, or ask for a smaller max_length, and submit the job again.",
        param="dataset",
        context={"key": task.key, "rows": list(task.rows[:1]) + list(task.rows[-1:])},
    )
