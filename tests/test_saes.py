"""SAEs through planner, job and reader as the api runs them: training, features, views, features as concepts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

from benchmarks.lab import Quiet
from service import artifacts, codec, concepts, filters, indexes, sae, saelens, saes, verify
from service.cache import LoadingCache
from service.contracts import JobRecord
from service.errors import Conflict, Damaged, Interrupted, Invalid, NotFound
from service.feature_groups import ByFeatures, FeatureGroups
from service.groups import GroupBy, Grouped, Groups, Shown
from service.loading import IndexLoader
from service.queries import QueryService
from service.questions import Query, Weighted
from service.registry import CONCEPTS, MODELS, SAES
from service.row_blocks import RowBlocks
from service.sae_features import Features, FeaturesRequest, FeaturesService
from service.sae_planning import TrainSaeRequest, default_features, plan_training
from service.sae_records import SaeRecipe
from service.sae_tally import Tally, strongest
from service.sae_view import ViewRequest, ViewService
from service.terms import GroupSort, JobKind, JobState, Method, Order, Pooling
from service.whole import WholeRankings
from tests.test_influence_build import World, embedding
from tests.test_saelens import STORED
from workers import sae_training
from workers.works.sae import split

ABOUT = {"embedding_coordinates": 100, "projection_dim": 6}
RECIPE = SaeRecipe(24, 4, 300, 16, 1e-3, 0, 1 / 32, 0.1, 1 << 18)
REQUEST = TrainSaeRequest("s", "run", None, 24, 4, 60, 16, 1e-3, 0, 1 / 32, 0.1, 1 << 18)
VIEW = ViewRequest("run", "s", None, None, None, 5, 2, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("saes"))
    made.index = made.build("run", kinds=("activation", "influence"), query_sets=("q",), **ABOUT)
    made.loader = IndexLoader(made.lab.registry, made.lab.storage, threads=1)
    made.result, _ = made.lab.run(JobKind.TRAIN_SAE, plan_training(REQUEST, made.lab.registry))
    made.sae = made.lab.registry.get(SAES, "s")
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


def activations(world) -> tuple[list[str], np.ndarray]:
    manifest = indexes.read_manifest(world.lab.storage, world.index)
    blocks = list(RowBlocks(world.lab.storage, manifest, world.index.arrays[0]).with_ids())
    return [item for ids, _ in blocks for item in ids], np.concatenate([rows for _, rows in blocks])


def ask(world, reference: str = "run", **about):
    service = QueryService(world.lab.registry, world.lab.storage, world.lab.jobs, world.loader, shard_size=8)
    query = Query(reference, None, Method.CONCEPT_INFLUENCE, Order.MOST, 1000)
    return service.run(replace(query, **about))


# --- training ---------------------------------------------------------------------------------------------


def planted(seed: int, rows: int = 600) -> tuple[torch.Tensor, np.ndarray]:
    """Sums of 3 of 12 unit directions in 16 dimensions, somewhere off zero and not near size 1."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((12, 16))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((rows, 12)), axis=1)[:, :3]
    sizes = rng.uniform(0.5, 1.5, (rows, 3))
    x = 7 * (np.einsum("nk,nkd->nd", sizes, directions[chosen]) + 2.0)
    return torch.from_numpy(x.astype(np.float32)), directions.astype(np.float32)


def trained(rows: torch.Tensor, recipe: SaeRecipe) -> tuple[sae_training.State, sae.Sae]:
    state = sae_training.advance(sae_training.begin(rows, recipe), rows, recipe, 0, recipe.steps)
    weights = {name: each.numpy() for name, each in sae_training.raw(state).items()}
    config = saelens.SaeConfig("topk", rows.shape[1], recipe.features, "", 1, k=recipe.k)
    return state, sae.load(config, saelens.weights(weights))


def test_training_finds_planted_directions_and_explains_rows_it_has_not_seen():
    rows, directions = planted(0)
    recipe = replace(RECIPE, features=24, k=3, steps=800, batch=128, learning_rate=3e-3)
    training, held_out = split(rows.numpy(), recipe)
    _, held = trained(torch.from_numpy(training), recipe)
    cosines = saes.directions(held) @ directions.T
    assert (cosines.max(axis=0) > 0.9).sum() >= 11
    rebuilt = sae.decode(held, *sae.encode(held, held_out))
    assert sae.explained_variance(held_out, rebuilt) > 0.9
    np.testing.assert_allclose(sae.decoder_norms(held), 1, atol=1e-5)


def test_a_seed_gives_the_same_numbers_in_one_piece_or_in_several():
    rows, _ = planted(1, 200)
    whole, _ = trained(rows, RECIPE)
    state = sae_training.begin(rows, RECIPE)
    for start, stop in ((0, 7), (7, 120), (120, 300)):
        state = sae_training.advance(state, rows, RECIPE, start, stop)
        state = sae_training.State.of(state.flat(), state.scale, state.variance)
    for name, each in whole.flat().items():
        assert torch.equal(each, state.flat()[name]), name
    other, _ = trained(rows, replace(RECIPE, seed=1))
    assert not torch.equal(other.weights["W_dec"], whole.weights["W_dec"])


def test_raw_weights_do_to_rows_what_the_trained_ones_do_to_scaled_rows():
    rows, _ = planted(2, 100)
    state, held = trained(rows, replace(RECIPE, steps=40))
    ours, _ = sae.encode(held, rows.numpy())
    weights, scale = {name: each.numpy() for name, each in state.weights.items()}, np.float32(state.scale)
    scaled = sae.load(held.config, saelens.weights(weights))
    theirs, _ = sae.encode(scaled, rows.numpy() * scale)
    np.testing.assert_allclose(ours * scale, theirs, atol=1e-4)
    np.testing.assert_allclose(sae.decode(held, ours) * scale, sae.decode(scaled, theirs), atol=1e-4)
    assert not 0.5 < state.scale < 2


def test_the_auxiliary_loss_reaches_dead_features_only_and_revives_them():
    rows, _ = planted(3, 64)
    state = sae_training.begin(rows, RECIPE)
    dead = torch.zeros(RECIPE.features, dtype=torch.bool)
    dead[5:9] = True
    weights = {name: each.clone() for name, each in state.weights.items()}
    weights["b_enc"][dead] = -100.0  # they never fire by themselves
    weights = {name: each.requires_grad_(True) for name, each in weights.items()}
    x = rows * state.scale
    grads = {}
    for mask in (torch.zeros_like(dead), dead):
        total, _ = sae_training.loss(weights, x, RECIPE, state.variance, mask)
        grads[bool(mask.any())] = torch.autograd.grad(total, weights["W_dec"])[0]
    assert not grads[False][dead].any()
    weights = {name: each.detach() for name, each in weights.items()}
    weights["b_enc"][dead] = -0.5
    weights = {name: each.requires_grad_(True) for name, each in weights.items()}
    total, _ = sae_training.loss(weights, x, RECIPE, state.variance, dead)
    gradient = torch.autograd.grad(total, weights["W_dec"])[0]
    assert gradient[dead].any(dim=1).all()


def test_the_geometric_median_is_where_distances_sum_to_least():
    rows = torch.from_numpy(np.random.default_rng(4).standard_t(2, (101, 5)).astype(np.float32))
    median = sae_training.geometric_median(rows)
    least = (rows - median).norm(dim=1).sum()
    for step in 0.02 * torch.cat([torch.eye(5), -torch.eye(5)]):
        assert (rows - median - step).norm(dim=1).sum() > least
    with pytest.raises(Invalid, match="the same"):
        sae_training.begin(torch.ones(50, 4), RECIPE)


def test_the_job_reports_what_came_of_it_and_publishes_a_folder_of_saelens(world):
    lab, record = world.lab, world.sae
    files = sorted(path.name for path in (Path(lab.storage.root) / saes.folder(record)).iterdir())
    assert files == [saelens.CONFIG, saelens.WEIGHTS]
    config = json.loads(saes.file(lab.storage, record, saelens.CONFIG))
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert (record.layer, record.pooling, record.architecture) == (2, Pooling.RESPONSE_MEAN, "topk")
    done = record.training
    assert (done.rows, done.rows_held_out, done.index) == (72, 8, "run@v1")
    held = saes.read(lab.storage, record)
    _, rows = activations(world)
    _, held_out = split(rows, done.recipe)
    rebuilt = sae.decode(held, *sae.encode(held, held_out))
    assert done.explained_variance == pytest.approx(sae.explained_variance(held_out, rebuilt), abs=1e-5)
    assert 0 < done.explained_variance < 1
    assert world.result["explained_variance"] == done.explained_variance
    assert done.l0 == pytest.approx((sae.encode(held, held_out)[0] > 0).sum(axis=1).mean())


def states(lab) -> list[Path]:
    """Files of trainings that have not come to their end."""
    return list((Path(lab.storage.root) / "artifacts").rglob("state.safetensors"))


def test_a_training_that_was_interrupted_goes_on_and_comes_out_the_same(world, tmp_path):
    lab = world.lab
    spec = plan_training(replace(REQUEST, id="again", seed=5), lab.registry)
    job = JobRecord(
        "job-x", JobKind.TRAIN_SAE, codec.to_plain(spec), JobState.RUNNING, 1, 1, codec.now(), codec.now()
    )

    told = []

    class Watched(Quiet):
        most = 60

        def progress(self, stage, done, total, **rest):
            assert (stage, total) == ("training", 60)
            told.append(done)
            if done > self.most:
                raise Interrupted("interrupted", "The dispatcher is leaving.")

    with pytest.raises(Interrupted):
        stopped = Watched(job, {})
        stopped.most = 30
        lab.engine.run(job, stopped)
    assert lab.registry.find(SAES, "again") is None
    assert len(states(lab)) == 1  # of the last part; those before it made room
    told.clear()
    lab.engine.run(job, Watched(job, {}))
    assert told[0] == 30
    assert states(lab) == []
    record = lab.registry.get(SAES, "again")
    lab.run(JobKind.TRAIN_SAE, replace(spec, id="twin"))  # all of it is there already
    assert lab.registry.get(SAES, "twin").files == record.files
    assert record.files != world.sae.files
    assert lab.engine.run(job, Quiet(job, {}))["sae"] == "again"  # an attempt that died after publishing


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"id": "s"}, "sae_exists", "id"),
        ({"id": "a/b"}, "bad_id", "id"),
        ({"id": "n", "index": "nowhere"}, "index_not_found", "index"),
        ({"id": "n", "layer": 1}, "layer_not_indexed", "layer"),
        ({"id": "n", "k": 25}, "bad_k", "k"),
        ({"id": "n", "features": 1 << 24}, "too_many_features", "features"),
    ],
)
def test_a_training_that_cannot_be_is_refused(world, change, code, param):
    with pytest.raises((Invalid, NotFound, Conflict)) as caught:
        plan_training(replace(REQUEST, **change), world.lab.registry)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_few_rows_make_few_features_and_few_features_a_higher_rate(world):
    assert [default_features(rows, 48) for rows in (80, 480, 10**9)] == [8, 24, 384]
    left_out = dict.fromkeys(("features", "k", "steps", "batch", "learning_rate"))
    recipe = plan_training(replace(REQUEST, id="n", **left_out), world.lab.registry).recipe
    assert (recipe.features, recipe.k, recipe.steps, recipe.batch) == (8, 2, 2000, 20)
    assert recipe.learning_rate == pytest.approx(2e-4 * (16_384 / 8) ** 0.5)


# --- importing --------------------------------------------------------------------------------------------


def test_a_folder_is_imported_whole_and_its_misfits_are_refused(world, tmp_path):
    """The library's tiny SAEs have width 8, the model 16: a copy of the record stands for one of width 8."""
    lab = world.lab
    model = replace(lab.registry.get(MODELS, world.index.model), width=8)
    files = saes.read_folder(STORED / "standard")
    record = saes.publish(lab.registry, saes.describe("lib", files, model, source="x"), files)
    assert sorted(record.files) == [saelens.CONFIG, saelens.WEIGHTS, saelens.SPARSITY]
    assert (record.width, record.features, record.layer, record.pooling) == (8, 16, 2, None)
    expected = load_file(STORED / "standard" / "expected.safetensors")
    held = saes.read(lab.storage, record)
    np.testing.assert_allclose(sae.encode(held, expected["inputs"])[0], expected["features"], atol=1e-4)
    assert saes.publish(lab.registry, saes.describe("lib", files, model, source="x"), files) == record
    others = saes.read_folder(STORED / "gated")
    with pytest.raises(Conflict):
        saes.publish(lab.registry, saes.describe("lib", others, model, source="x"), others)
    with pytest.raises(Invalid, match="8 dimensions"):
        saes.describe("n", files, replace(model, width=16), source="x")
    with pytest.raises(Invalid, match="has 1 blocks"):
        saes.describe("n", files, replace(model, n_layers=1), source="x")
    (tmp_path / "sae_weights.pt").write_bytes(b"pickle")
    with pytest.raises(Invalid, match="may run code"):
        saes.read_folder(tmp_path)


def test_an_old_folder_says_that_centring_is_not_known_where_it_matters(world, tmp_path):
    files = saes.read_folder(STORED / "old_standard")
    model = replace(world.lab.registry.get(MODELS, world.index.model), width=8)
    assert saes.describe("n", files, model, source="x").notes == ()  # RMSNorm has no mean to lose
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_epsilon": 1e-5}))
    layered = replace(model, path=str(tmp_path))
    (note,) = saes.describe("n", files, layered, source="x").notes
    assert "centred" in note
    told = saes.describe("n", files, layered, source="x", centred=True)
    assert (told.notes, told.centred) == ((), True)
    assert told.sha256 != saes.describe("n", files, layered, source="x").sha256


def test_saes_survive_a_redis_that_forgets(world):
    world.lab.redis.flushall()
    assert world.lab.registry.get(SAES, "s") == world.sae
    assert world.lab.registry.rebuild().saes == len(world.lab.registry.all(SAES))


# --- features as concepts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.VECTOR_FILTER, Method.CONCEPT_INFLUENCE])
def test_a_feature_is_a_concept_wherever_one_is_asked_for(world, method):
    held = saes.read(world.lab.storage, world.sae)
    v = held.W_dec[7] / np.linalg.norm(held.W_dec[7])
    answer = ask(world, concept="sae:s/7", method=method)
    given = ask(world, vector=tuple(map(float, v)), layer=2, method=method)
    assert [hit.example.id for hit in answer.hits] == [hit.example.id for hit in given.hits]
    np.testing.assert_allclose([h.score for h in answer.hits], [h.score for h in given.hits], rtol=1e-4, atol=1e-6)
    assert (answer.concept.id, answer.concept.method) == ("sae:s/7", "sae_feature")
    summed = ask(world, concepts=(Weighted("sae:s/7", 2.0), Weighted("v0", -1.0)), method=method)
    assert summed.concept.id == "2·sae:s/7 + -1·v0"


def test_a_feature_can_be_registered_under_a_name(world):
    lab = world.lab
    saes.label(lab.redis, lab.storage, world.sae, [(3, "rude answers")], "ann")
    about = {"pooling": None, "param": "feature"}
    record = concepts.publish_feature(lab.registry, "rude", "s", 3, **about)
    assert record == lab.registry.get(CONCEPTS, "rude")
    assert (record.method, record.provenance["label"], record.provenance["feature"]) == (
        "sae_feature",
        "rude answers",
        3,
    )
    assert concepts.publish_feature(lab.registry, "rude", "s", 3, **about) == record
    same, named = ask(world, concept="sae:s/3"), ask(world, concept="rude")
    assert [(h.example.id, h.score) for h in same.hits] == [(h.example.id, h.score) for h in named.hits]
    with pytest.raises(Conflict):
        concepts.publish_feature(lab.registry, "rude", "s", 4, **about)
    with pytest.raises(Invalid, match="pooled by response_mean"):
        concepts.publish_feature(lab.registry, "other", "s", 3, pooling=Pooling.LAST_TOKEN, param="feature")


@pytest.mark.parametrize(
    ("concept", "code"),
    [
        ("sae:s/24", "feature_not_found"),
        ("sae:none/1", "sae_not_found"),
        ("sae:s/x", "concept_not_found"),
        ("sae:lost/1", "concept_of_other_lineage"),
        ("sae:deep/1", "layer_not_indexed"),
    ],
)
def test_features_that_do_not_fit_are_refused(world, concept, code):
    registry = world.lab.registry
    for name, change in (("lost", {"lineage": "elsewhere"}), ("deep", {"layer": 3})):
        if registry.find(SAES, name) is None:
            other = replace(world.sae, id=name, **change)
            files = {each: saes.file(world.lab.storage, world.sae, each) for each in other.files}
            saes.publish(registry, other, files)
    with pytest.raises((Invalid, NotFound)) as caught:
        ask(world, concept=concept)
    assert (caught.value.code, caught.value.param) == (code, "concept")


# --- labels -----------------------------------------------------------------------------------------------


def test_labels_are_kept_with_who_said_them_and_the_newest_is_shown(world):
    lab = world.lab
    first = saes.label(lab.redis, lab.storage, world.sae, [(1, "boats"), (2, "horses")], "ann")
    again = saes.label(lab.redis, lab.storage, world.sae, [(1, "boats")], "ann")
    assert again == first
    changed = saes.label(lab.redis, lab.storage, world.sae, [(1, "ships")], "bob")
    assert changed == saes.labels(lab.storage, world.sae)
    assert [(each.text, each.author) for each in changed.labels if each.feature == 1] == [
        ("boats", "ann"),
        ("ships", "bob"),
    ]
    assert (changed.of(1), changed.of(2), changed.of(9)) == ("ships", "horses", None)
    with pytest.raises(NotFound):
        saes.label(lab.redis, lab.storage, world.sae, [(24, "x")], None)


# --- what fires -------------------------------------------------------------------------------------------


def features(world, **about) -> Features:
    service = FeaturesService(world.lab.registry, world.lab.storage, world.lab.jobs, world.loader)
    request = replace(FeaturesRequest("run", "s", (), (), 5, 24), **about)
    answer = service.run(request)
    if isinstance(answer, JobRecord):
        assert answer.kind == JobKind.ENCODE_FEATURES
        world.lab.engine.run(answer, Quiet(answer, {}))
        answer = service.run(request)
    assert isinstance(answer, Features)
    return answer


def test_what_fires_is_what_encoding_every_row_says(world):
    ids, rows = activations(world)
    dense, _ = sae.encode(saes.read(world.lab.storage, world.sae), rows)
    answer = features(world, examples=(ids[3], ids[70]), features=(0, 5, 11))
    assert answer.rows == 80
    assert answer.l0 == pytest.approx((dense > 0).sum(axis=1).mean())
    assert answer.silent == pytest.approx((dense == 0).all(axis=0).mean())
    for told, row in zip(answer.examples, (3, 70), strict=True):
        order = np.argsort(-dense[row])[: (dense[row] > 0).sum()][:5]
        assert (told.example.id, told.l0) == (ids[row], (dense[row] > 0).sum())
        assert [each.feature for each in told.features] == order.tolist()
        np.testing.assert_allclose([each.value for each in told.features], dense[row, order], rtol=1e-4)
    for told in answer.features:
        column = dense[:, told.feature]
        assert told.share == pytest.approx((column > 0).mean())
        assert told.largest == pytest.approx(column.max(), rel=1e-4)
        assert [each.id for _, each in told.examples] == [ids[row] for row in np.argsort(-column) if column[row]][
            :5
        ]
    shares = [(dense[:, each.feature] > 0).mean() for each in answer.most]
    assert shares == sorted(shares, reverse=True)
    assert len(answer.most) == (dense > 0).any(axis=0).sum()
    with pytest.raises(NotFound):
        features(world, examples=("0" * 64,))
    with pytest.raises(NotFound):
        features(world, features=(24,))


def test_a_tally_in_pieces_is_the_tally_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((50, 9)) < 0.4, rng.integers(1, 6, (50, 9)), 0).astype(np.float32)  # many ties
    monkeypatch.setattr("service.sae_tally._PENDING", 20)
    monkeypatch.setattr("service.sae_tally.TOP", 4)
    tally = Tally(9, keep=2)
    for start in range(0, 50, 7):
        tally.add(sae.sparse(dense[start : start + 7]))
    found = tally.finish()
    np.testing.assert_array_equal(found["counts"], (dense > 0).sum(axis=0))
    np.testing.assert_allclose(found["sums"], dense.sum(axis=0))
    np.testing.assert_array_equal(found["largest"], dense.max(axis=0))
    np.testing.assert_array_equal(found["l0"], (dense > 0).sum(axis=1))
    np.testing.assert_array_equal(found["least"], [min(row[row > 0], default=0) for row in dense])
    for feature in range(9):
        span = slice(found["feature_starts"][feature], found["feature_starts"][feature + 1])
        expected = np.lexsort((np.arange(50), -dense[:, feature]))[:4]
        assert found["feature_examples"][span].tolist() == expected.tolist()
    for row in range(50):
        span = slice(found["example_starts"][row], found["example_starts"][row + 1])
        expected = [each for each in np.lexsort((np.arange(9), -dense[row]))[:2] if dense[row, each]]
        assert found["example_features"][span].tolist() == expected
    empty = Tally(9, keep=2).finish()
    assert (len(empty["l0"]), empty["feature_starts"].tolist()) == (0, [0] * 10)
    assert strongest(sae.sparse(dense[:0]), 2).rows == 0


# --- groups of examples on which features fire ------------------------------------------------------------


def group(world, by: ByFeatures, *, limit: int = 50, sort: GroupSort = GroupSort.MEAN, **about) -> Grouped:
    """As the api answers, with the job in between."""
    queries = QueryService(world.lab.registry, world.lab.storage, world.lab.jobs, world.loader, shard_size=8)
    features = FeaturesService(world.lab.registry, world.lab.storage, world.lab.jobs, world.loader)
    whole, by_feature = (
        WholeRankings(queries, world.loader),
        FeatureGroups(world.lab.registry, world.loader, features),
    )
    service = Groups(whole, world.loader, world.lab.storage, world.lab.jobs, by_feature)
    query = replace(Query("run", "v0", Method.VECTOR_FILTER, Order.MOST, 10), **about)
    asked = (query, GroupBy(features=by), Shown(sort, limit, examples=2, terms=2))
    answer = service.run(*asked)
    if isinstance(answer, JobRecord):
        assert answer.kind == JobKind.ENCODE_FEATURES
        world.lab.engine.run(answer, Quiet(answer, {}))
        answer = service.run(*asked)
    assert isinstance(answer, Grouped)
    return answer


def drawn(world, name: str, architecture: str, **about) -> None:
    """An SAE of random weights, of which half or so fire."""
    rng, d = np.random.default_rng(len(name)), world.sae.width
    shapes = {"W_enc": (d, 20), "W_dec": (20, d), "b_enc": 20, "b_dec": d}
    weights = {each: rng.standard_normal(shape).astype(np.float32) for each, shape in shapes.items()}
    if architecture == "jumprelu":
        weights["threshold"] = rng.random(20).astype(np.float32)
    config = saelens.SaeConfig(architecture, d, 20, saelens.hook_of(2), 2, **about)
    files = {saelens.CONFIG: saelens.write(config, {}), saelens.WEIGHTS: saelens.weights(weights)}
    model = world.lab.registry.get(MODELS, world.index.model)
    saes.publish(
        world.lab.registry, saes.describe(name, files, model, source="x", pooling=world.sae.pooling), files
    )


@pytest.mark.parametrize("name", ["s", "cut-jumprelu", "cut-topk"])
@pytest.mark.parametrize("method", [Method.VECTOR_FILTER, Method.CONCEPT_INFLUENCE])
def test_groups_by_feature_are_what_encoding_every_row_says(world, monkeypatch, name, method):
    """Of the two that are cut the table keeps two features an example, where more fire."""
    if world.lab.registry.find(SAES, name) is None:
        monkeypatch.setattr("workers.sae_jobs.kept_per_example", lambda _examples: 2)
        drawn(world, name, name.removeprefix("cut-"), **({"k": 6} if name == "cut-topk" else {}))
    record = world.lab.registry.get(SAES, name)
    ids, rows = activations(world)
    dense, _ = sae.encode(saes.read(world.lab.storage, record), rows)
    largest = dense.max(axis=0)
    some = filters.parse({"id": {"in": ids[10:70]}})
    loud = int(largest.argmax())
    for by, filtered in [
        (ByFeatures(name, (3, loud, 7, 11)), None),
        (ByFeatures(name, (7, loud), float(np.median(dense[dense > 0]))), some),
        (ByFeatures(name, None, 0.5, relative=True), some),
    ]:
        scores = {
            hit.example.id: hit.score for hit in ask(world, concept="v0", method=method, filter=filtered).hits
        }
        kept = [row for row, item in enumerate(ids) if item in scores]
        own = np.array([scores[ids[row]] for row in kept], np.float64)
        fires = dense[kept] > (by.threshold * largest if by.relative else by.threshold)
        answer = group(world, by, method=method, filter=filtered)
        members = answer.members
        assert answer.k == 10
        assert members.covered == fires[:, list(members.features)].any(axis=1).sum()
        assert (answer.rest.group.count if answer.rest else 0) == len(kept) - members.covered
        told = {each.group.value: (each, fires[:, each.group.value]) for each in answer.groups}
        if answer.rest:
            told[None] = (answer.rest, ~fires[:, list(members.features)].any(axis=1))
        assert told.keys() - {None} == {each for each in members.features if fires[:, each].any()}
        top = set(np.argsort(-own)[:10].tolist())
        for each, member in told.values():
            mine, found = own[member], each.group
            assert (found.count, found.sum) == (member.sum(), pytest.approx(mine.sum(), rel=1e-4, abs=1e-7))
            assert found.mean == pytest.approx(mine.mean(), rel=1e-4, abs=1e-7)
            assert found.share == pytest.approx(mine.sum() / np.abs(own).sum(), rel=1e-4, abs=1e-7)
            assert found.share_of_top == pytest.approx(len(top & set(np.flatnonzero(member).tolist())) / 10)
            if len(mine) > 1:
                low, _high = stats.t.interval(0.95, len(mine) - 1, mine.mean(), stats.sem(mine))
                assert found.error == pytest.approx(mine.mean() - low, rel=2e-3)
            best = [kept[row] for row in np.flatnonzero(member)[np.argsort(-mine)][:2]]
            assert [one.example.id for one in each.examples] == [ids[row] for row in best]
        means = [each.group.mean for each in answer.groups]
        assert means == sorted(means, reverse=True)
        if by.features is None and name == "s":
            excess = np.abs(fires.T @ (own - own.mean()))
            assert members.features == tuple(
                each for each in np.argsort(-excess, kind="stable") if fires[:, each].any()
            )
        said = any("More features fire on" in each for each in members.warnings)
        assert said == (by.features is None and name != "s")


def test_groups_by_feature_are_labelled_limited_and_said_to_be_missing(world):
    lab = world.lab
    saes.label(lab.redis, lab.storage, world.sae, [(6, "quiet")], "ann")
    dense, _ = sae.encode(saes.read(lab.storage, world.sae), activations(world)[1])
    often = np.argsort(-(dense > 0).sum(axis=0))[:3].tolist()
    answer = group(world, ByFeatures("s", (*often, 6)), limit=2, sort=GroupSort.SUM)
    assert (len(answer.groups), answer.total) == (2, sum(1 for each in {*often, 6} if dense[:, each].any()))
    assert set(answer.members.features) == {*often, 6}
    labels = saes.labels(lab.storage, world.sae)
    assert all(each.label == labels.of(each.group.value) for each in answer.groups)
    assert answer.members.labels[answer.members.features.index(6)] == "quiet"
    assert len(group(world, ByFeatures("s"), limit=3).members.features) == 3
    none = group(world, ByFeatures("s", (2, 4), 1e6))
    assert (none.groups, none.total, none.members.covered, none.rest.group.count) == ((), 0, 0, 80)
    assert any("feature 2, 4 firing above 1e+06" in each for each in none.members.warnings)
    assert group(world, ByFeatures("s", None, 1e6)).members.features == ()


@pytest.mark.parametrize(
    ("by", "code", "param"),
    [
        (ByFeatures("nobody"), "sae_not_found", "sae"),
        (ByFeatures("stray"), "sae_of_other_lineage", "sae"),
        (ByFeatures("s", (3, 24)), "feature_not_found", "features[1]"),
        (ByFeatures("s", None, -0.1), "bad_threshold", "threshold"),
        (ByFeatures("s", None, float("nan")), "bad_threshold", "threshold"),
        (ByFeatures("s", None, 1.0, relative=True), "bad_threshold", "threshold"),
    ],
)
def test_groups_by_feature_that_cannot_be_are_refused(world, by, code, param):
    if world.lab.registry.find(SAES, "stray") is None:
        files = {each: saes.file(world.lab.storage, world.sae, each) for each in world.sae.files}
        saes.publish(world.lab.registry, replace(world.sae, id="stray", lineage="elsewhere"), files)
    with pytest.raises((Invalid, NotFound)) as caught:
        group(world, by)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_damaged_weights_are_told_with_their_file_and_never_used(world, monkeypatch):
    monkeypatch.setattr(saes, "_kept", LoadingCache(1))
    path = Path(world.lab.storage.root) / saes.folder(world.sae) / saelens.WEIGHTS
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    try:
        for call in (lambda: view(world), lambda: ask(world, concept="sae:s/7")):
            with pytest.raises(Damaged, match="under the same id") as caught:
                call()
            assert caught.value.param == f"{saes.folder(world.sae)}/{saelens.WEIGHTS}"
        (found,) = verify.verify(world.lab.storage, world.index.id).damage
        assert (found.file, found.what, found.belongs_to, found.owner) == (
            caught.value.param,
            "changed",
            "sae",
            "s",
        )
        files = {name: (path.parent / name).read_bytes() for name in world.sae.files} | {path.name: intact}
        assert saes.publish(world.lab.registry, world.sae, files) == world.sae
        assert path.read_bytes() == intact
    finally:
        path.write_bytes(intact)
    assert view(world).rows == 80
    assert verify.verify(world.lab.storage, world.index.id).damage == ()


# --- the view of a dataset --------------------------------------------------------------------------------


def view(world, **about):
    return ViewService(world.lab.registry, world.lab.storage, world.loader).run(replace(VIEW, **about))


def test_a_view_sums_what_queries_score(world):
    held = saes.read(world.lab.storage, world.sae)
    rows = world.matrix(world.index, embedding(world.index))
    pushes = rows.sum(axis=0, dtype=np.float64) @ saes.directions(held).T
    answer = view(world)
    order = np.argsort(-pushes)
    assert [each.feature for each in answer.up] == [each for each in order[:5] if pushes[each] > 0]
    assert [each.feature for each in answer.down] == [each for each in order[::-1][:5] if pushes[each] < 0]
    assert answer.rows == 80
    for each in (*answer.up, *answer.down):
        hits = ask(world, concept=f"sae:s/{each.feature}").hits
        scores = np.array([hit.score for hit in hits], np.float64)
        size = np.abs(scores).sum()
        assert each.push == pytest.approx(scores.sum(), abs=1e-4 * size)
        assert each.error == pytest.approx(scores.std(ddof=1) / 80**0.5, rel=1e-2)
        assert each.upward == pytest.approx((scores > 0).mean(), abs=0.02)
        assert each.share == pytest.approx(abs(each.push) / np.abs(pushes).sum(), rel=1e-3)
        furthest = hits[:2] if each.push > 0 else hits[:-3:-1]
        assert [example.id for _, example in each.examples] == [hit.example.id for hit in furthest]
        np.testing.assert_allclose(
            [score for score, _ in each.examples], [hit.score for hit in furthest], rtol=1e-3
        )


def test_a_view_can_be_of_some_examples(world):
    ids = [hit.example.id for hit in ask(world, concept="sae:s/0").hits]
    some = filters.parse({"id": {"in": ids[:30]}})
    rest = filters.parse({"id": {"in": ids[30:]}})
    whole = {each.feature: each.push for side in ("up", "down") for each in getattr(view(world, count=24), side)}
    parts = [view(world, filter=each, count=24, examples=0) for each in (some, rest)]
    assert [each.rows for each in parts] == [30, 50]
    sums = dict.fromkeys(whole, 0.0)
    for part in parts:
        for each in (*part.up, *part.down):
            sums[each.feature] += each.push
    largest = max(map(abs, whole.values()))
    assert all(abs(sums[feature] - push) < 1e-4 * largest for feature, push in whole.items())


def test_within_r_a_view_projects_the_decoder_as_queries_do(world):
    low = world.build("low", kinds=("influence",), query_sets=("q",), rank=4, directions=("sae:s/2",), **ABOUT)
    stored = artifacts.get(world.lab.storage, embedding(low).embedding.directions)
    r = artifacts.read(world.lab.storage, stored, "directions")["rows"]
    directions = saes.directions(saes.read(world.lab.storage, world.sae))
    answer = view(world, index="low", count=24, examples=0)
    pushes = world.matrix(low, embedding(low)).sum(axis=0, dtype=np.float64) @ (r @ directions.T)
    for each in (*answer.up, *answer.down):
        assert each.push == pytest.approx(pushes[each.feature], abs=1e-3 * np.abs(pushes).max())
        assert each.captured == pytest.approx(((r @ directions[each.feature]) ** 2).sum(), abs=1e-4)
        if each.feature == 2:
            assert each.captured == pytest.approx(1, abs=1e-4)  # R was told to contain it
    assert any("directions capture less" in warning for warning in answer.warnings)


def test_a_view_that_cannot_be_is_refused(world):
    deep = world.sae if world.lab.registry.find(SAES, "s") is None else replace(world.sae, id="deep2", layer=3)
    files = {each: saes.file(world.lab.storage, world.sae, each) for each in deep.files}
    saes.publish(world.lab.registry, deep, files)
    for about, code, param in [
        ({"sae": "nobody"}, "sae_not_found", "sae"),
        ({"sae": "deep2"}, "layer_not_indexed", "sae"),
        ({"damping": 7.0}, "damping_not_indexed", "damping"),
        ({"index": "nowhere"}, "index_not_found", "index"),
    ]:
        with pytest.raises((Invalid, NotFound)) as caught:
            view(world, **about)
        assert (caught.value.code, caught.value.param) == (code, param)
