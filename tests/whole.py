"""A small index with everything in it, built for real, and ways to break its files."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab import Lab
from service.contracts import Completion, Example, IndexRecord
from service.datasets import example_id
from service.loading import IndexLoader
from service.planning import ExtendRequest, plan_extension
from service.queries import Answer, QueryService
from service.questions import Query
from service.registry import INDEXES, Registry
from service.storage import Storage
from service.terms import (
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    JobKind,
    Method,
    Order,
    Pooling,
)
from tests import tiny

TOKENIZER = tiny.words(bos=True)
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"]
V = np.random.default_rng(0).standard_normal(tiny.WIDTH).astype(np.float32)
FITTED = {"examples": 12, "seed": 0, "labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}
LAYER = 2


def example(number: int) -> Example:
    rng = np.random.default_rng(number)
    words = rng.choice(WORDS, rng.integers(5, 12)).tolist()
    content = Completion(" ".join(words[:2]) + " ", " ".join(words[2:]))
    return Example(example_id(content), content, {"number": number}, ())


TRAIN, QUERY_SET = [example(number) for number in range(12)], [example(number) for number in range(100, 104)]

ASKED: dict[str, dict[str, Any]] = {
    "vector filter": {"concept": "v", "method": Method.VECTOR_FILTER},
    "embeddings": {"concept": "v", "method": Method.CONCEPT_INFLUENCE},
    "coordinates": {
        "concept": "v",
        "method": Method.CONCEPT_INFLUENCE,
        "query_set": "q",
        "through": IndexKind.GRADIENT,
    },
    "loss": {"concept": None, "method": Method.INFLUENCE_FUNCTION, "query_set": "q"},
}


class Spy(Storage):
    """A storage that notes what is read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.keys: set[str] = set()

    def read(self, key: str, *, sha256: str | None = None, cached: bool = True) -> bytes:
        self.keys.add(key)
        return super().read(key, sha256=sha256, cached=cached)

    def local_path(self, key: str) -> Path | None:
        self.keys.add(key)
        return super().local_path(key)


class Whole:
    """A run of two checkpoints, twelve examples in shards of six; ``index`` has every kind but ``difference``."""

    def __init__(self, root: Path) -> None:
        folders = []
        for number in range(2):
            model = tiny.model("llama", blocks=2, vocab=len(TOKENIZER))
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(number)
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            folders.append(root / f"m{number}")
            model.save_pretrained(folders[-1])
            TOKENIZER.save_pretrained(folders[-1])
        self.lab = Lab(root / "lab", shard_size=6)
        self.storage, self.registry, self.redis = self.lab.storage, self.lab.registry, self.lab.redis
        self.root = Path(self.storage.root)
        model = self.lab.model("m", folders[1], checkpoints=[(folders[0], 0.5)])
        self.lab.dataset("d", TRAIN)
        self.lab.dataset("q", QUERY_SET)
        self.lab.concept("v", model, V, layer=LAYER)

    def build(self, name: str, kinds: tuple[str, ...] = ("activation", "gradient", "influence"), **options: Any):
        about = {"kinds": kinds, "curvature": FITTED, "modules": "q_proj,down_proj", "coordinates": 64}
        about |= {"query_sets": ("q",), "rank": 4} if "influence" in kinds else {}
        return self.lab.build(name, "m", "d", LAYER, **about | options)[0]

    def extend(self, index: IndexRecord, **options: Any) -> IndexRecord:
        fields = {"query_sets": ("q",), "layers": (LAYER,), "pooling": Pooling.RESPONSE_MEAN}
        fields |= {"concept_functions": (ConceptFunction.DOT,), "dampings": (0.5,)}
        lab = self.lab
        request = ExtendRequest(**fields | options)
        spec = plan_extension(index.id, request, lab.registry, lab.storage, lab.redis, lab.settings)
        return lab.registry.get(INDEXES, lab.run(JobKind.EXTEND_INDEX, spec)[0]["index"])

    def service(self, storage: Storage | None = None) -> QueryService:
        """As a process that has just started sees the index."""
        storage = storage or Storage(self.storage.root)
        registry = Registry(self.redis, storage)
        loader = IndexLoader(registry, storage, threads=1)
        return QueryService(registry, storage, self.lab.jobs, loader, shard_size=6)

    def ask(self, name: str, index: str, storage: Storage | None = None) -> Any:
        """(rank, score, id) of every hit, or the job that must run first."""
        asked = ASKED[name]
        answer = self.service(storage).run(Query(index=index, order=Order.MOST, k=5, **asked))
        if not isinstance(answer, Answer):
            return answer
        return [(hit.rank, hit.score, hit.example.id) for hit in answer.hits]

    def tokens(self, index: str, storage: Storage | None = None) -> Any:
        query = Query(index=index, order=Order.MOST, k=1, **ASKED["embeddings"])
        found = self.service(storage).tokens(query, tuple(one.id for one in TRAIN[:2]))
        return [each.shares for each in found] if isinstance(found, list) else found

    def run_job(self, job: Any) -> Any:
        return self.lab.engine.run(job, Silent())

    def job(self, kind: JobKind, index: str) -> dict[str, Any]:
        return dict(self.run_job(self.lab.jobs.submit(kind, {"index": index})))

    def everything(self) -> dict[str, bytes]:
        """Every file of the storage."""
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths}

    def put_back(self, before: dict[str, bytes]) -> None:
        """Every file as it was, and a registry that knows no more than they say."""
        now = self.everything()
        for file in now.keys() - before.keys():
            (self.root / file).unlink()
        for file, data in before.items():
            if now.get(file) != data:
                (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                (self.root / file).write_bytes(data)
        self.forget()

    def forget(self) -> None:
        """Redis loses everything and learns again what storage holds."""
        self.redis.flushall()
        self.registry.rebuild()


class Silent:
    """A JobContext that keeps what is logged."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: list[tuple[str, int, int, str]] = []

    def progress(self, stage: str, done: int, total: int, *, unit: str = "examples", **_rest: Any) -> None:
        self.stages.append((stage, done, total, unit))

    def log(self, message: str, **_data: Any) -> None:
        self.messages.append(message)

    def check(self) -> None: ...


def broken(data: bytes, rng: random.Random) -> bytes:
    """One bit flipped, or the end cut off."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
