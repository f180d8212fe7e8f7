"""A model's own answers: each token against a loop without batch, padding or cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from service import artifacts, codec
from service.contracts import Completion, Example, PlainText
from service.datasets import example_id
from service.errors import Invalid
from service.storage import Storage
from service.terms import LongExamples
from service.work import AnswersSpec, AnswersWork, Reading
from tests import tiny
from workers.answers import ends_of, generate
from workers.curvature import sample, uniforms
from workers.models import Loaded
from workers.works import answers, compute

family = pytest.mark.parametrize("family", tiny.FAMILIES)
LIMIT, ENDS = 9, (1,)
PROMPTS = [np.random.default_rng(n).integers(2, tiny.VOCAB, n) for n in (3, 11, 1, 7, 11)]
UNIFORM = [uniforms(4, f"example {n}", LIMIT) for n in range(len(PROMPTS))]
READING = Reading("weights", "tokenizer", tiny.CONTEXT, LongExamples.TRUNCATE_RIGHT, 4096, "float32")


def one_by_one(loaded: Loaded, prompt, uniform, *, limit=LIMIT, temperature=1.0, ends=(1,)) -> list[int]:
    ids = torch.from_numpy(prompt)[None]
    for step in range(limit):
        with torch.no_grad():
            logits = loaded.model(input_ids=ids, use_cache=False).logits[:, -1]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = sample(logits / temperature, torch.from_numpy(uniform[step : step + 1]))
        ids = torch.cat([ids, token[:, None]], dim=1)
        if int(token) in ends:
            break
    return ids[0, len(prompt) :].tolist()


def example(content) -> Example:
    return Example(example_id(content), content, {}, ())


@family
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 3.0])
def test_answers_are_those_of_a_loop_over_single_examples(family, temperature):
    loaded = tiny.loaded(family)
    found = generate(loaded, PROMPTS, UNIFORM, limit=LIMIT, temperature=temperature, ends=ENDS)
    for prompt, uniform, answer in zip(PROMPTS, UNIFORM, found, strict=True):
        assert answer.tolist() == one_by_one(loaded, prompt, uniform, temperature=temperature)


def test_company_and_order_change_nothing():
    loaded = tiny.loaded("llama")
    together = generate(loaded, PROMPTS, UNIFORM, limit=LIMIT, temperature=1.0, ends=ENDS)
    for number, (prompt, uniform) in enumerate(zip(PROMPTS, UNIFORM, strict=True)):
        (alone,) = generate(loaded, [prompt], [uniform], limit=LIMIT, temperature=1.0, ends=ENDS)
        np.testing.assert_array_equal(alone, together[number])
    backwards = generate(loaded, PROMPTS[::-1], UNIFORM[::-1], limit=LIMIT, temperature=1.0, ends=ENDS)
    for one, other in zip(backwards[::-1], together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_answers_otherwise_and_the_same_one_the_same():
    loaded = tiny.loaded("llama")
    other = [uniforms(5, f"example {n}", LIMIT) for n in range(len(PROMPTS))]
    first, again, changed = (
        [answer.tolist() for answer in generate(loaded, PROMPTS, points, limit=LIMIT, temperature=1.0, ends=ENDS)]
        for points in (UNIFORM, UNIFORM, other)
    )
    assert first == again != changed


@pytest.mark.parametrize("several", [[], [5, 7]])
def test_an_answer_ends_with_the_first_end_token_of_the_model_or_the_tokenizer(several):
    loaded = tiny.loaded("llama")
    endless = one_by_one(loaded, PROMPTS[0], UNIFORM[0], ends=())
    ends = ends_of(loaded, [endless[3], *several])
    assert set(ends) == {endless[3], *several, loaded.tokenizer.eos_token_id}
    (found,) = generate(loaded, PROMPTS[:1], UNIFORM[:1], limit=LIMIT, temperature=1.0, ends=ends)
    stop = next(place for place, token in enumerate(endless) if token in ends)
    assert found.tolist() == endless[: stop + 1]
    assert stop <= 3


def test_settings_in_the_models_folder_do_not_change_the_distribution():
    loaded = tiny.loaded("llama")
    expected = generate(loaded, PROMPTS, UNIFORM, limit=LIMIT, temperature=1.0, ends=ENDS)
    config = loaded.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.suppress_tokens = 3.0, 1, [5, 6, 7]
    for one, other in zip(
        generate(loaded, PROMPTS, UNIFORM, limit=LIMIT, temperature=1.0, ends=ENDS), expected, strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_model_that_gives_nan_has_no_answer():
    loaded = tiny.loaded("llama")
    loaded.model.get_input_embeddings().weight.data[PROMPTS[1][0]] = torch.nan
    found = generate(loaded, PROMPTS, UNIFORM, limit=LIMIT, temperature=1.0, ends=ENDS)
    damaged = [PROMPTS[1][0] in prompt for prompt in PROMPTS]
    assert [len(answer) == 0 for answer in found][:4] == damaged[:4]
    assert any(damaged) and not all(damaged)


# --- as a work of the service -----------------------------------------------------------------------------

TEXTS = ["the cat", "sat on the mat. the end of the", "the answer", "the question the end"]
EXAMPLES = [example(Completion(text + " ", "the mat.")) for text in TEXTS]


def computed(storage: Storage, loaded: Loaded, examples, reading=READING, **spec) -> list[list[int]]:
    work = AnswersWork(reading, AnswersSpec(**{"max_new_tokens": LIMIT, "seed": 4} | spec))
    tensors, facts = compute(work, storage, loaded, examples)
    key = codec.digest([codec.to_plain(work), [one.id for one in examples]])
    artifacts.publish(storage, key, tensors, facts=facts)
    found = [ids.tolist() for ids in answers.read(storage, [key])]
    assert facts == {"examples": sum(map(bool, found)), "tokens": sum(map(len, found))}
    return found


def test_the_prompt_is_what_stands_before_the_last_answer(storage):
    loaded = tiny.loaded("llama", tiny.byte_pairs(tiny.TAGGED))
    chat = tiny.chat("user: the cat", "assistant: sat", "user: the end", "assistant: of the answer")
    first = tiny.chat("user: the cat", "assistant: sat", "user: the end", "assistant: another")
    prompt = answers.prompt_of(example(chat), loaded, READING)
    text = "<s><|user|>the cat<|end|><|assistant|>sat<|end|><|user|>the end<|end|><|assistant|>"
    assert tiny.as_bytes(loaded.tokenizer, prompt).decode() == text
    np.testing.assert_array_equal(prompt, answers.prompt_of(example(first), loaded, READING))
    ((answer,),) = [computed(storage, loaded, [example(chat)])]
    assert answer == one_by_one(loaded, prompt, uniforms(4, example(chat).id, LIMIT))


def test_batches_and_parts_change_nothing(storage):
    loaded = tiny.loaded("llama")
    ends = {"ends": tuple(range(2, 60))}
    whole = computed(storage, loaded, EXAMPLES, **ends)
    assert len({len(answer) for answer in whole}) > 1  # some ended before others
    for budget in (1, 10):
        assert computed(storage, loaded, EXAMPLES, replace(READING, token_budget=budget), **ends) == whole
    last, first = (computed(storage, loaded, some, **ends) for some in (EXAMPLES[2:], EXAMPLES[:2]))
    assert first + last == whole


def test_answers_keep_within_the_context(storage):
    loaded = tiny.loaded("gpt2")  # learnt positions: one beyond the last is an error
    lengths = [len(answers.prompt_of(one, loaded, READING)) for one in EXAMPLES]
    for most in range(min(lengths) + 1, max(lengths) + LIMIT + 2, 3):
        found = computed(storage, loaded, EXAMPLES, replace(READING, max_length=most), temperature=9.0)
        for answer, length in zip(found, lengths, strict=True):
            assert len(answer) <= max(0, most - length)
            assert bool(answer) == (length < most)


def test_each_answer_has_its_own_limit_in_one_batch(storage, monkeypatch):
    """Where the context leaves less room to some, they leave the batch first: the others go on as if alone."""
    loaded = tiny.loaded("gpt2")
    most = max(len(answers.prompt_of(one, loaded, READING)) for one in EXAMPLES) + 2
    reading = replace(READING, max_length=most, long_examples=LongExamples.QUARANTINE)
    sizes = []

    def watched(*given, **named):
        sizes.append(len(given[1]))
        return generate(*given, **named)

    monkeypatch.setattr(answers, "generate", watched)
    together = computed(storage, loaded, EXAMPLES, reading)
    assert sizes[0] == len(EXAMPLES)
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert together == [computed(storage, loaded, [one], reading)[0] for one in EXAMPLES]


@pytest.mark.parametrize("fits", [1, 2])
def test_a_batch_of_answers_that_does_not_fit_is_halved(storage, monkeypatch, fits):
    loaded, sizes = tiny.loaded("llama"), []

    def short_of_memory(*given, **named):
        sizes.append(len(given[1]))
        if len(given[1]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*given, **named)

    whole = computed(storage, loaded, EXAMPLES)
    monkeypatch.setattr(answers, "generate", short_of_memory)
    assert computed(storage, loaded, EXAMPLES) == whole
    assert sizes[0] == len(EXAMPLES)
    assert max(sizes[-2:]) <= fits
    assert loaded.memory.tokens is not None


def test_a_prompt_that_does_not_fit_alone_is_named(storage, monkeypatch):
    def never(*_given, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answers, "generate", never)
    with pytest.raises(Invalid) as caught:
        computed(storage, tiny.loaded("llama"), EXAMPLES[:1])
    assert caught.value.code == "out_of_memory"
    assert EXAMPLES[0].id in caught.value.detail


def test_cut_on_the_left_the_prompt_is_what_is_left(storage):
    loaded = tiny.loaded("llama")
    reading = replace(READING, max_length=6, long_examples=LongExamples.TRUNCATE_LEFT)
    whole = answers.prompt_of(EXAMPLES[1], loaded, READING)
    left = answers.prompt_of(EXAMPLES[1], loaded, reading)
    assert 0 < len(left) < len(whole)
    np.testing.assert_array_equal(left, whole[-len(left) :])
    ((answer,),) = [computed(storage, loaded, EXAMPLES[1:2], reading)]
    assert 0 < len(answer) <= 6 - len(left)


def test_what_has_no_prompt_has_no_answer_and_the_others_keep_their_places(storage):
    loaded = tiny.loaded("llama")
    odd = [example(PlainText("the cat sat")), example(Completion("", "the cat"))]
    mixed = [EXAMPLES[0], odd[0], EXAMPLES[1], odd[1], EXAMPLES[2]]
    found = computed(storage, loaded, mixed)
    assert [found[n] for n in (1, 3)] == [[], []]
    assert [found[n] for n in (0, 2, 4)] == computed(storage, loaded, EXAMPLES[:3])


def test_an_empty_part_has_no_answers(storage):
    loaded = tiny.loaded("llama")
    assert computed(storage, loaded, [example(PlainText("the cat sat"))]) == [[]]
