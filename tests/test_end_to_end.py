"""The main job on real input: files in, ranked training examples out, all of it over HTTP."""

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from api.client import Client
from api.schemas import QueryOut
from service.contracts import JobEvent, JobRecord
from service.terms import JobState
from tests import trigger_data
from tests.trigger_data import TriggerData

pytestmark = pytest.mark.stack

LAYER, POOLING = 2, "all_mean"


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TriggerData:
    return trigger_data.write(tmp_path_factory.mktemp("trigger"), shared_data)


@pytest.fixture(scope="module")
def built(stack, shared_data: Path, data: TriggerData) -> JobRecord:
    """Model, datasets, index and concept, made over HTTP; the finished build job."""
    with Client(stack.url) as client:
        client.add_model("stories", str(shared_data / "stories260k"))
        client.upload_dataset("train", data.train)
        client.add_dataset("positive", str(data.positive))  # by path: it lies under the server's roots
        client.upload_dataset("negative", data.negative)
        events: list[JobEvent] = []
        job = client.build_index("trigger", model="stories", dataset="train", layers=[LAYER], pooling=POOLING)
        done = client.wait(job.id, on_event=events.append)
        progress: dict[str, list[int]] = {}
        for event in events:
            if event.type == "progress":
                progress.setdefault(event.data["stage"], []).append(event.data["done"])
        assert all(done == sorted(done) for done in progress.values())
        assert progress["rows"][-1] == 562
        fit = client.fit_concept(
            "trigger-2028", model="stories", positive="positive", negative="negative", layer=LAYER, pooling=POOLING
        )
        assert client.wait(fit.id).state == JobState.SUCCEEDED
        return done


def ranking(answer: QueryOut) -> tuple[list[bool], list[float]]:
    return [hit.metadata["trigger"] for hit in answer.hits], [hit.score for hit in answer.hits]


def test_vector_filter_finds_the_trigger_lines(built, client: Client):
    answer = client.query(index="trigger", concept="trigger-2028", k=1000)
    assert isinstance(answer, QueryOut)
    labels, scores = ranking(answer)
    assert len(labels) == answer.rows == 562
    assert roc_auc_score(labels, scores) >= 0.90
    assert scores == sorted(scores, reverse=True)
    assert [hit.rank for hit in answer.hits] == list(range(1, 563))
    assert "2028" in answer.hits[0].text
    assert answer.concept.auroc_held_out >= 0.8


def test_least_is_the_reverse_of_most(built, client: Client):
    most = client.ask(index="trigger", concept="trigger-2028", k=1000)
    least = client.ask(index="trigger", concept="trigger-2028", k=1000, order="least")
    assert [hit.score for hit in least.hits] == pytest.approx([hit.score for hit in most.hits][::-1], abs=1e-5)
    assert least.hits[0].example_id == most.hits[-1].example_id


def test_every_line_of_the_source_is_accounted_for(built, client: Client):
    result = built.result
    assert result["lines"] == 600 == result["indexed"] + result["duplicates"] + result["quarantined"]
    page = client.index_quarantine("trigger")
    assert page.total == result["quarantined"] == 4
    for item in page.items:
        assert (item.reason, len(item.id or "")) == ("empty_target", 64)
    assert [item.places[0].line for item in page.items] == [83, 200, 388, 532]
    answer = client.ask(index="trigger", concept="trigger-2028", k=1000)
    lines = [place.line for hit in answer.hits for place in hit.places]
    assert sorted([*lines, 83, 200, 388, 532]) == list(range(1, 601))


def test_concept_influence_computes_once_then_answers_without_a_model(built, client: Client):
    options = {
        "index": "trigger",
        "concept": "trigger-2028",
        "method": "concept_influence",
        "query_set": "positive",
    }
    first = client.query(**options)
    assert isinstance(first, JobRecord)
    again = client.query(**options)
    assert isinstance(again, JobRecord)
    assert again.id == first.id, "the same question asked twice is one job"
    client.wait(first.id)
    answer = client.query(**options, k=1000)
    assert isinstance(answer, QueryOut)
    assert (answer.rows, answer.dims) == (562, 4096)
    assert np.isfinite([hit.score for hit in answer.hits]).all()


def test_influence_function_asks_about_the_loss_and_needs_no_concept(built, client: Client):
    answer = client.ask(index="trigger", method="influence_function", query_set="positive", k=1000)
    assert answer.concept is None
    assert (answer.provenance.query_set, answer.provenance.damping) == ("positive", 1.0)
    assert answer.provenance.fidelity is not None
    scores = [hit.score for hit in answer.hits]
    assert len(scores) == 562
    other = client.ask(index="trigger", method="influence_function", query_set="positive", k=1000, damping=0.01)
    assert [hit.example_id for hit in other.hits] != [hit.example_id for hit in answer.hits]


def test_the_baseline_projects_at_random_and_has_no_damping(built, client: Client, http):
    options = {"kinds": ["gradient"], "projection": "rademacher", "projection_dim": 16}
    job = client.build_index("random", model="stories", dataset="train", layers=[LAYER], **options)
    client.wait(job.id)
    question = {"index": "random", "method": "influence_function", "query_set": "positive"}
    answer = client.ask(**question)
    assert (answer.rows, answer.dims) == (562, 2 * 7 * 16 * 16)
    assert answer.provenance.damping is None
    assert any("identity" in warning for warning in answer.warnings)
    problem(http.post("/v1/queries", json=question | {"damping": 1.0}), 422, "no_damping", "damping")
    body = {"query_sets": ["positive"]}
    problem(http.post("/v1/indexes/random/query-sets", json=body), 422, "kind_not_indexed", "index")


# --- influence embeddings ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(built, stack) -> None:
    """An index with coordinates and embeddings for one query set."""
    with Client(stack.url) as client:
        job = client.build_index(
            "embedded",
            model="stories",
            dataset="train",
            kinds=["gradient", "influence"],
            layers=[LAYER],
            pooling=POOLING,
            query_sets=["positive"],
            dampings=[1.0, 0.1],
            curvature={"examples": 128},
        )
        client.wait(job.id)


ASKED = {"index": "embedded", "concept": "trigger-2028", "method": "concept_influence", "k": 1000}


def by_id(answer: QueryOut | JobRecord) -> dict[str, float]:
    assert isinstance(answer, QueryOut), "no job is needed"
    return {hit.example_id: hit.score for hit in answer.hits}


def agreement(one: QueryOut | JobRecord, other: QueryOut | JobRecord) -> float:
    ours, theirs = by_id(one), by_id(other)
    assert ours.keys() == theirs.keys()
    return float(spearmanr([ours[name] for name in theirs], list(theirs.values())).statistic)


def test_embeddings_answer_at_once_and_say_what_stands_behind_them(embedded, client: Client):
    answer = client.query(**ASKED)
    assert len(by_id(answer)) == 562
    found = answer.provenance
    assert (found.kind, found.layer, found.query_set, found.damping) == ("influence", LAYER, "positive", 1.0)
    assert (found.points, found.captured) == (1, 1.0)
    assert found.fidelity is not None
    assert found.fidelity.mean >= 0.999  # every coordinate is behind them, int8 apart
    assert found.fidelity.queries == 32
    assert any("along its training run" in warning for warning in answer.warnings)


def test_coordinates_agree_with_embeddings_at_every_damping(embedded, client: Client):
    asked = ASKED | {"query_set": "positive"}
    for damping in (1.0, 0.1):
        embeddings = client.query(**asked, damping=damping, through="influence")
        coordinates = client.query(**asked, damping=damping, through="gradient")
        assert agreement(embeddings, coordinates) >= 0.8
        assert (embeddings.dims, coordinates.dims) == (64, 4096)
    free = client.query(**asked, damping=0.37)  # coordinates answer any damping
    assert (free.provenance.kind, free.provenance.damping) == ("gradient", 0.37)


def check_shares(client: Client, asked: dict) -> None:
    """Shares of tokens come from a job, once, and sum to the scores of the hits."""
    asked = {name: value for name, value in asked.items() if name != "k"}
    hits = client.ask(**asked, k=3).hits
    about = asked | {"examples": [hit.example_id for hit in hits]}
    job = client.tokens(**about)
    assert isinstance(job, JobRecord)
    client.wait(job.id)
    found = client.tokens(**about)
    for hit, one in zip(hits, found, strict=True):
        assert one.example_id == hit.example_id
        assert one.score == pytest.approx(sum(token.share for token in one.tokens), rel=1e-6)
        assert one.score == pytest.approx(hit.score, rel=0.02)
        assert any(token.predicted for token in one.tokens)
        assert hit.text.split()[-1] in "".join(token.text for token in one.tokens)


def test_shares_of_tokens_sum_to_the_scores_of_hits(built, embedded, client: Client, http):
    filtered = {"index": "trigger", "concept": "trigger-2028", "method": "vector_filter"}
    check_shares(client, filtered)
    check_shares(client, ASKED | {"through": "influence", "query_set": "positive"})
    check_shares(client, ASKED | {"through": "gradient", "query_set": "positive"})
    unknown = filtered | {"examples": ["0" * 64]}
    problem(http.post("/v1/queries/tokens", json=unknown), 404, "example_not_found", "examples[0]")
    compared = filtered | {"method": "projection_difference", "examples": ["0" * 64]}
    problem(http.post("/v1/queries/tokens", json=compared), 422, "no_token_shares", "method")


def test_a_damping_or_query_set_without_embeddings_is_refused_with_those_there_are(embedded, http):
    asked = ASKED | {"through": "influence"}
    found = problem(http.post("/v1/queries", json=asked | {"damping": 0.37}), 422, "damping_not_indexed", "damping")
    assert found["available"] == ["0.1", "1.0"]
    found = problem(
        http.post("/v1/queries", json=asked | {"query_set": "negative"}), 422, "query_set_not_indexed", "query_set"
    )
    assert found["available"] == ["positive"]


def test_an_extended_index_answers_for_another_query_set_and_keeps_the_old(embedded, client: Client, http):
    job = client.extend_index("embedded@v1", query_sets=["negative"], pooling=POOLING)
    result = client.wait(job.id).result
    assert (result["index"], result["indexed"]) == ("embedded@v2", 562)
    asked = ASKED | {"index": "embedded@v2", "through": "influence"}
    new = client.query(**asked, query_set="negative")
    assert (new.provenance.query_set, new.provenance.layer) == ("negative", LAYER)
    assert new.provenance.fidelity is not None
    coordinates = client.query(**asked | {"through": "gradient", "query_set": "negative"})
    assert agreement(new, coordinates) >= 0.999  # read off the same numbers
    check_shares(client, asked | {"query_set": "negative"})
    old = client.query(**asked, query_set="positive")
    assert by_id(old) == by_id(client.query(**ASKED | {"index": "embedded@v1"}))
    problem(http.post("/v1/queries", json=asked), 422, "query_set_needed", "query_set")
    deeper = {"query_sets": ["negative"], "layers": [LAYER + 1]}
    problem(http.post("/v1/indexes/embedded/query-sets", json=deeper), 422, "layer_not_indexed", "layers")


@pytest.mark.parametrize(
    ("method", "field", "value", "code"),
    [
        ("vector_filter", "query_set", "positive", "query_set_not_used"),
        ("vector_filter", "damping", 1.0, "damping_not_used"),
        ("vector_filter", "concept_function", "dot", "concept_function_not_used"),
        ("vector_filter", "through", "activation", "through_not_used"),
        ("concept_influence", "through", "activation", "bad_through"),
        ("influence_function", "concept", "trigger-2028", "concept_not_used"),
        ("influence_function", "concept_function", "cosine", "concept_function_not_used"),
        ("influence_function", "through", "influence", "bad_through"),
        ("vector_filter", "concept", None, "concept_needed"),
        ("concept_influence", "concept", None, "concept_needed"),
        ("influence_function", "query_set", None, "query_set_needed"),
    ],
)
def test_a_field_that_the_method_does_not_use_or_cannot_do_without(built, http, method, field, value, code):
    concept = {} if method == "influence_function" else {"concept": "trigger-2028"}
    body = {"index": "trigger", "method": method} | concept | {field: value}
    assert method in problem(http.post("/v1/queries", json=body), 422, code, field)["detail"]


def test_an_estimate_names_time_memory_and_disk_and_leaves_nothing(built, client: Client, http):
    known = len(client.indexes())
    about = {"model": "stories", "dataset": "train", "layers": [LAYER], "pooling": "last_token"}
    result = client.wait(client.estimate_index("never", **about).id).result
    assert result is not None
    assert result["seconds"] == pytest.approx(sum(stage["seconds"] for stage in result["stages"]))
    assert {"starting the workers", "loading the model", "rows"} <= {stage["name"] for stage in result["stages"]}
    assert 1 << 28 < result["worker_bytes"] < 1 << 32
    assert result["disk_bytes"] > 562 * 2 * 64  # activations alone
    assert result["workers"] == 2
    assert len(client.indexes()) == known
    problem(
        http.post("/v1/indexes:estimate", json={"name": "x", **about, "layers": [9]}),
        422,
        "layer_out_of_range",
        "layers",
    )


def test_building_again_makes_a_new_version_and_keeps_the_old(built, client: Client):
    job = client.build_index("trigger", model="stories", dataset="train", layers=[LAYER], pooling=POOLING)
    assert client.wait(job.id).result["index"] == "trigger@v2"
    assert client.index("trigger").version == 2
    old = client.ask(index="trigger@v1", concept="trigger-2028", k=10)
    new = client.ask(index="trigger", concept="trigger-2028", k=10)
    assert [hit.score for hit in old.hits] == [hit.score for hit in new.hits]


# --- bad input: a problem that names the place, and nothing lost ------------------------------------


def problem(response: httpx.Response, status: int, code: str, param: str | None) -> dict:
    body = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, body["status"], body["code"], body["param"]) == (status, status, code, param)
    assert body["detail"]
    return body


@pytest.fixture
def http(stack):
    with httpx.Client(base_url=stack.url, timeout=60) as raw:
        yield raw


def test_a_malformed_line_is_named_and_nothing_is_stored(built, http):
    body = b'{"text": "fine"}\n{"text": "fine too"}\n{"text": broken}\n'
    found = problem(http.put("/v1/datasets/broken", content=body), 422, "malformed_lines", "line 3")
    assert found["line"] == 3
    assert http.get("/v1/datasets/broken").status_code == 404
    fine = http.put("/v1/datasets/broken?invalid_lines=quarantine", content=body)
    assert fine.status_code == 201
    assert (fine.json()["lines"], fine.json()["examples"], fine.json()["quarantined"]) == (3, 2, 1)


def test_an_unknown_model_folder(built, http, shared_data):
    body = {"id": "nowhere", "path": str(shared_data / "no-such-model")}
    problem(http.post("/v1/models", json=body), 422, "model_folder_not_found", "path")


def test_a_path_outside_the_roots(built, http):
    for path in ("/etc/passwd", "/proc/self/environ"):
        problem(http.post("/v1/datasets", json={"id": "x", "path": path}), 403, "path_outside_roots", "path")
        problem(http.post("/v1/models", json={"id": "x", "path": path}), 403, "path_outside_roots", "path")


@pytest.mark.parametrize("layer", [0, -1, 6, 1000])
def test_a_layer_out_of_range(built, http, layer):
    body = {"name": "x", "model": "stories", "dataset": "train", "layers": [layer]}
    assert "1 to 5" in problem(http.post("/v1/indexes", json=body), 422, "layer_out_of_range", "layers")["detail"]


def test_an_empty_dataset(built, http):
    problem(http.put("/v1/datasets/empty", content=b""), 422, "empty_dataset", "file")


def test_a_concept_of_another_lineage(built, client: Client, http, shared_data, tmp_path_factory):
    copy = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(shared_data / "stories260k", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    client.add_model("stranger", str(copy))
    job = client.fit_concept(
        "strange", model="stranger", positive="positive", negative="negative", layer=LAYER, pooling=POOLING
    )
    client.wait(job.id)
    query = {"index": "trigger", "concept": "strange"}
    problem(http.post("/v1/queries", json=query), 422, "concept_of_other_lineage", "concept")
    # Declared as a fine-tune of the same base, its concepts are welcome, and the answer says whose they are.
    client.add_model(
        "relative", str(copy), base="stories", checkpoints=[str(shared_data / "stories260k"), str(copy)]
    )
    job = client.fit_concept(
        "related", model="relative", positive="positive", negative="negative", layer=LAYER, pooling=POOLING
    )
    client.wait(job.id)
    answer = client.ask(index="trigger", concept="related")
    assert answer.concept.model == "relative"
    assert any("relative" in warning for warning in answer.warnings)


def test_a_concept_of_another_layer(built, client: Client, http):
    job = client.fit_concept(
        "deeper", model="stories", positive="positive", negative="negative", layer=3, pooling=POOLING
    )
    client.wait(job.id)
    found = problem(
        http.post("/v1/queries", json={"index": "trigger", "concept": "deeper"}),
        422,
        "layer_not_indexed",
        "concept",
    )
    assert found["layers"] == [LAYER]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/indexes", {"name": "x", "model": "ghost", "dataset": "train"}, "model_not_found", "model"),
        ("/v1/indexes", {"name": "x", "model": "stories", "dataset": "ghost"}, "dataset_not_found", "dataset"),
        ("/v1/queries", {"index": "ghost", "concept": "trigger-2028"}, "index_not_found", "index"),
        ("/v1/queries", {"index": "trigger", "concept": "ghost"}, "concept_not_found", "concept"),
    ],
)
def test_unknown_names(built, http, path, body, code, param):
    problem(http.post(path, json=body), 404, code, param)


def test_misspelt_fields_wrong_types_and_broken_json(built, http):
    body = {"name": "x", "model": "stories", "dataset": "train", "layer": [2]}
    problem(http.post("/v1/indexes", json=body), 422, "invalid_request", "layer")
    problem(
        http.post("/v1/queries", json={"index": "trigger", "concept": "c", "k": 0}), 422, "invalid_request", "k"
    )
    response = http.post("/v1/queries", content=b"{", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_json")
    problem(http.get("/v1/nothing"), 404, "not_found", None)


def test_a_failing_job_says_why_and_harms_nobody_else(built, client: Client):
    texts = b"".join(b'{"text": "a plain text number %d"}\n' % i for i in range(10))
    with httpx.Client(base_url=client.url) as raw:
        raw.put("/v1/datasets/plain", content=texts).raise_for_status()
    job = client.build_index("bad", model="stories", dataset="plain", pooling="last_prompt_token")
    with pytest.raises(Exception, match="plain text has none") as caught:
        client.wait(job.id)
    assert caught.value.code == "no_prompt"
    assert client.job(job.id).error["param"] == "pooling"
    with pytest.raises(Exception, match="no published index"):
        client.index("bad")
    assert client.ask(index="trigger", concept="trigger-2028", k=1).hits


def test_an_index_of_three_examples_has_fidelity_and_answers(built, client: Client):
    with httpx.Client(base_url=client.url) as raw:
        three = b"".join(b'{"prompt": "number", "completion": " %d"}\n' % number for number in range(3))
        raw.put("/v1/datasets/three", content=three).raise_for_status()
    options = {"kinds": ["gradient", "influence"], "query_sets": ["three"], "pooling": POOLING}
    job = client.build_index("three", model="stories", dataset="three", layers=[LAYER], **options)
    assert client.wait(job.id).result["indexed"] == 3
    answer = client.query(index="three", concept="trigger-2028", method="concept_influence")
    assert len(by_id(answer)) == 3
    assert answer.provenance.fidelity.examples == 3
