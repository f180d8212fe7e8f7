"""One Ray actor: loads a model once and turns shards into files."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from service import datasets, shards
from service.contracts import DatasetRecord, Example, PassSpec, ShardManifest, ShardTask
from service.models import check_fingerprints
from service.storage import Storage
from workers import passes
from workers.gradients import Sides
from workers.models import Loaded, load

log = logging.getLogger(__name__)


class ShardWorker:
    """Keeps the last model, its projections and the last dataset; a shard is a pure function of its task."""

    def __init__(self, storage_root: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._storage = Storage(storage_root)
        self._loaded: tuple[tuple[str, str, str], Loaded] | None = None
        self._sides: tuple[PassSpec, dict[str, Sides]] | None = None
        self._examples: tuple[str, Sequence[Example]] | None = None

    def pid(self) -> int:
        """Process id: answers once the actor has started."""
        return os.getpid()

    def process(self, task: ShardTask) -> ShardManifest:
        """Compute and publish the shard, unless it is there. Raises DomainError for what the user can mend.

        A published shard is never written again: an index may name its bytes already, and another device or
        library version would give others.
        """
        if shards.exists(self._storage, task.key):
            return shards.read_manifest(self._storage, task.key)
        loaded = self._model(task)
        if self._sides is None or self._sides[0] != task.spec:
            self._sides = (task.spec, passes.tracked_sides(loaded, task.spec))
        examples = self._dataset(task.dataset)[task.start : task.stop]
        result = passes.run(loaded, self._sides[1], task.spec, examples)
        if shards.exists(self._storage, task.key):  # somebody else was faster
            return shards.read_manifest(self._storage, task.key)
        return shards.publish(
            self._storage,
            task,
            ids=result.ids,
            arrays=result.arrays,
            quarantined=result.quarantined,
            truncated=result.truncated,
            tokens=result.tokens,
            versions=passes.versions(),
        )

    def _model(self, task: ShardTask) -> Loaded:
        key = (task.model_path, task.spec.model_fingerprint, task.spec.dtype)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = self._sides = None  # free the old model before the new one needs the memory
            loaded = load(task.model_path, task.spec.dtype)
            # After loading, since a training run may write to the folder just now; before any row is stored.
            check_fingerprints(Path(task.model_path), task.spec)
            self._loaded = (key, loaded)
        return self._loaded[1]

    def _dataset(self, record: DatasetRecord) -> Sequence[Example]:
        if self._examples is None or self._examples[0] != record.fingerprint:
            table = datasets.read_table(self._storage, record)
            self._examples = (record.fingerprint, datasets.to_examples(table))
        return self._examples[1]


RemoteShardWorker = ray.remote(ShardWorker)
