"""Questions to an index: directions in three ways, orders, pages, filters, and where a score lies among all."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from api.body_limit import MOST_BYTES
from api.main import create_app
from service import codec, concepts, datasets, indexes, queries, shards
from service.contracts import ArrayInfo, ConceptRecord, Counts, ModelRecord, Point
from service.errors import Invalid
from service.queries import Ranking
from service.questions import Query
from service.rankings import percentiles
from service.registry import DATASETS, MODELS, Registry
from service.search import TopK
from service.settings import Settings
from service.specs import IndexManifest, Section
from service.spread import Spread
from service.storage import Storage, sha256_bytes
from service.terms import IndexKind, LongExamples, Method, Order, Pooling
from service.work import ActivationSpec, Location, PassSpec

D, N, LAYER = 12, 300, 2
RNG = np.random.default_rng(7)
ROWS = (RNG.normal(size=(N, D)) * np.exp(RNG.normal(size=(N, 1)))).astype(np.float16).astype(np.float32)
DIRECTIONS = {name: RNG.normal(size=D).astype(np.float32) for name in ("a", "b", "deep", "pooled")}
DIRECTIONS = {name: value / np.linalg.norm(value) for name, value in DIRECTIONS.items()}


def publish(registry: Registry, storage: Storage) -> None:
    registry.add(MODELS, "m", ModelRecord("m", "", "f", "", None, "none", 4, D, 64, None, "f", (), codec.now()))
    lines = "".join(
        f'{{"text": "example {number}: {"x" * 300}", "n": {number}, "odd": {str(number % 2 == 1).lower()}}}\n'
        for number in range(N)
    )
    source = Path(storage.root) / "lines.jsonl"
    source.write_text(lines)
    with source.open("rb") as file:
        parsed = datasets.parse(file, "l", quarantine_malformed=False, max_bytes=1 << 30, max_line_bytes=1 << 20)
    dataset = datasets.publish(storage, "d", parsed)
    registry.add(DATASETS, "d", dataset)
    info = ArrayInfo(IndexKind.ACTIVATION, LAYER, D)
    spec = PassSpec(
        model_fingerprint="f",
        tokenizer_fingerprint="",
        activation=ActivationSpec((LAYER,), Pooling.RESPONSE_MEAN),
        gradient=None,
        objective=None,
        max_length=64,
        long_examples=LongExamples.TRUNCATE_RIGHT,
        token_budget=64,
        dtype="float32",
    )
    ids = list(parsed.examples)
    refs = [
        shards.reference(
            shards.publish(
                storage,
                task,
                ids=[ids[row] for row in task.rows],
                arrays={info: ROWS[list(task.rows)]},
                encoding=shards.HALF,
                versions={},
            )
        )
        for task in shards.cut(Location("", ""), spec, dataset, ids, range(N), 64)
    ]
    for version in (1, 2):
        manifest = IndexManifest(
            "i", version, "m", "f", "f", "d", dataset.fingerprint, None, spec, (Point("m", "", "f"),), None,
            (Section((info,), tuple(refs)),), Counts(N, N, 0, 0, 0), {},
        )  # fmt: skip
        indexes.publish(storage, registry, indexes.describe(manifest, job="j"), manifest, {})
    for name, direction in DIRECTIONS.items():
        tensor = concepts.to_safetensors(direction)
        record = ConceptRecord(
            name,
            "m",
            "f",
            "f",
            LAYER,
            Pooling.RESPONSE_MEAN,
            D,
            "x",
            1.0,
            0.9,
            9,
            9,
            {},
            sha256_bytes(tensor),
            "now",
        )
        if name == "deep":
            record = replace(record, layer=3)
        if name == "pooled":
            record = replace(record, pooling=Pooling.ALL_MEAN)
        concepts.publish(storage, registry, record, tensor)


@pytest.fixture
def http(redis: Redis, redis_server, storage: Storage, registry: Registry, tmp_path: Path) -> Iterator[TestClient]:
    publish(registry, storage)
    settings = Settings(home=tmp_path, storage_url=storage.root, redis_url=redis_server.url, search_threads=2)
    with TestClient(create_app(settings)) as client:
        yield client


def ask(http: TestClient, status: int = 200, **body):
    response = http.post("/v1/queries", json={"index": "i", **body})
    assert response.status_code == status, response.text
    return response.json()


def numbers(answer) -> list[int]:
    return [hit["metadata"]["n"] for hit in answer["hits"]]


SCORES = ROWS.astype(np.float64) @ DIRECTIONS["a"]


def test_orders_rank_by_the_sign_or_the_size_of_scores(http: TestClient) -> None:
    for order, key in (("most", -SCORES), ("least", SCORES), ("absolute", -np.abs(SCORES))):
        answer = ask(http, concept="a", k=40, order=order)
        assert numbers(answer) == np.argsort(key, kind="stable")[:40].tolist()
        np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], SCORES[numbers(answer)], rtol=1e-5)
        assert [hit["rank"] for hit in answer["hits"]] == list(range(1, 41))


def test_where_a_score_lies_among_all(http: TestClient) -> None:
    for order in ("most", "least", "absolute"):
        for hit in ask(http, concept="a", k=N, order=order)["hits"]:
            score = SCORES[hit["metadata"]["n"]]
            lower = 100 * (score > SCORES).mean()
            # of both signs mixed it is read off the scores in float32, where its own is half below it
            assert hit["percentile"] == pytest.approx(lower, abs=1e-3 if order != "absolute" else 100.5 / N)
            assert hit["z_score"] == pytest.approx((score - SCORES.mean()) / SCORES.std(), abs=1e-3)


def test_an_inline_vector_is_the_concept_of_the_same_numbers(http: TestClient) -> None:
    vector = [3 * float(value) for value in DIRECTIONS["a"]]
    answer = ask(http, vector=vector, layer=LAYER, k=30)
    assert [hit["example_id"] for hit in answer["hits"]] == [
        hit["example_id"] for hit in ask(http, concept="a", k=30)["hits"]
    ]
    assert answer["concept"]["id"] == "inline"
    assert answer["concept"]["auroc_held_out"] is None


def test_a_weighted_sum_scores_the_sum_of_scores(http: TestClient) -> None:
    total = 2 * SCORES - 0.5 * (ROWS.astype(np.float64) @ DIRECTIONS["b"])
    answer = ask(http, concepts=[{"id": "a", "weight": 2}, {"id": "b", "weight": -0.5}], k=25)
    assert numbers(answer) == np.argsort(-total)[:25].tolist()
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], np.sort(-total)[:25] * -1, rtol=1e-4)


def test_one_ranking_for_each_of_several_concepts(http: TestClient) -> None:
    wanted = [{"id": "a"}, {"id": "b"}, {"id": "a", "weight": -1}]
    response = http.post("/v1/queries/each", json={"index": "i", "concepts": wanted, "k": 20})
    first, second, third = response.json()["items"]
    assert numbers(first) == numbers(ask(http, concept="a", k=20))
    assert numbers(second) == numbers(ask(http, concept="b", k=20))
    assert numbers(third) == numbers(ask(http, concept="a", k=20, order="least"))
    alone = http.post("/v1/queries/each", json={"index": "i", "concept": "a"})
    assert (alone.status_code, alone.json()["code"]) == (422, "concepts_needed")


def test_pages_fit_together_and_stay_with_their_version(http: TestClient) -> None:
    body = {"concept": "a", "k": 50, "limit": 20, "order": "least"}
    first = ask(http, **body)
    second = ask(http, **body, cursor=first["next"])
    third = ask(http, **body, cursor=second["next"])
    assert numbers(first) + numbers(second) + numbers(third) == numbers(ask(http, concept="a", k=50, order="least"))
    assert [len(page["hits"]) for page in (first, second, third)] == [20, 20, 10]
    assert third["next"] is None
    assert [hit["rank"] for hit in second["hits"]] == list(range(21, 41))
    old = ask(http, **{**body, "index": "i@v1"})
    assert ask(http, **{**body, "index": "i@v1"}, cursor=old["next"])["index"] == "i@v1"
    assert first["index"] == "i@v2"


@pytest.mark.parametrize("change", [{"k": 49}, {"concept": "b"}, {"order": "most"}, {"filter": {"odd": True}}])
def test_a_cursor_of_another_question_is_refused(http: TestClient, change) -> None:
    body = {"concept": "a", "k": 50, "limit": 20, "order": "least"}
    cursor = ask(http, **body)["next"]
    assert ask(http, 422, **{**body, **change}, cursor=cursor)["code"] == "bad_cursor"
    deep = base64.urlsafe_b64encode(b"[" * 1400).decode()
    index, _, about = json.loads(base64.urlsafe_b64decode(cursor))
    forged = [base64.urlsafe_b64encode(json.dumps([index, at, about]).encode()).decode() for at in (-1, True, 2.0)]
    for bad in ("", "x", "e30=", cursor[:-4], deep, *forged):
        assert ask(http, 422, **body, cursor=bad)["code"] == "bad_cursor"


@pytest.mark.parametrize(("filter_", "keep"), [
    ({"odd": True}, lambda n: n % 2 == 1),
    ({"n": {"lt": 7}}, lambda n: n < 7),
    ({"n": {"gte": 299}}, lambda n: n >= 299),
    ({"n": {"lt": 0}}, lambda n: False),
])  # fmt: skip
def test_filters_apply_before_ranking(http: TestClient, filter_, keep) -> None:
    kept = [n for n in range(N) if keep(n)]
    answer = ask(http, concept="a", k=30, filter=filter_)
    assert numbers(answer) == sorted(kept, key=lambda n: -SCORES[n])[:30]
    assert answer["rows"] == len(kept)


def test_fields_decide_what_hits_carry(http: TestClient) -> None:
    (full,) = ask(http, concept="a", k=1)["hits"]
    assert len(full["text"]) > 300
    assert full["places"]
    (short,) = ask(http, concept="a", k=1, fields=["excerpt"])["hits"]
    assert (short["text"], short["metadata"], short["places"]) == (full["text"][:200] + "…", {}, [])
    (bare,) = ask(http, concept="a", k=1, fields=[])["hits"]
    assert (bare["text"], bare["example_id"]) == ("", full["example_id"])


def test_the_same_question_is_searched_once(http: TestClient) -> None:
    assert [ask(http, concept="a", k=9)["timing"]["cached"] for _ in range(2)] == [False, True]
    assert not ask(http, index="i@v1", concept="a", k=9)["timing"]["cached"]
    assert not ask(http, concept="a", k=9, filter={"odd": True})["timing"]["cached"]


@pytest.mark.parametrize(("body", "code", "param"), [
    ({}, "concept_needed", "concept"),
    ({"concept": "a", "vector": [1.0] * D, "layer": LAYER}, "concept_needed", "vector"),
    ({"concept": "a", "layer": 2}, "layer_not_used", "layer"),
    ({"vector": [1.0] * D}, "layer_needed", "layer"),
    ({"vector": [1.0] * (D + 1), "layer": LAYER}, "vector_of_other_width", "vector"),
    ({"vector": [0.0] * D, "layer": LAYER}, "bad_vector", "vector"),
    ({"vector": [1.0] * D, "layer": 3}, "layer_not_indexed", "layer"),
    ({"concept": "deep"}, "layer_not_indexed", "concept"),
    ({"concepts": [{"id": "deep"}]}, "layer_not_indexed", "concepts"),
    ({"concepts": [{"id": "a", "weight": 0}]}, "zero_direction", "concepts"),
    ({"vector": [1.0] * D, "layer": LAYER, "pooling": "all_mean"}, "concept_of_other_pooling", "pooling"),
    ({"concepts": [{"id": "a"}, {"id": "deep"}]}, "concepts_of_different_layer", "concepts[1]"),
    ({"concepts": [{"id": "a"}, {"id": "pooled"}]}, "concept_of_other_pooling", "concepts[1]"),
    ({"concepts": [{"id": "a"}, {"id": "a", "weight": -1}]}, "zero_direction", "concepts"),
    ({"concepts": [{"id": "nobody"}]}, "concept_not_found", "concepts[0]"),
    ({"concept": "a", "filter": {"nowhere": 1}}, "unknown_filter_field", "filter.nowhere"),
    ({"concept": "a", "k": 0}, "invalid_request", "k"),
    ({"concept": "a", "k": 10_001}, "k_too_large", "k"),
    ({"concept": "a", "fields": ["all"]}, "invalid_request", "fields.0"),
    ({"concept": "a", "limit": 0}, "invalid_request", "limit"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(http: TestClient, body, code: str, param: str) -> None:
    answer = ask(http, 404 if code.endswith("not_found") else 422, **body)
    assert (answer["code"], answer["param"]) == (code, param)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_the_length_of_a_vector_does_not_matter(http: TestClient, size: float) -> None:
    vector = [size * float(value) for value in DIRECTIONS["a"]]
    answer = ask(http, vector=vector, layer=LAYER, k=30)
    assert numbers(answer) == np.argsort(-SCORES)[:30].tolist()
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], -np.sort(-SCORES)[:30], rtol=1e-5)


@pytest.mark.parametrize(("bad", "code"), [
    ({"id": "nobody"}, "concept_not_found"),
    ({"id": "deep"}, "layer_not_indexed"),
    ({"id": "pooled"}, "concept_of_other_pooling"),
    ({"id": "b", "weight": 0}, "zero_direction"),
])  # fmt: skip
def test_of_several_rankings_the_error_names_the_concept(http: TestClient, bad, code: str) -> None:
    body = {"index": "i", "concepts": [{"id": "a"}, {"id": "b"}, bad]}
    answer = http.post("/v1/queries/each", json=body).json()
    assert (answer["code"], answer["param"]) == (code, "concepts[2]")


@pytest.mark.parametrize(("path", "body"), [
    ("queries", '{"concept": "a", "filter": {"n": {"HALF": 1}}}'),
    ("queries", '{"concept": "a", "HALF": 1}'),
    ("queries/groups", '{"concept": "a", "group_by": "HALF"}'),
])  # fmt: skip
def test_what_is_no_text_is_refused_and_not_a_bug(http: TestClient, path: str, body: str) -> None:
    content = body.replace("HALF", "\\ud800").replace("{", '{"index": "i", ', 1)
    response = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.json()["code"] in {"bad_filter", "invalid_request", "unknown_field"}


def test_a_body_that_no_question_needs_is_not_read(http: TestClient) -> None:
    long = b'{"index": "i", "concept": "a", "filter": {"s": "' + b"x" * MOST_BYTES + b'"}}'

    def unannounced() -> Iterator[bytes]:
        yield from (long[start : start + (1 << 20)] for start in range(0, len(long), 1 << 20))

    for content in (long, unannounced()):
        response = http.post("/v1/queries", content=content, headers={"content-type": "application/json"})
        answer = response.json()
        assert (response.status_code, answer["code"], answer["param"]) == (413, "body_too_large", "body")


def test_a_cursor_holds_in_every_process() -> None:
    """Sets have another order in each, and the next page may be asked of another server, or after a restart."""
    code = (
        "from service import filters, paging, questions, terms;"
        "wanted = filters.parse({'s': {'in': list('abcdefgh')}, 'n': {'gt': 1}, 'any': [{'x': 1}, {'y': True}]});"
        "query = questions.Query('i', 'a', terms.Method.VECTOR_FILTER, terms.Order.MOST, 5, filter=wanted);"
        "print(paging._digest(query))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in "123"
    ]
    assert len(set(told)) == 1
    assert len(told[0].strip()) == 16


def test_equal_scores_have_equal_percentiles_and_zero_has_no_sign() -> None:
    scores = np.array([5, 3, 3, 3, 0, 0, -1], dtype=np.float32)
    query = Query("i", "a", Method.VECTOR_FILTER, Order.MOST, 7)
    whole = percentiles(scores)
    for order, top in ((Order.MOST, scores), (Order.LEAST, scores[::-1])):
        ranking = Ranking(TopK(np.arange(7), top), Spread(0.0, 1.0), None, 7)
        found = queries._percentiles(replace(query, order=order), ranking, top[2:5])
        np.testing.assert_allclose(found, (whole if order == Order.MOST else whole[::-1])[2:5])
    turned = queries._negative(TopK(np.arange(2), np.array([0, 1], dtype=np.float32))).scores
    assert not np.signbit(turned[0])


def test_scores_that_no_number_can_hold_are_refused() -> None:
    with pytest.raises(Invalid, match="1 of 2 scores") as refused:
        queries.check_finite(np.array([1, np.inf], dtype=np.float32))
    assert refused.value.code == "scores_overflow"


def test_what_is_kept_is_weighed_with_its_key(http: TestClient) -> None:
    """A ranking of one hit takes a few bytes, but the question it answers may have a hundred thousand values."""
    ask(http, concept="a", k=1, filter={"n": {"in": list(range(2000))}})
    ask(http, vector=[1.0] * D, layer=LAYER, k=1)
    app: Any = http.app
    service = app.state.services.queries
    for kept in (service._rankings, service._masks):
        assert kept._values
        for key, (_, weight) in kept._values.items():
            assert len(repr(key)) < weight


def test_a_vector_with_nan_is_refused(http: TestClient) -> None:
    content = '{"index": "i", "layer": 2, "vector": [' + ", ".join(["NaN"] * D) + "]}"
    response = http.post("/v1/queries", content=content, headers={"content-type": "application/json"})
    assert response.status_code in {400, 422}, response.text
