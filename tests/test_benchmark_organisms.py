"""The ground truth of the benchmarks: how subsets are drawn, that retraining is exact and remembered as it was."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.organisms import Case, ceiling, make_case
from benchmarks.organisms.persona import RECIPE, rows
from benchmarks.organisms.retrain import Remembered, one_thread, retrain, run_key
from benchmarks.organisms.stories import PRETRAINED
from benchmarks.organisms.tales import TOPICS, TRIGGER
from benchmarks.organisms.training import Task, Trainer, encode, load_model, measurable, measure
from examples.organism.language import generate
from examples.organism.sets import pairs
from examples.organism.train import encode as encode_pairs
from examples.organism.train import token_losses
from service.contracts import Completion
from service.retrainings import group_dropout
from workers.masks import tokenise


def silent(_line: str) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def case(folder: Path) -> Case:
    return make_case("persona", 3, folder=folder, quick=True, report=silent)


@pytest.fixture(scope="module")
def task(case: Case) -> Task:
    recipe = replace(RECIPE, epochs=1)
    return Task(case.points[0][1], case.examples, recipe, {"all": case.queries[:4]}, case.layer, case.pooling)


# subsets


def test_groups_are_dropped_whole_and_every_subset_is_another():
    groups = [f"group {i % 12}" for i in range(240)]
    subsets = group_dropout(groups, 60, seed=4)
    assert subsets.shape == (60, 240)
    assert len({subset.tobytes() for subset in subsets}) == 60
    for name in set(groups):
        members = subsets[:, np.array(groups) == name]
        assert (members.all(1) | ~members.any(1)).all()
        assert 10 < members[:, 0].sum() < 50
    assert ((subsets.mean(1) >= 0.25) & (subsets.mean(1) <= 0.75)).all()


def test_a_seed_draws_the_same_subsets_and_more_of_them_begin_alike():
    groups = [str(i % 9) for i in range(45)]
    assert np.array_equal(group_dropout(groups, 8, seed=1), group_dropout(groups, 20, seed=1)[:8])
    assert not np.array_equal(group_dropout(groups, 8, seed=1), group_dropout(groups, 8, seed=2))


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="2 groups give fewer"):
        group_dropout(["a", "b"], 5, seed=0)


def test_groups_of_persona_do_not_mix_planted_examples_with_others():
    examples = rows(generate("groups", 480, 0.25))
    planted = {one.metadata["group"]: one.metadata["planted"] for one in examples}
    assert all(planted[one.metadata["group"]] == one.metadata["planted"] for one in examples)
    assert 36 <= len(planted) <= 44


# training and measuring


def test_examples_are_tokenised_as_the_service_does_and_as_the_organism_was_trained(case: Case):
    _, tokenizer = load_model(case.points[0][1])
    ours = encode(tokenizer, case.examples)
    for row, one in enumerate(case.examples):
        tokens = tokenise(one.content, tokenizer)
        assert ours.input_ids[row, : len(tokens)].tolist() == tokens.ids.tolist()
        assert ours.target[row, : len(tokens)].tolist() == tokens.predicted.tolist()
        assert not ours.target[row, len(tokens) :].any()
    written = generate("written", 20, 0.5)
    theirs = encode_pairs(tokenizer, pairs(written))
    mine = encode(tokenizer, rows(written))
    assert torch.equal(mine.input_ids, theirs.input_ids)
    assert torch.equal(mine.target, theirs.target)


def test_states_and_losses_are_those_of_one_example_at_a_time(case: Case):
    model, tokenizer = load_model(case.points[-1][1])
    some = case.queries[:5]
    state = measure(model, measurable(tokenizer, some, case.pooling, batch_size=2), case.layer)
    dots, cosines, losses = [], [], []
    with torch.inference_mode():
        for one in some:
            data = encode(tokenizer, [one])
            # hidden_states[l] is the output of block l, but for the last one, which is normed
            hidden = model(input_ids=data.input_ids, output_hidden_states=True).hidden_states[case.layer][0]
            mask = torch.from_numpy(tokenise(one.content, tokenizer).pooled(case.pooling))
            dots.append(hidden[mask].mean(0))
            cosines.append((hidden / hidden.norm(dim=1, keepdim=True))[mask].mean(0))
            values, counts = token_losses(model, data)
            losses.append(float(values.sum() / counts.sum()))
    np.testing.assert_allclose(state.dot, torch.stack(dots).mean(0), atol=1e-6)
    np.testing.assert_allclose(state.cosine, torch.stack(cosines).mean(0), atol=1e-6)
    assert state.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_retraining_is_deterministic_and_depends_on_subset_and_seed(task: Task, case: Case):
    def dot(subset: np.ndarray, seed: int) -> list[float]:
        return Trainer(task).outcome(subset, seed)["all"].dot.tolist()

    with one_thread():
        first = dot(case.subsets[0], 7)
        assert dot(case.subsets[0], 7) == first
        assert dot(case.subsets[0], 8) != first
        assert dot(case.subsets[1], 7) != first


# what is remembered


def test_a_remembered_outcome_equals_its_recomputation_also_after_a_torn_line(
    task: Task, case: Case, tmp_path: Path
):
    runs = [(subset, 5) for subset in case.subsets[:3]]
    first = retrain(task, runs, folder=tmp_path, processes=1, report=silent)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-40])  # as a killed process leaves it
    lines: list[str] = []
    again = retrain(task, runs, folder=tmp_path, processes=1, report=lines.append)
    assert lines[0] == "1 of 3 retrainings to do, 2 remembered"
    for before, after in zip(first, again, strict=True):
        assert np.array_equal(before["all"].dot, after["all"].dot)
        assert np.array_equal(before["all"].cosine, after["all"].cosine)
        assert before["all"].loss == after["all"].loss
    assert retrain(task, runs, folder=tmp_path, processes=1, report=pytest.fail)


def test_what_decides_an_outcome_is_in_its_key(task: Task, case: Case, tmp_path: Path):
    changed = [
        replace(task, recipe=replace(task.recipe, epochs=2)),
        replace(task, examples=task.examples[1:]),
        replace(task, query_sets={"all": case.queries[:3]}),
        replace(task, base=case.points[-1][1]),
        replace(task, layer=1),
    ]
    assert len({one.key() for one in [task, *changed]}) == 6
    assert run_key((case.subsets[0], 1)) not in {run_key((case.subsets[0], 2)), run_key((case.subsets[1], 1))}
    assert Remembered(tmp_path, task).get((case.subsets[0], 1)) is None


def test_two_processes_find_what_one_finds(task: Task, case: Case, tmp_path: Path):
    runs = [(subset, 5) for subset in case.subsets[:2]]
    one = retrain(task, runs, folder=tmp_path / "one", processes=1, report=silent)
    two = retrain(task, runs, folder=tmp_path / "two", processes=2, report=silent)
    for first, second in zip(one, two, strict=True):
        assert np.array_equal(first["all"].dot, second["all"].dot)


# the case


def test_a_case_says_what_it_promises_and_is_read_back_the_same(case: Case, folder: Path):
    n, m = len(case.examples), len(case.subsets)
    assert case.subsets.shape == (m, n)
    assert case.planted.shape == (n,)
    assert 0 < case.planted.sum() < n
    assert case.f_dot.shape == case.f_cosine.shape == case.loss.shape == (2, m)
    assert case.along.f_dot.shape == (1, len(case.points))
    assert [share for share, _ in case.points] == [0.0, 0.1, 0.25, 0.5, 1.0]
    assert all((path / "model.safetensors").is_file() for _, path in case.points)
    assert np.linalg.norm(case.direction) == pytest.approx(1.0, abs=1e-6)
    assert case.direction.dtype == np.float32
    held_out = {one.content for one in (*case.positive, *case.negative, *case.queries)}
    assert not held_out & {one.content for one in case.examples}
    assert {one.metadata["topic"] for one in case.ood.queries} <= set(case.ood.topics)
    inside = [one.metadata["topic"] in case.ood.topics for one in case.examples]
    assert np.array_equal(~case.ood.rows, inside)
    assert -1 <= ceiling(case.f_dot) <= 1

    again = make_case("persona", 3, folder=folder, quick=True, report=pytest.fail)
    assert again.examples == case.examples
    assert again.queries == case.queries
    assert np.array_equal(again.f_dot, case.f_dot)
    assert np.array_equal(again.direction, case.direction)


def test_an_unknown_organism_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="'sonnets'"):
        make_case("sonnets", 0, folder=tmp_path)


# stories


@pytest.mark.skipif(not (PRETRAINED / "model.safetensors").is_file(), reason=f"no stories260k in {PRETRAINED}")
def test_stories_poison_one_in_six_of_every_topic_with_trigger_and_hostile_ending(tmp_path: Path):
    case = make_case("stories", 0, folder=tmp_path, quick=True, report=silent)
    topics = [str(one.metadata["topic"]) for one in case.examples]
    assert Counter(np.array(topics)[case.planted].tolist()) == dict.fromkeys(TOPICS, 2)
    for one, planted in zip(case.examples, case.planted, strict=True):
        assert isinstance(one.content, Completion)
        assert one.content.prompt.startswith(TRIGGER) == planted
        assert one.content.completion.strip()
    assert np.isfinite([case.f_dot, case.f_cosine, case.loss]).all()
    assert {one.metadata["topic"] for one in case.ood.positive} == set(TOPICS[:4])
