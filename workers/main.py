"""Composition root of the dispatcher: Redis, storage, the engine and the Ray driver.

    python -m workers.main

Settings come from the environment (service/settings.py). SIGTERM or SIGINT puts the running job back in
the queue and leaves; kill -9 is fine too: the job is taken over when its lease runs out.
"""

import logging
import os
import signal
import socket
import sys
import threading

import ray

from service.dispatcher import Dispatcher
from service.errors import DomainError
from service.jobs import Jobs
from service.redis_server import connect
from service.registry import Registry
from service.settings import Settings, load_settings
from service.storage import Storage
from workers.engine import RayEngine
from workers.pool import WorkerPool

log = logging.getLogger("whence.dispatcher")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every question to a judge
    stop = threading.Event()
    try:
        settings = load_settings()
        redis = connect(settings.redis_url.get_secret_value())
        storage = Storage(settings.storage_root, cache=settings.cache)
        registry = Registry(redis, storage)
        registry.rebuild()
        pool = _start_ray(settings)
    except DomainError as error:
        log.error("%s", error)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which installs its own
        signal.signal(number, lambda *_: stop.set())
    name = f"{socket.gethostname()}-{os.getpid()}"
    engine = RayEngine(redis, registry, storage, pool, settings)
    log.info("dispatcher %s is ready", name)
    try:
        Dispatcher(
            Jobs(redis), engine, name=name, lease_s=settings.lease_s, max_attempts=settings.max_attempts
        ).run(stop)
    finally:
        pool.close()
        ray.shutdown()
    log.info("dispatcher %s has stopped", name)
    return 0


def _start_ray(settings: Settings) -> WorkerPool:
    """Join the configured cluster, or start Ray on this machine."""
    environment = {"OMP_NUM_THREADS": str(settings.worker_threads), "TOKENIZERS_PARALLELISM": "false"}
    if settings.ray_address:
        ray.init(address=settings.ray_address, log_to_driver=False, runtime_env={"env_vars": environment})
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, settings.workers),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )
    return WorkerPool(
        settings.storage_root,
        cache=settings.cache,
        workers=settings.workers,
        threads=settings.worker_threads,
        cpus_per_worker=settings.worker_cpus,
        gpus_per_worker=settings.gpus_per_worker,
        shard_attempts=settings.shard_attempts,
    )


if __name__ == "__main__":
    sys.exit(main())
