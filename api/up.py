"""The one-machine stack: Redis, dispatcher (with its own Ray) and api as processes under one supervisor.

A child that dies is started again; Ctrl-C or SIGTERM stops all of them in order. Everything lives under
one home folder: storage, Redis data, logs.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from service.errors import Conflict, Unavailable
from service.redis_server import EmbeddedRedis

log = logging.getLogger("whence.up")

_POLL_S = 0.2
_STOP_S = 15.0
_PR_SET_PDEATHSIG = 1

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of our loopback


@dataclass
class Child:
    """One supervised process, its output in ``log``."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    not_before: float = 0.0

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the supervisor only
                preexec_fn=die_with_parent,  # noqa: PLW1509  (no other threads here)
            )

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("%s does not stop, killing it", self.name)
        self.kill_rest()

    def kill_rest(self) -> None:
        """End whatever is left of its process group: Ray's agents outlive a dispatcher that was killed."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Stack:
    """Start, watch and stop the processes. Use as a context manager."""

    def __init__(
        self,
        home: Path,
        *,
        host: str,
        port: int,
        roots: Sequence[Path],
        dispatcher: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """``settings``: further WHENCE_* variables; ``dispatcher`` False: an api that only answers queries."""
        self.home = home.absolute()
        self.url = f"http://{host}:{port}"
        _check_port(host, port)
        self.home.mkdir(parents=True, exist_ok=True)
        logs = self.home / "logs"
        logs.mkdir(exist_ok=True)
        self._lock = _lock(self.home)
        self.redis = EmbeddedRedis(self.home / "redis", preexec=die_with_parent)
        environment = {
            "OMP_WAIT_POLICY": "PASSIVE",  # FAISS's OpenMP threads must not spin between queries
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            **os.environ,
            **(settings or {}),
            "WHENCE_HOME": str(self.home),
            "WHENCE_REDIS_URL": self.redis.url,
            "WHENCE_HOST": host,
            "WHENCE_PORT": str(port),
            "WHENCE_ROOTS": os.pathsep.join(str(root.absolute()) for root in (*roots, self.home)),
        }
        modules = {"api": "api.main", **({"dispatcher": "workers.main"} if dispatcher else {})}
        self.children = {
            name: Child(name, (sys.executable, "-m", module), environment, logs / f"{name}.log")
            for name, module in modules.items()
        }

    def __enter__(self) -> "Stack":
        try:
            self.redis.start()
            for child in self.children.values():
                child.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_ready(self, *, timeout_s: float = 90.0, say: Callable[[str], None] = log.info) -> None:
        """Until the api answers and a dispatcher is alive. Raises Unavailable with the end of a log."""
        wanted = '"status":"ok"' if "dispatcher" in self.children else '"redis":true'
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for child in self.children.values():
                if child.process is not None and child.process.poll() is not None:
                    raise Unavailable("did_not_start", f"{child.name} stopped at once. {_tail(child.log)}")
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                _direct.open(f"{self.url}/readyz", timeout=2) as answer,
            ):
                if wanted in answer.read().decode().replace(" ", ""):
                    say(f"ready at {self.url}")
                    return
            time.sleep(_POLL_S)
        logs = " ".join(_tail(child.log) for child in self.children.values())
        raise Unavailable("did_not_start", f"Not ready within {timeout_s:.0f} s. {logs}")

    def supervise(self, stop: threading.Event) -> None:
        """Start dead children again, ever more slowly, until ``stop``."""
        while not stop.wait(_POLL_S):
            self.restart_dead()

    def restart_dead(self) -> None:
        """One round of supervision."""
        for child in self.children.values():
            now = time.monotonic()
            if child.process is None or child.process.poll() is None or now < child.not_before:
                continue
            child.kill_rest()
            child.restarts += 1
            wait = min(30.0, 0.5 * 2 ** min(child.restarts, 6))
            log.warning(
                "%s ended (exit status %s); started again. %s", child.name, child.process.returncode, child.log
            )
            child.not_before = now + wait
            child.start()
        if self.redis.process is not None and self.redis.process.poll() is not None:
            log.warning("redis ended (exit status %s); started again", self.redis.process.returncode)
            with contextlib.suppress(Unavailable):  # a full disk, a long log: tried again in the next round
                self.redis.start()

    def stop(self) -> None:
        """Stop everything, Redis last: the dispatcher hands its job back through it."""
        for child in reversed(self.children.values()):
            child.stop()
        self.redis.stop()
        self._lock.close()


def run(home: Path, *, host: str, port: int, roots: Sequence[Path], say: Callable[[str], None]) -> None:
    """`whence up`: until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    say(f"starting redis, dispatcher (with ray) and api; data and logs under {home.absolute()}")
    with Stack(home, host=host, port=port, roots=roots) as stack:
        threading.Thread(target=_ready, args=(stack, say, stop), daemon=True).start()
        stack.supervise(stop)
        say("stopping; a running job goes back to the queue")
    say("stopped")


def free_port() -> int:
    """A loopback port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """In the child, before exec: the kernel sends SIGTERM when the supervisor is gone, kill -9 included."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _ready(stack: Stack, say: Callable[[str], None], stop: threading.Event) -> None:
    """Say when the stack is ready; a machine that is slow to start is no reason to stop it."""
    try:
        stack.wait_ready(say=say)
    except Unavailable as error:
        if not stop.is_set():
            say(f"{error}\nStill trying; Ctrl-C stops.")


def _check_port(host: str, port: int) -> None:
    """Raise Conflict when somebody listens there: it would answer in our place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            detail = f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port."
            raise Conflict("port_in_use", detail, param="port") from error


def _lock(home: Path) -> IO[str]:
    """One stack per home folder; the kernel drops the lock with the process."""
    file = (home / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise Conflict("already_running", f"Another `whence up` is running on {home}. Use its address.") from error
    return file


def _tail(path: Path, lines: int = 8) -> str:
    text = path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else ["(no log)"]
    return f"End of {path}:\n" + "\n".join(text)
