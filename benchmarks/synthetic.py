"""A published index of clustered random vectors, in the service's own formats, of any size.

Rows are made block by block from a seed, so that nobody ever holds all of them in float32, and whoever needs the
true ranking makes them again.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from service import codec, concepts, datasets, indexes, shards
from service.contracts import ArrayInfo, ConceptRecord, Counts, DatasetRecord, ModelRecord, Point
from service.errors import Conflict
from service.registry import CONCEPTS, DATASETS, MODELS, Registry
from service.specs import IndexManifest, Section
from service.storage import Storage, sha256_bytes
from service.tasks import ShardRef
from service.terms import IndexKind, LongExamples, Pooling
from service.work import ActivationSpec, Location, PassSpec

SHARD = 4096
LAYER = 1
CENTRES = 64
_NAMED = ["market", "harbor", "school", "garden", "tower"]


def blocks(n: int, d: int) -> Iterator[np.ndarray]:
    """(≤ SHARD, d) float32 at a time, around 64 centres, as real activations lie, with uneven norms."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, d), dtype=np.float32)
    for start in range(0, n, SHARD):
        rng = np.random.default_rng([1, start])
        count = min(SHARD, n - start)
        rows = centres[rng.integers(0, CENTRES, count)] + rng.standard_normal((count, d), dtype=np.float32)
        yield rows * np.exp(0.3 * rng.standard_normal((count, 1), dtype=np.float32))


def directions(count: int, d: int) -> np.ndarray:
    """(count, d) float32 unit vectors."""
    found = np.random.default_rng(2).standard_normal((count, d)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def line(number: int) -> dict[str, Any]:
    """What stands in the dataset: a text, and metadata to filter by."""
    text = f"example {number}: " + "words of a typical example " * 4
    return {"text": text, "bucket": number % 100, "topic": _NAMED[number % len(_NAMED)]}


def publish(storage: Storage, registry: Registry, name: str, n: int, d: int, *, concept_count: int) -> None:
    """A model, a dataset of n lines, ``concept_count`` concepts, and an index of n rows, called after ``name``."""
    at, fingerprint = codec.now(), f"synthetic-{d}"
    model = ModelRecord(f"model-{d}", "", fingerprint, "", None, "none", 2, d, 512, None, fingerprint, (), at)
    if registry.find(MODELS, model.id) is None:
        registry.add(MODELS, model.id, model)
    dataset, ids = _dataset(storage, registry, name, n)
    spec = PassSpec(
        model_fingerprint=fingerprint,
        tokenizer_fingerprint="",
        activation=ActivationSpec((LAYER,), Pooling.RESPONSE_MEAN),
        gradient=None,
        objective=None,
        max_length=512,
        long_examples=LongExamples.TRUNCATE_RIGHT,
        token_budget=8192,
        dtype="float32",
    )
    info = ArrayInfo(IndexKind.ACTIVATION, LAYER, d)
    counts = Counts(lines=n, indexed=n, duplicates=0, quarantined=0, truncated=0)
    manifest = IndexManifest(
        name, 1, model.id, fingerprint, fingerprint, dataset.id, dataset.fingerprint, None, spec,
        (Point(model.id, model.path, fingerprint),), None,
        (Section((info,), tuple(_shards(storage, dataset, spec, info, ids))),), counts, {},
    )  # fmt: skip
    indexes.publish(storage, registry, indexes.describe(manifest, job="benchmark"), manifest, {})
    for number, direction in enumerate(directions(concept_count, d)):
        tensor = concepts.to_safetensors(direction)
        concept = ConceptRecord(
            f"c{d}-{number}", model.id, fingerprint, fingerprint, LAYER, Pooling.RESPONSE_MEAN, d, "random", 1.0,
            None, 0, 0, {}, sha256_bytes(tensor), at,
        )  # fmt: skip
        if registry.find(CONCEPTS, concept.id) is None:
            concepts.publish(storage, registry, concept, tensor)


def _dataset(storage: Storage, registry: Registry, name: str, n: int) -> tuple[DatasetRecord, list[str]]:
    with tempfile.TemporaryFile() as file:
        text = io.TextIOWrapper(file, encoding="utf-8", write_through=True)
        for number in range(n):
            text.write(json.dumps(line(number)) + "\n")
        text.flush()
        file.seek(0)
        parsed = datasets.parse(
            file, f"{name}.jsonl", quarantine_malformed=False, max_bytes=1 << 40, max_line_bytes=1 << 20
        )
        text.detach()
    record = datasets.publish(storage, name, parsed)
    try:
        registry.add(DATASETS, record.id, record)
    except Conflict:
        record = registry.get(DATASETS, name)
    return record, list(parsed.examples)


def _shards(
    storage: Storage, dataset: DatasetRecord, spec: PassSpec, info: ArrayInfo, ids: list[str]
) -> Iterator[ShardRef]:
    tasks = shards.cut(Location("", ""), spec, dataset, ids, range(len(ids)), SHARD)
    for task, rows in zip(tasks, blocks(len(ids), info.dims), strict=True):
        manifest = shards.publish(
            storage,
            task,
            ids=[ids[row] for row in task.rows],
            arrays={info: rows},
            encoding=shards.HALF,
            versions={},
        )
        yield shards.reference(manifest)


def true_best(n: int, d: int, queries: np.ndarray, k: int) -> list[set[int]]:
    """The k rows with the largest inner product with each query, by brute force in float64."""
    best = [(np.zeros(0, np.int64), np.zeros(0)) for _ in queries]
    for start, rows in zip(range(0, n, SHARD), blocks(n, d), strict=True):
        scores = rows.astype(np.float64) @ queries.astype(np.float64).T
        for number, (held, values) in enumerate(best):
            place = np.concatenate([held, np.arange(start, start + len(rows))])
            together = np.concatenate([values, scores[:, number]])
            top = np.argsort(-together, kind="stable")[:k]
            best[number] = (place[top], together[top])
    return [set(held.tolist()) for held, _ in best]
