"""Estimates: the rehearsal runs the very tasks of a build, weighs what they leave, and touches nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lab import DEFAULTS, Lab, Quiet
from service import artifacts, codec, shards
from service.contracts import Completion, Example
from service.datasets import example_id
from service.planning import IndexRequest, plan_estimate
from service.registry import DATASETS, MODELS
from service.tasks import BUDGET, Task
from service.terms import ConceptFunction, LongExamples, Projection
from service.work import NarrowWork, PassSpec, ScoutWork, Tracked
from tests import tiny
from workers.build import Build
from workers.estimates import probe
from workers.estimates.rehearsal import Rehearsal
from workers.models import load
from workers.stages import grouped
from workers.works.choice import HELD
from workers.works.factors import shapes_of

TOKENIZER = tiny.words()
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"]
FITTED = DEFAULTS["curvature"] | {"examples": 40}
ALL = ("activation", "gradient", "influence")
V = np.random.default_rng(0).standard_normal(tiny.WIDTH).astype(np.float32)


def example(seed: int) -> Example:
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS, rng.integers(4, 30)).tolist()
    content = Completion(" ".join(words[:2]) + " ", " ".join(words[2:]))
    return Example(example_id(content), content, {}, ())


class World:
    """A base, a model tuned from it, and storage that nothing has been built in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lab = Lab(root / "lab", shard_size=32, token_budget=256)
        base = Path(tiny.save(root / "base", "llama", TOKENIZER))
        self.tuned = root / "tuned"
        model = tiny.model("llama", vocab=len(TOKENIZER))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(self.tuned)
        TOKENIZER.save_pretrained(self.tuned)
        self.lab.model("base", base)
        tuned = self.lab.model("tuned", self.tuned, base="base")
        self.lab.dataset("d", [example(number) for number in range(150)])
        self.lab.dataset("q", [example(number) for number in range(1000, 1006)])
        self.lab.concept("v", tuned, V, layer=2)
        self.tasks: list[Task] = []
        worker = self.lab.engine._pool._worker
        process = worker.process

        def counted(task: Task):
            self.tasks.append(task)
            return process(task)

        worker.process = counted

    def files(self) -> dict[str, int]:
        storage = self.root / "lab" / "storage"
        paths = [path for path in storage.rglob("*") if path.is_file()]
        return {str(path.relative_to(storage)): path.stat().st_size for path in paths}

    def rehearse(self, **options) -> Rehearsal:
        fields = DEFAULTS | {"name": "x", "model": "tuned", "dataset": "d", "layers": (2,)} | options
        lab = self.lab
        spec = plan_estimate(codec.from_plain(IndexRequest, fields), lab.registry, lab.settings).build
        loaded = load(str(self.tuned), "float32")
        rehearsal = Rehearsal(lab.storage, shapes_of(loaded, spec.tracked), loaded.width, Quiet(None, {}))
        with np.errstate(all="ignore"):
            model, dataset = lab.registry.get(MODELS, "tuned"), lab.registry.get(DATASETS, "d")
            Build(rehearsal, lab.registry, spec, model, dataset).run()
        return rehearsal


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path)
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


OPTIONS = {
    "activation": {"kinds": ("activation",), "layers": (1, 2)},
    "gradient": {"kinds": ("gradient",)},
    "all kinds, a run of two": {"kinds": ALL, "query_sets": ("q",)},
    "few eigenvectors": {"kinds": ALL, "query_sets": ("q",), "projection_dim": 6, "coordinates": 500},
    "a lower rank": {"kinds": ("influence",), "query_sets": ("q",), "rank": 5, "directions": ("v",)},
    "dampings and cosine": {
        "kinds": ("influence",),
        "query_sets": ("q",),
        "dampings": (0.1, 1.0),
        "concept_functions": ("dot", "cosine"),
        "checkpoints": "end",
        "embedding_coordinates": 300,
    },
    "random signs": {"kinds": ("gradient",), "projection": Projection.RADEMACHER},
    "attention of every other block": {"kinds": ("gradient",), "modules": "attn", "stride": 2, "layers": (3,)},
    "split": {"kinds": ALL, "query_sets": ("q",), "max_length": 12, "long_examples": LongExamples.SPLIT_AND_SUM},
    "difference": {"kinds": ("difference",), "answers": {"temperature": 0.0, "max_new_tokens": 5, "seed": 0}},
}


@pytest.mark.parametrize("chosen", OPTIONS)
def test_a_rehearsal_runs_the_tasks_of_the_build_and_weighs_what_they_leave(world: World, chosen: str) -> None:
    options = {"curvature": FITTED} | OPTIONS[chosen]
    before = world.files()
    rehearsal = world.rehearse(**options)
    assert world.files() == before
    planned = [each.task for stage in rehearsal.stages for each in stage.tasks]
    estimated = world.lab.estimate("x", "tuned", "d", 2, **options)
    assert world.files() == before
    world.lab.build("x", "tuned", "d", 2, **options)
    assert [task.key for task in planned] == [task.key for task in world.tasks]
    added = sum(world.files().values()) - sum(before.values())
    assert estimated["disk_bytes"] == pytest.approx(added, rel=0.1, abs=30_000)  # manifests dominate what is tiny
    assert estimated["seconds"] > 0
    assert estimated["worker_bytes"] >= max(stage["worker_bytes"] for stage in estimated["stages"]) > 1 << 26
    assert estimated["examples"] == 150


def test_what_is_there_already_costs_nothing(world: World) -> None:
    options = {"kinds": ALL, "query_sets": ("q",), "curvature": FITTED}
    whole = world.lab.estimate("x", "tuned", "d", 2, **options)
    world.lab.build("x", "tuned", "d", 2, **options)
    again = world.lab.estimate("x", "tuned", "d", 2, **options)
    assert again["disk_bytes"] == 0
    assert [stage["name"] for stage in again["stages"]] == ["starting the workers", "loading the model"]
    more = world.lab.estimate("x", "tuned", "d", 2, **options | {"dampings": (1.0, 3.0)})
    assert 0 < more["disk_bytes"] < whole["disk_bytes"]
    assert not any("covariances" in stage["name"] for stage in more["stages"])


def test_an_estimate_takes_no_version(world: World) -> None:
    for _ in range(2):
        world.lab.estimate("x", "tuned", "d", 2, kinds=("activation",))
    assert world.lab.build("x", "tuned", "d", 2, kinds=("activation",))[0].id == "x@v1"


def test_more_examples_take_longer_and_more_disk_but_no_more_memory(world: World) -> None:
    world.lab.dataset("more", [example(number) for number in range(2000, 3500)])
    options = {"kinds": ("activation", "gradient"), "curvature": FITTED}
    few, many = (world.lab.estimate("x", "tuned", name, 2, **options) for name in ("d", "more"))
    rows = [next(stage for stage in found["stages"] if stage["name"] == "rows") for found in (few, many)]
    assert rows[1]["tasks"] == pytest.approx(10 * rows[0]["tasks"], rel=0.1)
    assert rows[1]["disk_bytes"] == pytest.approx(10 * rows[0]["disk_bytes"], rel=0.05)
    assert rows[1]["seconds"] > 4 * rows[0]["seconds"]
    assert many["worker_bytes"] < 1.2 * few["worker_bytes"]


def test_eigenvectors_are_timed_up_to_a_size_and_scaled_beyond(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(probe.curvature, "eigenvectors", lambda matrix: asked.append(matrix.shape))
    clock = iter(range(100))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    assert probe._eigen_seconds(64) == 1
    assert probe._eigen_seconds(2048) == 8
    assert asked == [(64, 64), (1024, 1024)]


# --- groups of modules --------------------------------------------------------------------------------------


def test_modules_are_grouped_in_order_within_the_memory() -> None:
    shapes = {"a": (4, 4), "b": (4, 4), "c": (40, 4), "d": (4, 4)}
    each = 4 * 48
    assert grouped(shapes, 10**9) == [("a", "b", "c", "d")]
    assert grouped(shapes, 2 * each) == [("a", "b"), ("c",), ("d",)]  # c fits nowhere: it gets a group of its own
    assert grouped(shapes, 1) == [("a",), ("b",), ("c",), ("d",)]


def test_curvature_in_groups_is_the_same_curvature(world: World) -> None:
    options = {"kinds": ("gradient",), "curvature": FITTED}
    index, _ = world.lab.build("x", "tuned", "d", 2, **options)
    together = {type(task.work).__name__: task for task in world.tasks}
    world.tasks.clear()
    other = Lab(world.root / "other", shard_size=32, token_budget=256, curvature_bytes=4 * 3 * 24 * 24)
    try:
        other.model("base", world.root / "base")
        other.model("tuned", world.tuned, base="base")
        other.dataset("d", [example(number) for number in range(150)])
        apart, _ = other.build("x", "tuned", "d", 2, **options)
        assert len(together["CovarianceWork"].work.modules) == 14
        ids = [example(number).id for number in range(150)]
        other.dataset("q", [example(number) for number in range(1000, 1006)])
        ours = world.lab.scores(index, ids, query_set="q", method="influence_function")
        theirs = other.scores(apart, ids, query_set="q", method="influence_function")
        np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=2e-3 * np.abs(ours).max())
    finally:
        other.close()


def test_a_group_is_a_task_for_each_part_of_the_sample(world: World) -> None:
    options = {"kinds": ("gradient",), "curvature": FITTED}
    world.lab.settings = replace_setting(world.lab.settings, curvature_bytes=1 << 10)
    world.lab.build("x", "tuned", "d", 2, **options)
    works = [task.work for task in world.tasks]
    names = [work.modules for work in works if type(work).__name__ == "CovarianceWork"]
    assert len(names) == len(set(names)) == 14
    assert all(len(group) == 1 for group in names)
    assert sum(type(work).__name__ == "MomentWork" for work in works) == 14


def test_scouts_in_groups_choose_the_same_eigenvectors(world: World) -> None:
    """For several questions, whose importances are made comparable over all modules before they are added."""
    lab = world.lab
    lab.dataset("q2", [example(number) for number in range(1100, 1105)])
    options = {
        "kinds": ("influence",),
        "query_sets": ("q", "q2"),
        "layers": (1, 2),
        "projection_dim": 3,
        "checkpoints": "end",
    }
    options |= {"concept_functions": tuple(ConceptFunction), "curvature": FITTED}
    small = 4 * (2 * 24 * 24 + 10 * 16 * 24)
    chosen, scouts = [], []
    for most in (1 << 30, small, 1):
        lab.settings = replace_setting(lab.settings, curvature_bytes=most)
        world.tasks.clear()
        lab.build("x", "tuned", "d", 2, **options)
        works = {task.key: task.work for task in world.tasks}
        narrow = {key: work for key, work in works.items() if isinstance(work, NarrowWork) and work.p == 3}
        made = {(work.curvature, work.module): artifacts.get(lab.storage, key) for key, work in narrow.items()}
        chosen.append({about: artifacts.read(lab.storage, found, "eigen") for about, found in made.items()})
        scouts.append([work for work in works.values() if isinstance(work, ScoutWork)])
    assert len(chosen[0]) == 14
    assert len(scouts[0]) == 8  # a question is a query set, a layer and a function
    assert len(scouts[0]) < len(scouts[1])
    alone = [work for works in scouts[1:] for work in works if len(work.modules) == 1]
    assert len(alone) == 4 * (7 + 14)  # those of both, as the second finds some done
    shapes = shapes_of(load(str(world.tuned), "float32"), Tracked(2))
    for work in scouts[1]:
        held = sum(d_out**2 + d_in**2 + HELD * d_out * d_in for d_out, d_in, _ in map(shapes.get, work.modules))
        assert 4 * held <= small
    for other in chosen[1:]:
        for about, sides in chosen[0].items():
            for side in ("out", "into"):
                np.testing.assert_array_equal(other[about][side], sides[side])


def test_a_lower_token_budget_finds_all_that_is_done(world: World) -> None:
    """As after running out of memory: nothing is computed twice, for an index or for a question."""
    lab, ids = world.lab, [example(number).id for number in range(150)]
    lab.dataset("q2", [example(number) for number in range(1100, 1105)])
    kinds = (*ALL, "difference")
    options = {"kinds": kinds, "query_sets": ("q",), "projection_dim": 6, "curvature": FITTED, "coordinates": 500}
    options["answers"] = {"temperature": 1.0, "max_new_tokens": 3, "seed": 0}
    asked = {"concept": "v", "query_set": "q2", "through": "gradient"}
    first, _ = lab.build("x", "tuned", "d", 2, **options)
    expected = lab.scores(first, ids, **asked)
    assert len(world.tasks) > 30
    assert {task.work.token_budget for task in world.tasks if isinstance(task.work, PassSpec)} == {256}
    world.tasks.clear()
    lab.settings = replace_setting(lab.settings, token_budget=128)
    second, _ = lab.build("x", "tuned", "d", 2, **options)
    np.testing.assert_array_equal(lab.scores(second, ids, **asked), expected)
    assert world.tasks == []
    lab.dataset("more", [example(number) for number in range(2000, 2010)])
    lab.build("new", "tuned", "more", 2, kinds=("activation",))
    assert [task.work.token_budget for task in world.tasks] == [128]
    shard = shards.read_manifest(lab.storage, world.tasks[0].key)
    assert shard.versions[BUDGET] == "128"


def replace_setting(settings, **changed):
    return settings.model_copy(update=changed)
