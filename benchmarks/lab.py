"""The service without its processes: the same planner, engine, storage and matcher, one worker in this process.

What a benchmark builds here is what `whence indexes build` builds; only Ray and HTTP are left out.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import codec, concepts, datasets, indexes, models
from service.contracts import ConceptRecord, DatasetRecord, Example, IndexRecord, JobRecord, ModelRecord, Place
from service.datasets import Parsed
from service.jobs import Jobs
from service.matching import Asked, Matched, Missing, match
from service.planning import IndexRequest, plan_estimate, plan_index
from service.redis_server import EmbeddedRedis, connect
from service.registry import CONCEPTS, DATASETS, INDEXES, MODELS, Registry
from service.settings import Settings
from service.shards import read_manifest as read_shard
from service.shards import read_rows
from service.storage import Storage, sha256_bytes
from service.terms import (
    Checkpoints,
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    JobKind,
    JobState,
    LongExamples,
    Lora,
    LossReduction,
    Method,
    Pooling,
    Projection,
)
from service.work import PassSpec, SumSpec
from workers.engine import RayEngine
from workers.pool import InlinePool

F32 = NDArray[np.float32]

DEFAULTS: dict[str, Any] = {
    "kinds": (IndexKind.GRADIENT,),
    "pooling": Pooling.RESPONSE_MEAN,
    "loss_reduction": LossReduction.MEAN,
    "projection": Projection.EIGEN,
    "projection_dim": None,
    "coordinates": 4096,
    "seed": 0,
    "query_sets": (),
    "concept_functions": (ConceptFunction.DOT,),
    "dampings": (1.0,),
    "embedding_coordinates": None,
    "rank": None,
    "directions": (),
    "checkpoints": Checkpoints.ALL,
    "modules": "all",
    "stride": 1,
    "lora": Lora.MERGED,
    "answers": {"temperature": 1.0, "max_new_tokens": 1000, "seed": 0},
    "curvature": {
        "examples": 4096,
        "seed": 0,
        "labels": FactorLabels.SAMPLED,
        "positions": FactorPositions.TARGETS,
    },
    "max_length": None,
    "long_examples": LongExamples.TRUNCATE_RIGHT,
}


@dataclass
class Quiet:
    """A JobContext that keeps the seconds of every stage."""

    job: JobRecord
    seconds: dict[str, float]
    began: float = 0.0
    stage: str = ""

    def progress(self, stage: str, done: int, total: int, **_rest: Any) -> None:
        now = time.perf_counter()
        if stage != self.stage:
            self.stage, self.began = stage, now
        if done >= total:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.began
            self.began = now

    def log(self, message: str, **data: Any) -> None: ...

    def check(self) -> None: ...


class Lab:
    """``folder`` keeps storage and Redis; ``close`` stops the latter."""

    def __init__(self, folder: Path, *, threads: int = 1, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = EmbeddedRedis(folder / "redis")
        self._server.start()
        self.redis = connect(self._server.url)
        self.settings = Settings(home=folder, **settings)  # pyright: ignore[reportCallIssue]
        self.storage = Storage(self.settings.storage_root, cache=self.settings.cache)
        self.registry = Registry(self.redis, self.storage)
        self.registry.rebuild()
        self.engine = RayEngine(
            self.redis, self.registry, self.storage, InlinePool(self.storage.root, threads=threads), self.settings
        )
        self.jobs = Jobs(self.redis)

    def close(self) -> None:
        self.redis.close()
        self._server.stop()

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # --- what is registered ---------------------------------------------------------------------------

    def model(
        self, name: str, path: Path, *, base: str | None = None, checkpoints: Sequence[tuple[Path, float]] = ()
    ) -> ModelRecord:
        """A model folder with the points of its run; registered once."""
        points = [(point.resolve(), weight) for point, weight in checkpoints]
        known = self.registry.get(MODELS, base) if base else None
        record = models.inspect(name, path.resolve(), base=known, checkpoints=points, redis=self.redis)
        return models.register(self.registry, record)

    def dataset(self, name: str, examples: Sequence[Example]) -> DatasetRecord:
        known = self.registry.find(DATASETS, name)
        if known is not None:
            return known
        parsed = Parsed(f"{name}.jsonl")
        for line, example in enumerate(examples, start=1):
            parsed.lines += 1
            if example.id in parsed.examples:
                parsed.duplicates += 1
                continue
            place = Place(parsed.source, line)
            parsed.examples[example.id] = Example(example.id, example.content, dict(example.metadata), (place,))
        record = datasets.publish(self.storage, name, parsed)
        self.registry.add(DATASETS, name, record)
        return record

    def concept(
        self, name: str, model: ModelRecord, direction: F32, *, layer: int, pooling: Pooling = Pooling.RESPONSE_MEAN
    ) -> ConceptRecord:
        """A direction as a concept of the model; the same name again replaces nothing."""
        known = self.registry.find(CONCEPTS, name)
        if known is not None:
            return known
        unit = (direction / np.linalg.norm(direction)).astype(np.float32)
        tensor = concepts.to_safetensors(unit)
        record = ConceptRecord(
            id=name,
            model=model.id,
            model_fingerprint=model.fingerprint,
            lineage=model.lineage,
            layer=layer,
            pooling=pooling,
            width=model.width,
            method="given",
            norm=1.0,
            auroc_held_out=1.0,
            n_positive=0,
            n_negative=0,
            provenance={},
            sha256=sha256_bytes(tensor),
            created_at=codec.now(),
        )
        concepts.publish(self.storage, self.registry, record, tensor)
        return record

    # --- builds and scores ----------------------------------------------------------------------------

    def build(self, name: str, model: str, dataset: str, layer: int, **options: Any) -> tuple[IndexRecord, Quiet]:
        """The index and how long each stage took; ``options`` as in planning.IndexRequest."""
        request = self._request(name, model, dataset, layer, options)
        spec = plan_index(request, self.registry, self.redis, self.settings)
        result, context = self.run(JobKind.BUILD_INDEX, spec)
        return self.registry.get(INDEXES, result["index"]), context

    def estimate(self, name: str, model: str, dataset: str, layer: int, **options: Any) -> dict[str, Any]:
        """What ``build`` with the same arguments would cost."""
        spec = plan_estimate(self._request(name, model, dataset, layer, options), self.registry, self.settings)
        return self.run(JobKind.ESTIMATE_INDEX, spec)[0]

    def _request(self, name: str, model: str, dataset: str, layer: int, options: dict[str, Any]) -> IndexRequest:
        fields = DEFAULTS | {"name": name, "model": model, "dataset": dataset, "layers": (layer,)} | options
        return codec.from_plain(IndexRequest, fields)

    def scores(
        self,
        index: IndexRecord,
        ids: Sequence[str],
        *,
        concept: str | None = None,
        query_set: str | None = None,
        method: Method = Method.CONCEPT_INFLUENCE,
        function: ConceptFunction = ConceptFunction.DOT,
        damping: float | None = None,
        through: IndexKind | None = None,
    ) -> NDArray[np.float64]:
        """The score of every example in ``ids`` (NaN: not in the index), in float64 from the stored rows."""
        found = self._matched(
            index,
            concept=concept,
            query_set=query_set,
            method=method,
            function=function,
            damping=damping,
            through=through,
        )
        manifest = indexes.read_manifest(self.storage, index)
        by_id: dict[str, float] = {}
        section = next(section for section in manifest.sections if found.array in section.arrays)
        for reference in section.shards:
            shard = read_shard(self.storage, reference.key)
            rows = read_rows(self.storage, shard, found.array).astype(np.float64) @ found.u.astype(np.float64)
            by_id |= dict(zip(shard.ids, rows, strict=True))
        return np.array([by_id.get(item, np.nan) for item in ids])

    def query_vector(self, index: IndexRecord, *, concept: str, query_set: str) -> F32:
        """u of a concept influence query, with the default settings."""
        return self._matched(index, concept=concept, query_set=query_set).u

    def curvatures(self, index: IndexRecord) -> list[str]:
        """The curvature artifact of every point that the index sums over, in order."""
        manifest = indexes.read_manifest(self.storage, index)
        summed = read_shard(self.storage, manifest.sections[-1].shards[0].key).work
        assert isinstance(summed, SumSpec)
        works = [read_shard(self.storage, key).work for key, _ in summed.sources]
        return [work.influence.curvature for work in works if isinstance(work, PassSpec) and work.influence]

    def _matched(
        self,
        index: IndexRecord,
        *,
        concept: str | None = None,
        query_set: str | None = None,
        method: Method = Method.CONCEPT_INFLUENCE,
        function: ConceptFunction = ConceptFunction.DOT,
        damping: float | None = None,
        through: IndexKind | None = None,
    ) -> Matched:
        record = self.registry.get(CONCEPTS, concept) if concept else None
        vector = concepts.direction(self.storage, record) if record else None
        asked_of = self.registry.get(DATASETS, query_set) if query_set else None
        asked = Asked(method, record, vector, asked_of, function, damping, through)
        manifest = indexes.read_manifest(self.storage, index)
        found = match(self.storage, index, manifest, asked, shard_size=512)
        if isinstance(found, Missing):
            self.run(JobKind.QUERY_GRADIENT, found.spec)
            found = match(self.storage, index, manifest, asked, shard_size=512)
        assert not isinstance(found, Missing)
        return found

    def run(self, kind: JobKind, spec: Any) -> tuple[Any, Quiet]:
        job = JobRecord(
            f"lab-{time.time_ns()}", kind, asdict(spec), JobState.RUNNING, 1, 1, codec.now(), codec.now()
        )
        context = Quiet(job, {})
        return self.engine.run(job, context), context
