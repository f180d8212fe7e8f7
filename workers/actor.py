"""One Ray actor: loads a model once and turns tasks into files."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import fields, replace

import pyarrow as pa
import ray
import torch

from service import artifacts, datasets, results, shards
from service.contracts import DatasetRecord, Example
from service.local_cache import CacheAt
from service.models import check_fingerprints
from service.storage import Storage
from service.tasks import BUDGET, LOWERED, AnyWork, Artifact, ShardManifest, Task
from service.terms import Pooling
from service.training import ReadAnswersWork, RetrainWork
from service.work import (
    CompactSpec,
    DifferenceSpec,
    Location,
    PassSpec,
    Reading,
    ReadOffSpec,
    ShardWork,
    SumSpec,
    Tracked,
)
from workers import derive, differences, passes, readout, works
from workers.estimates import probe
from workers.estimates.probe import Cost, Source, Survey, Trial
from workers.models import Loaded, load_at
from workers.passes import PassResult
from workers.prepare import naming_memory
from workers.works import answers

log = logging.getLogger(__name__)

Manifest = ShardManifest | Artifact
Computed = PassSpec | DifferenceSpec | SumSpec | ReadOffSpec  # what compaction only copies


class Worker:
    """Keeps the last model, its readout and the last dataset; a result is a pure function of its task."""

    def __init__(self, storage_root: str, threads: int, cache: CacheAt | None = None) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._storage = Storage(storage_root, cache=cache)
        self._loaded: tuple[object, Loaded] | None = None  # by what it was loaded from
        self._readout: tuple[PassSpec, readout.Readout] | None = None
        self._table: tuple[str, pa.Table] | None = None

    def pid(self) -> int:
        """Process id: answers once the actor has started."""
        return os.getpid()

    def process(self, task: Task) -> Manifest:
        """Compute and publish the task's result, unless it is there. Raises DomainError for what the user can mend.

        A published result is never written again: an index may name its bytes already, and another device or
        library version would give others.
        """
        if (there := find(self._storage, task)) is not None:
            return there
        task = self._as_before(task)
        if isinstance(task.work, CompactSpec):
            return derive.compact(self._storage, task, task.work, self._versions(None))
        if isinstance(task.work, ShardWork):
            with naming_memory(task.title):
                found = self._rows(task, task.work)
            return self._publish_shard(task, *found)
        reading = _reading(task.work)
        with naming_memory(task.title):
            loaded = self._model(task.location, reading) if reading is not None else None
            tensors, facts = works.compute(task.work, self._storage, loaded, self._examples(task))
        if (there := find(self._storage, task)) is not None:  # somebody else was faster
            return there
        about = {"facts": facts, "versions": self._versions(reading)}
        measured = isinstance(task.work, RetrainWork | ReadAnswersWork)  # nothing is computed from it
        return artifacts.publish(self._storage, task.key, tensors, answer=measured, **about)

    def survey(
        self,
        location: Location,
        reading: Reading,
        tracked: Tracked,
        pooling: Pooling | None,
        sources: Sequence[Source],
    ) -> Survey:
        """For an estimate: what loading and reading cost here."""
        probe.forget_peak()
        began = time.perf_counter()
        loaded = self._model(location, reading)
        seconds, most = time.perf_counter() - began, probe.peak()
        examples = [self._read(source.dataset, source.rows) for source in sources]
        about = {"load_s": seconds, "load_bytes": most}
        return probe.survey(loaded, reading, tracked, pooling, examples, self._storage, **about)

    def measure(self, trial: Trial) -> Cost:
        """For an estimate: what one kind of work costs here."""
        work = trial.work
        reading = work if isinstance(work, Reading) else work.reading  # pyright: ignore[reportAttributeAccessIssue]
        loaded = self._model(trial.location, reading)
        return probe.measure(loaded, trial, self._read(trial.source.dataset, trial.source.rows))

    def _versions(self, reading: Reading | None) -> dict[str, str]:
        """What stands behind a result, and the token budget where texts were read for it."""
        found = passes.versions()
        if reading is not None and self._loaded is not None:
            memory = self._loaded[1].memory
            found[BUDGET] = str(memory.within(reading.token_budget))
            if memory.tokens:
                found[LOWERED] = str(memory.tokens)
        return found

    def _as_before(self, task: Task) -> Task:
        """A damaged result is made again in batches of the size that it was made in: others round differently."""
        work = task.work
        if isinstance(work, PassSpec | DifferenceSpec):
            shard = results.intact(self._storage, f"{shards.folder(task.key)}/{shards.MANIFEST}", ShardManifest)
            return replace(task, work=shard.work) if shard is not None else task
        reading = _reading(work)
        if reading is not None and "reading" in {each.name for each in fields(work)}:
            file = f"{artifacts.folder(task.key)}/{artifacts.MANIFEST}"
            known = results.intact(self._storage, file, Artifact)
            if known is not None and BUDGET in known.versions:
                reading = replace(reading, token_budget=int(known.versions[BUDGET]))
                return replace(task, work=replace(work, reading=reading))  # pyright: ignore[reportCallIssue]
        return task

    def _rows(self, task: Task, work: Computed) -> tuple[PassResult, str]:
        """The rows of a shard, and how they are encoded."""
        match work:
            case PassSpec():
                loaded = self._model(task.location, work)
                result = passes.run(loaded, self._reads(loaded, work), work, self._examples(task))
                return result, shards.HALF if work.objective is None else shards.SINGLE
            case DifferenceSpec():
                loaded = self._model(task.location, work)
                answered = answers.read(self._storage, work.answers)
                return differences.run(loaded, answered, work, self._examples(task)), shards.HALF
            case SumSpec():
                return derive.total(self._storage, work), shards.INT8
            case ReadOffSpec():
                return derive.read_off(self._storage, work), shards.INT8

    def _publish_shard(self, task: Task, result: PassResult, encoding: str) -> Manifest:
        if (there := find(self._storage, task)) is not None:  # somebody else was faster
            return there
        return shards.publish(
            self._storage,
            task,
            ids=result.ids,
            arrays=result.arrays,
            encoding=encoding,
            quarantined=result.quarantined,
            long=result.long,
            tokens=result.tokens,
            versions=self._versions(_reading(task.work)),
        )

    def _model(self, location: Location | None, reading: Reading) -> Loaded:
        assert location is not None  # noqa: S101
        weights = (reading.model_fingerprint, reading.dtype, reading.lora)
        key = (location, weights, reading.tokenizer_fingerprint)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = self._readout = None  # free the old model before the new one needs the memory
            loaded = load_at(location, reading)
            # After loading, since a training run may write to the folder just now; before any row is stored.
            check_fingerprints(location, reading)
            self._loaded = (key, loaded)
        return self._loaded[1]

    def _reads(self, loaded: Loaded, spec: PassSpec) -> readout.Readout:
        if self._readout is None or self._readout[0] != spec:
            self._readout = None
            self._readout = (spec, readout.make(loaded, spec, self._storage))
        return self._readout[1]

    def _examples(self, task: Task) -> Sequence[Example]:
        return () if task.dataset is None else self._read(task.dataset, task.rows)

    def _read(self, record: DatasetRecord, rows: Sequence[int]) -> Sequence[Example]:
        """Some examples; the dataset is kept as a table, which is a tenth of the size of its records."""
        if self._table is None or self._table[0] != record.fingerprint:
            self._table = (record.fingerprint, datasets.read_table(self._storage, record))
        return datasets.to_examples(self._table[1].take(list(rows)))


def _reading(work: AnyWork) -> Reading | None:
    """How the work reads texts, when it does."""
    return work if isinstance(work, Reading) else getattr(work, "reading", None)


def find(storage: Storage, task: Task) -> Manifest | None:
    """The task's result, when it has been published and nothing is known to be wrong with it."""
    made = shards.made if isinstance(task.work, ShardWork) else artifacts.made
    return made(storage, task.key)


RemoteWorker = ray.remote(Worker)
