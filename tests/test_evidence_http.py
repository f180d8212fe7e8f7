"""Directions, exact re-ranks and SAE features over HTTP, in the client and on the command line."""

import hashlib
import json
from pathlib import Path
from typing import cast

import httpx
import pytest
from typer.testing import CliRunner

from api.cli import app
from api.client import Client, WhenceError
from api.schemas_evidence import DirectionsOut, RerankOut
from api.schemas_health import HealthOut
from api.schemas_rankings import GroupsOut
from api.schemas_validations import ValidationOut
from service.contracts import Completion, JobRecord
from service.terms import JobKind
from tests import tiny
from tests.test_influence_build import OTHERS, QUERIES, TRAIN, save

pytestmark = pytest.mark.stack

ASKED = {"index": "evidence", "concept": "ev", "method": "concept_influence", "query_set": "ev-q"}


@pytest.fixture(scope="module")
def built(stack, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("evidence")
    start, end = save(folder / "start", 1), save(folder / "end", 2)
    with Client(stack.url) as client:
        client.add_model("ev-start", str(start))
        client.add_model("ev-end", str(end), base="ev-start")
        sides = {"ev-pos": QUERIES, "ev-neg": OTHERS}
        for name, examples in {"ev-d": TRAIN, "ev-q": QUERIES, **sides}.items():
            client.upload_dataset(name, lines(folder / f"{name}.jsonl", examples))
        fit = client.fit_concept("ev", model="ev-end", positive="ev-pos", negative="ev-neg", layer=2)
        client.wait(fit.id)
        about = {"layers": [2], "query_sets": ["ev-q"], "kinds": ["activation", "gradient", "influence"]}
        few = {"coordinates": 60, "embedding_coordinates": 60, "projection_dim": 4}
        client.wait(client.build_index("evidence", model="ev-end", dataset="ev-d", **about, **few).id)


def lines(path: Path, examples) -> Path:
    rows = []
    for number, example in enumerate(examples):
        content = cast("Completion", example.content)
        rows.append(json.dumps({"prompt": content.prompt, "completion": content.completion, "number": number}))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_rerank_is_a_job_and_then_an_answer(built, client: Client):
    first = client.rerank(**ASKED, candidates=12, k=5)
    assert isinstance(first, JobRecord)
    assert first.kind == JobKind.RERANK
    assert client.rerank(**ASKED, candidates=12, k=5).id == first.id
    client.wait(first.id)
    answer = client.rerank(**ASKED, candidates=12, k=5)
    assert isinstance(answer, RerankOut)
    assert (answer.candidates, len(answer.hits), answer.points) == (12, 5, 2)
    assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5]
    assert [hit.score for hit in answer.hits] == sorted((hit.score for hit in answer.hits), reverse=True)
    plain = client.ask(**ASKED, k=12)
    known = {hit.example_id: hit for hit in plain.hits}
    for hit in answer.hits:
        before = known[hit.example_id]
        assert (hit.approximate_rank, hit.text, hit.places) == (before.rank, before.text, before.places)
        assert hit.approximate_score == pytest.approx(before.score, rel=1e-5)
    assert answer.concept.id == "ev"
    assert answer.seconds > 0


def test_clusters_are_found_by_a_job_and_shown_by_the_command(built, client: Client):
    asked = ["--index", "evidence", "--concept", "ev", "--method", "concept_influence", "--query-set", "ev-q"]
    result = CliRunner().invoke(app, ["groups", *asked, "--clusters", "3", "--url", client.url])
    assert result.exit_code == 0, result.output
    assert "cluster" in result.output
    assert "mean cosine of an example with the centre of its cluster" in result.output
    answer = client.groups(**ASKED, clusters=3, k=5)
    assert isinstance(answer, GroupsOut)
    assert (answer.group_by, answer.clusters, answer.total) == (None, 3, len(answer.groups))
    assert sum(group.count for group in answer.groups) == answer.rows
    assert sum(group.share_of_top for group in answer.groups) == pytest.approx(1)
    assert all(group.low <= group.mean <= group.high for group in answer.groups if group.count > 1)
    with pytest.raises(WhenceError, match="name one of them"):
        client.groups(**ASKED, clusters=3, group_by="number")


def test_a_loss_query_needs_two_jobs_and_settle_waits_for_both(built, client: Client):
    kinds = []

    def wait(job: JobRecord) -> None:
        kinds.append(job.kind)
        client.wait(job.id)

    about = {"index": "evidence", "method": "influence_function", "query_set": "ev-q", "candidates": 10}
    answer = client.settle(lambda: client.rerank(**about), wait=wait)
    assert kinds == [JobKind.QUERY_GRADIENT, JobKind.RERANK]
    assert (answer.concept, answer.candidates, answer.points) == (None, 10, 1)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"method": "vector_filter"}, "nothing_to_rerank", "method"),
        ({"candidates": 0}, "invalid_request", "candidates"),
        ({"candidates": 10_001}, "invalid_request", "candidates"),
        ({"k": 0}, "invalid_request", "k"),
        ({"candidate": 3}, "invalid_request", "candidate"),
        ({"concept": "nobody"}, "concept_not_found", "concept"),
        ({"index": "nowhere"}, "index_not_found", "index"),
        ({"damping": 3.0, "through": "influence"}, "damping_not_indexed", "damping"),
    ],
)
def test_a_rerank_that_cannot_be_is_a_problem(built, stack, change, code, param):
    response = httpx.post(f"{stack.url}/v1/queries/rerank", json=ASKED | change)
    assert response.status_code in {404, 422}
    assert (response.json()["code"], response.json()["param"]) == (code, param)


def test_directions_are_a_job_and_then_an_answer(built, client: Client):
    first = client.directions("evidence", count=3, examples=2)
    assert isinstance(first, JobRecord)
    assert first.kind == JobKind.DIRECTIONS
    client.wait(first.id)
    answer = client.directions("evidence", count=3, examples=2)
    assert isinstance(answer, DirectionsOut)
    assert (answer.index, answer.query_set, answer.layer, answer.rows) == ("evidence@v1", "ev-q", 2, 80)
    assert (len(answer.directions), answer.dims, answer.points) == (3, tiny.WIDTH, 2)
    assert all(len(each.most) == len(each.least) == 2 for each in answer.directions)
    assert all(each.most[0].score > each.least[0].score for each in answer.directions)
    assert answer.directions[0].vector is None
    assert [each.concepts[0].concept for each in answer.directions] == ["ev"] * 3
    again = client.directions("evidence", count=3, examples=0, vectors=True)
    assert isinstance(again, DirectionsOut)
    assert len(again.directions[0].vector) == tiny.WIDTH


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"layer": 1}, "layer_not_indexed", "layer"),
        ({"query_set": "ev-d"}, "query_set_not_indexed", "query_set"),
        ({"query_set": "nobody"}, "dataset_not_found", "query_set"),
        ({"count": 0}, "invalid_request", "count"),
        ({"count": 101}, "invalid_request", "count"),
        ({"damping": -1}, "invalid_request", "damping"),
        ({"typo": 1}, "invalid_request", "typo"),
    ],
)
def test_directions_that_cannot_be_are_a_problem(built, stack, change, code, param):
    response = httpx.post(f"{stack.url}/v1/indexes/evidence/directions", json=change)
    assert response.status_code in {404, 422}
    assert (response.json()["code"], response.json()["param"]) == (code, param)
    missing = httpx.post(f"{stack.url}/v1/indexes/nowhere/directions", json={})
    assert (missing.status_code, missing.json()["code"]) == (404, "index_not_found")


def test_health_is_a_job_then_a_report_and_then_part_of_every_answer(built, stack, client: Client):
    asked = {"index": "evidence", "concept": "ev", "query_set": "ev-q"}
    assert client.ask(**ASKED, k=1).health.known is False
    first = client.concept_health(**asked)
    assert isinstance(first, JobRecord)
    assert first.kind == JobKind.CONCEPT_HEALTH
    client.wait(first.id)
    report = client.concept_health(**asked)
    assert isinstance(report, HealthOut)
    assert [point.name for point in report.movement.points] == ["ev-start", "ev-end"]
    assert report.movement.examples == len(QUERIES)
    assert (report.points, report.query_set) == (2, "ev-q")
    assert "query_set_too_small" in {each.code for each in report.doubts}
    assert set(report.absent) == {"domain"}  # six queries
    assert report.concept_domain.name == "ev-pos and ev-neg"
    shown = whence(stack, "concepts", "health", "ev", "--index", "evidence", "--query-set", "ev-q")
    assert "f_v on 6 examples of ev-q, dot:" in shown
    for each in report.doubts:
        assert each.said[:60] in shown
    told = json.loads(whence(stack, "concepts", "health", "ev", "--index", "evidence", "--json"))
    assert told["movement"]["examples"] == len(QUERIES)
    refused = httpx.post(f"{stack.url}/v1/queries/health", json={"index": "evidence"})
    assert (refused.status_code, refused.json()["code"]) == (422, "concept_needed")


# --- the command line -------------------------------------------------------------------------------------


def whence(stack, *words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--url", stack.url], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


QUERY = ("query", "--index", "evidence", "--concept", "ev", "--method", "concept_influence", "--query-set", "ev-q")


def test_the_command_for_exact_ranks_waits_and_shows_both(built, stack, client: Client):
    shown = whence(stack, *QUERY, "--exact", "9", "-k", "4")
    assert "exact" in shown
    assert "9 candidates of evidence@v1" in shown
    assert "summed over 2 points of the run" in shown
    told = json.loads(whence(stack, *QUERY, "--exact", "9", "-k", "4", "--json"))
    assert len(told["hits"]) == 4
    assert f"{told['hits'][0]['score']:+.4g}" in shown


def test_exact_ranks_have_no_shares_of_tokens(built, stack):
    result = CliRunner().invoke(app, [*QUERY, "--exact", "9", "--tokens", "1", "--url", stack.url])
    assert result.exit_code == 2
    assert "--exact" in result.output


def test_the_command_for_directions_shows_a_table(built, stack):
    shown = whence(stack, "indexes", "directions", "evidence", "--count", "2", "--examples", "1")
    told = json.loads(
        whence(stack, "indexes", "directions", "evidence", "--count", "2", "--examples", "1", "--json")
    )
    assert "█" in shown
    assert "what all examples have in common" in shown
    for each in told["directions"]:
        assert f"{each['share']:.1%}" in shown
        assert f"ev {each['concepts'][0]['cosine']:+.2f}" in shown
    assert shown.count("ev-d.jsonl:") == 4


def test_a_validation_is_a_job_with_a_plan_and_then_a_verdict(built, client: Client, stack):
    about = {
        "recipe": {"learning_rate": 1e-3, "batch_size": 40},
        "design": {"subsets": 2, "group_size": 20, "seeds": 1, "fractions": [0.5]},
        "budget": {"runs": 7},
        "trait": {"max_new_tokens": 2},
    }
    job = client.validate(**ASKED, **about)
    assert isinstance(job, JobRecord)
    assert job.kind == JobKind.VALIDATE
    assert client.validate(**ASKED, **about).id == job.id
    client.wait(job.id)
    answer = client.validate(**ASKED, **about)
    assert isinstance(answer, ValidationOut)
    assert (answer.state, answer.plan.runs, answer.plan.wanted) == ("done", 7, 9)
    assert answer.plan.cut == ("1 of 2 random subsets",)
    assert client.validation(job.id).report == client.validation(answer.id).report == answer.report
    report = answer.report
    assert (report.examples, len(report.runs), report.about["base"]) == (80, 7, "ev-start")
    assert all(0 <= run.trait_rate <= 1 and run.f_v == run.outcome for run in report.runs)
    shown = CliRunner().invoke(app, ["validation", job.id, "--url", stack.url])
    assert shown.exit_code == 0
    assert " ".join(report.verdict.words.split()) in " ".join(shown.output.split())
    assert "7 of 9 runs" in shown.output
    options = ["--query-set", "ev-q", "--concept", "ev", "--index", "evidence", "--batch-size", "40"]
    options += ["--learning-rate", "1e-3", "--subsets", "0", "--seeds", "1", "--remove", "0.5", "--runs", "5"]
    asked = CliRunner().invoke(app, ["validate", *options, "--trait", "--max-new-tokens", "2", "--url", stack.url])
    assert asked.exit_code == 0, asked.output
    assert "5 of 5 runs (5 were there)" in asked.output  # the same recipe, the same runs


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"budget": {}}, "invalid_request", "budget"),
        ({"budget": {"runs": 1}}, "invalid_request", "budget.runs"),
        ({"design": {"fractions": [1.5]}}, "invalid_request", "design"),
        ({"design": {"group_by": "nothing"}}, "unknown_field", "design.group_by"),
        ({"design": {"subset": 3}}, "invalid_request", "design.subset"),
        ({"recipe": {"learning_rate": -1}}, "invalid_request", "recipe.learning_rate"),
        ({"method": "vector_filter", "query_set": None}, "query_set_needed", "query_set"),
        ({"concept": "nobody"}, "concept_not_found", "concept"),
    ],
)
def test_a_validation_that_cannot_be_is_a_problem(built, stack, change, code, param):
    response = httpx.post(f"{stack.url}/v1/validations", json=ASKED | {"budget": {"runs": 9}} | change)
    assert response.status_code in {404, 422}
    assert (response.json()["code"], response.json()["param"]) == (code, param)
    assert httpx.get(f"{stack.url}/v1/validations/nothing").json()["code"] == "validation_not_found"


# --- SAEs: behind the others, since they register a concept ------------------------------------------------


def test_an_sae_is_trained_asked_labelled_and_imported_again(built, stack, client: Client):
    job = client.train_sae("ev-sae", index="evidence", steps=50, features=12, k=3)
    assert client.wait(job.id).result["sae"] == "ev-sae"
    record = client.sae("ev-sae")
    assert (record.layer, record.features, record.training.rows_held_out) == (2, 12, 8)
    view = client.feature_view("evidence", sae="ev-sae", count=12, examples=1, filter={"number": {"lt": 40}})
    assert (view.rows, view.layer, view.query_set, view.points) == (40, 2, "ev-q", 2)
    pushed = (view.up or view.down)[0]
    about = {"index": "evidence", "method": "concept_influence", "filter": {"number": {"lt": 40}}, "k": 80}
    scores = [hit.score for hit in client.ask(concept=pushed.concept, **about).hits]
    assert sum(scores) == pytest.approx(pushed.push, abs=1e-4 * sum(map(abs, scores)))
    client.label_features("ev-sae", {pushed.feature: "a push"}, author="ann")
    found = client.settle(lambda: client.features("evidence", sae="ev-sae", features=[pushed.feature]))
    assert (found.rows, found.features[0].label) == (80, "a push")
    assert client.concept(pushed.concept).provenance["feature"] == pushed.feature
    with pytest.raises(WhenceError, match="features 0 to 11"):
        client.concept("sae:ev-sae/12")
    assert client.feature_concept("ev-sae", pushed.feature, "pushed").method == "sae_feature"
    named = client.ask(concept="pushed", **about).hits
    assert [hit.score for hit in named] == scores
    fires = {**about, "sae": "ev-sae", "threshold": 0.2, "relative": True}
    groups = client.settle(lambda: client.groups(concept="ev", **fires))
    assert (groups.overlapping, groups.sae, groups.threshold, groups.rows) == (True, "ev-sae", 0.2, 40)
    assert groups.covered + (groups.rest.count if groups.rest else 0) == groups.rows
    client.label_features("ev-sae", {groups.groups[0].value: "first"})
    assert client.groups(concept="ev", **fires).groups[0].label == "first"
    for wrong in ({"clusters": 3}, {"group_by": "number"}, {"threshold": -1}, {"features": []}, {"sae": None}):
        with pytest.raises(WhenceError) as refused:
            client.groups(concept="ev", **fires | wrong)
        assert (refused.value.status, refused.value.code) == (422, "invalid_request")
    tokens = client.settle(
        lambda: client.tokens(index="evidence", concept=pushed.concept, examples=[named[0].example_id])
    )
    assert len(tokens[0].tokens) > 1
    copy = next((stack.home / "storage" / "saes" / "ev-sae").glob("*/cfg.json")).parent
    again = client.import_sae("ev-copy", str(copy), model="ev-end")
    assert (again.files, again.training, again.pooling) == (record.files, None, None)
    assert {each.id for each in client.saes()} >= {"ev-sae", "ev-copy"}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("saes", {"id": "x", "path": "/", "model": "ev-end"}, "path_outside_roots", "path"),
        ("saes", {"id": "x", "path": "/", "model": "none"}, "model_not_found", "model"),
        ("saes:train", {"id": "x", "index": "evidence", "layer": 1}, "layer_not_indexed", "layer"),
        ("saes:train", {"id": "x", "index": "evidence", "k": 0}, "invalid_request", "k"),
        ("saes/none/labels", {"labels": {"1": "x"}}, "sae_not_found", None),
        ("indexes/evidence/features", {"sae": "none"}, "sae_not_found", "sae"),
        ("indexes/evidence/feature-view", {"sae": "none"}, "sae_not_found", "sae"),
    ],
)
def test_what_cannot_be_asked_of_saes_is_a_problem(built, stack, path, body, code, param):
    response = httpx.post(f"{stack.url}/v1/{path}", json=body)
    assert 400 <= response.status_code < 500
    assert (response.json()["code"], response.json()["param"]) == (code, param)


def test_suggestions_come_from_concepts_features_and_directions(built, stack, client: Client, tmp_path: Path):
    sides = {
        name: lines(tmp_path / f"{name}.jsonl", some[:10]) for name, some in (("pos", QUERIES), ("neg", OTHERS))
    }
    sent = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in sides.items()}
    asked = {"model": "ev-end", "positive": sent["pos"], "negative": sent["neg"], "index": "evidence"}
    answer = client.settle(lambda: client.suggest_concepts(**asked, k=200))
    assert {each.kind for each in answer.suggestions} == {"concept", "sae_feature", "direction"}
    n, m = len({str(each) for each in sent["pos"]}), len({str(each) for each in sent["neg"]})
    assert (answer.n_positive, answer.n_negative, answer.candidates) == (n, m, len(answer.suggestions))
    known = {each.id: each for each in answer.suggestions}
    assert known["ev"].sign == 1  # it was fitted on these
    assert [each.auroc for each in answer.suggestions] == sorted(
        (one.auroc for one in known.values()), reverse=True
    )
    files = ["--positive", str(sides["pos"]), "--negative", str(sides["neg"])]
    told = whence(stack, "concepts", "suggest", "--model", "ev-end", *files, "--index", "evidence", "-k", "3")
    assert answer.suggestions[0].id in told
    with pytest.raises(WhenceError, match="3 are least"):
        client.suggest_concepts(**asked | {"negative": sent["neg"][:2]})
    with pytest.raises(WhenceError, match="same examples"):
        client.suggest_concepts(**asked | {"negative": sent["pos"]})
    with pytest.raises(WhenceError, match="no dataset 'none'"):
        client.suggest_concepts(**asked, query_set="none")


def test_the_commands_for_saes_show_what_the_server_says(built, stack):
    whence(stack, "saes", "train", "cli-sae", "--index", "evidence", "--steps", "20", "--features", "8", "-k", "2")
    whence(stack, "saes", "label", "cli-sae", "3", "boats", "--author", "ann")
    assert "cli-sae" in whence(stack, "saes", "list")
    shown = whence(stack, "saes", "show", "cli-sae")
    assert "held-out rows it explains" in shown
    assert "3: boats (ann" in shown
    told = json.loads(whence(stack, "saes", "view", "evidence", "--sae", "cli-sae", "--json"))
    shown = whence(stack, "saes", "view", "evidence", "--sae", "cli-sae")
    for each in (*told["up"], *told["down"]):
        assert f"{each['push']:+.4g}" in shown
    assert "80 examples of evidence@v1" in shown
    assert "80 examples of evidence@v1" in whence(stack, "saes", "features", "evidence", "--sae", "cli-sae")
    asked = ("groups", "--index", "evidence", "--concept", "ev", "--sae", "cli-sae", "--feature", "3")
    shown = whence(stack, *asked)
    assert "3 boats" in shown or "there is no group of it" in " ".join(shown.split())
    assert "of 80 examples are in a group, shown or not" in shown
    assert json.loads(whence(stack, *asked, "--json"))["features"] == [3]
    one = ("--feature", "3", "--example", told["up"][0]["examples"][0]["example_id"])
    assert "fire" in whence(stack, "saes", "features", "evidence", "--sae", "cli-sae", *one)


# --- persona vectors --------------------------------------------------------------------------------------


def test_a_persona_vector_from_a_trait_file_and_the_answers_behind_it(built, stack, client: Client, tmp_path: Path):
    trait = {
        "instruction": [{"pos": "the cat sat", "neg": "the end of"}, {"pos": "the mat", "neg": "the answer"}],
        "questions": ["the question", "sat on the", "the cat"],
    }
    file = tmp_path / "catlike.json"
    file.write_text(json.dumps(trait))
    few = ("--samples", "2", "--max-new-tokens", "4", "--layers", "1-2")
    shown = whence(stack, "concepts", "persona", str(file), "--model", "ev-end", *few)
    assert "12 of 12 pairs kept" in shown
    assert "No judge looked at the answers" in shown
    record = client.concept("catlike")
    assert (record.method, record.n_positive) == ("persona", 12)
    assert f"layer   {record.layer}: held-out AUROC {record.auroc_held_out:.3f}" in shown
    assert record.provenance["trait"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    some = whence(stack, "concepts", "answers", "catlike", "--side", "positive", "-n", "2")
    assert "2 of 12 answers" in some
    kept = tmp_path / "kept.jsonl"
    whence(stack, "concepts", "answers", "catlike", "--kept", "--into", str(kept))
    assert client.upload_dataset("catlike-answers", kept).lines == 24


def test_a_sweep_over_layers_is_told_as_a_table_with_a_bar_for_each(built, stack, tmp_path):
    here = lines(tmp_path / "here.jsonl", QUERIES)
    fitted = ["--model", "ev-end", "--positive", str(here), "--negative", "ev-neg", "--layers", "all"]
    told = whence(stack, "concepts", "fit", "ev-lda", *fitted, "--method", "lda")
    with Client(stack.url) as client:
        record = client.concept("ev-lda")
    assert [each.layer for each in record.evidence.layers] == list(range(1, tiny.BLOCKS + 1))
    for each in record.evidence.layers:
        assert f"{each.auroc:.3f}" in told
    assert told.count("█") + told.count("░") == 20 * tiny.BLOCKS
    assert f"→ {record.layer} " in told
    assert "cosine to difference_of_means" in told
    assert all(warning in told for warning in record.evidence.warnings)
    assert whence(stack, "concepts", "show", "ev-lda").split() == told.split()
    about = json.loads(whence(stack, "concepts", "show", "ev-lda", "--json"))
    assert about["evidence"]["layer"] == record.layer
