"""Published indexes: numbers never given twice, versions never changed, every flipped byte noticed."""

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from service import codec, datasets, example_ids, indexes, keys, shards
from service.contracts import (
    ArrayInfo,
    ConceptRecord,
    Counts,
    DatasetRecord,
    Embedding,
    IndexRecord,
    Point,
    Quarantined,
)
from service.errors import Conflict, Damaged, DomainError, Invalid, NotFound
from service.loading import IndexLoader, Rows
from service.matching import Asked, Matched, match
from service.redis_server import EmbeddedRedis, connect
from service.registry import DATASETS, INDEXES, Registry
from service.rows import F32
from service.specs import IndexManifest, Section
from service.storage import Storage
from service.tasks import ShardManifest, Task
from service.terms import ConceptFunction, IndexKind, LongExamples, LossReduction, Method, Pooling
from service.work import ActivationSpec, Location, PassSpec, SumSpec

D = 8
LAYERS = (1, 3)
ARRAYS = tuple(ArrayInfo(IndexKind.ACTIVATION, layer, D) for layer in LAYERS)
EMBEDDED = 3
EMBEDDING = ArrayInfo(
    IndexKind.INFLUENCE, EMBEDDED, D, Embedding("q", "q", Pooling.RESPONSE_MEAN, ConceptFunction.DOT, 1.0, points=2)
)
SPEC = PassSpec(
    model_fingerprint="f",
    tokenizer_fingerprint="t",
    activation=ActivationSpec(LAYERS, Pooling.RESPONSE_MEAN),
    gradient=None,
    objective=None,
    max_length=128,
    long_examples=LongExamples.TRUNCATE_RIGHT,
    token_budget=4096,
    dtype="float32",
)
SOURCE = b"".join(b'{"text": "example %d", "n": %d}\n' % (n, n) for n in range(10)) + b"\n" + b'{"text": ""}\n'


class Shelf:
    """Indexes made by hand: ten examples in shards of four, the last one quarantined by the build."""

    def __init__(self, registry: Registry, storage: Storage) -> None:
        self.registry, self.storage = registry, storage
        self.dataset = registry.find(DATASETS, "d") or self._add_dataset()
        self.ids = datasets.read_table(storage, self.dataset).column("id").to_pylist()

    def _add_dataset(self) -> DatasetRecord:
        parsed = datasets.parse(
            BytesIO(SOURCE), "f.jsonl", quarantine_malformed=False, max_bytes=1 << 20, max_line_bytes=1 << 20
        )
        record = datasets.publish(self.storage, "d", parsed)
        self.registry.add(DATASETS, "d", record)
        return record

    def rows(self, layer: int) -> F32:
        return np.random.default_rng(layer).normal(size=(9, D)).astype(np.float32)

    def shard(self, task: Task) -> ShardManifest:
        if shards.exists(self.storage, task.key):
            return shards.read_manifest(self.storage, task.key)
        rows = [row for row in task.rows if row < 9]
        return shards.publish(
            self.storage,
            task,
            ids=[self.ids[row] for row in rows],
            arrays={info: self.rows(info.layer or 0)[rows] for info in ARRAYS},
            encoding=shards.HALF,
            quarantined=[Quarantined(self.ids[9], "too_long", "Too long.")] if 9 in task.rows else [],
            long=(),
            tokens=10,
            versions={"torch": "x"},
        )

    def shards(self) -> list[ShardManifest]:
        tasks = shards.cut(Location("/m", "/m"), SPEC, self.dataset, self.ids, range(len(self.ids)), 4)
        return [self.shard(task) for task in tasks]

    def section(self) -> Section:
        return Section(ARRAYS, tuple(map(shards.reference, self.shards())))

    def embeddings(self, *, without: int) -> Section:
        """A section of its own for the same examples, but for one that its pass has set aside."""
        found = []
        for number, manifest in enumerate(self.shards()):
            rows = [row for row, item in enumerate(manifest.ids) if item != self.ids[without]]
            told = Quarantined(self.ids[without], "zero_gradient", "Zero.")
            task = shards.derived(SumSpec(((manifest.key, 1.0),), (EMBEDDING,)), f"shard {number}")
            found.append(
                shards.publish(
                    self.storage,
                    task,
                    ids=[manifest.ids[row] for row in rows],
                    arrays={EMBEDDING: self.rows(EMBEDDED)[[self.ids.index(manifest.ids[row]) for row in rows]]},
                    encoding=shards.INT8,
                    quarantined=[told] if self.ids[without] in manifest.ids else [],
                    versions={"torch": "x"},
                )
            )
        return Section((EMBEDDING,), tuple(map(shards.reference, found)))

    def publish(
        self,
        name: str,
        version: int,
        *,
        created_at: str = "now",
        model: str = "m",
        sections: tuple[Section, ...] | None = None,
        **about: object,
    ) -> IndexRecord:
        sections = sections or (self.section(),)
        shared = {
            "name": name,
            "version": version,
            "model": model,
            "model_fingerprint": "f",
            "lineage": "f",
            "dataset": "d",
            "dataset_fingerprint": self.dataset.fingerprint,
            "points": (Point(model, "/m", "f"),),
            "counts": Counts(12, 9, 0, 3, 0),
            "quarantine_reasons": {"blank_line": 1, "empty_text": 1, "too_long": 1},
        } | about
        record = IndexRecord(
            **shared,
            arrays=tuple(array for section in sections for array in section.arrays),
            pooling=Pooling.RESPONSE_MEAN,
            loss_reduction=LossReduction.MEAN,
            bytes=1,
            job="job-1",
            created_at=created_at,
        )
        manifest = IndexManifest(**shared, chat_template_sha256=None, spec=SPEC, curvature=None, sections=sections)
        indexes.publish(self.storage, self.registry, record, manifest, {"created_at": created_at})
        return self.registry.get(INDEXES, record.id)

    def loader(self) -> IndexLoader:
        return IndexLoader(self.registry, self.storage, threads=2)

    def path(self, pattern: str) -> Path:
        return sorted(Path(self.storage.root).glob(pattern))[0]


@pytest.fixture(scope="module")
def made(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the dataset and its shards, to be copied: making it costs dozens of fsyncs."""
    folder, client = tmp_path_factory.mktemp("made"), connect(redis_server.url)
    storage = Storage(str(folder))
    Shelf(Registry(client, storage), storage).shards()
    client.close()
    return folder


@pytest.fixture
def shelf(made: Path, registry: Registry, storage: Storage) -> Shelf:
    shutil.copytree(made, storage.root, dirs_exist_ok=True)
    return Shelf(registry, storage)


def flip(path: Path, position: float = 0.5, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= bit
    path.write_bytes(data)


# --- versions -----------------------------------------------------------------------------------------


def test_versions_count_from_one_for_each_name(registry: Registry, redis: Redis) -> None:
    assert [indexes.next_version(redis, registry, "a") for _ in range(3)] == [1, 2, 3]
    assert indexes.next_version(redis, registry, "b") == 1


@pytest.mark.parametrize("lost", ["nothing", "counter", "everything", "counter is an old one"])
def test_the_next_version_lies_above_all_published(
    shelf: Shelf, registry: Registry, redis: Redis, lost: str
) -> None:
    for version in (1, 2, 11):
        shelf.publish("a", version)
    shelf.publish("ab", 40)
    if lost == "counter":
        redis.delete(keys.index_versions("a"))
    if lost == "everything":
        redis.flushall()
    if lost == "counter is an old one":  # Redis was restored from a backup
        redis.set(keys.index_versions("a"), 1)
    assert indexes.next_version(redis, registry, "a") == 12
    assert indexes.next_version(redis, registry, "a") == 13


def test_of_many_that_ask_at_once_each_gets_its_own_version(
    redis_server: EmbeddedRedis, shelf: Shelf, storage: Storage
) -> None:
    shelf.publish("a", 7)
    clients = [connect(redis_server.url) for _ in range(4)]
    start = threading.Barrier(len(clients))

    def ask(client: Redis) -> list[int]:
        start.wait()
        return [indexes.next_version(client, Registry(client, storage), "a") for _ in range(5)]

    with ThreadPoolExecutor(len(clients)) as pool:
        given = [number for numbers in pool.map(ask, clients) for number in numbers]
    for client in clients:
        client.close()
    assert sorted(given) == list(range(8, 28))


# --- names --------------------------------------------------------------------------------------------


def test_a_name_is_its_newest_version_and_a_version_itself(shelf: Shelf, registry: Registry) -> None:
    records = {version: shelf.publish("a", version) for version in (10, 2, 9)}
    assert {record.id for record in records.values()} == {"a@v10", "a@v2", "a@v9"}
    shelf.publish("a-b", 11)
    assert indexes.resolve(registry, "a") == records[10]
    assert indexes.resolve(registry, "a@v2") == records[2]
    assert indexes.versions(registry, "a") == [records[version] for version in (2, 9, 10)]


@pytest.mark.parametrize("reference", ["b", "a@v3", "a@", "a@2", "a@v02", "@v1", "a@v1@v1", "../indexes/a@v1", ""])
def test_what_is_not_published_is_not_found(shelf: Shelf, registry: Registry, reference: str) -> None:
    shelf.publish("a", 1)
    with pytest.raises(NotFound, match="Known: a") as missing:
        indexes.resolve(registry, reference)
    assert (missing.value.code, missing.value.param) == ("index_not_found", "index")


def test_after_redis_forgot_everything_names_resolve_again(shelf: Shelf, registry: Registry, redis: Redis) -> None:
    newest = [shelf.publish("a", version) for version in (1, 2)][-1]
    redis.flushall()
    registry.rebuild()
    assert indexes.resolve(registry, "a") == newest


def test_a_name_never_falls_back_to_an_older_version(shelf: Shelf, registry: Registry, redis: Redis) -> None:
    for version in (1, 2):
        shelf.publish("a", version)
    redis.flushall()
    indexes.resolve(registry, "a@v1")  # somebody asks for the old one first, and Redis knows that one again
    assert indexes.resolve(registry, "a").version == 2


# --- publishing ---------------------------------------------------------------------------------------


def test_publishing_the_same_again_keeps_the_first_record(shelf: Shelf, registry: Registry) -> None:
    first = shelf.publish("a", 1, created_at="first")
    shelf.publish("a", 1, created_at="second")
    assert registry.all(INDEXES) == [first]


def test_a_published_version_is_never_replaced(shelf: Shelf, registry: Registry, storage: Storage) -> None:
    record = shelf.publish("a", 1)
    before = indexes.read_manifest(storage, record)
    with pytest.raises(Conflict):
        shelf.publish("a", 1, model="other")
    assert indexes.read_manifest(storage, record) == before
    assert registry.all(INDEXES) == [record]


@pytest.mark.parametrize(
    "about",
    [
        {"counts": Counts(12, 8, 0, 3, 0)},
        {"counts": Counts(13, 9, 0, 3, 0)},
        {"counts": Counts(12, 9, 1, 3, 0)},
        {"counts": Counts(12, 9, 0, 3, 0), "quarantine_reasons": {"blank_line": 1, "empty_text": 1}},
        {"counts": Counts(12, 8, 0, 4, 0)},
    ],
)
def test_a_version_that_loses_a_line_is_not_published(shelf: Shelf, registry: Registry, about: dict) -> None:
    with pytest.raises(DomainError) as refused:
        shelf.publish("a", 1, **about)
    assert refused.value.code == "lines_unaccounted"
    assert registry.all(INDEXES) == []
    assert not shelf.storage.exists("indexes/a@v1/manifest.json")


def test_the_manifest_is_decided_by_the_inputs_alone(shelf: Shelf) -> None:
    shelf.publish("a", 1, created_at="monday")
    first = shelf.path("indexes/a@v1/manifest.json").read_bytes()
    for folder in ("indexes", "shards"):
        shutil.rmtree(Path(shelf.storage.root) / folder)
    shelf.publish("a", 1, created_at="tuesday")
    assert shelf.path("indexes/a@v1/manifest.json").read_bytes() == first


def test_every_line_of_the_source_that_is_not_indexed_is_told_with_its_place(shelf: Shelf) -> None:
    record = shelf.publish("a", 1)
    aside = indexes.quarantined(shelf.storage, shelf.registry, record)
    assert [(item.reason, item.places[0].line) for item in aside] == [
        ("blank_line", 11),
        ("empty_text", 12),
        ("too_long", 10),
    ]
    assert len(aside) == record.counts.lines - record.counts.indexed - record.counts.duplicates


# --- loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_the_rows_of_all_shards_are_searched_under_their_ids(shelf: Shelf, layer: int) -> None:
    record, vectors = shelf.publish("a", 1), shelf.rows(layer)
    rows = shelf.loader().rows(record, ArrayInfo(IndexKind.ACTIVATION, layer, D))
    assert [item.decode() for item in rows.ids] == shelf.ids[:9]
    assert (rows.index.n, rows.index.d) == vectors.shape
    query = np.random.default_rng(9).normal(size=D).astype(np.float32)
    top = rows.index.search(query, 9)
    assert top.rows.tolist() == np.argsort(-(vectors @ query)).tolist()
    assert top.scores == pytest.approx(np.sort(vectors @ query)[::-1], abs=1e-2)


def asked(method: Method, layer: int = 1) -> Asked:
    at = "2026-01-01"
    pooled = Pooling.RESPONSE_MEAN
    concept = ConceptRecord("c", "m", "f", "f", layer, pooled, D, "by hand", 1.0, 1.0, 5, 5, {}, "sha256", at)
    v = np.eye(D, dtype=np.float32)[0]
    return Asked(method, concept, v, None, ConceptFunction.DOT, damping=None, through=None)


def matched(shelf: Shelf, record: IndexRecord, question: Asked) -> Matched:
    manifest = indexes.read_manifest(shelf.storage, record)
    found = match(shelf.storage, record, manifest, question, shard_size=4)
    assert isinstance(found, Matched)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_concept_is_matched_with_the_rows_of_its_layer(shelf: Shelf, layer: int) -> None:
    found = matched(shelf, shelf.publish("a", 1), asked(Method.VECTOR_FILTER, layer))
    assert found.array == ArrayInfo(IndexKind.ACTIVATION, layer, D)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_layer_that_is_not_indexed_is_refused_with_those_that_are(shelf: Shelf, layer: int) -> None:
    record = shelf.publish("a", 1)
    with pytest.raises(Invalid, match="it has layers 1, 3") as refused:
        matched(shelf, record, asked(Method.VECTOR_FILTER, layer))
    assert (refused.value.code, refused.value.param) == ("layer_not_indexed", "concept")
    assert refused.value.context == {"layers": [1, 3]}


def test_a_kind_that_is_not_indexed_is_refused(shelf: Shelf) -> None:
    with pytest.raises(Invalid) as refused:
        matched(shelf, shelf.publish("a", 1), asked(Method.CONCEPT_INFLUENCE))
    assert (refused.value.code, refused.value.param) == ("kind_not_indexed", "method")


@pytest.mark.parametrize("array", [ARRAYS[0], ARRAYS[1], EMBEDDING])
def test_an_example_that_one_section_lacks_is_in_none(shelf: Shelf, array: ArrayInfo) -> None:
    record = shelf.publish("a", 1, sections=(shelf.section(), shelf.embeddings(without=5)))
    rows = shelf.loader().rows(record, array)
    kept = [row for row in range(9) if row != 5]
    assert [item.decode() for item in rows.ids] == [shelf.ids[row] for row in kept]
    query = np.random.default_rng(9).normal(size=D).astype(np.float32)
    vectors = shelf.rows(array.layer or 0)[kept]
    top = rows.index.search(query, 9)
    assert top.rows.tolist() == np.argsort(-(vectors @ query)).tolist()
    assert top.scores == pytest.approx(np.sort(vectors @ query)[::-1], abs=5e-2)


def test_what_any_section_has_set_aside_is_told_once(shelf: Shelf) -> None:
    record = shelf.publish("a", 1, sections=(shelf.section(), shelf.embeddings(without=5)))
    aside = indexes.quarantined(shelf.storage, shelf.registry, record)
    assert [(item.reason, item.places[0].line) for item in aside] == [
        ("blank_line", 11),
        ("empty_text", 12),
        ("too_long", 10),
        ("zero_gradient", 6),
    ]


FILES = {
    "rows": "shards/*/*/00.activation.l1.npy",
    "exponents": "shards/*/*/00.activation.l1.scale.npy",
    "shard manifest": "shards/*/*/shard.json",
    "index manifest": "indexes/a@v1/manifest.json",
}


@pytest.mark.parametrize("position", [0.0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_one_flipped_byte_is_damage_until_it_is_mended(shelf: Shelf, file: str, position: float) -> None:
    record, loader = shelf.publish("a", 1), shelf.loader()
    path = shelf.path(FILES[file])
    flip(path, position)
    for _ in range(2):
        with pytest.raises(Damaged):
            loader.rows(record, ARRAYS[0])
    flip(path, position)
    assert loader.rows(record, ARRAYS[0]).index.n == 9


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_told_by_name(shelf: Shelf, file: str) -> None:
    record = shelf.publish("a", 1)
    path = shelf.path(FILES[file])
    path.unlink()
    with pytest.raises(Damaged, match=path.name):
        shelf.loader().rows(record, ARRAYS[0])


def test_a_shard_of_another_shape_is_damage(shelf: Shelf) -> None:
    # A manifest that is consistent with its files, but not with what it says of them.
    record = shelf.publish("a", 1)
    manifest = indexes.read_manifest(shelf.storage, record)
    shard = shards.read_manifest(shelf.storage, manifest.sections[0].shards[0].key)
    short = dataclasses.replace(shard, ids=shard.ids[:-1])
    with pytest.raises(Damaged):
        shards.read_packed(shelf.storage, short, ARRAYS[0])
    with pytest.raises(Damaged):
        shards.read_manifest(shelf.storage, shard.key, sha256=shards.reference(short).sha256)


def test_a_loaded_index_answers_without_its_files(shelf: Shelf) -> None:
    record, loader = shelf.publish("a", 1), shelf.loader()
    first = loader.rows(record, ARRAYS[0])
    shutil.rmtree(Path(shelf.storage.root) / "shards")
    assert loader.rows(record, ARRAYS[0]) is first


def test_those_who_ask_at_once_get_the_same_rows(shelf: Shelf) -> None:
    record, loader, start = shelf.publish("a", 1), shelf.loader(), threading.Barrier(4)

    def ask(_: int) -> Rows:
        start.wait()
        return loader.rows(record, ARRAYS[0])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert all(rows is found[0] for rows in found)


def test_examples_come_back_in_the_order_asked_for(shelf: Shelf) -> None:
    ids = shelf.ids
    wanted = [ids[7], ids[0], ids[9], ids[0]]
    table = shelf.loader().examples(shelf.publish("a", 1))
    examples = table.take(table.positions(example_ids.of(wanted)))
    assert [example.id for example in examples] == wanted
    assert [example.metadata["n"] for example in examples] == [7, 0, 9, 0]


def test_a_reference_names_the_bytes_of_the_manifest(shelf: Shelf) -> None:
    record = shelf.publish("a", 1)
    (section,) = indexes.read_manifest(shelf.storage, record).sections
    for reference in section.shards:
        manifest = shards.read_manifest(shelf.storage, reference.key, sha256=reference.sha256)
        assert (manifest.key, len(manifest.ids)) == (reference.key, reference.rows)
        assert codec.decode(type(manifest), codec.encode(manifest)) == manifest
