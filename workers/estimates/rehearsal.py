"""A build without workers: every task that it would run, and what each result would weigh.

The very code that drives builds runs here, against a pool that makes up results of the right shape, so that the
list of tasks cannot fall behind it. What is in storage already is found as a build would find it: it costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifacts, results, shards
from service.contracts import ArrayInfo, DatasetRecord
from service.errors import NotFound
from service.rows import F32
from service.storage import Storage, sha256_bytes
from service.tasks import Artifact, ShardArray, ShardManifest, Task
from service.terms import IndexKind
from service.work import DifferenceSpec, PassSpec, ReadOffSpec, ShardWork, SumSpec
from workers.derive import summed
from workers.estimates.probe import Shapes
from workers.estimates.weights import Weights
from workers.stages import Stages

_ID_BYTES = 67  # of an example in a shard's manifest: 64 digits, quotes and a comma
_MANIFEST_BYTES = 1500
_NPY_HEADER = 128


@dataclass(frozen=True)
class Rehearsed:
    """A task that a build would run; ``written`` and ``read``: bytes of its result and of what it reads first."""

    task: Task
    written: int
    read: int
    files: int


@dataclass(frozen=True)
class Stage:
    name: str
    tasks: tuple[Rehearsed, ...]


class Overlay(Storage):
    """Storage whose writes stay in memory."""

    def __init__(self, under: Storage) -> None:
        self.root = under.root
        self._under = under
        self._held: dict[str, bytes] = {}
        self._gone: set[str] = set()

    def exists(self, key: str) -> bool:
        return key in self._held or (key not in self._gone and self._under.exists(key))

    def read(self, key: str, *, sha256: str | None = None, cached: bool = True) -> bytes:
        if key in self._gone:
            raise NotFound("file_not_found", f"Storage has no {key}.", param=key)
        held = self._held.get(key)
        return self._under.read(key, sha256=sha256, cached=cached) if held is None else held

    def local_path(self, key: str) -> Path | None:
        return None if key in self._held or key in self._gone else self._under.local_path(key)

    def write(self, key: str, data: bytes) -> str:
        self._gone.discard(key)
        self._held[key] = data
        return sha256_bytes(data)

    def remove(self, key: str) -> None:
        self._held.pop(key, None)
        self._gone.add(key)

    def holds(self, key: str) -> bool:
        """Whether it was written here."""
        return key in self._held


class RehearsalPool:
    """A Runner whose results hold no numbers. ``width``: d of the model."""

    def __init__(
        self, storage: Overlay, shapes: Shapes, ids: Callable[[DatasetRecord], Sequence[str]], width: int
    ) -> None:
        self._storage = storage
        self._ids = ids
        self._width = width
        self.weights = Weights(storage, shapes)
        self.done: list[Rehearsed] = []

    def run(
        self,
        tasks: Sequence[Task],
        *,
        on_done: Callable[[Task, Any], None],
        check: Callable[[], None],
        log_event: Callable[..., None],
    ) -> None:
        for task in tasks:
            check()
            made = self._shard(task) if isinstance(task.work, ShardWork) else self._artifact(task)
            on_done(task, made)

    def _artifact(self, task: Task) -> Artifact:
        assert not isinstance(task.work, ShardWork)  # noqa: S101
        weight = self.weights.of(task)
        self.done.append(Rehearsed(task, weight.written, weight.read, weight.files))
        results.give_up(self._storage, artifacts.folder(task.key))  # a damaged one has other bytes than a rehearsal
        return artifacts.publish(self._storage, task.key, weight.tensors, facts=weight.facts)

    def _shard(self, task: Task) -> ShardManifest:
        work, read = task.work, 0
        ids: tuple[str, ...] = ()
        arrays: list[ArrayInfo] = []
        match work:
            case PassSpec():
                if work.activation is not None:
                    arrays += [
                        ArrayInfo(IndexKind.ACTIVATION, layer, self._width) for layer in work.activation.layers
                    ]
                if work.gradient is not None:
                    arrays.append(ArrayInfo(IndexKind.GRADIENT, None, self.weights.coordinates(work.gradient)))
                arrays += [head.array for head in (work.influence.heads if work.influence else ())]
            case DifferenceSpec():
                arrays = [ArrayInfo(IndexKind.DIFFERENCE, layer, self._width) for layer in work.layers]
            case SumSpec():
                arrays = [summed(info, len(work.sources)) for info in work.arrays]
                manifests = [shards.read_manifest(self._storage, key) for key, _ in work.sources]
                ids = manifests[0].ids
                read = sum(_bytes(len(each.ids), each.arrays) for each in manifests)
            case _:
                raise TypeError(f"{type(work).__name__} is no part of a build")
        if task.dataset is not None:
            known = self._ids(task.dataset)
            ids = tuple(known[row] for row in task.rows)
        encoding = shards.INT8 if isinstance(work, SumSpec | ReadOffSpec) else shards.HALF
        stored = tuple(ShardArray(info, encoding, "", "") for info in arrays)
        manifest = ShardManifest(task.key, work, ids, (), (), 0, stored, {}, {})  # pyright: ignore[reportArgumentType]
        self._storage.write(f"{shards.folder(task.key)}/{shards.MANIFEST}", results.sealed(manifest))
        self._storage.remove(f"{shards.folder(task.key)}/{results.MARK}")
        written = _bytes(len(ids), stored) + _MANIFEST_BYTES + _ID_BYTES * len(ids)
        self.done.append(Rehearsed(task, written, read, 2 * len(stored) + 1))
        return manifest


def _bytes(rows: int, arrays: Sequence[ShardArray]) -> int:
    """Of the stored rows."""
    each = {shards.HALF: lambda dims: 2 * dims + 2, shards.INT8: lambda dims: dims + 4}
    return sum(rows * each[array.encoding](array.info.dims) + 2 * _NPY_HEADER for array in arrays)


class Rehearsal(Stages):
    """Stages over a RehearsalPool that remember what each of them ran."""

    def __init__(self, storage: Storage, shapes: Shapes, width: int, context: Any) -> None:
        overlay = Overlay(storage)
        self._known: dict[str, list[str]] = {}
        self._rehearsed = RehearsalPool(overlay, shapes, self.ids, width)
        super().__init__(overlay, self._rehearsed, context)
        self._overlay = overlay
        self.stages: list[Stage] = []

    @property
    def weights(self) -> Weights:
        return self._rehearsed.weights

    def ids(self, dataset: DatasetRecord) -> list[str]:
        if dataset.fingerprint not in self._known:
            self._known[dataset.fingerprint] = super().ids(dataset)
        return self._known[dataset.fingerprint]

    def run(self, stage: str, tasks: Sequence[Task], *, unit: str) -> list[Any]:
        before = len(self._rehearsed.done)
        found = super().run(stage, tasks, unit=unit)
        if made := self._rehearsed.done[before:]:
            self.stages.append(Stage(self.prefix + stage, tuple(made)))
        return found

    def rows_of(self, manifest: ShardManifest, array: ArrayInfo) -> F32:
        return np.zeros((len(manifest.ids), array.dims), dtype=np.float32)

    def numbers(self, key: str, stem: str) -> dict[str, NDArray[Any]]:
        if not self._overlay.holds(f"{artifacts.folder(key)}/{artifacts.MANIFEST}"):
            return super().numbers(key, stem)
        facts = artifacts.get(self.storage, key).facts
        return {"rows": np.zeros((int(facts["rows"]), int(facts["columns"])), dtype=np.float32)}
