"""What an estimate says of a build, and what the build then takes: time, memory of a worker, disk.

    python -m benchmarks.estimate             # three sizes, about 15 minutes
    python -m benchmarks.estimate --size wide # one of them

Each size runs on a real stack of its own: estimate over HTTP, stop, start again with new workers, build. Nothing is
fitted: the estimate knows of a size only what it measures on it. Errors are |estimated/true − 1|.
"""

import argparse
import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from api.client import Client
from api.up import Stack, free_port
from benchmarks.build import random_examples, random_model
from benchmarks.report import Report, parser
from benchmarks.served import write
from service.contracts import JobEvent

_QUERIES = 4


@dataclass(frozen=True)
class Size:
    """A Llama of ``blocks`` blocks, so many examples of ``length`` tokens on average."""

    width: int
    blocks: int
    examples: int
    length: int
    options: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "many": Size(128, 6, 6000, 96, {"curvature": {"examples": 512}}),
    "wide": Size(384, 8, 800, 128, {"projection_dim": 64, "curvature": {"examples": 256}}),
    "long": Size(256, 4, 600, 500, {"projection_dim": 48, "curvature": {"examples": 128}}),
}
QUICK = {"quick": Size(64, 2, 48, 24, {"curvature": {"examples": 16}})}


def compare(size: Size, settings: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """(estimated, true): seconds, bytes of memory, bytes on disk."""
    with TemporaryDirectory() as name:
        home = Path(name)
        random_model(home / "model", width=size.width, blocks=size.blocks)
        write(home / "train.jsonl", random_examples(size.examples, size.length))
        write(home / "queries.jsonl", random_examples(_QUERIES, size.length, seed=2))
        about = {
            "model": "model",
            "dataset": "train",
            "layers": [size.blocks // 2],
            "kinds": ["activation", "gradient", "influence"],
            "query_sets": ["queries"],
            **size.options,
        }
        with _stack(home, settings) as stack, Client(stack.url) as client:
            stack.wait_ready()
            client.add_model("model", str(home / "model"))
            for each in ("train", "queries"):
                client.add_dataset(each, str(home / f"{each}.jsonl"))
            began = time.perf_counter()
            found = dict(client.wait(client.estimate_index("x", **about).id).result or {})
            took = time.perf_counter() - began
        with _stack(home, settings) as stack, Client(stack.url) as client:  # workers that have measured nothing
            stack.wait_ready()
            before = _disk(home / "stack" / "storage")
            seen: dict[str, list[float]] = {}

            def note(event: JobEvent) -> None:
                if event.type == "progress":
                    seen.setdefault(str(event.data["stage"]), []).append(_seconds(event.at))

            job = client.wait(client.build_index("x", **about).id, on_event=note)
            assert job.started_at and job.finished_at
            true = {"time": _seconds(job.finished_at) - _seconds(job.started_at), "memory": _peak(stack)}
            true["disk"] = _disk(home / "stack" / "storage") - before
    estimated = {"time": found["seconds"], "memory": found["worker_bytes"], "disk": found["disk_bytes"]}
    _show(found, took, {name: max(at) - min(at) for name, at in seen.items()})
    return estimated, true


def _stack(home: Path, settings: dict[str, str]) -> Stack:
    return Stack(home / "stack", host="127.0.0.1", port=free_port(), roots=[home], settings=settings)


def _peak(stack: Stack) -> float:
    """The most memory that one of the workers has held."""
    dispatcher = stack.children["dispatcher"].process
    assert dispatcher is not None
    peaks = [0]
    for process in psutil.Process(dispatcher.pid).children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "ray::Worker" in " ".join([process.name(), *process.cmdline()[:1]]):
            peaks += [1024 * int(value) for value in re.findall(r"VmHWM:\s+(\d+) kB", status)]
    return max(peaks)


def _disk(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _show(found: dict[str, Any], took: float, true: dict[str, float]) -> None:
    print(f"  estimated in {took:.1f} s; the longest stages, and how long they took:")
    for stage in sorted(found["stages"], key=lambda stage: -stage["seconds"])[:10]:
        seconds, memory, name = stage["seconds"], stage["worker_bytes"] / 2**20, stage["name"]
        print(f"    {seconds:8.1f} s {true.get(name, 0):8.1f} s  {memory:8.0f} MiB  {name}")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--size", action="append", choices=list(SIZES), help="default: all three")
    options.add_argument("--workers", type=int, default=2, help="Ray actors, one torch thread each")
    chosen: argparse.Namespace = options.parse_args()
    sizes = QUICK if chosen.quick else {name: SIZES[name] for name in chosen.size or SIZES}
    report = Report()
    errors: dict[str, list[float]] = {"time": [], "memory": [], "disk": []}
    for name, size in sizes.items():
        estimated, true = compare(size, {"WHENCE_WORKERS": str(chosen.workers), "WHENCE_TOKEN_BUDGET": "4096"})
        for what, scale, unit in (("time", 1, "s"), ("memory", 2**20, "MiB"), ("disk", 2**20, "MiB")):
            ratio = estimated[what] / max(true[what], 1e-9)
            note = f"{estimated[what] / scale:.1f} {unit} estimated, {true[what] / scale:.1f} true"
            report.add(f"{what}_ratio_{name}", ratio, note)
            errors[what].append(abs(ratio - 1))
    for what, found in errors.items():
        report.add(f"{what}_error", max(found), "largest relative error")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
