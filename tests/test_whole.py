"""Whole rankings of published indexes, over HTTP: all scores as a file, groups, two rankings side by side."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from scipy import stats
from typer.testing import CliRunner

from api.cli import app as cli
from api.client import Client, WhenceError
from api.main import create_app
from api.schemas_rankings import CompareOut, GroupsOut
from api.up import free_port
from service import artifacts, concepts, datasets, indexes, ranking_file, shards
from service.contracts import ArrayInfo, ConceptRecord, DatasetRecord, IndexRecord, JobRecord, ModelRecord
from service.errors import Invalid
from service.feature_groups import FeatureGroups
from service.groups import GroupBy, Groups, Shown
from service.jobs import Jobs
from service.queries import QueryService
from service.questions import Query
from service.redis_server import EmbeddedRedis, connect
from service.registry import DATASETS, MODELS, Registry
from service.rows import F32
from service.sae_features import FeaturesService
from service.settings import Settings
from service.specs import Section
from service.storage import Storage, sha256_bytes
from service.terms import GroupSort, IndexKind, Method, Order, Pooling
from service.whole import Scored, WholeRankings
from service.work import GradientSpec, SumSpec, Tracked
from tests import test_indexes
from tests.test_indexes import ARRAYS, EMBEDDED, Shelf

D = test_indexes.D
TOPICS = ["tea", "tea", "sea", None, "tea", 7, "sea", "absent", "7", "tea"]
GRADIENT = ArrayInfo(IndexKind.GRADIENT, None, D)


def line(number: int) -> bytes:
    about: dict[str, Any] = {"text": f"example {number}", "n": number}
    if TOPICS[number] != "absent":
        about["topic"] = TOPICS[number]
    return json.dumps(about).encode() + b"\n"


SOURCE = b"".join(map(line, range(10))) + line(2) + b'{"text": ""}\n'  # the third one stands there twice


class Topics(Shelf):
    """The shelf's index of nine examples with topics, its model and three concepts."""

    def __init__(self, registry: Registry, storage: Storage) -> None:
        super().__init__(registry, storage)
        if registry.find(MODELS, "m") is None:
            self._add_model()

    def _add_dataset(self) -> DatasetRecord:
        parsed = datasets.parse(
            BytesIO(SOURCE), "f.jsonl", quarantine_malformed=False, max_bytes=1 << 20, max_line_bytes=1 << 20
        )
        for name in ("d", "q"):
            record = datasets.publish(self.storage, name, parsed)
            self.registry.add(DATASETS, name, record)
        return self.registry.get(DATASETS, "d")

    def _add_model(self) -> None:
        model = ModelRecord("m", "/m", "f", "t", None, "A", 4, D, 128, None, "f", (), "now")
        self.registry.add(MODELS, "m", model)
        self.add_concept("x", 1)
        self.add_concept("y", 1)
        self.add_concept("z", EMBEDDED)

    def add_concept(self, name: str, layer: int, *, like: str = "") -> None:
        tensor = concepts.to_safetensors(self.vector(like or name))
        record = ConceptRecord(
            *(name, "m", "f", "f", layer, Pooling.RESPONSE_MEAN, D, "by hand", 1.0, 0.9, 50, 50, {}),
            *(sha256_bytes(tensor), "now"),
        )
        concepts.publish(self.storage, self.registry, record, tensor)

    def vector(self, concept: str) -> F32:
        vector = np.random.default_rng(ord(concept)).normal(size=D)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def exact(self, concept: str, layer: int) -> np.ndarray:
        """Scores of the nine, by a product in float64 of rows as they are stored."""
        rows = np.float64(np.float16(self.rows(layer)))
        return rows @ self.vector(concept).astype(np.float64)

    def publish_with_gradients(self, monkeypatch: pytest.MonkeyPatch, name: str) -> IndexRecord:
        """An index that needs a job to answer influence functions."""
        found = []
        for number, manifest in enumerate(self.shards()):
            rows = [self.ids.index(item) for item in manifest.ids]
            task = shards.derived(SumSpec(((manifest.key, 1.0),), (GRADIENT,)), f"shard {number}")
            found.append(
                shards.publish(
                    self.storage,
                    task,
                    ids=manifest.ids,
                    arrays={GRADIENT: self.rows(7)[rows]},
                    encoding=shards.HALF,
                    versions={"torch": "x"},
                )
            )
        gradient = GradientSpec(Tracked(2))
        monkeypatch.setattr(test_indexes, "SPEC", replace(test_indexes.SPEC, gradient=gradient))
        return self.publish(name, 1, sections=(Section((GRADIENT,), tuple(map(shards.reference, found))),))


@pytest.fixture(scope="module")
def made_topics(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with everything but indexes, to be copied."""
    folder, client = tmp_path_factory.mktemp("made"), connect(redis_server.url)
    client.flushall()
    storage = Storage(str(folder))
    shelf = Topics(Registry(client, storage), storage)
    shelf.shards()
    shelf.embeddings(without=5)
    client.close()
    return folder


@pytest.fixture
def shelf(made_topics: Path, registry: Registry, storage: Storage) -> Topics:
    shutil.copytree(made_topics, storage.root, dirs_exist_ok=True)
    return Topics(registry, storage)


@pytest.fixture
def client(shelf: Topics, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Connected to the real application, served over a socket."""
    monkeypatch.setenv("WHENCE_REDIS_URL", redis_server.url)
    port = free_port()
    app = create_app(Settings(storage_url=str(shelf.storage.root)))  # pyright: ignore[reportCallIssue]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with Client(f"http://127.0.0.1:{port}") as connected:
        yield connected
    server.should_exit = True
    thread.join()


@pytest.fixture
def whole(shelf: Topics, registry: Registry, storage: Storage, jobs: Jobs) -> WholeRankings:
    loader = shelf.loader()
    return WholeRankings(QueryService(registry, storage, jobs, loader, shard_size=4), loader)


def grouping(whole: WholeRankings, shelf: Topics) -> Groups:
    jobs = whole._queries._jobs
    features = FeaturesService(shelf.registry, shelf.storage, jobs, whole._loader)
    by_feature = FeatureGroups(shelf.registry, whole._loader, features)
    return Groups(whole, whole._loader, shelf.storage, jobs, by_feature)


def run(client: Client, *arguments: str) -> str:
    """The output of a `whence` command."""
    result = CliRunner().invoke(cli, [*arguments, "--url", client.url], env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def ask(concept: str = "x", order: Order = Order.MOST, **about: Any) -> Query:
    return Query(index="a", concept=concept, method=Method.VECTOR_FILTER, order=order, k=about.pop("k", 3), **about)


def scored(found: Scored | JobRecord) -> Scored:
    assert isinstance(found, Scored)
    return found


# --- all scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(Order))
def test_the_file_holds_every_example_in_the_order_of_its_score(
    client: Client, shelf: Topics, tmp_path: Path, order: Order
) -> None:
    shelf.publish("a", 1)
    path = tmp_path / "all.parquet"
    told: list[int] = []
    assert client.download_scores(path, index="a", concept="x", order=order, on_received=told.append) is None
    assert told[-1] == path.stat().st_size
    exact = shelf.exact("x", 1)
    best = np.argsort({"most": -exact, "least": exact, "absolute": -np.abs(exact)}[order])
    rows = pq.read_table(path).to_pylist()
    assert [row["rank"] for row in rows] == list(range(1, 10))
    assert [row["example_id"] for row in rows] == [shelf.ids[row] for row in best]
    assert [row["score"] for row in rows] == pytest.approx(exact[best], rel=1e-5)
    below = [stats.percentileofscore(exact, score, kind="strict") for score in exact[best]]
    assert [row["percentile"] for row in rows] == pytest.approx(below)
    assert [row["z_score"] for row in rows] == pytest.approx(stats.zscore(exact)[best], rel=1e-5)
    assert [(row["file"], row["line"]) for row in rows] == [("f.jsonl", row + 1) for row in best]
    assert [row["places"] for row in rows] == [2 if row == 2 else 1 for row in best]


def test_a_query_ranks_and_scores_as_the_file_does(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    for order in (Order.MOST, Order.LEAST):
        client.download_scores(tmp_path / "all", index="a", concept="x", order=order)
        rows = pq.read_table(tmp_path / "all").to_pylist()
        answer = client.ask(index="a", concept="x", order=order, k=9)
        assert [hit.example_id for hit in answer.hits] == [row["example_id"] for row in rows]
        assert [hit.score for hit in answer.hits] == pytest.approx([row["score"] for row in rows], rel=1e-5)


def test_the_file_says_what_was_ranked_and_what_stands_behind_it(
    client: Client, shelf: Topics, tmp_path: Path
) -> None:
    shelf.publish("a", 3, sections=(shelf.section(), shelf.embeddings(without=5)))
    path = tmp_path / "all.parquet"
    client.download_scores(path, index="a", concept="z", method="concept_influence", metadata=True)
    facts = {name.decode(): value.decode() for name, value in pq.read_schema(path).metadata.items()}
    assert (facts["whence.index"], facts["whence.method"]) == ("a@v3", "concept_influence")
    assert facts["whence.order"] == "most"
    assert json.loads(facts["whence.concept"])["id"] == "z"
    provenance = json.loads(facts["whence.provenance"])
    assert (provenance["kind"], provenance["layer"], provenance["points"]) == ("influence", EMBEDDED, 2)
    assert json.loads(facts["whence.warnings"]) == []
    rows = pq.read_table(path).to_pylist()
    assert sorted(row["example_id"] for row in rows) == sorted(shelf.ids[row] for row in range(9) if row != 5)
    by_id = {shelf.ids[number]: number for number in range(9)}
    for row in rows:
        number = by_id[row["example_id"]]
        expected = {"n": number} | ({} if TOPICS[number] == "absent" else {"topic": TOPICS[number]})
        assert json.loads(row["metadata"]) == expected


def test_metadata_comes_on_request_only(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    client.download_scores(tmp_path / "all", index="a", concept="x")
    assert "metadata" not in pq.read_schema(tmp_path / "all").names


def test_the_answer_is_a_named_parquet_file(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    response = httpx.post(f"{client.url}/v1/queries/scores", json={"index": "a", "concept": "x"})
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    assert response.headers["content-disposition"] == 'attachment; filename="a@v1-x-vector_filter.parquet"'
    assert response.headers["whence-rows"] == "9"


@pytest.mark.parametrize("size", [1, 2, 4, 9, 100])
def test_row_groups_are_made_one_after_the_other(shelf: Topics, whole: WholeRankings, size: int) -> None:
    shelf.publish("a", 1)
    found = scored(whole.scores(ask()))
    pieces = list(ranking_file.stream(found, {}, metadata=True, row_group=size))
    file = pq.ParquetFile(BytesIO(b"".join(pieces)))
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert sizes == [min(size, 9 - start) for start in range(0, 9, size)]
    assert file.read().column("rank").to_pylist() == list(range(1, 10))
    assert len(pieces) == len(sizes) + 1


def test_a_row_group_is_sent_before_the_next_is_made() -> None:
    schema, begun = pa.schema([("a", pa.int64())]), []

    def batches() -> Iterator[pa.Table]:
        for number in range(3):
            begun.append(number)
            yield pa.table({"a": np.arange(1000) + 1000 * number}, schema=schema)

    pieces = []
    for piece in ranking_file.write(schema, batches()):
        pieces.append(piece)
        assert begun == list(range(min(3, len(pieces))))
        assert len(piece) > 100
    assert pq.read_table(BytesIO(b"".join(pieces))).column("a").to_pylist() == list(range(3000))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"index": "b", "concept": "x"}, 404, "index_not_found"),
        ({"index": "a", "concept": "nobody"}, 404, "concept_not_found"),
        ({"index": "a"}, 422, "concept_needed"),
        ({"index": "a", "concept": "x", "method": "concept_influence"}, 422, "kind_not_indexed"),
        ({"index": "a", "concept": "x", "damping": 1.0}, 422, "damping_not_used"),
        ({"index": "a", "concept": "x", "k": 5}, 422, "invalid_request"),
        ({"index": "a", "concept": "x", "order": "best"}, 422, "invalid_request"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_byte(
    client: Client, shelf: Topics, tmp_path: Path, body: dict[str, Any], status: int, code: str
) -> None:
    shelf.publish("a", 1)
    with pytest.raises(WhenceError) as refused:
        client.download_scores(tmp_path / "all.parquet", **body)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert list(tmp_path.glob("*all*")) == []


def test_a_damaged_file_is_told_and_no_broken_stream(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    test_indexes.flip(shelf.path("shards/*/*/00.activation.l1.npy"))
    with pytest.raises(WhenceError) as refused:
        client.download_scores(tmp_path / "all.parquet", index="a", concept="x")
    assert refused.value.status >= 500
    assert refused.value.code != "not_whence"


def test_a_download_that_breaks_leaves_what_was_there(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    path = tmp_path / "all.parquet"
    path.write_bytes(b"before")

    def break_off(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.download_scores(path, index="a", concept="x", on_received=break_off)
    assert [item.name for item in tmp_path.glob("*all*")] == ["all.parquet"]
    assert path.read_bytes() == b"before"
    assert client.download_scores(path, index="a", concept="x") is None
    assert pq.read_table(path).num_rows == 9


def test_a_stream_that_ends_early_is_an_error_and_no_file(tmp_path: Path) -> None:
    """A server that dies in the middle: the client must not keep half a ranking."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nPAR1\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}") as client,
            pytest.raises(httpx.TransportError),
        ):
            client.download_scores(tmp_path / "all.parquet", index="a", concept="x")
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_rows_that_may_not_be_ranked_are_in_no_ranking(shelf: Topics, whole: WholeRankings) -> None:
    record = shelf.publish("a", 1)
    alive = np.arange(9) % 3 != 0
    whole._loader.rows(record, ARRAYS[0]).alive = alive
    found = scored(whole.scores(ask()))
    exact = shelf.exact("x", 1)[alive]
    assert found.scores == pytest.approx(exact, rel=1e-5)
    rows = pq.read_table(BytesIO(b"".join(ranking_file.stream(found, {}, metadata=False)))).to_pylist()
    kept = np.flatnonzero(alive)
    assert [row["example_id"] for row in rows] == [shelf.ids[kept[row]] for row in np.argsort(-exact)]
    assert [row["z_score"] for row in rows] == pytest.approx(np.sort(stats.zscore(exact))[::-1], rel=1e-5)
    groups = grouping(whole, shelf).run(ask(k=100), GroupBy("n"), Shown(GroupSort.MEAN, 100))
    assert not isinstance(groups, JobRecord)
    assert sorted(each.group.value for each in groups.groups) == kept.tolist()
    assert groups.k == len(kept)


def test_with_nothing_to_rank_the_file_is_empty(shelf: Topics, whole: WholeRankings) -> None:
    record = shelf.publish("a", 1)
    whole._loader.rows(record, ARRAYS[0]).alive = np.zeros(9, dtype=bool)
    found = scored(whole.scores(ask()))
    table = pq.read_table(BytesIO(b"".join(ranking_file.stream(found, {"index": "a@v1"}, metadata=True))))
    assert (table.num_rows, table.schema.metadata[b"whence.index"]) == (0, b"a@v1")
    groups = grouping(whole, shelf).run(ask(), GroupBy("topic"), Shown(GroupSort.MEAN, 5, 3, 3))
    assert not isinstance(groups, JobRecord)
    assert (groups.groups, groups.total) == ((), 0)
    compared = whole.compare(ask(), ask("y"), k=10, movers=10)
    assert not isinstance(compared, JobRecord)
    assert (compared.found.n, compared.only_a, compared.only_b) == (0, 0, 0)


# --- scores that are kept ---------------------------------------------------------------------------------


def test_scores_are_computed_once_for_a_vector(shelf: Topics, whole: WholeRankings) -> None:
    record = shelf.publish("a", 1)
    index, asked = whole._loader.rows(record, ARRAYS[0]).index, []
    compute = index.scores
    index.scores = lambda query: asked.append(query) or compute(query)
    first = scored(whole.scores(ask()))
    for order in Order:
        assert scored(whole.scores(ask(order=order))).scores.tolist() == first.scores.tolist()
    assert len(asked) == 1
    scored(whole.scores(ask("y")))
    assert len(asked) == 2


def test_another_layer_version_or_concept_has_its_own_scores(shelf: Topics, whole: WholeRankings) -> None:
    shelf.publish("a", 1)
    shelf.add_concept("deeper", 3, like="x")
    first, other = scored(whole.scores(ask())), scored(whole.scores(ask("deeper")))
    assert first.scores == pytest.approx(shelf.exact("x", 1), rel=1e-5)
    assert other.scores == pytest.approx(shelf.exact("x", 3), rel=1e-5)
    shelf.publish("a", 2, sections=(shelf.section(), shelf.embeddings(without=5)))
    assert len(scored(whole.scores(ask())).scores) == 8


def test_kept_scores_cannot_be_written_to(shelf: Topics, whole: WholeRankings) -> None:
    shelf.publish("a", 1)
    with pytest.raises(ValueError, match="read-only"):
        scored(whole.scores(ask())).scores[0] = 5


def test_many_that_ask_at_once_are_answered_alike(shelf: Topics, whole: WholeRankings) -> None:
    shelf.publish("a", 1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: scored(whole.scores(ask("xy"[number % 2]))), range(40)))
    for number, one in enumerate(found):
        assert one.scores == pytest.approx(shelf.exact("xy"[number % 2], 1), rel=1e-5)


def test_scores_beyond_float32_are_refused(shelf: Topics, whole: WholeRankings) -> None:
    record = shelf.publish("a", 1)
    index = whole._loader.rows(record, ARRAYS[0]).index
    compute = index.scores
    index.scores = lambda query: compute(query) * np.float32([np.inf, *[1] * 8])
    with pytest.raises(Invalid) as refused:
        whole.scores(ask())
    assert refused.value.code == "scores_overflow"


# --- groups -------------------------------------------------------------------------------------------------


def groups_by_hand(shelf: Topics, order: Order, k: int) -> dict[Any, tuple[int, float, float]]:
    """Value → count, mean, share of the first k; absent and null are one."""
    exact = shelf.exact("x", 1)
    best = np.argsort({"most": -exact, "least": exact, "absolute": -np.abs(exact)}[order])[:k]
    topics = [None if topic == "absent" else topic for topic in TOPICS[:9]]
    found = {}
    for topic in set(topics):
        rows = [row for row in range(9) if topics[row] == topic]
        found[topic] = (len(rows), exact[rows].mean(), len(set(rows) & set(best.tolist())) / k)
    return found


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("sort", list(GroupSort))
def test_groups_are_what_a_loop_over_the_examples_finds(
    client: Client, shelf: Topics, order: Order, sort: GroupSort
) -> None:
    shelf.publish("a", 1)
    answer = client.groups(index="a", concept="x", group_by="topic", k=4, order=order, sort=sort)
    assert isinstance(answer, GroupsOut)
    expected = groups_by_hand(shelf, order, 4)
    assert {group.value for group in answer.groups} == set(expected) == {"tea", "sea", None, 7, "7"}
    for group in answer.groups:
        count, mean, share = expected[group.value]
        assert group.count == count
        assert (group.mean, group.sum) == (pytest.approx(mean, rel=1e-4), pytest.approx(count * mean, rel=1e-4))
        assert (group.share_of_top, group.lift) == (pytest.approx(share), pytest.approx(share * 9 / count))
    figures = [{"mean": group.mean, "sum": group.sum, "share": group.share_of_top}[sort] for group in answer.groups]
    if sort == GroupSort.SHARE or order == Order.MOST:
        assert figures == sorted(figures, reverse=True)
    else:
        assert figures == sorted(figures, key=(lambda x: x) if order == Order.LEAST else (lambda x: -abs(x)))
    assert (answer.total, answer.k, answer.rows, answer.index) == (5, 4, 9, "a@v1")
    assert (answer.provenance.kind, answer.provenance.layer) == ("activation", 1)


def test_only_so_many_groups_are_shown_and_all_are_counted(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    answer = client.groups(index="a", concept="x", group_by="n", limit=2)
    assert isinstance(answer, GroupsOut)
    best = np.argsort(-shelf.exact("x", 1))
    assert [group.value for group in answer.groups] == best[:2].tolist()
    assert (answer.total, answer.k) == (9, 9)  # of the first 100 there are nine


def test_a_field_that_nobody_has_is_refused_with_those_there_are(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    with pytest.raises(WhenceError, match="topic") as refused:
        client.groups(index="a", concept="x", group_by="tpic")
    assert (refused.value.status, refused.value.param) == (422, "group_by")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"limit": 0}, {"sort": "size"}, {"metadata": True}])
def test_groups_refuse_what_makes_no_sense(client: Client, shelf: Topics, wrong: dict[str, Any]) -> None:
    shelf.publish("a", 1)
    with pytest.raises(WhenceError) as refused:
        client.groups(index="a", concept="x", group_by="topic", **wrong)
    assert (refused.value.status, refused.value.param) == (422, *wrong)


# --- two rankings -----------------------------------------------------------------------------------------


def compare(client: Client, a: dict[str, Any], b: dict[str, Any], **about: Any) -> CompareOut:
    answer = client.compare({"index": "a", "concept": "x"} | a, {"index": "a", "concept": "x"} | b, **about)
    assert isinstance(answer, CompareOut)
    return answer


def test_two_concepts_are_compared_as_scipy_would(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    answer = compare(client, {}, {"concept": "y"}, k=4, movers=3)
    x, y = shelf.exact("x", 1), shelf.exact("y", 1)
    assert answer.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    shared = set(np.argsort(-x)[:4]) & set(np.argsort(-y)[:4])
    assert [(each.k, each.share) for each in answer.overlaps] == [(4, len(shared) / 4)]
    assert (answer.common, answer.only_a, answer.only_b) == (9, 0, 0)
    assert (answer.a.concept and answer.a.concept.id, answer.b.concept and answer.b.concept.id) == ("x", "y")
    rank_x, rank_y = (np.argsort(np.argsort(-exact)) + 1 for exact in (x, y))
    gain = rank_x - rank_y
    for sign, listed in ((1, answer.up), (-1, answer.down)):
        assert [sign * (mover.rank_a - mover.rank_b) for mover in listed] == sorted(
            (each for each in sign * gain if each > 0), reverse=True
        )[:3]
        for mover in listed:
            row = shelf.ids.index(mover.example_id)
            assert (mover.rank_a, mover.rank_b) == (rank_x[row], rank_y[row])
            assert mover.percentile_a == pytest.approx(stats.percentileofscore(x, x[row], kind="strict"))
            assert mover.percentile_b == pytest.approx(stats.percentileofscore(y, y[row], kind="strict"))
            assert (mover.text, mover.metadata["n"]) == (f"example {row}", row)
            assert mover.places[0].line == row + 1


def test_versions_are_compared_on_the_examples_that_both_hold(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    shelf.publish("a", 2, sections=(shelf.section(), shelf.embeddings(without=5)))
    answer = compare(client, {"index": "a@v1"}, {"index": "a@v2"})
    assert (answer.a.index, answer.b.index, answer.a.rows, answer.b.rows) == ("a@v1", "a@v2", 9, 8)
    assert (answer.common, answer.only_a, answer.only_b) == (8, 1, 0)
    assert (answer.spearman, answer.up, answer.down) == (pytest.approx(1), [], [])
    kept = [row for row in range(9) if row != 5]
    x, y = shelf.exact("x", 1)[kept], shelf.exact("y", 1)[kept]
    rank_x, rank_y = (
        {
            shelf.ids[row]: rank
            for row, rank in zip(kept, (np.argsort(np.argsort(-exact)) + 1).tolist(), strict=True)
        }
        for exact in (x, y)
    )
    for first, second, alone in (("a@v1", "a@v2", (1, 0)), ("a@v2", "a@v1", (0, 1))):
        other = compare(client, {"index": first}, {"index": second, "concept": "y"}, movers=100)
        assert (other.common, (other.only_a, other.only_b)) == (8, alone)
        assert other.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
        moved = other.up + other.down
        assert {mover.example_id for mover in moved} == {item for item in rank_x if rank_x[item] != rank_y[item]}
        for mover in moved:
            assert (mover.rank_a, mover.rank_b) == (rank_x[mover.example_id], rank_y[mover.example_id])


def test_indexes_of_different_datasets_are_compared_by_example(client: Client, shelf: Topics) -> None:
    """The same examples in a file of another order, with others before them."""
    first = shelf.publish("a", 1)
    lines = [b'{"text": "new %d", "n": 0}\n' % number for number in range(3)]
    source = b"".join(lines + [line(number) for number in (4, 9, 0, 7, 8, 5, 6, 3, 2, 1)])
    parsed = datasets.parse(
        BytesIO(source), "e.jsonl", quarantine_malformed=False, max_bytes=1 << 20, max_line_bytes=1 << 20
    )
    other = datasets.publish(shelf.storage, "e", parsed)
    shelf.registry.add(DATASETS, "e", other)
    about = {"name": "b", "dataset": "e", "dataset_fingerprint": other.fingerprint}
    manifest = replace(indexes.read_manifest(shelf.storage, first), **about)
    indexes.publish(shelf.storage, shelf.registry, replace(first, **about), manifest, {})
    answer = compare(client, {}, {"index": "b", "concept": "y"}, movers=100)
    x, y = shelf.exact("x", 1), shelf.exact("y", 1)
    assert (answer.common, answer.only_a, answer.only_b) == (9, 0, 0)
    assert answer.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    ranks = dict(zip(shelf.ids, (np.argsort(np.argsort(-y)) + 1).tolist(), strict=False))
    assert {mover.example_id: mover.rank_b for mover in answer.up + answer.down}.items() <= ranks.items()
    back = compare(client, {"index": "b", "concept": "y"}, {}, movers=100)
    assert back.spearman == pytest.approx(answer.spearman)
    assert [mover.example_id for mover in back.up] == [mover.example_id for mover in answer.down]
    assert {mover.places[0].file for mover in back.up} == {"e.jsonl"}


def test_two_methods_are_compared(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1, sections=(shelf.section(), shelf.embeddings(without=5)))
    answer = compare(client, {"concept": "z"}, {"concept": "z", "method": "concept_influence"})
    assert (answer.a.method, answer.b.method) == ("vector_filter", "concept_influence")
    assert (answer.a.provenance.kind, answer.b.provenance.kind) == ("activation", "influence")
    assert answer.common == 8
    assert answer.spearman is not None and answer.spearman > 0.9  # the shelf's embeddings are its activations


def test_each_side_has_its_order(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    same, turned = compare(client, {}, {}), compare(client, {}, {"order": "least"})
    assert (same.spearman, turned.spearman) == (pytest.approx(1), pytest.approx(-1))
    both = compare(client, {"order": "least"}, {"order": "least"}, k=2)
    assert both.overlaps[0].share == 1
    size = compare(client, {"order": "absolute"}, {"order": "most"})
    exact = shelf.exact("x", 1)
    assert size.spearman == pytest.approx(stats.spearmanr(np.abs(exact), exact).statistic)


def test_indexes_without_a_common_example_have_nothing_to_compare(shelf: Topics, whole: WholeRankings) -> None:
    record = shelf.publish("a", 1)
    shelf.publish("a", 2, sections=(shelf.section(), shelf.embeddings(without=5)))
    whole._loader.rows(record, ARRAYS[0]).alive = np.arange(9) == 5
    a, b = (Query("a@v1", "x", Method.VECTOR_FILTER, Order.MOST, 1), ask())
    found = whole.compare(a, b, k=3, movers=3)
    assert not isinstance(found, JobRecord)
    assert (found.found.n, found.only_a, found.only_b, found.found.spearman) == (0, 1, 8, None)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [({"concept": "nobody"}, 404, "concept"), ({"index": "b"}, 404, "index"), ({"damping": 1}, 422, "damping")],
)
def test_an_error_names_the_side_it_is_on(
    client: Client, shelf: Topics, side: str, wrong: dict[str, Any], status: int, param: str
) -> None:
    shelf.publish("a", 1)
    with pytest.raises(WhenceError) as refused:
        compare(client, **{"a": {}, "b": {}, side: wrong})
    assert (refused.value.status, refused.value.param) == (status, f"{side}.{param}")


def test_a_long_text_is_cut(client: Client, shelf: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.routes.rankings._EXCERPT", 4)
    shelf.publish("a", 1)
    answer = compare(client, {}, {"concept": "y"})
    assert {mover.text for mover in answer.up + answer.down} == {"exam…"}


# --- jobs that must end first -------------------------------------------------------------------------------


def test_all_three_answer_with_the_job_that_must_end_first(
    client: Client, shelf: Topics, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.publish("a", 1)
    shelf.publish_with_gradients(monkeypatch, "g")
    loss = {"index": "g", "method": "influence_function", "query_set": "q"}
    plain = {"index": "a", "concept": "x"}
    path = tmp_path / "all.parquet"
    needed = [
        client.download_scores(path, **loss),
        client.groups(group_by="topic", **loss),
        client.compare(plain, loss),
        client.compare(loss, plain),
    ]
    job = needed[0]
    assert isinstance(job, JobRecord)
    assert [each.id for each in needed if isinstance(each, JobRecord)] == [job.id] * 4  # one job, not four
    assert not path.exists()
    response = httpx.post(f"{client.url}/v1/queries/scores", json=loss)
    assert (response.status_code, response.headers["location"]) == (202, f"/v1/jobs/{job.id}")

    u = shelf.vector("u")
    artifacts.publish(
        shelf.storage, job.spec["key"], {"query": {"vector": u}}, facts={"examples": 9, "quarantined": 0}
    )
    exact = np.float64(np.float16(shelf.rows(7))) @ u
    assert client.download_scores(path, **loss) is None
    rows = pq.read_table(path)
    assert rows.column("score").to_pylist() == pytest.approx(np.sort(exact)[::-1], rel=1e-4)
    assert json.loads(rows.schema.metadata[b"whence.concept"]) is None
    assert isinstance(client.groups(group_by="topic", **loss), GroupsOut)
    answer = client.compare(plain, loss)
    assert isinstance(answer, CompareOut)
    assert answer.spearman == pytest.approx(stats.spearmanr(shelf.exact("x", 1), exact).statistic)
    assert (answer.b.concept, answer.b.provenance.kind) == (None, "gradient")


# --- the command line ---------------------------------------------------------------------------------------


def test_whence_query_all_writes_the_file(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    path = tmp_path / "all.parquet"
    said = run(client, "query", "--index", "a", "--concept", "x", "--all", str(path), "--metadata")
    assert f"{path.stat().st_size:,} bytes" in said
    assert pq.read_table(path).num_rows == 9
    assert "metadata" in pq.read_schema(path).names


def test_whence_query_group_by_shows_groups(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    asked = ("query", "--index", "a", "--concept", "x", "--group-by", "topic", "-k", "4", "--limit", "3")
    said = run(client, *asked)
    assert "topic" in said and "of first 4" in said and "3 of 5 groups" in said
    answer = json.loads(run(client, *asked, "--json", "--sort", "share"))
    assert (answer["total"], len(answer["groups"]), answer["k"], answer["sort"]) == (5, 3, 4, "share")


def test_whence_query_without_them_is_a_query(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    answer = json.loads(run(client, "query", "--index", "a", "--concept", "x", "-k", "2", "--json"))
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2]


def test_whence_query_refuses_both_at_once(client: Client, shelf: Topics, tmp_path: Path) -> None:
    both = ["query", "--index", "a", "--all", str(tmp_path / "f"), "--group-by", "topic", "--url", client.url]
    assert CliRunner().invoke(cli, both).exit_code == 2
    lost = ["query", "--index", "a", "--all", str(tmp_path / "no" / "f"), "--url", client.url]
    assert CliRunner().invoke(cli, lost).exit_code == 2


def test_whence_compare_shows_correlation_overlap_and_movers(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1, sections=(shelf.section(), shelf.embeddings(without=5)))
    kept = [row for row in range(9) if row != 5]
    expected = stats.spearmanr(shelf.exact("x", 1)[kept], shelf.exact("y", 1)[kept]).statistic
    said = run(client, "compare", "--index", "a", "--concept", "x", "--vs-concept", "y")
    assert f"{expected:+.3f} over 8 examples" in said
    assert "first 8" in said and "higher in b" in said and "concept y" in said
    found = json.loads(run(client, "compare", "--index", "a", "--concept", "x", "--vs-concept", "y", "--json"))
    assert found["spearman"] == pytest.approx(expected)
    method = ("compare", "--index", "a", "--concept", "z", "--vs-method", "concept_influence", "--json")
    assert json.loads(run(client, *method))["b"]["method"] == "concept_influence"
    shelf.publish("a", 2)
    version = ("compare", "--index", "a@v1", "--concept", "x", "--vs-index", "a@v2", "--json")
    assert json.loads(run(client, *version))["only_b"] == 1


@pytest.mark.parametrize(
    ("a", "changed", "b"),
    [
        ({}, {"concept": "y"}, {"index": "i", "concept": "x", "order": "most", "damping": 2.0} | {"concept": "y"}),
        ({}, {"method": Method.VECTOR_FILTER}, {"index": "i", "concept": "x", "order": "most"}),
        ({}, {"method": Method.INFLUENCE_FUNCTION, "query_set": "q"}, {"index": "i", "order": "most"}),
        ({}, {"method": Method.CONCEPT_INFLUENCE}, {"index": "i", "concept": "x", "order": "most", "damping": 2.0}),
    ],
)
def test_the_other_side_takes_over_what_it_can_use(
    a: dict[str, Any], changed: dict[str, Any], b: dict[str, Any]
) -> None:
    from api.cli_rankings import other_side

    base = {"index": "i", "concept": "x", "method": Method.CONCEPT_INFLUENCE, "order": "most", "damping": 2.0}
    assert other_side(base | a, changed) == {"method": Method.CONCEPT_INFLUENCE} | b | changed


def test_a_comparison_with_itself_is_refused(client: Client) -> None:
    same = ["compare", "--index", "a", "--concept", "x", "--url", client.url]
    result = CliRunner().invoke(cli, same)
    assert result.exit_code == 2
    assert "--vs-concept" in result.output


# --- filters, vectors -----------------------------------------------------------------------------------------


def test_a_filter_holds_for_all_three(client: Client, shelf: Topics, tmp_path: Path) -> None:
    shelf.publish("a", 1)
    tea = [row for row in range(9) if TOPICS[row] == "tea"]
    x, y = shelf.exact("x", 1)[tea], shelf.exact("y", 1)[tea]
    path, filtered = tmp_path / "tea.parquet", {"index": "a", "concept": "x", "filter": {"topic": "tea"}}
    client.download_scores(path, **filtered)
    rows = pq.read_table(path).to_pylist()
    assert [row["example_id"] for row in rows] == [shelf.ids[tea[row]] for row in np.argsort(-x)]
    assert [row["percentile"] for row in rows] == pytest.approx(
        [100 * row / len(tea) for row in range(len(tea))][::-1]
    )
    groups = client.groups(group_by="topic", **filtered)
    assert isinstance(groups, GroupsOut)
    assert [(group.value, group.count, group.share_of_top) for group in groups.groups] == [("tea", len(tea), 1)]
    answer = compare(client, {"filter": {"topic": "tea"}}, {"concept": "y"})
    assert (answer.common, answer.only_a, answer.only_b) == (len(tea), 0, 9 - len(tea))
    assert answer.spearman == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_vector_or_a_sum_is_scored_and_names_its_file(client: Client, shelf: Topics) -> None:
    shelf.publish("a", 1)
    summed = {"index": "a", "concepts": [{"id": "x", "weight": 0.5}, {"id": "y"}]}
    response = httpx.post(f"{client.url}/v1/queries/scores", json=summed)
    name = response.headers["content-disposition"]
    assert name == 'attachment; filename="a@v1-0.5_x_y-vector_filter.parquet"'
    expected = 0.5 * shelf.exact("x", 1) + shelf.exact("y", 1)
    found = pq.read_table(BytesIO(response.content)).column("score").to_pylist()
    assert found == pytest.approx(np.sort(expected)[::-1], rel=1e-4)
    given = {"index": "a", "vector": shelf.vector("x").tolist(), "layer": 1}
    answer = client.compare(given, {"index": "a", "concept": "x"})
    assert isinstance(answer, CompareOut)
    assert answer.spearman == pytest.approx(1)
