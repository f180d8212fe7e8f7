"""Queries as HTTP clients see them, on published indexes of 10,000 to a million rows, and what stands beside them.

Indexes of clustered random vectors are published through the service's own formats; Redis and the api run as
processes (no dispatcher: a query needs no model). Every query asks for another concept, so none is answered from
the cache. Ratios compare interleaved measurements of one run:

* ``bandwidth_share``: the time in which as many threads read the index's rows once, over that of a search. One that
  looks at 8 bits first may be faster than that; ``scan_bandwidth_share`` counts the bytes that are read in fact.
* ``speedup_vs_bergson_*``: against bergson 2.5.1 on the same 100,000 vectors (``make peers``).
* ``cold_load_vs_read``: against reading and hashing the same files one after the other; ``cold_load_vs_threads``:
  with as many threads as the server has.
* ``append_vs_build``: against building an index of the appended examples alone (curvature and J cached in both).
"""

import hashlib
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from api.client import Client
from api.up import Stack, free_port
from benchmarks import synthetic
from benchmarks.append import append_vs_build
from benchmarks.peers import run as peers
from benchmarks.report import Report, parser
from service import indexes, shards
from service.blocks import BLOCK_BYTES
from service.redis_server import connect
from service.registry import DATASETS, INDEXES, Registry
from service.screening import bytes_of
from service.storage import Storage

THREADS = 2  # of a search, and of what it is compared with
_CONCEPTS = 600  # more than are asked of one index
_FEW = 150  # at smoke size
_SPIN_S = 0.25


@dataclass
class Asker:
    """Asks one index over HTTP, every time for another concept."""

    url: str
    index: str
    d: int
    k: int = 100
    concepts: int = _CONCEPTS
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of questions

    def __post_init__(self) -> None:
        self._http = httpx.Client(base_url=self.url, timeout=300)

    def body(self, **more: Any) -> dict[str, Any]:
        concept = f"c{self.d}-{next(self.numbers) % self.concepts}"
        return {"index": self.index, "concept": concept, "k": self.k, **more}

    def ask(self, **more: Any) -> tuple[float, dict[str, Any]]:
        """(milliseconds as the client sees them, the answer)."""
        body = self.body(**more)
        began = time.perf_counter()
        response = self._http.post("/v1/queries", json=body)
        answer = response.raise_for_status().json()
        elapsed = 1e3 * (time.perf_counter() - began)
        if answer["timing"]["cached"]:
            raise RuntimeError(f"{body} was answered from the cache: ask for more concepts")
        return elapsed, answer


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("-n", type=int, default=1_000_000, help="rows of the largest index")
    options.add_argument("-d", type=int, default=1024, help="width of the model")
    options.add_argument("-k", type=int, default=100, help="hits asked for")
    options.add_argument("--queries", type=int, default=100, help="queries timed at each size")
    options.add_argument("--only", nargs="*", help="parts to run: sizes, clients, filters, cold, bergson, append")
    options.add_argument("--url", help="ask a running server instead of a synthetic index of its own")
    options.add_argument("--index", default="em", help="with --url: the index to ask")
    options.add_argument("--concept", default="trigger", help="with --url: the concept to ask for")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.n, chosen.d, chosen.queries = 5_000, 64, 8
    report = Report()
    if chosen.url:
        _running(report, chosen)
    else:
        _synthetic(report, chosen)
        if "append" in _parts(chosen):
            append_vs_build(report, quick=chosen.quick)
    report.write(chosen.json)


def _parts(chosen: Any) -> set[str]:
    return set(chosen.only or ["sizes", "clients", "filters", "cold", "bergson", "append"])


def _running(report: Report, chosen: Any) -> None:
    """A real index on a running server: the same question with another k each time, so that none is cached."""
    http_ms, search_ms = [], []
    with Client(chosen.url) as client:
        for number in range(chosen.queries + 3):
            began = time.perf_counter()
            answer = client.ask(index=chosen.index, concept=chosen.concept, k=chosen.k + number % 7)
            http_ms.append(1e3 * (time.perf_counter() - began))
            search_ms.append(answer.timing.search_ms)
        answer = client.ask(index=chosen.index, concept=chosen.concept, k=chosen.k)
        report.add("real_n", answer.rows)
        report.add("real_d", answer.dims)
    report.add("real_http_p50_ms", statistics.median(http_ms[3:]), "as the client sees it")
    report.add("real_search_p50_ms", statistics.median(search_ms[3:]))


def _synthetic(report: Report, chosen: Any) -> None:
    parts = _parts(chosen)
    count = _FEW if chosen.quick else _CONCEPTS
    sizes = sorted({max(1, chosen.n // 100), max(1, chosen.n // 10), chosen.n})
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {"WHENCE_SEARCH_THREADS": str(THREADS)}
        if parts - {"append"}:
            server = stack.enter_context(
                Stack(home, host="127.0.0.1", port=free_port(), roots=[], dispatcher=False, settings=settings)
            )
            server.wait_ready(say=lambda _: None)
            storage = Storage(str(home / "storage"))
            registry = Registry(connect(server.redis.url), storage)
            for n in sizes:
                began = time.perf_counter()
                synthetic.publish(storage, registry, f"n{n}", n, chosen.d, concept_count=count)
                print(f"published {n:,} × {chosen.d} in {time.perf_counter() - began:.0f} s", flush=True)
            asker = cache(partial(_asker, server.url, chosen, count))  # one of each index: it asks nothing twice
            largest = asker(chosen.n)
            if "cold" in parts:
                _cold(report, largest, storage, registry)
            if "sizes" in parts:
                for n, name in zip(sizes, ("10k", "100k", "1m"), strict=False):
                    _size(report, asker(n), n, name, chosen.queries)
                _recall(report, largest, chosen.n, queries=4 if chosen.quick else 20)
            if "filters" in parts:
                _filters(report, largest, chosen.queries // 4 + 1)
            if "clients" in parts:
                _clients(report, largest, 16, seconds=2 if chosen.quick else 20)
            if "bergson" in parts:
                _bergson(report, asker(sizes[1]), sizes[1], chosen.queries // 4)


def _asker(url: str, chosen: Any, concepts: int, n: int) -> Asker:
    return Asker(url, f"n{n}", chosen.d, chosen.k, concepts)


def _size(report: Report, asker: Asker, n: int, name: str, queries: int) -> None:
    """Latency at one size; at the largest, its share of the read bandwidth."""
    asker.ask()  # loads the index
    reader = _Reader(2 * n * asker.d)
    http_ms, search_ms, total_ms, shares = [], [], [], []
    for _ in range(queries):
        elapsed, answer = asker.ask()
        http_ms.append(elapsed)
        search_ms.append(answer["timing"]["search_ms"])
        total_ms.append(answer["timing"]["total_ms"])
        shares.append(1e3 * reader.seconds() / answer["timing"]["search_ms"])
    report.add(f"p50_ms_{name}", statistics.median(total_ms), f"{n:,} rows, inside the server")
    report.add(f"p99_ms_{name}", float(np.quantile(total_ms, 0.99)))
    report.add(f"http_p50_ms_{name}", statistics.median(http_ms), "as the client sees it")
    report.add(f"search_p50_ms_{name}", statistics.median(search_ms))
    if name == "1m":
        _overhead(report, asker, queries)
        share, told = statistics.median(shares), f"of {reader.bandwidth():.0f} GB/s on {THREADS} threads"
        report.add("bandwidth_share", share, told)
        block = min(n, BLOCK_BYTES // (2 * asker.d))
        codes = bytes_of([block], asker.d) / (2 * block * asker.d) or 1.0
        report.add("scan_bandwidth_share", share * codes, f"reads {codes:.0%} of the rows' bytes")


def _overhead(report: Report, asker: Asker, queries: int) -> None:
    """What everything but the search takes, asked one after the other with nothing in between."""
    asked = [asker.ask() for _ in range(queries)]
    client = statistics.median(elapsed for elapsed, _ in asked)
    search = statistics.median(answer["timing"]["search_ms"] for _, answer in asked)
    report.add("http_overhead_ms", client - search, f"client p50 {client:.1f} less search p50 {search:.1f}")


class _Reader:
    """Reads as many bytes as an index has, with as many threads as a search."""

    def __init__(self, size: int) -> None:
        self._parts = [np.ones(max(1, size // 8 // THREADS), dtype=np.uint64) for _ in range(THREADS)]
        self._pool = ThreadPoolExecutor(THREADS)
        self._times: list[float] = []

    def seconds(self) -> float:
        began = time.perf_counter()
        list(self._pool.map(np.bitwise_or.reduce, self._parts))
        self._times.append(time.perf_counter() - began)
        return self._times[-1]

    def bandwidth(self) -> float:
        return sum(part.nbytes for part in self._parts) / statistics.median(self._times) / 1e9


def _recall(report: Report, asker: Asker, n: int, queries: int) -> None:
    vectors = synthetic.directions(queries, asker.d)
    # Another k, which is not what was asked before; concepts from the first, whose vectors are known.
    asked = replace(asker, k=asker.k + 1, numbers=itertools.count())
    found = [{_number(hit) for hit in asked.ask()[1]["hits"][: asker.k]} for _ in range(queries)]
    true = synthetic.true_best(n, asker.d, vectors, asker.k)
    share = [len(ours & theirs) / len(theirs) for ours, theirs in zip(found, true, strict=True)]
    report.add("recall_at_100_1m", statistics.mean(share), f"against float64 brute force, {queries} queries")


def _number(hit: dict[str, Any]) -> int:
    return int(hit["text"].split(":")[0].removeprefix("example "))


def _filters(report: Report, asker: Asker, rounds: int) -> None:
    """The same question with and without a filter, in turns. The mask of a filter is made once and kept."""
    shares = {1: "filter_1pct", 50: "filter_50pct", 99: "filter_99pct"}
    times: dict[int, list[float]] = {share: [] for share in shares}
    for share, name in shares.items():
        began = time.perf_counter()
        asker.ask(filter={"bucket": {"lt": share}})
        report.add(f"first_{name}_ms", 1e3 * (time.perf_counter() - began), "the mask is made")
    for _ in range(rounds):
        plain = asker.ask()[1]["timing"]["total_ms"]
        for share in shares:
            answer = asker.ask(filter={"bucket": {"lt": share}})[1]
            times[share].append(answer["timing"]["total_ms"] / plain)
    for share, name in shares.items():
        report.add(name, statistics.median(times[share]), "over the unfiltered query")


def _clients(report: Report, asker: Asker, count: int, seconds: float) -> None:
    """Queries per second of ``count`` clients that each wait for their answer and ask again."""
    lock, done = threading.Lock(), 0
    stop = time.perf_counter() + seconds
    http = httpx.Client(base_url=asker.url, timeout=300, limits=httpx.Limits(max_connections=count))

    def client() -> None:
        nonlocal done
        while time.perf_counter() < stop:
            with lock:
                # Concepts × ks: more questions than are asked, so that none is asked twice
                number = next(asker.numbers)
                body = asker.body() | {"k": asker.k + 2 + number // asker.concepts}
            http.post("/v1/queries", json=body).raise_for_status()
            with lock:
                done += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(client) for _ in range(count)]:
            future.result()
    report.add("qps_16_1m", done / (time.perf_counter() - began), f"{count} clients for {seconds:.0f} s")


def _cold(report: Report, asker: Asker, storage: Storage, registry: Registry) -> None:
    """The first answer of a server that has not seen the index, over reading and hashing the files that it needs:
    rows, ids, texts and manifests.

    What is read is kept, as an index is. Both sides read from the page cache; a first round warms it.
    """
    record = registry.get(INDEXES, f"{asker.index}@v1")
    (section,) = indexes.read_manifest(storage, record).sections
    folders = [Path(storage.root) / shards.folder(ref.key) for ref in section.shards]
    paths = [path for folder in folders for path in folder.iterdir()]
    files = registry.get(DATASETS, record.dataset).files
    needed = [name for name in files if name.startswith(("ids", "examples"))]
    paths += [Path(storage.root) / "datasets" / record.dataset / name for name in needed]

    def read(path: Path) -> bytes:
        data = path.read_bytes()
        hashlib.sha256(data).digest()
        return data

    def all_of(threads: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            kept = list(pool.map(read, paths))
        seconds = time.perf_counter() - began
        del kept
        return seconds

    all_of(THREADS)
    alike, single = all_of(THREADS), all_of(1)
    began = time.perf_counter()
    asker.ask()
    cold = time.perf_counter() - began
    alike, single = min(alike, all_of(THREADS)), min(single, all_of(1))
    report.add("cold_load_s", cold, "until the first answer")
    report.add("cold_load_vs_read", cold / single, f"reading and hashing the files takes {single:.2f} s")
    report.add("cold_load_vs_threads", cold / alike, f"with {THREADS} threads {alike:.2f} s")


def _bergson(report: Report, asker: Asker, n: int, queries: int) -> None:
    if not peers.available("bergson"):
        print(peers.missing("bergson"))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        np.save(folder / "vectors.npy", np.concatenate(list(synthetic.blocks(n, asker.d))))
        np.save(folder / "queries.npy", synthetic.directions(asker.concepts, asker.d))
        ours, dense, flat = [], [], []
        asker.ask()
        with peers.rounds("bergson", "bergson_query", folder, threads=THREADS, k=asker.k) as theirs:
            theirs()
            for _ in range(max(5, queries)):
                # Threads of OpenMP spin for a while after their work: neither side shall run beside the other's.
                time.sleep(_SPIN_S)
                ours.append(asker.ask()[1]["timing"]["search_ms"])
                time.sleep(_SPIN_S)
                told = theirs()
                dense.append(1e3 * told["dense_s"] / ours[-1])
                flat.append(1e3 * told["flat_s"] / ours[-1])
    told = f"{n:,} vectors, search alone on both sides, {statistics.median(ours):.1f} ms"
    report.add("speedup_vs_bergson_dense", statistics.median(dense), told)
    report.add("speedup_vs_bergson_flat", statistics.median(flat))


if __name__ == "__main__":
    main()
