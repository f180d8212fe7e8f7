"""The deployment files agree with each other and with the code, and the commands in them work together.

No container engine is needed: the commands and health checks are read from the compose file and run as
processes of this machine, with other addresses, ports and folders. Not covered by that: the build of the
image, networks, mounts, limits, and that the driver joins the dispatcher's own Ray node (on one machine Ray
gives it the head's).
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from service.redis_server import find_server
from service.settings import Settings
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[1]
COMPOSE, DOCKERFILE, README = ROOT / "docker-compose.yml", ROOT / "Dockerfile", ROOT / "deploy" / "README.md"
OURS = ("ray-head", "ray-worker", "dispatcher", "api")
START_S, CHECK_S, SICK_S = 120, 30, 4


def compose(replaced: dict[str, str] | None = None) -> dict[str, Any]:
    """The compose file as `docker compose` reads it without any variable set, texts replaced before."""
    text = COMPOSE.read_text()
    for old, new in (replaced or {}).items():
        assert old in text, f"{old!r} is no longer in the compose file; adapt this test"
        text = text.replace(old, new)
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$"))


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Target: (source, read-only)."""
    parts = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {target: (source, flags == ["ro"]) for source, target, *flags in parts}


def instructions(name: str) -> list[str]:
    """Arguments of every such instruction of the Dockerfile."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(name + " ")]


# --- the files ------------------------------------------------------------------------------------------


def test_compose_file_is_valid():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_service_is_watched_restarted_and_stopped_gently():
    assert set(SERVICES) == {*OURS, "redis"}
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
        assert service["restart"] == "unless-stopped", name
        assert service["init"] is True, name
        assert seconds(service["stop_grace_period"]) >= 10, name


def test_nothing_runs_as_root():
    assert instructions("USER")[-1] == "whence"
    assert SERVICES["redis"]["user"] == "redis"
    for name in OURS:
        assert SERVICES[name]["image"] == "whence:local"
        assert "user" not in SERVICES[name]


def test_redis_keeps_acknowledged_jobs():
    command = shlex.split(SERVICES["redis"]["command"])
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    assert (flags["--appendonly"], flags["--appendfsync"]) == ("yes", "everysec")
    assert mounts("redis") == {"/data": ("redis", False)}


def test_named_volumes_are_declared_and_used():
    sources = {source for name in SERVICES for source, _ in mounts(name).values()}
    assert {source for source in sources if not source.startswith(".")} == set(compose()["volumes"])


def test_every_container_of_ours_sees_the_same_storage_and_may_not_change_the_data():
    for name in OURS:
        assert mounts(name)["/var/lib/whence"] == ("storage", False)
        assert mounts(name)["/data"] == ("./data", True)
    for name in ("api", "dispatcher"):
        environment = SERVICES[name]["environment"]
        assert environment["WHENCE_STORAGE_URL"] == "/var/lib/whence"
        assert environment["WHENCE_ROOTS"] == "/data"


def test_ray_nodes_share_a_token_that_only_the_head_writes():
    home = re.search(r"HOME=(\S+)", " ".join(instructions("ENV")))
    assert home is not None
    for name in ("ray-head", "ray-worker", "dispatcher"):
        assert mounts(name)[f"{home[1]}/.ray"] == ("ray-token", name != "ray-head")
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_only_the_api_can_be_reached_and_only_from_this_host():
    assert compose()["networks"]["private"] == {"internal": True}
    for name, service in SERVICES.items():
        if name == "api":
            assert service["ports"] == ["127.0.0.1:8311:8311"]
        else:
            assert "ports" not in service
            assert service["networks"] == ["private"]


@pytest.mark.parametrize("file", [COMPOSE, README], ids=lambda file: file.name)
def test_every_setting_named_exists(file: Path):
    known = {f"WHENCE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"WHENCE_[A-Z_]*[A-Z]", file.read_text())) <= known


def test_every_variable_of_the_compose_file_has_a_default_and_is_documented():
    variables = re.findall(r"\$\{([^}]*)\}", COMPOSE.read_text())
    assert variables
    for name, default in (variable.split(":-") for variable in variables):
        row = next(line for line in README.read_text().splitlines() if line.startswith(f"| `{name}` |"))
        assert default in row


def test_every_file_the_image_copies_exists_and_is_in_the_build_context():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed
    for copy in instructions("COPY"):
        sources = [] if copy.startswith("--from") else copy.split()[:-1]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, source


# --- the commands ---------------------------------------------------------------------------------------


class Machine:
    """Runs the services of the compose file as processes; what it starts is known by a path in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        server = Path(find_server())
        (programs / "redis-server").symlink_to(server)
        (programs / "redis-cli").symlink_to(server.with_name(server.name.replace("-server", "-cli")))
        self.base = {
            "PATH": os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"])),
            "HOME": str(folder),  # the Ray token goes below
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        # Ray's workers listen between 10002 and 19999, where a node refuses to have anything else.
        self.port, redis, ray, *_ = filter(lambda port: port > 19_999, (free_port() for _ in range(99)))
        self.services = compose(
            {
                "redis-server --": f"redis-server --bind 127.0.0.1 --port {redis} --dir {folder} --",
                "redis-cli ping": f"redis-cli -p {redis} ping",
                "redis:6379": f"127.0.0.1:{redis}",
                "ray-head:6379": f"127.0.0.1:{ray}",
                "--port=6379": f"--port={ray}",
                # Nodes of one machine would share the head's folder, and the names of sockets in it.
                "ray start": f"ray start --temp-dir={folder}/SERVICE",
                "/var/lib/whence": f"{folder}/storage",
                "/data": f"{folder}/data",
                "0.0.0.0": "127.0.0.1",  # noqa: S104
                "8311": str(self.port),
            }
        )["services"]
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, name: str) -> dict[str, str]:
        return self.base | {key: str(value) for key, value in self.services[name].get("environment", {}).items()}

    def start(self, name: str) -> None:
        command = self.services[name]["command"]
        words = shlex.split(command) if isinstance(command, str) else command
        with self.log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                [word.replace("SERVICE", name) for word in words],
                env=self.environment(name),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_all(self) -> None:
        """In the order that `depends_on` asks for, each as soon as what it waits for is healthy."""
        waits = {name: set(service.get("depends_on", ())) for name, service in self.services.items()}
        deadline = time.monotonic() + START_S
        healthy: set[str] = set()
        while healthy != set(self.services):
            for name, needed in waits.items():
                if name not in self.running and needed <= healthy:
                    self.start(name)
            unsure = set(self.running) - healthy
            healthy |= {name for name, code in self.check(unsure).items() if code == 0}
            for name, process in self.running.items():
                late = name not in healthy and time.monotonic() > deadline
                assert process.poll() is None and not late, f"{name}: {self.log(name).read_text()[-3000:]}"
            time.sleep(0.5)  # what is starting needs the processor more

    def check(self, names: Iterable[str], timeout_s: float = CHECK_S) -> dict[str, int]:
        """Exit status of the health checks, run side by side; the engine's rule: no answer in time is a failure."""
        checks, deadline = {}, time.monotonic() + timeout_s
        for name in names:
            kind, *command = self.services[name]["healthcheck"]["test"]
            checks[name] = subprocess.Popen(
                ["/bin/sh", "-c", *command] if kind == "CMD-SHELL" else command,
                env=self.environment(name),
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        while any(check.poll() is None for check in checks.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for check in checks.values():
            check.kill()
        return {name: check.wait(timeout=CHECK_S) for name, check in checks.items()}

    def stop(self, name: str) -> float:
        """What `docker stop` does: SIGTERM, then the grace period. Seconds it took; TimeoutExpired if longer."""
        began = time.monotonic()
        self.running[name].send_signal(signal.SIGTERM)
        self.running[name].wait(timeout=seconds(self.services[name]["stop_grace_period"]))
        return time.monotonic() - began

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started here, daemons of daemons included."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
            except psutil.Error:
                continue
        return mine

    def kill(self) -> None:
        """What the end of a container does to the rest. `ray stop` would stop other clusters of this machine."""
        for process in (left := self.processes()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=10)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [("node", 1, ""), ("dispatcher", 4, ""), ("container", 0, "job is back\n")],
)
def test_a_dispatcher_and_its_ray_node_end_together(ending: str, status: int, said: str, tmp_path: Path):
    lives = "while sleep 0.05; do :; done"
    programs = {
        "ray": "exit 3" if ending == "node" else lives,
        "python": f"trap 'echo job is back; exit 0' TERM; {'exit 4' if ending == 'dispatcher' else lives}",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    container = subprocess.Popen(
        SERVICES["dispatcher"]["command"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        if ending == "container":
            time.sleep(1)
            container.terminate()
        assert container.wait(timeout=10) == status
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(container.pid, signal.SIGKILL)  # the engine does this to what is left
    assert container.communicate()[0] == said


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))  # short: Ray's sockets lie below
    (folder / "data").mkdir()
    machine = Machine(folder)
    yield machine
    machine.kill()
    for process in machine.running.values():
        process.wait(timeout=10)
    shutil.rmtree(folder)


@pytest.mark.stack
def test_the_commands_of_the_compose_file_make_a_stack_that_is_ready_healthy_and_stops(machine: Machine):
    machine.start_all()
    assert ready(machine.port) == {"status": "ok", "redis": True, "dispatcher": True}
    assert cluster(machine) == {"nodes": 3, "CPU": 2}  # the worker's; head and dispatcher lend none

    for name in ("api", "dispatcher", "ray-worker", "ray-head", "redis"):
        machine.stop(name)
    machine.kill()
    assert machine.processes() == []
    assert 0 not in machine.check(machine.services, SICK_S).values()


def ready(port: int) -> dict[str, Any]:
    """What the api says of itself and of the others."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
        said = json.load(answer)
    return {key: said[key] for key in ("status", "redis", "dispatcher")}


def cluster(machine: Machine) -> dict[str, float]:
    """What a driver with the dispatcher's environment sees of the Ray cluster."""
    program = (
        "import json, os, ray; ray.init(os.environ['WHENCE_RAY_ADDRESS'], log_to_driver=False); "
        "print(json.dumps({'nodes': len(ray.nodes()), 'CPU': ray.cluster_resources()['CPU']}))"
    )
    return json.loads(
        subprocess.run(
            ["python", "-c", program],
            env=machine.environment("dispatcher"),
            cwd=machine.folder,
            capture_output=True,
            check=True,
            timeout=CHECK_S,
        ).stdout
    )


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))
