"""Many retrainings over processes, every outcome remembered on disk: an interrupted run goes on where it was.

One JSONL file per task (its name is the task's key), one line per outcome. This file knows neither organisms
nor how subsets are drawn.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from benchmarks.organisms.training import Bools, Outcome, State, Task, Trainer

Report = Callable[[str], None]
Run = tuple[Bools, int]  # subset (N,) and training seed


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread; and another count would give other bytes."""
    threads = torch.get_num_threads()
    bars = logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


class Remembered:
    """Outcomes of one task on disk, by subset and training seed. A torn last line is as if never written."""

    def __init__(self, folder: Path, task: Task) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{task.key()[:32]}.jsonl"
        self._lines = dict(self._read())

    def get(self, run: Run) -> Outcome | None:
        found = self._lines.get(run_key(run))
        if found is None:
            return None
        return {
            name: State(np.array(state["dot"]), np.array(state["cosine"]), state["loss"])
            for name, state in found.items()
        }

    def put(self, run: Run, outcome: Outcome) -> None:
        row = {name: _jsonable(state) for name, state in outcome.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": run_key(run), "outcome": row}) + "\n")
        self._lines[run_key(run)] = row

    def _read(self) -> Iterator[tuple[str, dict[str, dict]]]:
        if not self._path.is_file():
            return
        text = self._path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            self._path.write_text(text, encoding="utf-8")
        for line in text.splitlines():
            row = json.loads(line)
            yield row["run"], row["outcome"]


def run_key(run: Run) -> str:
    subset, seed = run
    return hashlib.sha256(f"{seed} ".encode() + np.packbits(subset).tobytes()).hexdigest()[:32]


def retrain(
    task: Task, runs: Sequence[Run], *, folder: Path, processes: int = 2, report: Report = to_stderr
) -> list[Outcome]:
    """The outcome of every run, in order; only those not remembered in `folder` are computed.

    With one process everything happens in this one. More are spawned, one torch thread each, so a script that
    calls this needs its `if __name__ == "__main__"`.
    """
    memory = Remembered(folder, task)
    missing = {run_key(run): run for run in runs if memory.get(run) is None}
    if missing:
        report(f"{len(missing)} of {len(runs)} retrainings to do, {len(runs) - len(missing)} remembered")
        progress = _Progress(len(missing), report)
        for run, outcome in _outcomes(task, list(missing.values()), processes):
            memory.put(run, outcome)
            progress.step()
    outcomes = [memory.get(run) for run in runs]
    return [outcome for outcome in outcomes if outcome is not None]


def _outcomes(task: Task, runs: Sequence[Run], processes: int) -> Iterator[tuple[Run, Outcome]]:
    if processes <= 1:
        with one_thread():
            trainer = Trainer(task)
            for run in runs:
                yield run, trainer.outcome(*run)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(runs)), mp_context=get_context("spawn"), initializer=_start, initargs=(task,)
    )
    try:
        futures: Mapping[Future[Outcome], Run] = {pool.submit(_outcome, *run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_trainer: list[Trainer] = []  # of a worker process: loaded once, used for every run


def _start(task: Task) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _trainer.append(Trainer(task))


def _outcome(subset: Bools, seed: int) -> Outcome:
    return _trainer[0].outcome(subset, seed)


class _Progress:
    """A line every ten seconds, with the time that is left at the pace so far."""

    def __init__(self, total: int, report: Report) -> None:
        self._total, self._report, self._done = total, report, 0
        self._started = self._last = time.monotonic()

    def step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= 10 or self._done == self._total:
            self._last = now
            each = (now - self._started) / self._done
            left = each * (self._total - self._done)
            self._report(f"{self._done}/{self._total} retrained, {each:.2f} s each, {left:.0f} s to go")


def _jsonable(state: State) -> dict[str, object]:
    def listed(value: float | NDArray[np.float64]) -> object:
        return value.tolist() if isinstance(value, np.ndarray) else value

    return {name: listed(value) for name, value in asdict(state).items()}
