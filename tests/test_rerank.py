"""Exact re-ranks against dense float64 EK-FAC, through planner, job and reader as the api runs them."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.lab import Quiet
from service import artifacts, codec, filters, indexes
from service.contracts import DatasetPart, JobRecord
from service.errors import Damaged, Interrupted, Invalid, NotFound
from service.life import plan_append, plan_compact, plan_delete
from service.loading import IndexLoader
from service.queries import QueryService
from service.questions import Query, Weighted
from service.registry import INDEXES, MODELS
from service.reranking import SCORES, Reranked, RerankService, spearman
from service.row_blocks import id_bytes
from service.terms import (
    Checkpoints,
    ConceptFunction,
    IndexKind,
    JobKind,
    JobState,
    LongExamples,
    Method,
    Order,
    Projection,
)
from tests import exact
from tests.test_influence_build import (
    IDS,
    LAYER,
    QUERIES,
    TRAIN,
    WEIGHTS,
    V,
    World,
    make_example,
    make_examples,
)
from workers import rerank
from workers.stages import Stages

CLOSE = 1e-4  # of the largest score
FEW = {"projection_dim": 4, "coordinates": 60, "embedding_coordinates": 60}  # of 3840 coordinates
CONCEPT = {"concept": "v0", "method": Method.CONCEPT_INFLUENCE, "query_set": "q"}
LOSS = {"concept": None, "method": Method.INFLUENCE_FUNCTION, "query_set": "loss"}


class Asking:
    """The api's side, and a dispatcher that runs the jobs it is answered with."""

    def __init__(self, world: World) -> None:
        lab = world.lab
        self.lab = lab
        loader = IndexLoader(lab.registry, lab.storage, threads=1)
        queries = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=64)
        self.service = RerankService(lab.registry, lab.storage, lab.jobs, loader, queries, lab.settings)
        self.ran: list[JobRecord] = []

    def once(self, index, candidates: int = 100, **about) -> Reranked | JobRecord:
        return self.service.run(Query(index.id, **{"order": Order.MOST, "k": 100} | about), candidates)

    def ask(self, index, candidates: int = 100, **about) -> Reranked:
        self.ran = []
        for _ in range(3):
            answer = self.once(index, candidates, **about)
            if isinstance(answer, Reranked):
                return answer
            self.ran.append(answer)
            self.lab.engine.run(answer, Quiet(answer, {}))
        raise AssertionError([job.kind for job in self.ran])


def quiet() -> Quiet:
    return Quiet(JobRecord("job-0", JobKind.RERANK, {}, JobState.RUNNING, 1, 1, codec.now(), codec.now()), {})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("rerank"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture
def asking(world) -> Asking:
    return Asking(world)


@pytest.fixture(scope="module")
def coarse(world):
    """Truncated on purpose, summed over three points of the run."""
    return world.build(
        "coarse",
        kinds=("activation", "gradient", "influence"),
        query_sets=("q",),
        concept_functions=tuple(ConceptFunction),
        dampings=(0.3, 1.0),
        **FEW,
    )


def scores(answer: Reranked) -> np.ndarray:
    """(80,) exact scores in the order of the training set."""
    found = {hit.example.id: hit.score for hit in answer.hits}
    return np.array([found[item] for item in IDS])


def approximate(answer: Reranked) -> np.ndarray:
    found = {hit.example.id: hit.approximate_score for hit in answer.hits}
    return np.array([found[item] for item in IDS])


def along_the_run(world: World, function=ConceptFunction.DOT, damping: float = 1.0) -> np.ndarray:
    each = [oracle.embeddings(function, damping) @ V[0] for oracle in world.oracles]
    return sum(weight * one for weight, one in zip(WEIGHTS, each, strict=True))


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(exact.spearman(ours[:, None], theirs[:, None])[0])


# --- against dense matrices -------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("function", ConceptFunction)
def test_a_concept_along_the_run_is_scored_as_dense_matrices_do(world, asking, coarse, function, damping):
    answer = asking.ask(coarse, **CONCEPT, concept_function=function, damping=damping)
    expected = along_the_run(world, function, damping)
    assert [job.kind for job in asking.ran] == [JobKind.RERANK]
    assert answer.points == 3
    assert off(scores(answer), expected) <= CLOSE
    # what the index has is far from it, and that is what both correlations say
    before = rank_correlation(approximate(answer), expected)
    assert before < 0.95
    assert answer.spearman == pytest.approx(before, abs=1e-3)
    assert rank_correlation(scores(answer), expected) > 0.9999


@pytest.mark.parametrize("damping", [None, 0.05])
def test_a_concept_through_coordinates_is_scored_at_the_end_of_the_run(world, asking, coarse, damping):
    answer = asking.ask(coarse, **CONCEPT, through=IndexKind.GRADIENT, damping=damping)
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, damping or 1.0) @ V[0]
    assert (answer.points, answer.damping, answer.array.kind) == (1, damping or 1.0, IndexKind.GRADIENT)
    assert off(scores(answer), expected) <= CLOSE
    assert off(scores(answer), along_the_run(world)) > 0.1
    assert rank_correlation(approximate(answer), expected) < 0.95


@pytest.mark.parametrize("damping", [None, 0.05])
def test_a_loss_query_is_scored_as_dense_matrices_do(world, asking, coarse, damping):
    answer = asking.ask(coarse, **LOSS, damping=damping)
    expected = world.oracles[-1].influence(QUERIES[:3], damping or 1.0)
    assert [job.kind for job in asking.ran] == [JobKind.QUERY_GRADIENT, JobKind.RERANK][damping is not None :]
    assert answer.concept is None
    assert off(scores(answer), expected) <= CLOSE
    assert rank_correlation(approximate(answer), expected) < 0.98


def test_embeddings_of_fewer_directions_are_scored_with_the_whole_concept(world, asking):
    index = world.build("low", kinds=("influence",), query_sets=("q",), rank=3)
    answer = asking.ask(index, **CONCEPT)
    assert off(scores(answer), along_the_run(world)) <= CLOSE
    assert rank_correlation(approximate(answer), along_the_run(world)) < 0.95


def test_embeddings_read_off_stored_coordinates_are_of_the_end_of_the_run(world, asking, coarse):
    extended = world.extend(coarse, query_sets=("other",))
    answer = asking.ask(extended, **CONCEPT | {"query_set": "other"})
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0, "other") @ V[0]
    assert (answer.array.kind, answer.points) == (IndexKind.INFLUENCE, 1)
    assert off(scores(answer), expected) <= CLOSE


def test_an_index_of_the_end_alone(world, asking):
    index = world.build("end", kinds=("influence",), query_sets=("q",), checkpoints=Checkpoints.END, **FEW)
    answer = asking.ask(index, **CONCEPT)
    assert off(scores(answer), world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0) @ V[0]) <= CLOSE


def test_examples_of_an_appended_dataset_are_scored_with_the_curvature_of_the_first(world, coarse):
    """As appending will leave it: the manifest names a second dataset, the curvature is that of the first."""
    lab = world.lab
    more = make_examples(7, 12)
    record = lab.dataset("more", [*TRAIN[:5], *more])
    manifest = replace(world.manifest(coarse), appended=(DatasetPart(record.id, record.fingerprint),))
    wanted = [*more, TRAIN[3], TRAIN[70]]
    spec = plan_of(world, coarse, sorted(one.id for one in wanted))
    stages = Stages(lab.storage, lab.engine._pool, quiet())
    model = lab.registry.get(MODELS, "m")
    rerank.compute(stages, lab.registry, spec, manifest, model)
    held = artifacts.read(lab.storage, artifacts.get(lab.storage, spec.key), SCORES)["scores"]
    found = dict(zip(sorted(one.id for one in wanted), held, strict=True))
    expected = 0
    for oracle, weight in zip(world.oracles, WEIGHTS, strict=True):
        J = oracle.jacobian(ConceptFunction.DOT)
        solved = exact.solve(oracle.factors, J, 1.0)
        expected = expected - weight * (oracle.loss_gradients(wanted) @ solved.T @ V[0])
    assert off(np.array([found[one.id] for one in wanted]), expected) <= CLOSE


def test_versions_after_an_append_a_deletion_and_a_compaction(world, asking, coarse):
    """The same scores as from scratch, of old and new examples alike, and none for what was taken out."""
    lab = world.lab
    added = make_examples(8, 10)
    lab.dataset("added", added)
    gone = [IDS[4], added[0].id]
    plans = (
        (JobKind.APPEND_INDEX, lambda at: plan_append(at, "added", lab.registry, lab.storage, lab.settings)),
        (JobKind.DELETE_EXAMPLES, lambda at: plan_delete(at, gone, None, lab.registry, lab.storage)),
        (JobKind.COMPACT_INDEX, lambda at: plan_compact(at, 1000, lab.registry, lab.storage)),
    )
    everyone = [*TRAIN, *added]
    along = 0
    for oracle, weight in zip(world.oracles, WEIGHTS, strict=True):
        solved = exact.solve(oracle.factors, oracle.jacobian(ConceptFunction.DOT), 1.0)
        along = along - weight * (oracle.loss_gradients(everyone) @ solved.T @ V[0])
    known = dict(zip((one.id for one in everyone), along, strict=True))
    version, counts = coarse, []
    for kind, plan in plans:
        version = lab.registry.get(INDEXES, lab.run(kind, plan(version.id))[0]["index"])
        answer = asking.ask(version, **CONCEPT)
        found = {hit.example.id: hit.score for hit in answer.hits}
        counts.append(len(found))
        assert found.keys() == known.keys() - (set() if kind == JobKind.APPEND_INDEX else set(gone))
        assert off(np.array(list(found.values())), np.array([known[item] for item in found])) <= CLOSE
    assert counts == [90, 88, 88]


def plan_of(world: World, index, ids: list[str]):
    """A job for these candidates, whatever the index would rank first."""
    asking = Asking(world)
    about = Query(index.id, **CONCEPT, order=Order.MOST, k=5)
    prepared, answer = asking.service._queries.prepare(about), asking.service._queries.run(about)
    spec = asking.service._plan(prepared, answer)
    key = asking.service._store("candidates", {"ids": id_bytes(tuple(ids))})
    return replace(spec, key=f"test{key}", candidates=key)


def test_a_candidate_of_no_dataset_is_named(world, coarse):
    lab = world.lab
    spec = plan_of(world, coarse, ["f" * 64])
    stages = Stages(lab.storage, lab.engine._pool, quiet())
    with pytest.raises(NotFound) as caught:
        rerank.compute(stages, lab.registry, spec, world.manifest(coarse), lab.registry.get(MODELS, "m"))
    assert "f" * 64 in caught.value.detail


def test_a_weighted_sum_and_a_vector_of_numbers_are_scored_as_what_they_are(world, asking, coarse):
    about = CONCEPT | {"concept": None}
    summed = asking.ask(coarse, **about, concepts=(Weighted("v0", 2.0), Weighted("v1", -1.0)))
    each = [oracle.embeddings(ConceptFunction.DOT, 1.0) for oracle in world.oracles]
    whole = sum(weight * one for weight, one in zip(WEIGHTS, each, strict=True))
    assert off(scores(summed), whole @ (2 * V[0] - V[1])) <= CLOSE
    given = asking.ask(coarse, **about, vector=tuple(3 * V[2]), layer=LAYER)
    assert off(scores(given), whole @ V[2]) <= CLOSE  # its length does not count, as in a query
    assert given.concept.id == "inline"


# --- candidates and ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", Order)
def test_only_the_candidates_are_scored_and_ranked_by_the_order_asked_for(world, asking, coarse, order):
    plain = asking.service._queries.run(Query(coarse.id, **CONCEPT, order=order, k=15))
    answer = asking.ask(coarse, 15, **CONCEPT, order=order, k=6)
    assert answer.candidates == 15
    assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5, 6]
    expected = dict(zip(IDS, along_the_run(world), strict=True))
    sorted_by = {Order.MOST: lambda x: -x, Order.LEAST: lambda x: x, Order.ABSOLUTE: lambda x: -abs(x)}[order]
    best = sorted((hit.example.id for hit in plain.hits), key=lambda item: sorted_by(expected[item]))
    assert [hit.example.id for hit in answer.hits] == best[:6]
    known = {hit.example.id: hit for hit in plain.hits}
    for hit in answer.hits:
        before = known[hit.example.id]
        assert (hit.approximate_rank, hit.approximate_score) == (before.rank, before.score)
        assert hit.score == pytest.approx(expected[hit.example.id], abs=CLOSE * np.abs(along_the_run(world)).max())


def test_more_candidates_than_examples_are_all_of_them(world, asking, coarse):
    answer = asking.ask(coarse, 10_000, **CONCEPT)
    assert (answer.candidates, len(answer.hits)) == (80, 80)


def test_a_filter_decides_which_examples_are_candidates(world, asking, coarse):
    chosen = sorted(IDS)[:7]
    answer = asking.ask(coarse, 50, **CONCEPT, filter=filters.parse({"id": {"in": chosen}}))
    assert sorted(hit.example.id for hit in answer.hits) == chosen
    nothing = asking.once(coarse, 50, **CONCEPT, filter=filters.parse({"id": "0" * 64}))
    assert isinstance(nothing, Reranked)
    assert (nothing.hits, nothing.candidates, nothing.spearman) == ((), 0, None)


def test_one_candidate(world, asking, coarse):
    answer = asking.ask(coarse, 1, **CONCEPT)
    assert (len(answer.hits), answer.spearman) == (1, None)
    assert answer.hits[0].rank == answer.hits[0].approximate_rank == 1


def test_an_answer_says_when_better_examples_may_have_been_missed(world, asking, coarse):
    """The best of few candidates come from the end of them as often as not."""
    warned = []
    for number in range(4):
        answer = asking.ask(coarse, 10, **CONCEPT | {"concept": f"v{number}"}, k=4)
        deepest = max(hit.approximate_rank for hit in answer.hits)
        said = [warning for warning in answer.warnings if "more candidates" in warning]
        assert bool(said) == (deepest > 8)
        warned.append(bool(said))
    assert sorted(set(warned)) == [False, True], "the data is such that it matters"
    everything = asking.ask(coarse, 80, **CONCEPT, k=4)
    assert not [warning for warning in everything.warnings if "more candidates" in warning]


# --- one question, one job --------------------------------------------------------------------------------


def test_a_question_is_computed_once(world, asking, coarse):
    asking.ask(coarse, 20, **CONCEPT)
    world.tasks.clear()
    again = asking.ask(coarse, 20, **CONCEPT, k=3)
    assert (asking.ran, world.tasks, len(again.hits)) == ([], [], 3)


def test_what_a_name_means_is_asked_once(world, asking, coarse, monkeypatch):
    """Or a switch in between would check one version and rank another."""
    asked, pointed = [], world.lab.registry.pointed
    monkeypatch.setattr(world.lab.registry, "pointed", lambda name: (asked.append(name), pointed(name))[1])
    question = Query(coarse.name, order=Order.MOST, k=100, **CONCEPT)
    asking.service.run(question, 100)
    assert asked == [coarse.name]


def test_two_callers_at_once_have_one_job(world, coarse):
    first, second = Asking(world).once(coarse, 21, **CONCEPT), Asking(world).once(coarse, 21, **CONCEPT)
    assert isinstance(first, JobRecord)
    assert isinstance(second, JobRecord)
    assert first.id == second.id
    assert len(json.dumps(first.spec)) < 2000  # ids and vectors are not in the job's record
    other = Asking(world).once(coarse, 22, **CONCEPT)
    assert other.id != first.id


@pytest.mark.parametrize(
    "change", [{"concept": "v1"}, {"concept_function": "cosine"}, {"damping": 0.3}, {"through": "gradient"}]
)
def test_another_question_is_another_job(world, asking, coarse, change):
    base = asking.ask(coarse, 80, **CONCEPT)
    other = asking.ask(coarse, 80, **CONCEPT | change)
    assert off(scores(other), scores(base)) > 1e-3


def test_a_job_that_is_stopped_goes_on_where_it_was(world, asking, coarse):
    """Killed after each of its tasks in turn, it ends with the same scores and no task is done twice."""
    about = CONCEPT | {"concept": "v5"}
    job = asking.once(coarse, 33, **about)
    assert isinstance(job, JobRecord)
    process = world.lab.engine._pool._worker.process
    world.tasks.clear()
    attempts = 0

    class Stops(Quiet):
        def check(self) -> None:
            if len(world.tasks) > self.until:
                raise Interrupted("interrupted", "stop")

        def progress(self, *given, **named) -> None:
            self.check()

    while attempts < 40:
        attempts += 1
        context = Stops(job, {})
        context.until = len(world.tasks)  # one more task, then it stops
        try:
            world.lab.engine.run(job, context)
            break
        except Interrupted:
            continue
    assert attempts > 4
    assert world.lab.engine._pool._worker.process is process
    keys = [task.key for task in world.tasks]
    assert len(keys) == len(set(keys))
    answer = asking.once(coarse, 33, **about)
    assert isinstance(answer, Reranked)
    each = [oracle.embeddings(ConceptFunction.DOT, 1.0) @ V[5] for oracle in world.oracles]
    expected = dict(zip(IDS, sum(w * one for w, one in zip(WEIGHTS, each, strict=True)), strict=True))
    ours = np.array([hit.score for hit in answer.hits])
    assert off(ours, np.array([expected[hit.example.id] for hit in answer.hits])) <= CLOSE


def test_running_a_finished_job_again_does_nothing(world, asking, coarse):
    asking.ask(coarse, 80, **CONCEPT | {"concept": "v6"})
    (job,) = asking.ran
    world.tasks.clear()
    assert world.lab.engine.run(job, Quiet(job, {})) == {"rerank": job.spec["key"]}
    assert world.tasks == []


def test_damaged_scores_or_candidates_are_made_again(world, asking, coarse):
    about = CONCEPT | {"concept": "v7"}
    whole = asking.ask(coarse, 12, **about)
    (job,) = asking.ran
    for key, stem in ((job.spec["key"], SCORES), (job.spec["candidates"], "candidates")):
        name = f"{artifacts.folder(key)}/{stem}.safetensors"
        data = world.lab.storage.read(name)
        world.lab.storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
        if stem == "candidates":  # noticed when they are needed, which is now
            world.lab.storage.remove(f"{artifacts.folder(job.spec['key'])}/{artifacts.MANIFEST}")
        again = asking.ask(coarse, 12, **about)
        assert [ran.kind for ran in asking.ran] == [JobKind.RERANK]
        assert again.hits == whole.hits
        assert world.lab.storage.read(name) == data


# --- refused ----------------------------------------------------------------------------------------------


def refused(asking: Asking, index, candidates: int = 10, **about) -> Invalid:
    with pytest.raises(Invalid) as caught:
        asking.once(index, candidates, **about)
    return caught.value


def test_a_damaged_index_is_told_with_the_way_to_mend_it(world, asking, coarse):
    path = world.lab.storage.local_path(f"indexes/{coarse.id}/{indexes.MANIFEST}")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    try:
        with pytest.raises(Damaged) as told:
            Asking(world).once(coarse, **CONCEPT)
    finally:
        path.write_bytes(data)
    assert told.value.context["repair"] == f"whence indexes repair {coarse.id}"


def test_what_cannot_be_reranked_is_refused_with_the_reason(world, asking, coarse):
    error = refused(asking, coarse, concept="v0", method=Method.VECTOR_FILTER)
    assert (error.code, error.param) == ("nothing_to_rerank", "method")
    random = world.build("random", kinds=("gradient",), projection=Projection.RADEMACHER, projection_dim=4)
    for about in (CONCEPT, LOSS):
        error = refused(asking, random, **about)
        assert (error.code, error.param) == ("no_curvature", "index")
        assert "random projections" in error.detail
    error = refused(asking, coarse, 10_001, **CONCEPT)
    assert (error.code, error.param) == ("candidates_too_large", "candidates")
    plain = world.build("plain", kinds=("activation",))
    assert refused(asking, plain, **CONCEPT).code == "kind_not_indexed"
    assert refused(asking, coarse, **CONCEPT | {"damping": 7.0, "through": IndexKind.INFLUENCE}).param == "damping"


def test_a_query_set_that_gives_nothing_fails_the_job(world, coarse):
    """Its only example is longer than the index reads."""
    lab = world.lab
    lab.dataset("long", [make_example("the cat", "sat on the mat. " * 8)])
    short = world.build("short", kinds=("gradient",), max_length=14, long_examples=LongExamples.QUARANTINE)
    manifest = world.manifest(short)
    spec = plan_of(world, coarse, sorted(IDS[:3]))
    stages = Stages(lab.storage, lab.engine._pool, quiet())
    for about in ({}, {"direction": None}):  # a concept, and the loss
        spec = replace(spec, key="x" * 64, query_set="long", array=manifest.arrays[0], **about)
        with pytest.raises(Invalid) as caught:
            rerank.compute(stages, lab.registry, spec, manifest, lab.registry.get(MODELS, "m"))
        assert caught.value.code == "empty_query_set"
    assert artifacts.find(lab.storage, "x" * 64) is None


# --- rank correlation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_that_of_the_oracle(ties):
    generator = np.random.default_rng(0)
    ours, theirs = generator.standard_normal((2, 200))
    theirs = theirs + ours
    if ties:
        ours, theirs = np.round(ours), np.round(theirs)
    assert spearman(ours, theirs) == pytest.approx(rank_correlation(ours, theirs), abs=1e-12)


def test_no_rank_correlation_of_nothing():
    assert spearman(np.zeros(0), np.zeros(0)) is None
    assert spearman(np.ones(1), np.ones(1)) is None
    assert spearman(np.ones(3), np.arange(3.0)) is None
