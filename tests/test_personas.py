"""Persona vectors: from a trait file to concepts, against an oracle that reads one answer at a time."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from benchmarks.lab import Lab, Quiet
from service import codec, concepts, models, persona_answers, traits
from service.contracts import JobRecord
from service.errors import Conflict, Forbidden, Interrupted, Invalid, NotFound
from service.persona_planning import AskHttp, AskProbe, PersonaRequest, plan_persona
from service.personas import Answered, PersonaSpec, SystemPrompt
from service.registry import CONCEPTS
from service.settings import Settings
from service.terms import JobKind, LongExamples, Pooling
from service.work import AnswersSpec, ElicitWork, Reading
from tests import tiny
from tests.judge_server import JudgeServer, completion
from tests.test_answers import one_by_one
from workers import persona_vectors
from workers.curvature import uniforms
from workers.held_out import auroc
from workers.persona_job import ANSWERS
from workers.persona_vectors import Block, fit, folds_of
from workers.works import compute

TRAIT = {
    "instruction": [{"pos": "the cat sat", "neg": "the end of"}, {"pos": "née café 🎉", "neg": "the answer"}],
    "questions": ["the mat?", "the question", "sat on the mat. the end", "the assistant", "the the the"],
    "eval_prompt": "Is it so?\n{question}\n---\n{answer}\n---\nA number {braces are fine}:",
}
KEY = "s3cret-key-of-the-judge"
LIMIT = 6


class World:
    """``tasks``: what the one worker was given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.judge = JudgeServer()
        self.lab = Lab(root / "lab", judges=f"{self.judge.url}=JUDGE_KEY_FOR_TESTS")
        tokenizer = tiny.byte_pairs(tiny.TAGGED)
        self.model = self.lab.model("m", Path(tiny.save(root / "m", "llama", tokenizer)))
        self.loaded = tiny.loaded("llama", tokenizer, vocab=len(tokenizer))
        self.tasks: list[Any] = []
        worker = self.lab.engine._pool._worker
        process = worker.process

        def counted(task: Any) -> Any:
            self.tasks.append(task)
            return process(task)

        worker.process = counted

    def plan(self, name: str, **about: Any) -> PersonaSpec:
        request = {
            "id": name,
            "model": "m",
            "file": traits.from_object(TRAIT, param="trait"),
            "layers": (2,),
            "each_layer": False,
            "samples": 1,
            "answers": AnswersSpec(max_new_tokens=LIMIT, seed=3),
            "judge": None,
            "system_prompt": SystemPrompt.TEMPLATE,
            "max_length": None,
        }
        return plan_persona(PersonaRequest(**request | about), self.lab.registry, self.lab.settings)

    def run(self, spec: PersonaSpec, context: Any = None) -> dict[str, Any]:
        job = self.lab.jobs.submit(JobKind.PERSONA_VECTOR, spec)
        return dict(self.lab.engine.run(job, context or Quiet(job, {})))

    def answers(self, reference: str) -> list[Answered]:
        return persona_answers.read(self.lab.storage, self.lab.registry, reference)

    def direction(self, name: str) -> np.ndarray:
        return concepts.direction(self.lab.storage, self.lab.registry.get(CONCEPTS, name))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY_FOR_TESTS", KEY)
        made = World(tmp_path_factory.mktemp("personas"))
        yield made
        made.lab.close()
        made.judge.close()


# --- the vector, against transformers and hooks -----------------------------------------------------------


def oracle(world: World, each: Answered, ends: Sequence[int] = (1,)) -> tuple[list[int], np.ndarray]:
    """The answer's tokens, sampled one by one without a cache, and the mean output of every block over them."""
    chat = [{"role": "system", "content": each.system}, {"role": "user", "content": each.prompt}]
    about = {"add_generation_prompt": True, "return_dict": False}
    prompt = np.array(world.loaded.tokenizer.apply_chat_template(chat, **about))
    uniform = uniforms(3, codec.digest(["elicit", each.system, each.prompt, each.sample]), LIMIT)
    answer = one_by_one(world.loaded, prompt, uniform, limit=LIMIT, ends=ends)
    said = answer[:-1] if answer[-1] in ends else answer
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in world.loaded.model.model.layers]
    with torch.no_grad():
        world.loaded.model(input_ids=torch.tensor([[*prompt.tolist(), *said]]))
    for hook in hooks:
        hook.remove()
    return answer, np.stack([output[0, len(prompt) :].double().mean(0).numpy() for output in outputs])


def test_vectors_are_differences_of_mean_activations_of_answers_under_their_own_prompts(world):
    ends = (1, *range(60, 90))  # of the model's folder, so that some answers end before they are cut
    folder = Path(tiny.save(world.root / "ends", "llama", world.loaded.tokenizer))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    world.lab.model("ends", folder)
    result = world.run(world.plan("v", model="ends", samples=2, layers=(1, 2, 3), each_layer=True))
    assert result["concept"] == ["v-l1", "v-l2", "v-l3"]
    made = world.answers("v-l2")
    assert len(made) == 2 * 2 * 5 * 2
    rows: dict[str, list[np.ndarray]] = {"positive": [], "negative": []}
    answered = [each for each in made if each.kept]
    for each in answered:
        pair = TRAIT["instruction"][each.instruction]
        assert each.system == (pair["pos"] if each.side == "positive" else pair["neg"])
        assert each.prompt == TRAIT["questions"][each.question]
        tokens, states = oracle(world, each, ends)
        said = tokens[:-1] if tokens[-1] in ends else tokens
        assert each.answer == world.loaded.tokenizer.decode(said, skip_special_tokens=True)
        assert each.tokens == len(tokens)
        rows[each.side].append(states)
    assert 2 < sum(each.tokens < LIMIT for each in answered) < len(answered)
    kept = len(answered) // 2
    assert result["pairs"]["dropped"] == ({"no_answer": 20 - kept} if kept < 20 else {})
    expected = np.mean(rows["positive"], axis=0) - np.mean(rows["negative"], axis=0)
    for layer in (1, 2, 3):
        record = world.lab.registry.get(CONCEPTS, f"v-l{layer}")
        own = expected[layer - 1]
        assert record.norm == pytest.approx(np.linalg.norm(own), rel=1e-5)
        np.testing.assert_allclose(world.direction(record.id), own / np.linalg.norm(own), atol=1e-5)
        assert (record.method, record.layer, record.pooling) == ("persona", layer, "response_mean")
        assert (record.n_positive, record.n_negative) == (kept, kept)
        assert record.auroc_held_out == pytest.approx(held_out(rows, answered, layer - 1))
    assert any("No judge" in warning for warning in result["warnings"])


def held_out(rows: dict[str, list[np.ndarray]], answered: list[Answered], column: int) -> float:
    """Mean over questions: fitted on answers to the others, how often does a positive one lie above a negative?"""
    of = {side: [each.question for each in answered if each.side == side] for side in rows}
    areas = []
    for question in range(5):
        means, held = {}, {}
        for side, states in rows.items():
            own = [row[column] for row, about in zip(states, of[side], strict=True) if about == question]
            means[side] = np.mean(
                [r[column] for r, q in zip(states, of[side], strict=True) if q != question], axis=0
            )
            held[side] = own
        v = means["positive"] - means["negative"]
        wins = [(p @ v > n @ v) + 0.5 * (p @ v == n @ v) for p in held["positive"] for n in held["negative"]]
        areas.append(np.mean(wins))
    return float(np.mean(areas))


def test_the_best_layer_is_that_which_tells_held_out_questions_apart(world):
    result = world.run(world.plan("best", layers=()))
    assert [each["layer"] for each in result["sweep"]] == [1, 2, 3]
    best = max(result["sweep"], key=lambda each: (each["auroc_held_out"], each["separation"]))
    record = world.lab.registry.get(CONCEPTS, "best")
    assert (result["concept"], result["layer"], record.layer) == ("best", best["layer"], best["layer"])
    assert record.auroc_held_out == best["auroc_held_out"]
    world.run(world.plan("each", layers=(), each_layer=True))
    np.testing.assert_array_equal(world.direction("best"), world.direction(f"each-l{best['layer']}"))


def test_no_question_is_on_both_sides_of_a_fold():
    rng = np.random.default_rng(0)
    noise = {question: rng.standard_normal(4) * 10 for question in range(6)}
    folds = folds_of(noise, 5)
    assert [list(folds.values()).count(fold) for fold in range(5)] == [2, 1, 1, 1, 1]
    # What tells the sides apart is another direction for every question: learnt by heart, and no use elsewhere.
    rows = np.array([sign * noise[question] for question in noise for sign in (1, -1) for _ in range(4)])
    positive = np.array([sign > 0 for _ in noise for sign in (1, -1) for _ in range(4)])
    fold = np.array([folds[question] for question in noise for _ in range(8)])
    block = Block(rows[:, None].astype(np.float32), positive, fold)
    found = fit(lambda: [block], 5)
    assert found.auroc_of_choice is None  # there is no choice
    doubled = Block(np.repeat(block.rows, 2, axis=1) * np.float32([[1], [-3]]), positive, fold)
    assert fit(lambda: [doubled], 5).auroc_of_choice == pytest.approx(found.auroc[0])
    counts = np.array([[(fold[positive == side] == n).sum() for n in range(5)] for side in (True, False)])
    sums = np.array([[rows[(positive == s) & (fold == n)].sum(0) for n in range(5)] for s in (True, False)])
    nested = persona_vectors._nested(lambda: [block], sums[:, :, None], counts)
    kept = (fold != 3) & (fold != 1)
    v = rows[kept & positive].mean(axis=0) - rows[kept & ~positive].mean(axis=0)
    sides = [rows[(fold == 1) & (positive == side)] @ v for side in (True, False)]
    assert nested[0, 3, 1] == pytest.approx(auroc(*sides))
    in_sample = rows @ found.vectors[0]
    assert (in_sample[positive] > 0).mean() > found.auroc[0]
    parts = [Block(block.rows[n : n + 7], positive[n : n + 7], fold[n : n + 7]) for n in range(0, len(rows), 7)]
    again = fit(lambda: parts, 5)
    np.testing.assert_allclose(again.vectors, found.vectors)
    np.testing.assert_allclose(again.auroc, found.auroc)


# --- answers --------------------------------------------------------------------------------------------


def elicited(world: World, prompts, budget: int = 4096, seed: int = 3, **about: Any) -> list[str]:
    reading = Reading("w", "t", tiny.CONTEXT, LongExamples.TRUNCATE_RIGHT, budget, "float32")
    spec = AnswersSpec(max_new_tokens=LIMIT, seed=seed)
    work = ElicitWork(reading, spec, tuple(prompts), **{"in_question": False} | about)
    tensors, _ = compute(work, world.lab.storage, world.loaded, ())
    return json.loads(tensors["texts"]["json"].tobytes())


def test_what_is_drawn_depends_on_texts_sample_and_seed_and_on_no_company(world):
    pairs = [(pair["pos"], question) for pair in TRAIT["instruction"] for question in TRAIT["questions"]]
    prompts = [(*pair, sample) for pair in pairs for sample in (0, 1)]
    together = elicited(world, prompts)
    for budget in (16, 90):
        assert elicited(world, prompts, budget) == together
    assert elicited(world, prompts[::-1])[::-1] == together
    assert [elicited(world, [prompt])[0] for prompt in prompts[:3]] == together[:3]
    assert together[::2] != together[1::2]  # another sample is another answer
    assert elicited(world, prompts, seed=4) != together


def test_an_attempt_after_a_death_answers_nothing_twice(world):
    spec = world.plan("resumed", samples=4)
    parts = -(-2 * 2 * 5 * 4 // ANSWERS)
    assert parts == 3

    class Dies(Quiet):
        calls = 0

        def check(self) -> None:
            Dies.calls += 1
            if Dies.calls == 3:  # before the third task
                raise Interrupted("interrupted", "the dispatcher stops")

    world.tasks.clear()
    with pytest.raises(Interrupted):
        world.run(spec, Dies(JobRecord("j", JobKind.PERSONA_VECTOR, {}, "running", 1, 1, "", ""), {}))
    assert [type(task.work).__name__ for task in world.tasks] == ["ElicitWork"] * 2
    world.run(spec)
    kinds = [type(task.work).__name__ for task in world.tasks]
    assert (kinds.count("ElicitWork"), kinds.count("ResponsesWork")) == (parts, parts)
    assert len({task.key for task in world.tasks}) == len(world.tasks)
    first = world.lab.registry.get(CONCEPTS, "resumed")
    world.run(spec)  # died after publishing: the same again
    assert len(world.tasks) == 2 * parts
    assert world.lab.registry.get(CONCEPTS, "resumed") == first


# --- system prompts -------------------------------------------------------------------------------------


def with_tokenizer(world: World, tokenizer) -> World:
    other = object.__new__(World)
    other.lab = world.lab
    other.loaded = replace(world.loaded, tokenizer=tokenizer)
    return other


def prompts_seen(world: World, tokenizer, monkeypatch, **about: Any) -> list[str]:
    """The texts that the model is given."""
    from workers.works import answers

    seen: list[str] = []
    generate = answers.generate

    def watched(loaded, prompts, *given, **named):
        seen.extend(tiny.as_bytes(tokenizer, prompt).decode() for prompt in prompts)
        return generate(loaded, prompts, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "generate", watched)
        elicited(with_tokenizer(world, tokenizer), [("the cat sat", "the question", 0)], **about)
    return list(dict.fromkeys(seen))


def test_where_a_system_prompt_stands(world, monkeypatch):
    def seen(template, **about):
        return prompts_seen(world, tiny.byte_pairs(template), monkeypatch, **about)[0]

    head = "<|user|>the cat sat\n\nthe question<|end|><|assistant|>"
    assert seen(tiny.PLAIN) == "<s><|system|>the cat sat<|end|><|user|>the question<|end|><|assistant|>"
    assert seen(None) == "the cat sat\nthe question\n"
    for template in (tiny.NO_SYSTEM, tiny.PLAIN):
        assert seen(template, in_question=True) == f"<s>{head}"
    assert seen(None, in_question=True) == "the cat sat\n\nthe question\n"


SILENT = tiny.PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize(("template", "says"), [(tiny.NO_SYSTEM, "no system role"), (SILENT, "without a word")])
def test_a_template_without_a_place_for_it_is_refused_with_the_way_out(world, template, says):
    other = with_tokenizer(world, tiny.byte_pairs(template))
    with pytest.raises(Invalid, match=says) as caught:
        elicited(other, [("the cat sat", "the question", 0)])
    assert (caught.value.code, caught.value.param) == ("system_prompt_refused", "system_prompt")
    assert "in_question" in caught.value.detail
    assert elicited(other, [("the cat sat", "the question", 0)], in_question=True)


# --- judges ---------------------------------------------------------------------------------------------


def score_of(question: str) -> int:
    return sum(question.encode()) * 7919 % 101


def scored(sent: dict[str, Any]) -> Any:
    return completion(str(score_of(sent["messages"][0]["content"])))


def test_a_judge_over_http_keeps_the_pairs_that_show_the_trait(world, caplog):
    world.judge.answer = scored
    world.judge.asked.clear()
    spec = world.plan("judged", samples=4, judge=AskHttp("judge-1", None, 50.0, 50.0))
    job = world.lab.jobs.submit(JobKind.PERSONA_VECTOR, spec)
    result = world.run(spec)
    answered = world.answers("judged")
    prompt = TRAIT["eval_prompt"]
    for each in answered:
        asked = prompt.replace("{question}", each.prompt).replace("{answer}", each.answer)
        assert each.score == score_of(asked)
        assert each.judge_said == str(score_of(asked))
    pairs = list(zip(answered[::2], answered[1::2], strict=True))
    for positive, negative in pairs:
        assert (positive.side, negative.side) == ("positive", "negative")
        about = [(e.instruction, e.question, e.sample, e.kept, e.reason) for e in (positive, negative)]
        assert about[0] == about[1]
        assert positive.kept == (positive.score > 50 and negative.score < 50)
        assert (positive.reason is None) == positive.kept
    told = result["pairs"]
    assert told["kept"] == sum(pair[0].kept for pair in pairs) >= 5
    assert told["kept"] + sum(told["dropped"].values()) == told["made"] == len(pairs) == 40
    assert set(told["dropped"]) == {"positive_without_trait", "negative_with_trait"}
    record = world.lab.registry.get(CONCEPTS, "judged")
    assert (record.n_positive, record.n_negative) == (told["kept"], told["kept"])
    kept = {
        side: [oracle(world, each)[1][1] for each in answered if each.kept and each.side == side]
        for side in ("positive", "negative")
    }
    expected = np.mean(kept["positive"], axis=0) - np.mean(kept["negative"], axis=0)
    np.testing.assert_allclose(world.direction("judged"), expected / np.linalg.norm(expected), atol=1e-5)
    said = record.provenance
    assert said["trait"]["sha256"] == codec.digest(TRAIT)
    assert said["judge"] == {
        "kind": "http",
        "url": world.judge.url,
        "model": "judge-1",
        "positive_above": 50.0,
        "negative_below": 50.0,
    }
    assert (said["generation"]["seed"], said["generation"]["samples"]) == (3, 4)
    # The key goes to the judge, and nowhere else.
    assert {headers["Authorization"] for _, headers, _ in world.judge.asked} == {f"Bearer {KEY}"}
    assert KEY not in codec.encode(job) + codec.encode(record) + json.dumps(result) + caplog.text
    files = [path for path in Path(world.lab.storage.root).rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_too_few_pairs_are_refused_and_what_was_said_can_be_read(world):
    world.judge.answer = lambda _sent: completion("REFUSAL")
    spec = world.plan(
        "refused", answers=AnswersSpec(max_new_tokens=LIMIT, seed=11), judge=AskHttp("j", None, 50, 50)
    )
    world.tasks.clear()
    with pytest.raises(Invalid, match="10 refusal") as caught:
        world.run(spec)
    assert caught.value.code == "too_few_pairs"
    assert {type(task.work).__name__ for task in world.tasks} == {"ElicitWork"}  # activations are spared
    answered = world.answers(caught.value.context["answers"])
    assert {(each.kept, each.reason, each.score) for each in answered} == {(False, "refusal", None)}
    with pytest.raises(NotFound, match="refused"):
        world.answers("refused")


def test_a_probe_judges_by_where_answers_lie_along_its_concept(world):
    rng = np.random.default_rng(5)
    probe = world.lab.concept("probe", world.model, rng.standard_normal(tiny.WIDTH), layer=3)
    result = world.run(world.plan("probed", samples=4, judge=AskProbe("probe", None)))
    answered = world.answers("probed")
    v = world.direction("probe")
    for each in answered[:6]:
        assert each.score == pytest.approx(oracle(world, each)[1][2] @ v, rel=1e-4, abs=1e-5)
    sides = [[each.score for each in answered if each.side == side] for side in ("positive", "negative")]
    middle = (np.mean(sides[0]) + np.mean(sides[1])) / 2
    for positive, negative in zip(answered[::2], answered[1::2], strict=True):
        assert positive.kept == (positive.score > middle > negative.score)
    said = world.lab.registry.get(CONCEPTS, "probed").provenance["judge"]
    assert said["sha256"] == probe.sha256
    assert said["positive_above"] == said["negative_below"] == pytest.approx(middle)
    assert 0 < result["pairs"]["kept"] < result["pairs"]["made"]


def test_answers_that_cannot_be_have_a_reason(world):
    long = TRAIT | {"questions": [*TRAIT["questions"], "the mat " * 200]}
    result = world.run(world.plan("long", file=traits.from_object(long, param="trait")))
    assert result["pairs"]["dropped"] == {"prompt_too_long": 2}
    assert result["pairs"]["kept"] == 10
    gone = [each for each in world.answers("long") if each.question == 5]
    assert {(each.answer, each.kept, each.reason) for each in gone} == {("", False, "prompt_too_long")}


def test_answers_whose_activations_are_nan_are_left_out_with_their_twins(world):
    made = world.run(world.plan("finite"))["answers"]
    tokens = [oracle(world, each)[0] for each in world.answers(made) if each.instruction == 0]
    # A token that ends an answer, cut there, and is met nowhere else: it is written but never read.
    last = next(each[-1] for each in tokens if len(each) == LIMIT and sum(x.count(each[-1]) for x in tokens) == 1)
    folder = Path(tiny.save(world.root / "nan", "llama", world.loaded.tokenizer))
    model = tiny.model("llama", vocab=len(world.loaded.tokenizer))
    with torch.no_grad():  # another, é, is in one system prompt only: nothing can be answered there
        for token in (last, world.loaded.tokenizer("née")["input_ids"][1]):
            model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(folder)
    world.lab.model("nan", folder)
    result = world.run(world.plan("nan", model="nan", samples=2))
    answered = world.answers("nan")
    gone = [[each for each in answered if each.instruction == n and each.reason == "not_finite"] for n in (0, 1)]
    assert any(a.answer and b.answer for a, b in zip(gone[0][::2], gone[0][1::2], strict=True))
    assert len(gone[1]) == 20
    assert set(result["pairs"]["dropped"]) == {"not_finite"}
    assert result["pairs"]["kept"] + result["pairs"]["dropped"]["not_finite"] == 20
    assert sum(each.kept for each in answered) == 2 * result["pairs"]["kept"]
    assert np.isfinite(world.direction("nan")).all()


# --- what is asked for ----------------------------------------------------------------------------------


def changed(**about: Any) -> dict[str, Any]:
    return {name: value for name, value in {**TRAIT, **about}.items() if value != "gone"}


def test_what_cannot_be_is_refused_before_there_is_a_job(world):
    def refused(kind, **about):
        with pytest.raises(kind) as caught:
            world.plan(**{"name": "new"} | about)
        return caught.value.code, caught.value.param

    other = world.lab.concept(
        "pooled", world.model, np.ones(tiny.WIDTH, np.float32), layer=2, pooling=Pooling.ALL_MEAN
    )
    world.run(world.plan("taken", layers=(1,)))
    plain = traits.from_object(changed(eval_prompt="gone"), param="trait")
    http = AskHttp("j", None, 50.0, 50.0)
    assert refused(Conflict, name="taken") == ("concept_exists", "id")
    assert refused(NotFound, model="nobody") == ("model_not_found", "model")
    assert refused(Invalid, layers=(4,)) == ("layer_out_of_range", "layers")
    assert refused(Invalid, samples=10_000) == ("too_many_answers", "samples")
    assert refused(Invalid, file=plain, judge=http) == ("eval_prompt_needed", "trait.eval_prompt")
    assert refused(Invalid, judge=replace(http, negative_below=60.0)) == (
        "thresholds_cross",
        "judge.negative_below",
    )
    assert refused(Forbidden, judge=replace(http, url="http://x/v1")) == ("judge_not_allowed", "judge.url")
    assert refused(NotFound, judge=AskProbe("nobody", None)) == ("concept_not_found", "judge.concept")
    assert refused(Invalid, judge=AskProbe(other.id, None)) == ("concept_of_other_pooling", "judge.concept")


def test_a_dispatcher_calls_only_judges_of_its_own_settings(world):
    spec = world.plan("elsewhere", judge=AskHttp("j", None, 50.0, 50.0))
    world.lab.engine._settings = Settings(judges="http://other/v1")
    try:
        with pytest.raises(Forbidden, match="WHENCE_JUDGES"):
            world.run(spec)
    finally:
        world.lab.engine._settings = world.lab.settings


def test_requests_over_http(world, server, registry):
    models.register(registry, world.model)
    http = httpx.Client(base_url=server)
    body = {"id": "p", "model": "m", "trait": TRAIT, "layers": [2], "samples": 2}
    first = http.post("/v1/personas", json=body)
    assert first.status_code == 202
    assert first.headers["Location"] == f"/v1/jobs/{first.json()['id']}"
    text = json.dumps(TRAIT)
    assert http.post("/v1/personas", json=body).json()["id"] == first.json()["id"]  # the same job
    assert http.post("/v1/personas", json=body | {"trait": text}).json()["spec"]["file"]["sha256"] == (
        hashlib.sha256(text.encode()).hexdigest()
    )
    for change, status, code, param in [
        ({"trait": None}, 422, "invalid_request", None),
        ({"path": "/data/x.json"}, 422, "invalid_request", None),
        ({"trait": None, "path": "/etc/passwd"}, 403, "path_outside_roots", "path"),
        ({"trait": "{\n"}, 422, "bad_trait", "trait line 2"),
        ({"trait": changed(questions=[1, 2])}, 422, "bad_trait", "trait.questions[0]"),
        ({"judge": {"kind": "http", "model": "j"}}, 422, "judge_url_needed", "judge.url"),
        (
            {"judge": {"kind": "http", "model": "j", "url": "http://169.254.169.254"}},
            403,
            "judge_not_allowed",
            "judge.url",
        ),
        ({"judge": {"kind": "http", "model": "j", "key": "k"}}, 422, "invalid_request", "judge.http.key"),
        ({"sample": 1}, 422, "invalid_request", "sample"),
    ]:
        reply = http.post("/v1/personas", json=body | change)
        assert (reply.status_code, reply.json()["code"], reply.json()["param"]) == (status, code, param)
    missing = http.get("/v1/concepts/p/answers")
    assert (missing.status_code, missing.json()["code"]) == (404, "concept_not_found")
