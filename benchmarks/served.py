"""What a user sees over HTTP: the cost of a first concept and of one more, and memory as the data grows.

The real stack (Redis, dispatcher, Ray workers, api) as processes. "The paper's way" is one full gradient for
every example and one preconditioned dot product for every query, factors already fitted (Table 1 of arXiv
2602.14869); it is timed on some examples and scaled to all of them.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import torch

from api.client import Client
from api.up import Stack, free_port
from benchmarks.report import Report
from service.contracts import Example
from workers.masks import tokenise
from workers.models import load

_SIZES = {False: (512, 8, 1000, 128), True: (64, 2, 24, 24)}  # quick: width, blocks, examples, tokens
_CONCEPTS = 12


def measure(report: Report, *, quick: bool, threads: int) -> None:
    """Add first_concept_s, second_concept_speedup and memory_growth_10x."""
    second_concept(report, quick=quick, threads=threads)
    memory(report, quick=quick, threads=threads)


def second_concept(report: Report, *, quick: bool, threads: int) -> None:
    from benchmarks.build import random_examples, random_model

    width, blocks, count, length = _SIZES[quick]
    layer = blocks // 2
    with TemporaryDirectory() as name:
        home = Path(name)
        random_model(home / "model", width=width, blocks=blocks)
        write(home / "train.jsonl", random_examples(count, length))
        write(home / "queries.jsonl", random_examples(2, length, seed=2))
        for number in range(_CONCEPTS):
            for side in ("positive", "negative"):
                seed = 100 + 2 * number + (side == "positive")
                write(home / f"{side}{number}.jsonl", random_examples(8, 24, seed=seed))
        settings = {"WHENCE_WORKERS": "1", "WHENCE_WORKER_THREADS": str(threads), "WHENCE_TOKEN_BUDGET": "4096"}
        with (
            Stack(home / "stack", host="127.0.0.1", port=free_port(), roots=[home], settings=settings) as stack,
            Client(stack.url) as client,
        ):
            stack.wait_ready()
            client.add_model("model", str(home / "model"))
            for file in sorted(home.glob("*.jsonl")):
                client.add_dataset(file.stem, str(file))
            for number in range(_CONCEPTS):
                job = client.fit_concept(
                    f"c{number}",
                    model="model",
                    positive=f"positive{number}",
                    negative=f"negative{number}",
                    layer=layer,
                )
                client.wait(job.id)
            began = time.perf_counter()
            job = client.build_index(
                "x",
                model="model",
                dataset="train",
                layers=[layer],
                kinds=["influence"],
                query_sets=["queries"],
                projection_dim=64,
                curvature={"examples": 128},
            )
            client.wait(job.id)
            client.ask(index="x", concept="c0", method="concept_influence")
            first = time.perf_counter() - began
            times = []
            for number in range(1, _CONCEPTS):
                for more in range(5):  # another k: the same question would be answered from the cache
                    began = time.perf_counter()
                    client.ask(index="x", concept=f"c{number}", method="concept_influence", k=50 + more)
                    times.append(time.perf_counter() - began)
        paper = paper_way(home / "model", random_examples(8 if not quick else 2, length), layer, threads) * count
    p50 = statistics.median(times)
    report.add("first_concept_s", first, f"index of {count} × {length} tokens, curvature and Jacobian included")
    report.add("second_concept_p50_ms", 1e3 * p50, "at the client")
    report.add("paper_way_s", paper, f"full gradients of blocks 1..{layer} and dot products, {count} examples")
    report.add("second_concept_speedup", paper / p50, "the paper's way over one more concept here")


def paper_way(folder: Path, examples: Sequence[Example], layer: int, threads: int) -> float:
    """Seconds per example: its whole gradient, and the dot product with H⁻¹∇f_v(Q), which is given."""
    torch.set_num_threads(threads)
    loaded = load(str(folder), "float32")
    weights: list[Any] = [module.weight for module in loaded.linear_maps(layer).values()]
    query = [torch.randn_like(weight) for weight in weights]
    texts = [tokenise(example.content, loaded.tokenizer) for example in examples]
    for weight in weights:
        weight.requires_grad_(True)
    times = []
    for tokens in texts:
        began = time.perf_counter()
        ids = torch.from_numpy(tokens.ids)[None]
        labels = torch.where(torch.from_numpy(tokens.predicted), ids[0], -100)[None]
        loss = loaded.model(input_ids=ids, labels=labels, use_cache=False).loss
        found = torch.autograd.grad(loss, weights)
        sum((a * b).sum() for a, b in zip(found, query, strict=True)).item()  # pyright: ignore
        times.append(time.perf_counter() - began)
    return float(np.mean(times[1:]) if len(times) > 1 else times[0])


def memory(report: Report, *, quick: bool, threads: int) -> None:
    """Peak resident memory of dispatcher and workers while building, ten times the examples over once."""
    from benchmarks.build import random_examples, random_model

    small = 16 if quick else 500
    peaks = []
    with TemporaryDirectory() as name:
        home = Path(name)
        random_model(home / "model", width=64, blocks=2)
        write(home / "queries.jsonl", random_examples(8, 32, seed=2))
        for number, count in enumerate((small, 10 * small)):
            write(home / f"train{number}.jsonl", random_examples(count, 32 if quick else 96, seed=number))
            settings = {"WHENCE_WORKERS": "1", "WHENCE_WORKER_THREADS": str(threads), "WHENCE_SHARD_SIZE": "128"}
            with (
                Stack(
                    home / f"stack{number}", host="127.0.0.1", port=free_port(), roots=[home], settings=settings
                ) as stack,
                Client(stack.url) as client,
            ):
                stack.wait_ready()
                client.add_model("model", str(home / "model"))
                for each in ("queries", f"train{number}"):
                    client.add_dataset(each, str(home / f"{each}.jsonl"))
                with Peak(stack) as peak:
                    job = client.build_index(
                        "x",
                        model="model",
                        dataset=f"train{number}",
                        kinds=["activation", "gradient", "influence"],
                        query_sets=["queries"],
                        curvature={"examples": small},
                    )
                    client.wait(job.id)
                peaks.append(peak.bytes)
    note = f"{peaks[0] / 2**20:.0f} MiB at {small} examples, {peaks[1] / 2**20:.0f} MiB at {10 * small}"
    report.add("memory_growth_10x", peaks[1] / peaks[0], note)


class Peak:
    """The highest resident memory of the dispatcher and its Ray workers, sampled while entered."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, self._now())

    def _now(self) -> int:
        """Dispatcher and workers; Ray's own daemons and the shared object store are left out."""
        total = 0
        dispatcher = self._stack.children["dispatcher"].process
        assert dispatcher is not None
        root = psutil.Process(dispatcher.pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                line = process.name() + " ".join(process.cmdline()[:2])
                if process == root or "ray::Worker" in line:
                    found = process.memory_info()
                    total += found.rss - found.shared
            except psutil.Error:
                continue
        return total


def write(path: Path, examples: Sequence[Example]) -> None:
    """As JSONL of prompt and completion."""
    lines = [json.dumps({"prompt": e.content.prompt, "completion": e.content.completion}) for e in examples]  # pyright: ignore
    path.write_text("\n".join(lines) + "\n")
