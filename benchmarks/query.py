"""Latency of a query as an HTTP client sees it, against the search inside the server, on a synthetic index.

Publishes an index of clustered random vectors through the service's own formats, starts Redis and the api
as processes (no dispatcher: a query needs no model), and asks many times. ``search_vs_read`` compares the
search with one thread reading the same bytes once in this process, in the same run.
"""

import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from api.client import Client
from api.schemas import QueryOut
from api.up import Stack, free_port
from benchmarks.report import Report, parser
from service import codec, concepts, datasets, indexes, shards
from service.contracts import ArrayInfo, ConceptRecord, Counts, DatasetRecord, ModelRecord, Point
from service.redis_server import connect
from service.registry import DATASETS, MODELS, Registry
from service.specs import IndexManifest, Section
from service.storage import Storage, sha256_bytes
from service.terms import IndexKind, LongExamples, Pooling
from service.work import ActivationSpec, Location, PassSpec, ShardManifest

_SHARD = 4096
_LAYER = 1


def clustered(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """(n, d) float32 around 64 centres, as real activations lie, with uneven norms."""
    centres = rng.standard_normal((64, d), dtype=np.float32)
    rows = centres[rng.integers(0, 64, n)] + rng.standard_normal((n, d), dtype=np.float32)
    return rows * np.exp(0.3 * rng.standard_normal((n, 1), dtype=np.float32))


def publish(storage: Storage, registry: Registry, n: int, d: int) -> None:
    """A model record, a dataset, a concept and an index of n rows, in storage and registered."""
    rng = np.random.default_rng(0)
    at, fingerprint = codec.now(), "synthetic"
    model = ModelRecord("synthetic", "", fingerprint, "", None, "none", 2, d, 512, None, fingerprint, (), at)
    registry.add(MODELS, model.id, model)
    lines = "".join(
        json.dumps({"text": f"example {i}: " + "words of a typical example " * 4}) + "\n" for i in range(n)
    )
    path = Path(storage.root) / "lines.jsonl"
    path.write_text(lines)
    with path.open("rb") as file:
        parsed = datasets.parse(
            file, "lines.jsonl", quarantine_malformed=False, max_bytes=1 << 40, max_line_bytes=1 << 20
        )
    dataset = datasets.publish(storage, "synthetic", parsed)
    registry.add(DATASETS, dataset.id, dataset)
    spec = PassSpec(
        model_fingerprint=fingerprint,
        tokenizer_fingerprint="",
        activation=ActivationSpec((_LAYER,), Pooling.RESPONSE_MEAN),
        gradient=None,
        objective=None,
        max_length=512,
        long_examples=LongExamples.TRUNCATE_RIGHT,
        token_budget=8192,
        dtype="float32",
    )
    manifests = _publish_shards(storage, dataset, spec, list(parsed.examples), clustered(n, d, rng))
    info = ArrayInfo(IndexKind.ACTIVATION, _LAYER, d)
    counts = Counts(lines=n, indexed=n, duplicates=0, quarantined=0, truncated=0)
    manifest = IndexManifest(
        "synthetic", 1, model.id, fingerprint, fingerprint, dataset.id, dataset.fingerprint, None, spec,
        (Point(model.id, model.path, fingerprint),), None,
        (Section((info,), tuple(shards.reference(item) for item in manifests)),), counts, {},
    )  # fmt: skip
    indexes.publish(storage, registry, indexes.describe(manifest, job="benchmark"), manifest, {})
    direction = rng.standard_normal(d).astype(np.float32)
    tensor = concepts.to_safetensors(direction / np.float32(np.linalg.norm(direction)))
    concept = ConceptRecord(
        "synthetic", model.id, fingerprint, fingerprint, _LAYER, Pooling.RESPONSE_MEAN, d, "random", 1.0, 1.0, 0, 0,
        {}, sha256_bytes(tensor), at,
    )  # fmt: skip
    concepts.publish(storage, registry, concept, tensor)


def _publish_shards(
    storage: Storage, dataset: DatasetRecord, spec: PassSpec, ids: list[str], rows: np.ndarray
) -> list[ShardManifest]:
    return [
        shards.publish(
            storage,
            task,
            ids=[ids[row] for row in task.rows],
            arrays={ArrayInfo(IndexKind.ACTIVATION, _LAYER, rows.shape[1]): rows[list(task.rows)]},
            encoding=shards.HALF,
            versions={},
        )
        for task in shards.cut(Location("", ""), spec, dataset, ids, range(len(ids)), _SHARD)
    ]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("-n", type=int, default=100_000, help="examples in the index")
    options.add_argument("-d", type=int, default=512, help="width of the model")
    options.add_argument("-k", type=int, default=100, help="hits asked for")
    options.add_argument("--queries", type=int, default=200, help="queries timed")
    options.add_argument("--url", help="ask a running server instead of a synthetic index of its own")
    options.add_argument("--index", default="synthetic", help="with --url: the index to ask")
    options.add_argument("--concept", default="synthetic", help="with --url: the concept to ask for")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.n, chosen.d, chosen.queries = 2_000, 64, 20
    report = Report()
    question = {"index": chosen.index, "concept": chosen.concept, "k": chosen.k}
    if chosen.url:
        with Client(chosen.url) as client:
            known = client.ask(**question)
        chosen.n, chosen.d = known.rows, known.dims
        times = _ask(chosen.url, question, chosen.queries, chosen.n * chosen.d)
    else:
        times = _synthetic(chosen.n, chosen.d, question, chosen.queries)
    http_ms, search_ms, read_ms = times
    report.add("n", chosen.n)
    report.add("d", chosen.d)
    report.add("http_p50_ms", statistics.median(http_ms), "as the client sees it")
    report.add("http_p99_ms", float(np.quantile(http_ms, 0.99)))
    report.add("search_p50_ms", statistics.median(search_ms), f"top {chosen.k} inside the server")
    report.add(
        "search_vs_read",
        statistics.median(a / b for a, b in zip(search_ms, read_ms, strict=True)),
        "over one thread reading the same bytes",
    )
    report.write(chosen.json)


Times = tuple[list[float], list[float], list[float]]


def _synthetic(n: int, d: int, question: dict[str, Any], queries: int) -> Times:
    """Publish, start redis and api, ask."""
    with TemporaryDirectory() as folder:
        home = Path(folder)
        with Stack(home, host="127.0.0.1", port=free_port(), roots=[], dispatcher=False) as stack:
            stack.wait_ready(say=lambda _: None)
            storage = Storage(str(home / "storage"))
            publish(storage, Registry(connect(stack.redis.url), storage), n, d)
            return _ask(stack.url, question, queries, n * d)


def _ask(url: str, question: dict[str, Any], queries: int, numbers: int) -> Times:
    """Milliseconds per query at the client, of the search, and of reading as many fp16 numbers once."""
    same_bytes = np.ones(max(1, numbers * 2 // 8), dtype=np.uint64)
    http_ms, search_ms, read_ms = [], [], []
    with Client(url) as client:
        for number in range(queries + 5):
            began = time.perf_counter()
            answer = client.query(**question)
            elapsed = 1e3 * (time.perf_counter() - began)
            began = time.perf_counter()
            same_bytes.max()
            read = 1e3 * (time.perf_counter() - began)
            if number < 5:  # the first one loads the index
                continue
            assert isinstance(answer, QueryOut)
            http_ms.append(elapsed)
            search_ms.append(answer.timing.search_ms)
            read_ms.append(read)
    return http_ms, search_ms, read_ms


if __name__ == "__main__":
    main()
