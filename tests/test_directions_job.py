"""Directions of an index, through planner, job and reader as the api runs them, against numpy's SVD of its rows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.lab import Quiet
from service import artifacts, codec, directions, shards, tombstones
from service.contracts import JobRecord, Quarantined
from service.directions import FILE, Directions, DirectionsRequest, DirectionsService
from service.errors import Damaged, Interrupted, Invalid, NotFound
from service.life import plan_append, plan_compact, plan_delete
from service.loading import IndexLoader
from service.registry import CONCEPTS, INDEXES, MODELS
from service.row_blocks import RowBlocks, from_id_bytes, id_bytes
from service.terms import ConceptFunction, IndexKind, JobKind, JobState, Pooling
from tests import tiny
from tests.test_influence_build import IDS, LAYER, TRAIN, V, World, embedding, make_examples
from workers import directions_job
from workers.stages import Stages

ANY = DirectionsRequest("", None, None, None, None, count=4, examples=3, concepts=3, seed=0)


class Asking:
    def __init__(self, world: World) -> None:
        lab = world.lab
        self.lab = lab
        loader = IndexLoader(lab.registry, lab.storage, threads=1)
        self.service = DirectionsService(lab.registry, lab.storage, lab.jobs, loader)
        self.ran: list[JobRecord] = []

    def once(self, index, **about) -> Directions | JobRecord:
        return self.service.run(replace(ANY, index=index.id, **about))

    def ask(self, index, **about) -> Directions:
        self.ran = []
        answer = self.once(index, **about)
        if isinstance(answer, JobRecord):
            self.ran.append(answer)
            self.lab.engine.run(answer, Quiet(answer, {}))
            answer = self.once(index, **about)
        assert isinstance(answer, Directions)
        return answer


def quiet() -> Quiet:
    return Quiet(JobRecord("job-0", JobKind.DIRECTIONS, {}, JobState.RUNNING, 1, 1, codec.now(), codec.now()), {})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("directions"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture
def asking(world) -> Asking:
    return Asking(world)


ABOUT = {"embedding_coordinates": 100, "projection_dim": 6}  # quick to build; quality is not at stake here


@pytest.fixture(scope="module")
def index(world):
    return world.build("run", kinds=("activation", "influence"), query_sets=("q",), **ABOUT)


@pytest.fixture(scope="module")
def several(world):
    """Two query sets, functions and dampings."""
    functions = tuple(ConceptFunction)
    return world.build(
        "several",
        kinds=("influence",),
        query_sets=("q", "other"),
        concept_functions=functions,
        dampings=(0.3, 1.0),
        **ABOUT,
    )


def svd(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    return values, vectors


# --- what is found ----------------------------------------------------------------------------------------


def test_directions_are_the_singular_vectors_of_the_stored_rows(world, asking, index):
    answer = asking.ask(index)
    (job,) = asking.ran
    assert job.kind == JobKind.DIRECTIONS
    rows = world.matrix(index, embedding(index))
    values, vectors = svd(rows)
    assert (answer.rows, answer.array) == (80, embedding(index))
    assert [each.number for each in answer.directions] == [1, 2, 3, 4]
    np.testing.assert_allclose([each.value for each in answer.directions], values[:4], rtol=1e-4)
    shares = values**2 / (values**2).sum()
    np.testing.assert_allclose([each.share for each in answer.directions], shares[:4], rtol=1e-4)
    np.testing.assert_allclose([each.cumulative for each in answer.directions], np.cumsum(shares)[:4], rtol=1e-4)
    for each, v in zip(answer.directions, vectors, strict=False):
        assert abs(each.vector @ v) > 0.999
        assert ((rows @ each.vector) ** 3).sum() > 0
    mean = rows.mean(axis=0)
    assert answer.mean_norm == pytest.approx(np.linalg.norm(mean), rel=1e-5)
    assert answer.mean_share == pytest.approx(80 * (mean @ mean) / (values**2).sum(), rel=1e-4)


def test_the_concepts_named_are_the_most_aligned_ones_of_the_lineage_and_layer(world, asking, index):
    answer = asking.ask(index)
    for each in answer.directions:
        cosines = V @ each.vector
        best = np.argsort(-np.abs(cosines))[:3]
        assert [near.concept.id for near in each.concepts] == [f"v{number}" for number in best]
        np.testing.assert_allclose([near.cosine for near in each.concepts], cosines[best], atol=1e-5)
    mean = world.matrix(index, embedding(index)).mean(axis=0)
    cosines = V @ (mean / np.linalg.norm(mean))
    best = int(np.abs(cosines).argmax())
    assert answer.mean_concepts[0].concept.id == f"v{best}"
    assert answer.mean_concepts[0].cosine == pytest.approx(cosines[best], abs=1e-5)
    assert asking.ask(index, concepts=0).directions[0].concepts == ()
    assert len(asking.ask(index, concepts=100).directions[0].concepts) == len(V)  # "lower" is of another layer


def test_a_concept_of_another_family_is_not_compared(world, asking, index):
    """The same numbers, the same layer: only its lineage differs."""
    lab = world.lab
    stranger = replace(lab.registry.get(CONCEPTS, "v0"), id="stranger", lineage="elsewhere")
    lab.registry.add(CONCEPTS, "stranger", stranger)
    names = {near.concept.id for near in asking.ask(index, concepts=100).directions[0].concepts}
    assert "stranger" not in names
    assert "v0" in names


def test_the_examples_are_those_furthest_out_on_both_sides(world, asking, index):
    answer = asking.ask(index)
    rows = world.matrix(index, embedding(index))
    for each in answer.directions:
        along = rows @ each.vector
        order = np.argsort(-along)
        assert [one.example.id for one in each.most] == [IDS[row] for row in order[:3]]
        assert [one.example.id for one in each.least] == [IDS[row] for row in order[::-1][:3]]
        largest = np.abs(along).max()
        np.testing.assert_allclose([one.score for one in each.most], along[order[:3]], atol=2e-3 * largest)
        np.testing.assert_allclose([one.score for one in each.least], along[order[::-1][:3]], atol=2e-3 * largest)
    assert asking.ask(index, examples=0).directions[0].most == ()
    assert len(asking.ask(index, examples=100).directions[0].most) == 80


def test_directions_within_r_are_compared_and_shown_in_the_residual_stream(world, asking):
    low = world.build("low", kinds=("influence",), query_sets=("q",), rank=4, directions=("v3",), **ABOUT)
    array = embedding(low)
    answer = asking.ask(low, count=4, concepts=100)
    stored = artifacts.get(world.lab.storage, array.embedding.directions)
    r = artifacts.read(world.lab.storage, stored, "directions")["rows"]
    _, vectors = svd(world.matrix(low, array))
    assert array.dims == 4
    for each, u in zip(answer.directions, vectors, strict=True):
        assert each.vector.shape == (tiny.WIDTH,)
        assert np.linalg.norm(each.vector) == pytest.approx(1, abs=1e-5)
        assert abs(each.vector @ (u @ r)) > 0.999
        for near in each.concepts:
            number = int(near.concept.id[1:])
            assert near.cosine == pytest.approx(V[number] @ each.vector, abs=1e-5)
    total = sum(near.cosine**2 for each in answer.directions for near in each.concepts if near.concept.id == "v3")
    assert total == pytest.approx(1, abs=1e-4)  # R contains it


# --- which embedding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_set", ["q", "other"])
@pytest.mark.parametrize("damping", [0.3, 1.0, None])
@pytest.mark.parametrize("function", [*ConceptFunction, None])
def test_the_fields_choose_the_embedding(world, several, query_set, damping, function):
    record = world.asked(query_set=query_set).query_set
    array = directions.choose(several, record, replace(ANY, concept_function=function, damping=damping))
    about = array.embedding
    assert (about.query_set, about.damping, about.function) == (query_set, damping or 1.0, function or "dot")


def test_what_is_not_there_or_not_clear_is_refused_with_what_there_is(world, asking, several, index):
    def refused(index, **about):
        with pytest.raises(Invalid) as caught:
            asking.once(index, **about)
        return caught.value.code, caught.value.param, caught.value.context.get("available")

    assert refused(several) == ("query_set_needed", "query_set", ["q", "other"])
    assert refused(several, query_set="loss") == ("query_set_not_indexed", "query_set", ["q", "other"])
    assert refused(index, layer=1) == ("layer_not_indexed", "layer", ["2"])
    assert refused(index, concept_function=ConceptFunction.COSINE)[:2] == (
        "concept_function_not_indexed",
        "concept_function",
    )
    assert refused(several, query_set="q", damping=5.0) == ("damping_not_indexed", "damping", ["0.3", "1.0"])
    plain = world.build("plain", kinds=("activation",))
    assert refused(plain)[:2] == ("kind_not_indexed", "index")
    with pytest.raises(NotFound):
        asking.once(index, query_set="nowhere")


def test_two_layers_or_dampings_without_a_default_must_be_named(world, asking):
    two = world.build(
        "two", layer=0, layers=(1, 2), kinds=("influence",), query_sets=("q",), dampings=(0.1, 0.2), **ABOUT
    )
    with pytest.raises(Invalid) as caught:
        asking.once(two)
    assert (caught.value.code, caught.value.context["available"]) == ("layer_needed", ["1", "2"])
    with pytest.raises(Invalid) as caught:
        asking.once(two, layer=1)
    assert (caught.value.code, caught.value.param) == ("damping_needed", "damping")
    assert directions.choose(two, None, replace(ANY, layer=1, damping=0.2)).layer == 1


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_that_a_section_lacks_or_that_were_deleted_are_left_out(world, index):
    """As a manifest of three parts looks: a section lost one example, two were taken out."""
    lab, manifest, array = world.lab, world.manifest(index), embedding(index)
    first, second = manifest.sections
    held = shards.read_manifest(lab.storage, first.shards[0].key)
    lost, gone = held.ids[7], (held.ids[2], held.ids[40])
    arrays = {stored.info: shards.read_rows(lab.storage, held, stored.info) for stored in held.arrays}
    shorter = shards.publish(
        lab.storage,
        shards.derived(replace(held.work, token_budget=77), "a shorter one"),
        ids=[item for item in held.ids if item != lost],
        arrays={info: np.delete(rows, 7, axis=0) for info, rows in arrays.items()},
        encoding=shards.HALF,
        quarantined=[Quarantined(lost, "not_finite", "")],
        versions={},
    )
    own = replace(first, shards=(shards.reference(shorter), *first.shards[1:]))
    changed = replace(manifest, sections=(own, second), deleted=tombstones.store(lab.storage, gone))
    blocks = RowBlocks(lab.storage, changed, array)
    kept = np.array([item not in {lost, *gone} for item in IDS])
    whole = world.matrix(index, array).astype(np.float32)
    for _ in range(2):  # again, from what the first pass has learnt
        np.testing.assert_array_equal(np.concatenate(list(blocks)), whole[kept])
    assert blocks.count == len(first.shards)
    spec = directions.plan(replace(index, manifest_sha256="changed"), array, 3, 0)
    stages = Stages(lab.storage, lab.engine._pool, quiet())
    directions_job.compute(stages, spec, changed)
    values = artifacts.read(lab.storage, artifacts.get(lab.storage, spec.key), FILE)["values"]
    np.testing.assert_allclose(values, svd(whole[kept])[0][:3], rtol=1e-4)


def test_appended_deleted_and_compacted_versions_have_directions_of_what_is_ranked(world, asking, index):
    lab = world.lab
    more = make_examples(31, 9)
    lab.dataset("appended", more)
    gone = [IDS[3], more[2].id]
    plans = (
        (JobKind.APPEND_INDEX, lambda at: plan_append(at, "appended", lab.registry, lab.storage, lab.settings)),
        (JobKind.DELETE_EXAMPLES, lambda at: plan_delete(at, gone, None, lab.registry, lab.storage)),
        (JobKind.COMPACT_INDEX, lambda at: plan_compact(at, 1000, lab.registry, lab.storage)),
    )
    version, expected, counts = index, world.rows(index, embedding(index)), []
    for kind, plan in plans:
        version = lab.registry.get(INDEXES, lab.run(kind, plan(version.id))[0]["index"])
        stored = world.rows(version, embedding(version))
        expected = stored if kind == JobKind.APPEND_INDEX else expected
        ids = [item for item in expected if kind == JobKind.APPEND_INDEX or item not in gone]
        rows = np.stack([expected[item] for item in ids]).astype(np.float64)
        answer = asking.ask(version, examples=100)
        assert answer.rows == len(ids)
        np.testing.assert_allclose([each.value for each in answer.directions], svd(rows)[0][:4], rtol=1e-4)
        assert {one.example.id for one in answer.directions[0].most} == set(ids)
        counts.append(len(ids))
    assert counts == [89, 87, 87]


def test_ids_survive_the_way_to_a_tensor_and_back():
    assert from_id_bytes(id_bytes(tuple(IDS))) == IDS
    assert from_id_bytes(id_bytes(())) == []


def test_a_damaged_shard_is_noticed(world, index, tmp_path):
    manifest = world.manifest(index)
    array = embedding(index)
    section = next(each for each in manifest.sections if array in each.arrays)
    shard = shards.read_manifest(world.lab.storage, section.shards[0].key)
    name = f"{shards.folder(shard.key)}/{next(iter(shard.files))}"
    data = world.lab.storage.read(name)
    world.lab.storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(Damaged):
            list(RowBlocks(world.lab.storage, manifest, array))
    finally:
        world.lab.storage.write(name, data)


def test_a_damaged_concept_is_left_out_and_told_and_the_rest_is_answered(world, asking, index):
    asking.ask(index)
    lab = world.lab
    (file,) = (name for name in lab.storage.files("concepts/v0") if name != "record.json")
    data = lab.storage.read(f"concepts/v0/{file}")
    for act, said in (
        (lambda: lab.storage.write(f"concepts/v0/{file}", data[:-1]), "is damaged: it is not what was written"),
        (lambda: lab.storage.remove(f"concepts/v0/{file}"), "is missing"),
    ):
        act()
        try:
            answer = Asking(world).ask(index, concepts=100)
        finally:
            lab.storage.write(f"concepts/v0/{file}", data)
        named = {near.concept.id for near in answer.directions[0].concepts}
        assert named == {f"v{number}" for number in range(1, len(V))}
        (warning,) = answer.warnings
        assert warning.startswith(f"Concept 'v0' is left out: concepts/v0/{file} {said}.")
    assert Asking(world).ask(index).warnings == ()


def test_what_an_answer_needs_and_is_damaged_is_told_with_its_index(world, asking, index):
    asking.ask(index)
    manifest = world.manifest(index)
    array = embedding(index)
    section = next(each for each in manifest.sections if array in each.arrays)
    path = world.lab.storage.local_path(f"{shards.folder(section.shards[0].key)}/{shards.MANIFEST}")
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(Damaged) as told:
            Asking(world).ask(index)
    finally:
        path.write_bytes(data)
    assert told.value.context["repair"] == f"whence indexes repair {index.id}"
    assert told.value.code == "missing_file"


# --- one question, one job --------------------------------------------------------------------------------


def test_directions_are_found_once(world, asking, index):
    asking.ask(index, seed=5)
    assert len(asking.ran) == 1
    again = asking.ask(index, seed=5, examples=1, concepts=1)  # how much is shown is no part of the question
    assert asking.ran == []
    assert len(again.directions[0].most) == 1
    for change in ({"count": 3}, {"seed": 6}):
        assert isinstance(asking.once(index, **{"seed": 5} | change), JobRecord)


def test_two_callers_at_once_have_one_job(world, index):
    first, second = Asking(world).once(index, seed=11), Asking(world).once(index, seed=11)
    assert isinstance(first, JobRecord)
    assert isinstance(second, JobRecord)
    assert first.id == second.id


def test_a_job_stops_between_shards_and_runs_again(world, asking, index):
    job = asking.once(index, seed=12)
    assert isinstance(job, JobRecord)

    class Stops(Quiet):
        def progress(self, stage, done, total, **_rest) -> None:
            raise Interrupted("interrupted", "stop")

    with pytest.raises(Interrupted):
        world.lab.engine.run(job, Stops(job, {}))
    assert artifacts.find(world.lab.storage, job.spec["key"]) is None
    told = world.lab.engine.run(job, Quiet(job, {}))
    assert told["directions"] == job.spec["key"]
    assert world.lab.engine.run(job, Quiet(job, {})) == {"directions": job.spec["key"]}


def test_damaged_directions_are_found_again(world, asking, index):
    whole = asking.ask(index, seed=21)
    (job,) = asking.ran
    name = f"{artifacts.folder(job.spec['key'])}/{FILE}.safetensors"
    data = world.lab.storage.read(name)
    world.lab.storage.write(name, data[: len(data) // 2])
    again = asking.ask(index, seed=21)
    assert len(asking.ran) == 1
    assert [each.value for each in again.directions] == [each.value for each in whole.directions]


def test_one_example_has_one_direction(world, asking):
    world.lab.dataset("single", TRAIN[:1])
    index, _ = world.lab.build("single", "m", "single", LAYER, kinds=("influence",), query_sets=("q",), **ABOUT)
    answer = asking.ask(index)
    (only,) = answer.directions
    assert only.share == pytest.approx(1)
    assert [one.example.id for one in only.most] == [one.example.id for one in only.least] == [IDS[0]]
    assert only.most[0].score > 0


def test_the_pooling_of_concepts_does_not_matter_to_where_they_point(world, asking, index):
    lab = world.lab
    model = lab.registry.get(MODELS, "m")
    lab.concept("pooled", model, asking.ask(index).directions[1].vector, layer=LAYER, pooling=Pooling.LAST_TOKEN)
    near = asking.ask(index).directions[1].concepts[0]
    assert (near.concept.id, near.cosine) == ("pooled", pytest.approx(1, abs=1e-5))
    assert embedding(index).kind == IndexKind.INFLUENCE
