"""Concept health: the statistics against slow oracles, the job against other paths to the same numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks import domains
from benchmarks.lab import Lab, Quiet
from service import artifacts, codec
from service.concept_health import FILE, ConceptHealth, HealthRequest, Known, Reports, question
from service.contracts import ArrayInfo, Completion, Conversation, JobRecord, Message, PlainText
from service.errors import Invalid, Unavailable
from service.health_doubts import diverges, doubts, moved, needed, turned, without_doubts
from service.health_records import Agreement, AtPoint, Domain, Estimate, Movement, Report
from service.loading import IndexLoader
from service.movement import change, estimate, sign_flip, turn
from service.queries import Answer, QueryService
from service.questions import Query
from service.storage import Storage
from service.terms import ConceptFunction, IndexKind, Method, Order, Pooling
from service.two_samples import FOLDS, matched, told_apart, without
from tests.test_influence_build import FITTED, LAYER, TRAIN, make_examples, make_lab, save
from workers.concept_health import characters

F64 = NDArray[np.float64]


# --- two samples ------------------------------------------------------------------------------------------


def told_slowly(ours: F64, theirs: F64, seed: int) -> float:
    """Discriminant analysis with a ridge in its primal form, fold by fold."""
    rows = np.concatenate([ours, theirs])
    rows = (rows - rows.mean(0)) / rows.std(0)
    n, m = len(ours), len(theirs)
    generator = np.random.default_rng(seed)
    fold = np.concatenate([generator.permutation(n) % FOLDS, generator.permutation(m) % FOLDS])
    label, areas = np.arange(n + m) < n, []
    for number in range(FOLDS):
        a, b = rows[(fold != number) & label], rows[(fold != number) & ~label]
        within = sum((side - side.mean(0)).T @ (side - side.mean(0)) for side in (a, b)) / (len(a) + len(b))
        w = np.linalg.solve(within + np.eye(rows.shape[1]), a.mean(0) - b.mean(0))
        held = fold == number
        areas.append(roc_auc_score(label[held], rows[held] @ w))
    return float(np.mean(areas))


@pytest.mark.parametrize(("n", "m", "d"), [(30, 70, 6), (20, 25, 90)])
def test_the_classifier_is_a_discriminant_analysis(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(d)
    ours, theirs = rng.normal(0.3, 1, (n, d)), rng.normal(0, 2, (m, d))
    told = told_apart(ours, theirs, seed=3, permutations=19)
    assert told.auroc == pytest.approx(told_slowly(ours, theirs, 3), abs=1e-9)
    assert told == told_apart(ours, theirs, seed=3, permutations=19)


def test_p_values_are_uniform_where_nothing_differs_and_small_where_it_does() -> None:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(40):
        x = rng.normal(size=(60, 8))
        found.append(told_apart(x[:20], x[20:], seed=seed, permutations=99).p_value)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    shifted = told_apart(rng.normal(1, 1, (20, 8)), rng.normal(0, 1, (40, 8)), seed=0, permutations=99)
    assert shifted.p_value == 0.01
    assert shifted.auroc > 0.9


def test_rows_that_are_all_alike_are_not_told_apart() -> None:
    told = told_apart(np.ones((10, 4)), np.ones((10, 4)), seed=0, permutations=9)
    assert (told.auroc, told.p_value) == (0.5, 1.0)
    with pytest.raises(ValueError, match="folds"):
        told_apart(np.ones((4, 2)), np.ones((9, 2)), seed=0)


def test_a_shift_along_the_concept_does_not_count() -> None:
    rng = np.random.default_rng(1)
    v = rng.normal(size=6)
    ours, theirs = rng.normal(size=(40, 6)) + 3 * v, rng.normal(size=(80, 6))
    assert told_apart(ours, theirs, seed=0, permutations=9).auroc > 0.99
    a, b = without(ours, 7 * v), without(theirs, 7 * v)
    assert np.abs(a @ v).max() < 1e-12
    assert told_apart(a, b, seed=0, permutations=9).auroc < 0.65


def test_a_reference_has_the_lengths_of_the_query_set() -> None:
    rng = np.random.default_rng(2)
    lengths, pool = rng.integers(20, 60, 25), rng.integers(10, 2000, 3000)
    places, alike, paired = matched(lengths, pool, 75, seed=0)
    assert paired.all()
    assert alike.all()
    assert len(set(places.tolist())) == len(places)
    assert 25 <= len(places) <= 75
    gap = [np.abs(np.log1p(lengths) - np.log1p(pool[place])).min() for place in places]
    assert max(gap) <= 0.1
    assert abs(np.median(pool[places]) - np.median(lengths)) < 6


def test_lengths_that_the_index_has_none_of_take_the_nearest_and_are_told() -> None:
    places, alike, paired = matched(np.array([5, 6, 7000]), np.array([1000, 2000, 6800, 3000]), 90, seed=0)
    assert alike.tolist() == [False, False, True]
    assert 2 in places
    assert len(places) == 3
    assert paired.all()
    everything, none, paired = matched(np.arange(10), np.array([100, 200]), 50, seed=0)
    assert (everything.tolist(), none.any(), paired.sum()) == ([0, 1], False, 2)


def test_more_queries_than_the_index_has_of_a_length_are_no_texts_of_other_lengths() -> None:
    lengths, pool = np.repeat([20, 300], [150, 10]), np.repeat([20, 300, 900], [30, 40, 500])
    places, alike, paired = matched(lengths, pool, 512, seed=0)
    assert alike.all()
    assert (paired[:150].sum(), paired[150:].sum()) == (30, 10)  # as many of a length as have a partner
    assert np.unique(pool[places], return_counts=True)[1].tolist() == [30, 10]


# --- f_v along a run --------------------------------------------------------------------------------------


def test_a_sign_flip_p_value_is_the_share_of_all_flips() -> None:
    x = np.random.default_rng(3).normal(0.4, 1, 12)
    exact: Any = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=1 << 20)
    assert sign_flip(x, seed=0) == pytest.approx(exact.pvalue, abs=0.015)
    assert sign_flip(np.zeros(9), seed=0) == 1
    assert sign_flip(np.ones(40), seed=0) == 1e-4


def test_an_estimate_is_students() -> None:
    x = np.random.default_rng(4).normal(2, 3, 31)
    found = estimate(x)
    low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))
    assert estimate(np.ones(1)) == Estimate(1.0, None, None, None)


def along(means: list[float], *, noise: float, n: int = 60, spread: float = 1.0) -> Movement:
    rng = np.random.default_rng(5)
    drawn = rng.normal(size=(len(means), n))
    drawn -= drawn.mean(axis=1, keepdims=True)  # so that the means are those asked for
    values = spread * rng.normal(size=n) + np.array(means)[:, None] + noise * drawn
    points = tuple(AtPoint(str(number), estimate(each)) for number, each in enumerate(values))
    return Movement(n, 0, points, change(values, seed=0), turn(values, seed=0), {})


def codes(**parts: Any) -> list[str]:
    empty = dict.fromkeys(("movement", "domain", "concept_domain", "agreement"))
    about = {"index": "i@v1", "concept": "c", "concept_sha256": "0", "layer": 1, "pooling": Pooling.RESPONSE_MEAN}
    rest = {"query_set": "q", "function": ConceptFunction.DOT, "points": 1, "absent": {}, "seconds": 0.0}
    report = Report(**{**about, **rest, **empty, **parts})
    assert codec.decode(Report, codec.encode(report)) == report
    return [each.code for each in doubts(report)]


def test_a_rise_is_no_reason_to_doubt() -> None:
    movement = along([0, 0.3, 0.5, 0.6], noise=0.2)
    assert (moved(movement), turned(movement), codes(movement=movement)) == (True, False, [])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_turn_is_told(sign: int) -> None:
    movement = along([0, sign * 0.36, sign * 0.23], noise=0.2)
    assert turned(movement)
    assert movement.turn is not None
    assert movement.turn.point == 1
    assert codes(movement=movement) == ["f_v_turned"]


def test_a_turn_of_a_trifle_or_of_chance_is_none() -> None:
    assert along([0, 0.7, 0.69], noise=0.001).turn is not None
    assert not turned(along([0, 0.7, 0.69], noise=0.001))
    assert not turned(along([0, 0.02, -0.7], noise=0.001))  # nor one before nearly all of the way
    assert not turned(along([0, 0.36, 0.3], noise=2.0, n=20))
    assert along([0, 1], noise=0.1).turn is None


def test_what_did_not_move_is_told_from_what_nobody_can_say() -> None:
    assert codes(movement=along([0, 0.0], noise=0.1)) == ["f_v_did_not_move"]
    assert codes(movement=along([0, 0.01], noise=0.01)) == ["f_v_did_not_move"]  # significant, and a trifle
    few = along([0, 0.1], noise=1.0, n=25)
    assert (moved(few), codes(movement=few)) == (None, ["query_set_too_small"])
    assert 100 < needed(few) < 1500
    assert moved(along([0, 0.0], noise=1.0, n=needed(few))) is False
    assert codes(movement=along([0, 1.0], noise=0.1, n=8)) == ["query_set_too_small"]
    assert codes(movement=replace(along([0, 1.0], noise=0.1), change=None, turn=None)) == []


def test_silence_about_what_nobody_measured_is_no_health() -> None:
    assert without_doubts(1, 2) == "nothing speaks against it"
    assert without_doubts(1, None) == "nothing speaks against it in what could be measured (1 of 2 parts)"


def test_doubts_about_domains_and_families() -> None:
    near = Domain("q", 48, 480, 0.69, 0.002, 1.0, 100, 90)
    assert codes(domain=near, concept_domain=near) == []
    far, long = replace(near, auroc=0.7), replace(near, alike=0.4)
    assert codes(domain=far, concept_domain=long) == ["query_set_out_of_domain", "concept_of_other_length"]
    assert codes(domain=replace(far, p_value=0.02)) == []
    array = ArrayInfo(IndexKind.GRADIENT, None, 4)
    for rho, share, by_chance, expected in (
        (0.4, 0.3, 0.05, False),
        (0.1, 0.3, 0.05, True),
        (0.4, 0.07, 0.05, True),
        (0.4, 0.9, 0.8, False),  # a hundred of 125 have most in common whatever happens
        (None, 0.0, 0.1, False),
    ):
        agreement = Agreement(array, 2000, rho, 100, share, by_chance)
        assert diverges(agreement) is expected
        assert codes(agreement=agreement) == ["families_diverge"] * expected


def test_lengths_are_of_what_is_pooled() -> None:
    talk = Conversation((Message("user", "abc"), Message("assistant", "de"), Message("assistant", "f")))
    for content, answers, all_of_it in ((talk, 3, 6), (Completion("ab", "c"), 1, 3), (PlainText("abcd"), 4, 4)):
        assert characters(content, Pooling.RESPONSE_MEAN) == answers
        assert characters(content, Pooling.ALL_MEAN) == all_of_it


# --- the job ----------------------------------------------------------------------------------------------

QUERIES = make_examples(5, 24)


class World:
    """A run of a base and two points, an index of both families, and a query set of 24."""

    def __init__(self, root: Path) -> None:
        self.lab: Lab = make_lab(
            root / "lab", [save(root / str(number), number) for number in (1, 2, 3)], shard_size=32
        )
        self.lab.dataset("q24", QUERIES)
        about = {"kinds": ("activation", "influence"), "query_sets": ("q24",), "projection_dim": 4}
        about |= {"modules": "q_proj,down_proj", "curvature": FITTED | {"examples": 16}}
        self.index, _ = self.lab.build("both", "m", "d", LAYER, **about)
        self.bare, _ = self.lab.build("bare", "m", "d", LAYER, kinds=("activation",))
        self.ran = 0

    def service(self) -> ConceptHealth:
        lab = self.lab
        return ConceptHealth(lab.registry, lab.storage, lab.jobs, Reports(lab.storage), shard_size=32)

    def ask(self, index: str, concept: str | None = "v0", query_set: str | None = None, **about: Any) -> Known:
        asked = question(HealthRequest(index, concept, query_set, **about))
        found = self.service().run(asked)
        if isinstance(found, JobRecord):
            self.ran += 1
            self.lab.engine.run(found, Quiet(found, {}))
            found = self.service().run(asked)
        assert isinstance(found, Known)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("health"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


def test_a_report_agrees_with_other_ways_to_its_numbers(world: World) -> None:
    lab, report = world.lab, world.ask("both").report
    assert report.movement is not None and report.agreement is not None
    # f_v at the end: the scores of the queries as an index of their own.
    own, _ = lab.build("own", "m", "q24", LAYER, kinds=("activation",))
    ids = [one.id for one in QUERIES]
    exact = lab.scores(own, ids, concept="v0", method=Method.VECTOR_FILTER)
    end = report.movement.points[-1]
    assert (end.name, report.movement.examples, report.points) == ("m", 24, 3)
    assert end.f.value == pytest.approx(exact.mean(), rel=2e-3)
    assert end.f.error == pytest.approx(stats.sem(exact), rel=2e-3)
    assert [point.name for point in report.movement.points] == ["1", "2", "m"]
    moved_by = report.movement.points[-1].f.value - report.movement.points[0].f.value
    assert report.movement.change is not None
    assert report.movement.change.mean.value == pytest.approx(moved_by, rel=1e-9)
    train = [one.id for one in TRAIN]
    a = lab.scores(world.index, train, concept="v0")
    b = lab.scores(world.index, train, concept="v0", method=Method.VECTOR_FILTER)
    result: Any = stats.spearmanr(a, b)
    assert report.agreement.spearman == pytest.approx(result.statistic, abs=1e-9)
    assert (report.agreement.examples, report.agreement.k) == (80, 80)
    assert report.domain is not None
    assert (report.domain.examples, report.domain.name) == (24, "q24")
    assert set(report.absent) == {"concept_domain"}


def test_a_report_is_made_once_and_serves_every_method(world: World) -> None:
    world.ask("both")
    ran = world.ran
    again = world.ask("both@v1", query_set="q24", damping=1.0)
    assert world.ran == ran
    assert again.report == world.ask("both").report
    lab = world.lab
    loader = IndexLoader(lab.registry, lab.storage, threads=1)
    queries = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=32)
    for method in (Method.VECTOR_FILTER, Method.CONCEPT_INFLUENCE):
        answer = queries.run(Query("both", "v0", method, Order.MOST, 3))
        assert isinstance(answer, Answer)
        assert answer.health is not None and answer.health.known
        assert set(answer.health.warnings) == {each.said for each in doubts(again.report)}
        assert set(answer.health.warnings) <= set(answer.warnings)
    other = queries.run(Query("both", "v1", Method.VECTOR_FILTER, Order.MOST, 3))
    assert isinstance(other, Answer)
    assert other.health is not None and not other.health.known
    assert "`whence concepts health v1 --index both@v1 --query-set q24`" in other.health.said


def test_a_second_concept_runs_no_model_along_the_run(world: World) -> None:
    world.ask("both", "v0")
    tasks = []
    worker = world.lab.engine._pool._worker  # pyright: ignore
    process = worker.process
    worker.process = lambda task: tasks.append(task.title) or process(task)
    try:
        second = world.ask("both", "v2")
    finally:
        worker.process = process
    assert second.report.movement is not None
    assert tasks == []


def test_a_job_that_died_after_publishing_says_the_same_bytes(world: World) -> None:
    asked = question(HealthRequest("both", "v3"))
    job = world.service().run(asked)
    assert isinstance(job, JobRecord)
    first = world.lab.engine.run(job, Quiet(job, {}))
    known = artifacts.get(world.lab.storage, job.spec["key"])
    assert world.lab.engine.run(job, Quiet(job, {})) == first
    assert artifacts.get(world.lab.storage, job.spec["key"]) == known
    assert artifacts.stems(known) == [FILE]


def test_what_an_index_lacks_is_named(world: World) -> None:
    bare = world.ask("bare").report
    assert bare.movement is None and bare.agreement is None
    assert set(bare.absent) == {"query_set", "concept_domain"}
    lab = world.lab
    loader = IndexLoader(lab.registry, lab.storage, threads=1)
    answer = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=32).run(
        Query("bare", "v0", Method.VECTOR_FILTER, Order.MOST, 3)
    )
    assert isinstance(answer, Answer) and answer.health is not None
    assert "nothing could be measured" in answer.health.said
    named = world.ask("bare", query_set="q24").report
    assert named.movement is not None and named.movement == world.ask("both").report.movement
    assert "kind" in named.absent["agreement"]
    few = world.ask("bare", query_set="loss", concept_function=ConceptFunction.COSINE).report
    assert few.domain is None and "loss" in few.absent["domain"]
    assert any(each.code == "query_set_too_small" for each in doubts(few))


def test_an_inline_direction_has_health_too(world: World) -> None:
    vector = tuple(np.arange(1.0, 17.0).tolist())
    found = world.ask("both", None, vector=vector, layer=LAYER)
    assert found.report.concept == "inline"
    assert found.report.movement is not None


def test_a_point_that_cannot_be_read_is_left_out_and_named(world: World) -> None:
    lab, asked = world.lab, question(HealthRequest("both", "v0", concept_function=ConceptFunction.COSINE))
    job = world.service().run(replace(asked, query_set="q24"))
    assert isinstance(job, JobRecord)
    broken = [{**point, "fingerprint": "0" * 64} for point in job.spec["points"][:-1]]
    spec = {**job.spec, "points": [*broken, job.spec["points"][-1]]}
    lab.engine.run(replace(job, spec=spec), Quiet(job, {}))
    report = world.ask("both", query_set="q24", concept_function=ConceptFunction.COSINE).report
    assert report.movement is not None and report.movement.change is None
    assert list(report.movement.left_out) == [each["name"] for each in broken]
    assert "change" in report.absent


def test_a_query_set_without_examples_is_refused(world: World) -> None:
    world.lab.dataset("nothing", [])
    with pytest.raises(Invalid, match="nothing") as refused:
        world.ask("bare", query_set="nothing")
    assert refused.value.code == "empty_query_set"


def test_there_is_none_is_believed_for_a_while(world: World) -> None:
    now = [0.0]
    reports = Reports(world.lab.storage, now=lambda: now[0])
    asked = question(HealthRequest("bare", "v1", "q24"))
    job = world.service().run(asked)
    assert isinstance(job, JobRecord)
    key = job.spec["key"]
    assert reports.find(key) is None
    world.lab.engine.run(job, Quiet(job, {}))
    assert reports.find(key) is None
    now[0] = 11.0
    found = reports.find(key)
    assert found is not None
    assert Reports(world.lab.storage).find(key, fresh=True) == found


class Down(Storage):
    """A store that has stopped answering."""

    def exists(self, key: str) -> bool:
        raise Unavailable("storage_unavailable", f"No answer about {key}.")


def test_a_ranking_does_not_wait_for_storage_to_say_how_healthy_it_is(world: World) -> None:
    lab = world.lab
    loader = IndexLoader(lab.registry, lab.storage, threads=1)
    queries = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=32)
    query = Query("both", "v0", Method.VECTOR_FILTER, Order.MOST, 3)
    fine = queries.run(query)
    queries.reports = Reports(Down(lab.storage.root))
    answer = queries.run(query)
    assert isinstance(answer, Answer) and isinstance(fine, Answer)
    assert (answer.health, answer.hits) == (None, fine.hits)


# --- texts ------------------------------------------------------------------------------------------------


def test_texts_from_elsewhere_are_warned_of_and_those_that_belong_are_not(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two draws of each kind; ten by ``python -m benchmarks.concepts --only domains``."""
    monkeypatch.setattr(domains, "N_INDEX", 100)
    monkeypatch.setattr(domains, "SOURCES", {name: domains.SOURCES[name] for name in ("questions", "shakespeare")})
    found = domains.texts(shared_data, 0, 2)
    assert [each.warned for each in found] == [not each.draw.inside for each in found]
    assert len(found) == 4
