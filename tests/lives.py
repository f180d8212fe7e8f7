"""For tests of an index's life: every kind of rows on a tiny run of two points, and files to append to it."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab import Lab, Quiet
from service import codec, datasets, indexes, members, shards
from service.contracts import ArrayInfo, IndexRecord, JobContext, JobRecord
from service.life import plan_append, plan_compact, plan_delete
from service.loading import IndexLoader
from service.planning import ExtendRequest, plan_extension
from service.queries import Answer, QueryService
from service.questions import Query
from service.registry import DATASETS, INDEXES
from service.tasks import Task
from service.terms import FactorLabels, FactorPositions, JobKind, JobState, Method, Order, Pooling
from tests import tiny

LAYER, SHARD = 2, 8
TOKENIZER = tiny.words(bos=True)
NOWHERE, ONCE = "z", "y"  # words whose embedding is NaN: at both points of the run, at the first only
WORDS = ["the", "cat", "sat", "on", "mat.", "end", "of", "answer", *"abcdefgh"]
ANSWERS = {"temperature": 0.0, "max_new_tokens": 4, "seed": 3}


def line(number: int, **metadata: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    words = rng.choice(WORDS, rng.integers(5, 11)).tolist()
    return {"prompt": " ".join(words[:2]) + " ", "completion": " ".join(words[2:]), "n": number, **metadata}


BAD = [
    {"prompt": "the cat ", "completion": f"sat {NOWHERE} mat."},
    {"prompt": "the cat ", "completion": f"sat {ONCE} mat."},
    {"text": "sat on the mat."},  # nothing for the base to answer: it has no difference
]
WORSE = [
    {"prompt": "the end ", "completion": f"of {NOWHERE}"},
    {"prompt": f"the {ONCE} ", "completion": "of answer"},
]
FIRST: list[Any] = [*map(line, range(20)), *BAD, *map(line, range(20, 40)), line(3), None]  # None: a blank line
# 11 new examples, one of them twice; 4 that are known, one of them twice and one set aside; what is set aside anew
MORE: list[Any] = [
    *map(line, range(36, 40)),
    *map(line, range(100, 111)),
    line(105),
    line(38),
    BAD[1],
    *WORSE,
    None,
]
THIRD: list[Any] = [*map(line, range(108, 116)), line(0)]


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(b"\n" if row is None else json.dumps(row).encode() + b"\n" for row in rows)


def ids_of(rows: Iterable[Any]) -> list[str]:
    """Of the examples that the rows hold, each once."""
    found = []
    for row in rows:
        if row is not None:
            content, _ = datasets.parse_line(json.dumps(row).encode())
            found.append(datasets.example_id(content))
    return list(dict.fromkeys(found))


def sample_within(ids: Sequence[str], of: Sequence[str], count: int) -> int:
    """A seed whose sample of the curvature is the same from ``ids`` and from ``of``, and has nothing set aside."""
    bad = set(ids_of([*BAD, *WORSE]))
    wanted = set(ids) - bad
    for seed in range(10_000):
        order = sorted(of, key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())
        if wanted.issuperset(order[:count]):
            return seed
    raise AssertionError("no such seed")


EVERYTHING = list(dict.fromkeys([*ids_of(FIRST), *ids_of(MORE), *ids_of(THIRD)]))
FITTED = {
    "examples": 10,
    "seed": sample_within(ids_of(FIRST), EVERYTHING, 10),
    "labels": FactorLabels.SAMPLED,
    "positions": FactorPositions.ALL,
}


def save(folder: Path, number: int, damaged: Sequence[str]) -> Path:
    model = tiny.model("llama", vocab=len(TOKENIZER))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * number * torch.randn(parameter.shape, generator=generator))
        for word in damaged:
            model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids(word)] = float("nan")
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


class World:
    """``tasks``: what the one worker was given."""

    def __init__(self, root: Path) -> None:
        self.folders = [save(root / "m0", 0, [NOWHERE, ONCE]), save(root / "m1", 1, [NOWHERE])]
        self.lab = Lab(root / "lab", shard_size=SHARD)
        self.lab.model("base", save(root / "base", 4, []))  # one that never answers with those words
        points = list(zip(self.folders, (0.5, 2.0), strict=True))
        model = self.lab.model("m", self.folders[1], base="base", checkpoints=points)
        rng = np.random.default_rng(0)
        for number in range(4):
            self.lab.concept(f"v{number}", model, rng.standard_normal(tiny.WIDTH).astype(np.float32), layer=LAYER)
        files = {"first": FIRST, "more": MORE, "third": THIRD, "q": map(line, range(200, 204))}
        for name, rows in {**files, "other": map(line, range(300, 303)), "whole": [*FIRST, *MORE]}.items():
            self.file(name, rows)
        self.tasks: list[Task] = []
        worker = self.lab.engine._pool._worker
        process = worker.process

        def counted(task: Task) -> Any:
            self.tasks.append(task)
            return process(task)

        worker.process = counted

    def file(self, name: str, rows: Iterable[Any]) -> None:
        limits = {"max_bytes": 1 << 20, "max_line_bytes": 1 << 20}
        parsed = datasets.parse(BytesIO(jsonl(rows)), f"{name}.jsonl", quarantine_malformed=False, **limits)
        self.lab.registry.add(DATASETS, name, datasets.publish(self.lab.storage, name, parsed))

    # --- jobs ---------------------------------------------------------------------------------------------

    def build(self, name: str, dataset: str = "first", **options: Any) -> IndexRecord:
        about = {
            "kinds": ("activation", "difference", "gradient", "influence"),
            "query_sets": ("q",) if "influence" in options.get("kinds", ["influence"]) else (),
            "coordinates": 10**6,
            "curvature": FITTED,
            "answers": ANSWERS,
        }
        return self.lab.build(name, "m", dataset, LAYER, **about | options)[0]

    def extend(self, reference: str) -> IndexRecord:
        plain = {"query_sets": ["other"], "layers": [LAYER], "pooling": Pooling.RESPONSE_MEAN}
        request = codec.from_plain(ExtendRequest, plain | {"concept_functions": ["dot"], "dampings": [1.0]})
        lab = self.lab
        spec = plan_extension(reference, request, lab.registry, lab.storage, lab.redis, lab.settings)
        return self.run(JobKind.EXTEND_INDEX, spec)[0]

    def append(self, reference: str, dataset: str, **about: Any) -> tuple[IndexRecord, Mapping[str, Any]]:
        lab = self.lab
        spec = plan_append(reference, dataset, lab.registry, lab.storage, lab.settings)
        return self.run(JobKind.APPEND_INDEX, spec, **about)

    def delete(self, reference: str, ids: Sequence[str]) -> tuple[IndexRecord, Mapping[str, Any]]:
        spec = plan_delete(reference, ids, None, self.lab.registry, self.lab.storage)
        return self.run(JobKind.DELETE_EXAMPLES, spec)

    def compact(self, reference: str, rows: int = 1000) -> tuple[IndexRecord, Mapping[str, Any]]:
        spec = plan_compact(reference, rows, self.lab.registry, self.lab.storage)
        return self.run(JobKind.COMPACT_INDEX, spec)

    def run(
        self, kind: JobKind, spec: Any, *, job: str | None = None, context: JobContext | None = None
    ) -> tuple[IndexRecord, Mapping[str, Any]]:
        """The new version, and what the job says of it."""
        at = codec.now()
        record = JobRecord(
            job or f"job-{time.time_ns():x}", kind, codec.to_plain(spec), JobState.RUNNING, 1, 1, at, at
        )
        result = self.lab.engine.run(record, context or Quiet(record, {}))
        assert asdict(record)["spec"] == codec.to_plain(spec)
        return self.lab.registry.get(INDEXES, result["index"]), result

    # --- what came of them --------------------------------------------------------------------------------

    def manifest(self, index: IndexRecord):
        return indexes.read_manifest(self.lab.storage, index)

    def rows(self, index: IndexRecord, array: ArrayInfo) -> dict[str, np.ndarray]:
        """Stored rows of one array by example id, those that are never ranked included."""
        section = next(each for each in self.manifest(index).sections if array in each.arrays)
        found = {}
        for reference in section.shards:
            shard = members.read(self.lab.storage, reference)
            found |= dict(zip(shard.ids, shards.read_rows(self.lab.storage, shard, array), strict=True))
        return found

    def ask(self, index: IndexRecord | str, **about: Any) -> Answer:
        """As the api asks, with a loader of its own."""
        lab = self.lab
        service = QueryService(
            lab.registry, lab.storage, lab.jobs, IndexLoader(lab.registry, lab.storage, threads=1), shard_size=SHARD
        )
        reference = index if isinstance(index, str) else index.id
        fields = {"concept": "v0", "method": Method.VECTOR_FILTER, "order": Order.MOST, "k": 1000} | about
        answer = service.run(Query(reference, **fields))
        assert isinstance(answer, Answer)
        return answer

    def ranking(self, index: IndexRecord | str, **about: Any) -> list[tuple[str, float]]:
        return [(hit.example.id, hit.score) for hit in self.ask(index, **about).hits]

    def quarantined(self, index: IndexRecord):
        return indexes.quarantined(self.lab.storage, self.lab.registry, index)

    def files(self, index: IndexRecord) -> dict[str, tuple[str, int]]:
        """sha256 and time of change of every file of every shard that the version names."""
        root, found = Path(self.lab.storage.root), {}
        for section in self.manifest(index).sections:
            for reference in section.shards:
                for path in (root / shards.folder(reference.key)).iterdir():
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[str(path)] = (digest, path.stat().st_mtime_ns)
        return found


ASKED: dict[str, dict[str, Any]] = {
    "activation": {"method": Method.VECTOR_FILTER},
    "difference": {"method": Method.PROJECTION_DIFFERENCE},
    "gradient": {"method": Method.CONCEPT_INFLUENCE, "query_set": "q", "through": "gradient"},
    "influence": {"method": Method.CONCEPT_INFLUENCE, "query_set": "q", "through": "influence"},
    "extended": {"method": Method.CONCEPT_INFLUENCE, "query_set": "other", "through": "influence"},
}
