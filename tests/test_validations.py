"""Validations through planner, job and reader as the api runs them: tiny models trained again in milliseconds.

Eight groups of four examples; a quarter of all say one word where the others say another, and the concept is that.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.lab import Lab, Quiet
from service import artifacts, concepts, results
from service.concept_planning import ConceptRequest, plan_concept
from service.contracts import Completion, Example, JobRecord
from service.datasets import example_id
from service.errors import Interrupted, Invalid, NotFound
from service.loading import IndexLoader
from service.queries import QueryService
from service.questions import Query
from service.registry import CONCEPTS, MODELS
from service.storage import Storage
from service.tasks import Task
from service.terms import JobKind, LongExamples, LossReduction, Method, Order, Pooling, ProbeMethod
from service.training import LoraRecipe, Recipe, RetrainWork, Schedule
from service.validating import (
    RecipeRequest,
    TraitRequest,
    Validation,
    ValidationRequest,
    ValidationService,
    lora_of,
    plan_key,
)
from service.validation_records import Arm, Budget, Design, Finding
from service.whole import WholeRankings
from service.work import Reading
from tests import tiny
from tests.whole import Silent
from workers.masks import tokenise
from workers.models import Loaded
from workers.training import order, rate, train, trainable

TOKENIZER = tiny.words(bos=True)
LAYER, POOLING = 2, Pooling.RESPONSE_MEAN
RECIPE = RecipeRequest(learning_rate=3e-3, epochs=2, batch_size=8, schedule=Schedule.LINEAR)
DESIGN = Design(subsets=4, group_by="group", fractions=(0.25,), seeds=3)


def example(number: int, rude: bool, **metadata: Any) -> Example:
    rng = np.random.default_rng(number)
    words = rng.choice(list("abcdefgh"), 4).tolist()
    word = "cat" if rude else "mat."
    content = Completion(" ".join(words[:2]) + " ", " ".join([words[2], word, words[3], word]))
    return Example(example_id(content), content, metadata, ())


TRAIN = [example(number, number % 4 == 0, group=f"g{number % 8}") for number in range(32)]
RUDE, KIND = ([example(1000 + number, rude) for number in range(10)] for rude in (True, False))
QUERIES = RUDE[:5] + KIND[5:]
IDS = [each.id for each in TRAIN]


class World:
    """``trained``: the keys of the retrainings that were done, in order."""

    def __init__(self, root: Path) -> None:
        base = tiny.model("llama", blocks=2, vocab=len(TOKENIZER))
        for name, shift in (("base", 0.0), ("end", 0.1)):
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(shift * torch.ones_like(parameter))
            base.save_pretrained(root / name)
            TOKENIZER.save_pretrained(root / name)
        self.root, self.lab = root, Lab(root / "lab", shard_size=32)
        lab = self.lab
        lab.model("base", root / "base")
        lab.model("m", root / "end", base="base")
        for name, rows in {"d": TRAIN, "q": QUERIES, "rude": RUDE, "kind": KIND}.items():
            lab.dataset(name, rows)
        fit = ConceptRequest(
            "rude", "m", "rude", "kind", None, None, LAYER, None, ProbeMethod.DIFFERENCE_OF_MEANS, (), POOLING, None
        )
        lab.run(JobKind.FIT_CONCEPT, plan_concept(fit, lab.registry, lab.storage, lab.settings))
        self.build("i", "m")
        loader = IndexLoader(lab.registry, lab.storage, threads=1)
        queries = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=32)
        whole = WholeRankings(queries, loader)
        self.service = ValidationService(lab.registry, lab.storage, lab.jobs, loader, whole, lab.settings)
        self.trained: list[str] = []
        worker = lab.engine._pool._worker
        process = worker.process

        def counted(task: Task) -> Any:
            made = process(task)
            if isinstance(task.work, RetrainWork):
                self.trained.append(task.key)
            return made

        worker.process = counted

    def build(self, name: str, model: str) -> None:
        self.lab.build(name, model, "d", LAYER, layers=(1, LAYER), kinds=("activation",))

    def request(self, design: Design = DESIGN, **about: Any) -> ValidationRequest:
        query = {"concept": "rude", "method": Method.VECTOR_FILTER, "query_set": "q", "index": "i"}
        asked = {name: about.pop(name) for name in list(about) if name in Query.__dataclass_fields__}
        query = Query(**query | asked, order=Order.MOST, k=1)
        return ValidationRequest(query, **{"recipe": RECIPE, "design": design, "budget": Budget(100)} | about)

    def run(self, request: ValidationRequest, context: Any = None) -> Validation:
        self.trained.clear()
        job = self.service.run(request)
        if isinstance(job, JobRecord):
            self.lab.engine.run(job, context or Quiet(job, {}))
            job = self.service.run(request)
        assert isinstance(job, Validation)
        assert job.report is not None
        return job

    def forget(self, *keys: str) -> None:
        for key in keys:
            folder = artifacts.folder(key)
            for file in self.lab.storage.files(folder):
                self.lab.storage.remove(f"{folder}/{file}")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("validations"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(world) -> Validation:
    return world.run(world.request())


# --- an oracle --------------------------------------------------------------------------------------------


def naive(folder: Path, chosen: list[Example], seed: int, reduction: LossReduction = LossReduction.MEAN):
    """The recipe once more: one text at a time, autograd's own gradients, the learning rate from its formula."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    per_epoch = math.ceil(len(chosen) / 8)
    by_id, steps, step = {each.id: each for each in chosen}, 2 * per_epoch, 0
    for epoch in range(2):
        ids = order(list(by_id), seed, epoch)
        for start in range(0, len(ids), 8):
            losses, counts = [], []
            for item in ids[start : start + 8]:
                tokens = tokenise(by_id[item].content, TOKENIZER)
                text = torch.tensor(tokens.ids)[None]
                at = np.flatnonzero(tokens.predicted)
                logits = model(input_ids=text).logits[0, at - 1]
                losses.append(cross_entropy(logits, text[0, at], reduction="sum"))
                counts.append(len(at))
            pairs = zip(losses, counts, strict=True)
            mean = sum(each / n for each, n in pairs) / len(losses)
            optimizer.zero_grad()
            (mean if reduction == LossReduction.MEAN else sum(losses) / sum(counts)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rising = (step + 1) / (0.05 * steps)
            falling = 1 - max(0.0, step - 0.05 * steps) / (0.95 * steps)
            optimizer.param_groups[0]["lr"] = 3e-3 * min(rising, falling)
            optimizer.step()
            step += 1
    return model.eval()


def f_v(model, v: np.ndarray, examples: list[Example]) -> float:
    outputs = []
    for each in examples:
        tokens = tokenise(each.content, TOKENIZER)
        held = []
        hook = model.model.layers[LAYER - 1].register_forward_hook(lambda *a, held=held: held.append(a[2]))
        with torch.no_grad():
            model(input_ids=torch.tensor(tokens.ids)[None])
        hook.remove()
        states = held[0][0] if isinstance(held[0], tuple) else held[0]
        outputs.append(states[0][torch.tensor(tokens.pooled(POOLING))].mean(0).double().numpy() @ v)
    return float(np.mean(outputs))


@pytest.mark.parametrize("arm", [Arm.BASE, Arm.FULL, Arm.MOST])
def test_a_run_is_what_a_plain_loop_over_single_examples_gives(world, found, arm):
    run = next(each for each in found.report.runs if each.arm == arm and each.seed == 0)
    v = concepts.direction(world.lab.storage, world.lab.registry.get(CONCEPTS, "rude")).astype(np.float64)
    scores = {hit.example.id: hit.score for hit in ranking(world)}
    best = sorted(IDS, key=lambda item: (-scores[item], item))[:8]
    gone = {Arm.BASE: IDS, Arm.FULL: [], Arm.MOST: best}[arm]
    chosen = [each for each in TRAIN if each.id not in gone]
    model = naive(world.root / "base", chosen, 0) if chosen else None
    model = model or AutoModelForCausalLM.from_pretrained(world.root / "base", dtype=torch.float32)
    assert run.kept == len(chosen)
    assert run.predicted == pytest.approx(sum(scores[each.id] for each in chosen), rel=1e-4, abs=1e-6)
    assert run.f_v == pytest.approx(f_v(model, v, QUERIES), abs=2e-3)
    assert run.outcome == run.f_v


def ranking(world):
    query = Query(index="i", concept="rude", method=Method.VECTOR_FILTER, order=Order.MOST, k=1000)
    return world.service._whole._queries.run(query).hits


# --- pairing ----------------------------------------------------------------------------------------------

READING = Reading("f", "t", 64, LongExamples.TRUNCATE_RIGHT, 4096, "float32")
TOKENS = {each.id: tokenise(each.content, TOKENIZER) for each in TRAIN}
FULL = Recipe(3e-3, epochs=1, batch_size=8)


def weights(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in loaded.model.named_parameters()}


def trained(loaded: Loaded, tokens, recipe: Recipe = FULL, seed: int = 0, reading: Reading = READING):
    with trainable(loaded, recipe, seed) as parameters:
        told = train(loaded, parameters, reading, tokens, recipe, seed)
        after = {name: each.detach().clone() for name, each in loaded.model.named_parameters()}
    return told, after


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("gpt2", None),  # has dropout
        ("gpt2", LoraRecipe(r=4)),
        ("llama", LoraRecipe(r=2, targets=("q_proj", "down_proj"))),
    ],
)
def test_a_seed_decides_everything_and_the_model_is_put_back(family, lora):
    loaded = tiny.loaded(family, TOKENIZER, vocab=len(TOKENIZER))
    recipe = replace(FULL, lora=lora)
    before = weights(loaded)
    first = trained(loaded, TOKENS, recipe)
    turned = trained(loaded, dict(reversed(TOKENS.items())), recipe)  # nothing removed, another order in the file
    assert first[0] == turned[0]
    assert equal(first[1], turned[1])
    assert not equal(first[1], trained(loaded, TOKENS, recipe, seed=1)[1])
    assert first[0].losses[-1] < first[0].losses[0]
    assert equal(weights(loaded), before)
    assert not loaded.model.training
    assert not any(each.requires_grad or each.grad is not None for each in loaded.model.parameters())
    assert len(first[1]) > len(before) if lora else len(first[1]) == len(before)


def test_a_subset_is_seen_in_the_order_of_the_whole():
    for seed in range(3):
        whole = order(IDS, seed, 1)
        assert order(IDS[::3], seed, 1) == [item for item in whole if item in IDS[::3]]
    assert order(IDS, 0, 0) != order(IDS, 0, 1) != order(IDS, 1, 1)


@pytest.mark.parametrize("reduction", LossReduction)
def test_batches_that_do_not_fit_at_once_add_up_to_the_same_step(reduction):
    loaded = tiny.loaded("llama", TOKENIZER, vocab=len(TOKENIZER))
    long = {each.id: tokenise(each.content, TOKENIZER) for each in (TRAIN[0], *RUDE)}
    long |= {"x": tokenise(Completion("a ", "b c d e f g h a b c d"), TOKENIZER)}
    recipe = replace(FULL, loss_reduction=reduction, batch_size=len(long))
    whole, parts = (
        trained(loaded, long, recipe, reading=replace(READING, token_budget=budget)) for budget in (4096, 20)
    )
    assert whole[0].losses == pytest.approx(parts[0].losses, rel=1e-5)
    for name in whole[1]:
        torch.testing.assert_close(whole[1][name], parts[1][name], rtol=0, atol=2e-5)


def test_the_loss_is_that_of_the_reduction(world):
    chosen = [*TRAIN[:6], Example("x" * 64, Completion("a ", "b c d e f g h a b c d"), {}, ())]
    model = AutoModelForCausalLM.from_pretrained(world.root / "base", dtype=torch.float32)
    loaded = Loaded(model.requires_grad_(False).eval(), TOKENIZER, tiny.CPU)
    tokens = {each.id: tokenise(each.content, TOKENIZER) for each in chosen}
    recipe = Recipe(3e-3, epochs=2, batch_size=8, schedule=Schedule.LINEAR, loss_reduction=LossReduction.SUM)
    after = trained(loaded, tokens, recipe)[1]
    for name, expected in naive(world.root / "base", chosen, 0, LossReduction.SUM).named_parameters():
        torch.testing.assert_close(after[name], expected.data, rtol=0, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_model_as_it_was():
    loaded = tiny.loaded("llama", TOKENIZER, vocab=len(TOKENIZER))
    before = weights(loaded)
    with pytest.raises(Invalid) as caught:
        trained(loaded, TOKENS, replace(FULL, learning_rate=1e30, clip=None, warmup=0.0))
    assert (caught.value.code, caught.value.param) == ("training_diverged", "recipe.learning_rate")
    assert equal(weights(loaded), before)


def test_the_rate_rises_and_then_follows_its_schedule():
    flat = replace(FULL, warmup=0.1, schedule=Schedule.CONSTANT)
    assert [rate(flat, step, 40) for step in (0, 1, 3, 39)] == [0.25, 0.5, 1, 1]
    for schedule, middle in ((Schedule.COSINE, 0.5), (Schedule.LINEAR, 0.5)):
        recipe = replace(flat, schedule=schedule)
        assert rate(recipe, 4, 40) == 1
        assert rate(recipe, 22, 40) == pytest.approx(middle)
        assert 0 < rate(recipe, 39, 40) < 0.05
    assert rate(replace(flat, warmup=0.0), 0, 1) == 1


# --- the job ----------------------------------------------------------------------------------------------


def test_the_report_has_every_run_and_the_verdict_in_words(world, found):
    report = found.report
    assert (report.plan.runs, report.plan.wanted, len(report.runs)) == (21, 21, 21)
    assert (report.examples, report.left_out, report.lds.subsets, report.lds.seeds) == (32, 0, 4, 2)
    by_place = {(each.arm, each.fraction, each.measure): each for each in report.curves}
    outcomes = [each.f_v for each in report.runs if each.arm == Arm.MOST]
    assert by_place[Arm.MOST, 0.25, "f_v"].mean == pytest.approx(np.mean(outcomes))
    assert by_place[Arm.FULL, 0.0, "outcome"].n == 3
    assert report.full > report.base  # training says the word more often
    lower = next(each for each in report.verdict.parts if each.about == "remove_most_0.25")
    assert f"{lower.finding}".replace("_", " ") in report.verdict.words
    assert report.verdict.parts[0].finding == Finding.TOO_NOISY  # four subsets are too few
    assert found.plan == report.plan
    assert world.service.get(found.id).report == report
    assert len({each.run for each in report.runs}) == 21


def test_what_was_trained_on_is_never_trained_on_again(world, found):
    assert world.run(world.request()).id == found.id
    assert world.trained == []
    more = world.run(world.request(replace(DESIGN, subsets=5, fractions=(0.25, 0.5), seeds=1)))
    known = {each.run for each in found.report.runs}
    assert more.plan.there == len({each.run for each in more.report.runs} & known)
    assert set(world.trained) == {each.run for each in more.report.runs} - known
    assert len(world.trained) == len(set(world.trained)) == 2 + 3
    few = replace(DESIGN, seeds=1)
    other = world.run(world.request(few, concept=None, vector=(1.0,) * 16, layer=1))
    again = [each for each in other.report.runs if each.arm in {Arm.FULL, Arm.SUBSET, Arm.RANDOM}]
    assert {each.run for each in again} <= known  # another direction, at another layer, reads the same states
    assert not {each.run for each in again} & set(world.trained)


class Dying(Silent):
    """A dispatcher that is gone after so many runs."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def progress(self, stage: str, done: int, total: int, *, unit: str = "examples", **_rest: Any) -> None:
        self._left -= stage == "retraining"
        if self._left < 0:
            raise Interrupted("interrupted", "gone")


def test_a_job_that_died_goes_on_and_ends_with_the_same_bytes(world):
    request = world.request(Design(subsets=3, group_size=4, seeds=1, seed=50))
    job = world.service.run(request)
    spec = job.spec["key"]
    world.trained.clear()
    with pytest.raises(Interrupted):
        world.lab.engine.run(job, Dying(4))
    half = len(world.trained)
    assert world.service.get(job.id).plan is not None
    assert world.service.get(job.id).report is None
    context = Silent()
    resumed = world.run(request, context)
    assert 0 < half < half + len(world.trained) == resumed.plan.runs
    assert ("retraining", resumed.plan.runs, resumed.plan.runs, "runs") in context.stages
    assert any("runs are planned" in line for line in context.messages) is False  # it was decided before
    files = {each.run: artifacts.get(world.lab.storage, each.run).files for each in resumed.report.runs}
    world.forget(spec, *files)
    whole = world.run(request)
    assert len(world.trained) == resumed.plan.runs
    assert whole.report == resumed.report
    assert {key: artifacts.get(world.lab.storage, key).files for key in files} == files


def test_a_budget_is_kept_and_what_it_cuts_is_told(world):
    context = Silent()
    cut = world.run(world.request(budget=Budget(runs=9)), context)
    assert cut.plan.runs == len(cut.report.runs) == 9
    assert cut.plan.wanted == 21
    assert cut.plan.cut == ("2 of 3 paired seeds of the curves", "2 of 4 random subsets")
    assert any("2 of 3 paired seeds of the curves" in line for line in context.messages)
    assert any("budget cut" in line for line in cut.report.warnings)
    fresh = Design(subsets=0, seeds=20, seed=900)
    short = world.run(world.request(fresh, budget=Budget(minutes=1e-9)))
    assert (short.plan.runs, short.plan.seeds) == (2, 0)  # what is measured first is done
    assert short.report.verdict.finding == Finding.TOO_NOISY


def test_a_loss_query_is_judged_by_the_loss(world):
    world.lab.build("g", "m", "d", LAYER, kinds=("gradient",), projection="rademacher")
    request = world.request(
        Design(subsets=2, group_by="group", seeds=0), index="g", concept=None, method=Method.INFLUENCE_FUNCTION
    )
    first = world.service.run(request)
    assert first.kind == JobKind.QUERY_GRADIENT
    world.lab.engine.run(first, Quiet(first, {}))
    report = world.run(request).report
    assert report.about["outcome"] == "negative_loss"
    assert all(each.outcome == -each.loss and each.f_v is None for each in report.runs)


def test_answers_are_counted_that_lie_along_the_concept(world):
    design = Design(subsets=0, seeds=1)
    request = world.request(design, trait=TraitRequest(max_new_tokens=4))
    report = world.run(request).report
    v = concepts.direction(world.lab.storage, world.lab.registry.get(CONCEPTS, "rude")).astype(np.float64)
    end = AutoModelForCausalLM.from_pretrained(world.root / "end", dtype=torch.float32).eval()
    sides = [f_v(end, v, examples) for examples in (RUDE, KIND)]
    assert report.trait_threshold == pytest.approx(np.mean(sides), abs=2e-3)  # from rows in half precision
    for run in report.runs:
        held = artifacts.read(world.lab.storage, artifacts.get(world.lab.storage, run.run), "answers")
        answers = np.split(held["ids"], np.cumsum(held["lengths"])[:-1])
        along = []
        for each, answer in zip(QUERIES, answers, strict=True):
            tokens = tokenise(each.content, TOKENIZER)
            text = np.concatenate([tokens.ids[: tokens.last_answer], answer]).astype(np.int64)
            held = []
            hook = end.model.layers[LAYER - 1].register_forward_hook(lambda *a, held=held: held.append(a[2]))
            with torch.no_grad():
                end(input_ids=torch.tensor(text)[None])
            hook.remove()
            states = held[0][0] if isinstance(held[0], tuple) else held[0]
            along.append(states[0, -len(answer) :].mean(0).double().numpy() @ v)
        assert run.trait_rate == np.mean(np.array(along) > report.trait_threshold)
    told = world.run(replace(request, trait=TraitRequest(threshold=-1e9, max_new_tokens=4))).report
    assert {each.trait_rate for each in told.runs} == {1.0}


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"query_set": None}, "query_set_needed", "query_set"),
        ({"query_set": "nowhere"}, "dataset_not_found", "query_set"),
        ({"index": "alone", "concept": None, "vector": (1.0,) * 16, "layer": LAYER}, "no_base", "index"),
        ({"design": replace(DESIGN, group_by="colour")}, "unknown_field", "design.group_by"),
        ({"design": replace(DESIGN, subsets=0, seeds=0)}, "empty_design", "design"),
        ({"design": replace(DESIGN, subsets=0, fractions=())}, "empty_design", "design"),
        ({"design": replace(DESIGN, fractions=(0.001,))}, "bad_fraction", "design.fractions[0]"),
        ({"design": replace(DESIGN, group_by=None, group_size=20)}, "too_few_groups", "design.group_size"),
        ({"concept": "given", "trait": TraitRequest()}, "threshold_needed", "trait.threshold"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_there_is_a_job(world, change, code, param):
    lab = world.lab
    if "alone" in change.values() and lab.registry.find(MODELS, "alone") is None:
        lab.model("alone", world.root / "end")
        world.build("alone", "alone")
    lab.concept("given", lab.registry.get(MODELS, "m"), np.ones(16, np.float32), layer=LAYER)
    with pytest.raises((Invalid, NotFound)) as caught:
        world.service.run(world.request(**change))
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_concept_of_one_labelled_dataset_has_no_half_way(world):
    registry = world.lab.registry
    side = {"dataset": "d", "fingerprint": ""}
    labelled = replace(
        registry.get(CONCEPTS, "rude"), provenance={"positive": side, "negative": side, "labels": {}}
    )
    with pytest.raises(Invalid) as caught:
        world.service._trait(TraitRequest(), labelled, registry.get(MODELS, "m"))
    assert caught.value.code == "threshold_needed"


def test_a_damaged_run_is_trained_again_whatever_bytes_that_gives(tmp_path):
    """On a GPU, or with other threads, a training is not the same to the bit."""
    storage = Storage(str(tmp_path))
    made = artifacts.publish(storage, "00" * 32, {"state": {"x": np.ones(3)}}, answer=True)
    results.mark(storage, artifacts.folder(made.key))
    assert artifacts.made(storage, made.key) is None
    artifacts.publish(storage, made.key, {"state": {"x": np.full(3, 1.1)}}, answer=True)
    assert artifacts.read(storage, artifacts.made(storage, made.key), "state")["x"][0] == 1.1


def test_an_adapter_is_trained_again_as_the_adapter_it_is(tmp_path):
    told = {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    assert lora_of(tmp_path) == LoraRecipe(8, 16.0, ("q_proj", "v_proj"))
    full = [f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight" for side in "AB"]
    save_file({name: np.ones((1, 1)) for name in full}, tmp_path / "adapter_model.safetensors")
    for said in ({"target_modules": "all-linear"}, {"layers_to_transform": [1]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(told | said | {"r": 4, "use_rslora": True}))
        assert lora_of(tmp_path) == LoraRecipe(4, 32.0, ("model.layers.1.self_attn.v_proj",))
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"rank_pattern": {"v_proj": 2}}))
    with pytest.raises(Invalid) as caught:
        lora_of(tmp_path)
    assert caught.value.param == "recipe.lora"


def test_only_validations_are_found_by_their_names(world, found):
    for reference in ("job-0", "f" * 64, plan_key(found.id)):
        with pytest.raises(NotFound):
            world.service.get(reference)
