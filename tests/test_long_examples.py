"""Examples beyond the context: windows that count every target once and add up to one row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab import Lab
from service.contracts import Completion, Example, PlainText
from service.datasets import example_id
from service.terms import IndexKind, LongExamples, LossReduction, Method, Pooling
from service.work import ActivationSpec, GradientSpec, PassSpec, Rademacher, Tracked
from tests import tiny
from workers import passes, readout
from workers.masks import Tokens, Window, split, tokenise

POOLED = (Pooling.RESPONSE_MEAN, Pooling.ALL_MEAN, Pooling.LAST_TOKEN, Pooling.LAST_PROMPT_TOKEN)
SPEC = PassSpec(
    model_fingerprint="m",
    tokenizer_fingerprint="t",
    activation=ActivationSpec((2,), Pooling.RESPONSE_MEAN),
    gradient=GradientSpec(Tracked(2), Rademacher(p=4)),
    objective=None,
    max_length=9,
    long_examples=LongExamples.SPLIT_AND_SUM,
    token_budget=64,
    dtype="float32",
)


def tokens(length: int, prompt: int, bos: bool, gap: int = 0) -> Tokens:
    target = np.arange(length) >= prompt
    target[gap : gap + 1] = False
    if bos:
        target[0] = False
    return Tokens(np.arange(2, length + 2), target, bos, has_prompt=True)


@given(st.integers(1, 60), st.integers(1, 30), st.booleans(), st.integers(2, 20), st.integers(0, 59))
def test_every_token_counts_once_and_follows_what_stands_before_it(length, prompt, bos, limit, gap):
    whole = tokens(length, min(prompt, length), bos, gap)
    windows = split(whole, limit)
    assert all(len(window) <= limit for window in windows)
    if length <= limit:
        assert windows == [whole]
        return
    counted = np.concatenate([window.index[window.counted] for window in windows])
    np.testing.assert_array_equal(counted, np.arange(length))
    for window in windows:
        np.testing.assert_array_equal(window.ids, whole.ids[window.index])
        assert window.bos == (bos and window.index[0] == 0)
        first = int(window.counted.argmax())
        assert window.index[0] == 0 or window.index[first - 1] == window.index[first] - 1
        assert window.predicted[:1].sum() == 0  # nothing predicts position 0
    assert sum(window.predicted.sum() for window in windows) == whole.predicted.sum()
    for pooling in POOLED:
        assert sum(window.pooled(pooling).sum() for window in windows) == whole.pooled(pooling).sum()


def example(words: int, seed: int) -> Example:
    chosen = np.random.default_rng(seed).choice(
        ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"], words
    )
    content = Completion(" ".join(chosen[:3]) + " ", " ".join(chosen[3:]))
    return Example(example_id(content), content, {}, ())


def run(loaded, spec, examples):
    return passes.run(loaded, readout.make(loaded, spec, None), spec, examples)


@pytest.mark.parametrize("reduction", list(LossReduction))
@pytest.mark.parametrize("pooling", [Pooling.RESPONSE_MEAN, Pooling.ALL_MEAN])
def test_the_row_of_a_split_example_is_the_weighted_sum_of_its_windows(reduction, pooling):
    """Each window by itself as an example of its own, weighed by hand."""
    loaded = tiny.loaded("llama", tiny.words(bos=True))
    long = example(30, 1)
    gradient = replace(SPEC.gradient, loss_reduction=reduction)
    spec = replace(SPEC, activation=ActivationSpec((2,), pooling), gradient=gradient)
    result = run(loaded, spec, [long])
    whole = tokenise(long.content, loaded.tokenizer)
    sides = readout.make(loaded, spec, None).sides
    modules = dict(loaded.model.named_modules())
    row, state = 0, 0
    for window in split(whole, SPEC.max_length):
        assert isinstance(window, Window)
        ids = torch.from_numpy(window.ids)[None]
        weights = [modules[name].weight.requires_grad_() for name in sides]
        log_p = loaded.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        places = np.flatnonzero(window.predicted)
        share = whole.predicted.sum() if reduction == LossReduction.MEAN else 1
        if len(places):
            loss = sum(-log_p[t - 1, ids[0, t]] for t in places) / int(share)
            parts = zip(sides.values(), torch.autograd.grad(loss, weights), strict=True)
            row = row + torch.cat([(side.out.T @ G @ side.into).flatten() for side, G in parts])
        loaded.model.requires_grad_(False)
        hidden = tiny.hidden_states(loaded.model, ids)[2][0]
        state = state + hidden[torch.from_numpy(window.pooled(pooling))].sum(0) / int(whole.pooled(pooling).sum())
    for info, rows in result.arrays.items():
        expected = row if info.kind == IndexKind.GRADIENT else state
        np.testing.assert_allclose(rows[0], expected.numpy(), rtol=1e-4, atol=1e-5 * np.abs(expected.numpy()).max())


def test_short_examples_are_as_without_the_rule():
    loaded = tiny.loaded("llama", tiny.words())
    short, long = [example(words, seed) for seed, words in enumerate((5, 7, 6))], example(40, 9)
    alone = run(loaded, replace(SPEC, long_examples=LongExamples.QUARANTINE), short)
    mixed = run(loaded, SPEC, [short[0], long, *short[1:]])
    assert mixed.ids == (short[0].id, long.id, short[1].id, short[2].id)
    assert mixed.long == (long.id,)
    assert alone.long == ()
    for info, rows in alone.arrays.items():
        np.testing.assert_allclose(mixed.arrays[info][[0, 2, 3]], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 500])
def test_batches_do_not_matter(budget):
    loaded = tiny.loaded("llama", tiny.words())
    examples = [example(words, seed) for seed, words in enumerate((5, 40, 17, 9, 23))]
    expected, found = run(loaded, SPEC, examples), run(loaded, replace(SPEC, token_budget=budget), examples)
    for info, rows in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[info], rows, rtol=1e-4, atol=1e-5 * np.abs(rows).max())


def test_a_line_of_a_hundred_thousand_tokens_is_indexed_whole():
    loaded = tiny.loaded("llama", tiny.words())
    content = PlainText(" ".join(["the cat sat on mat"] * 20_000))
    spec = replace(SPEC, activation=ActivationSpec((2,), Pooling.ALL_MEAN), max_length=256, token_budget=8192)
    result = run(loaded, spec, [Example(example_id(content), content, {}, ())])
    assert result.tokens == 100_000
    assert len(result.ids) == 1
    assert all(np.isfinite(rows).all() and rows.any() for rows in result.arrays.values())


def test_a_question_about_long_query_examples_has_one_answer(tmp_path):
    """From the Jacobian that a build has kept, or from a job for one concept: cut on the right in both."""
    tokenizer = tiny.words()
    train = [example(8, seed) for seed in range(30)]
    long = [example(60, seed) for seed in range(100, 104)]
    beginning = []
    for one in long:
        assert isinstance(one.content, Completion)
        words = one.content.completion.split()[:13]  # 16 tokens with the three of the prompt
        content = Completion(one.content.prompt, " ".join(words))
        beginning.append(Example(example_id(content), content, {}, ()))
    fitted = {"examples": 30, "seed": 0, "labels": "true", "positions": "targets"}
    about = {"coordinates": 10**6, "max_length": 16, "curvature": fitted}
    about |= {"long_examples": LongExamples.SPLIT_AND_SUM}
    threads = torch.get_num_threads()
    with Lab(tmp_path / "lab") as lab:
        model = lab.model("m", Path(tiny.save(tmp_path / "m", "llama", tokenizer)))
        for name, examples in {"d": train, "long": long, "beginning": beginning}.items():
            lab.dataset(name, examples)
        lab.concept("v", model, np.random.default_rng(0).standard_normal(tiny.WIDTH).astype(np.float32), layer=2)
        kinds = ("gradient", "influence")
        kept, _ = lab.build("kept", "m", "d", 2, kinds=kinds, query_sets=("long",), **about)
        asked, _ = lab.build("asked", "m", "d", 2, kinds=("gradient",), **about)

        def scores(index, query_set: str, **query) -> np.ndarray:
            options = {"concept": "v", "through": IndexKind.GRADIENT} | query
            return lab.scores(index, [one.id for one in train], query_set=query_set, **options)

        expected = scores(kept, "long")
        within = {"rtol": 1e-2, "atol": 1e-2 * np.abs(expected).max()}  # rows in float16, chosen in another basis
        np.testing.assert_allclose(scores(asked, "long"), expected, **within)
        np.testing.assert_allclose(scores(asked, "beginning"), expected, **within)
        loss = {"concept": None, "through": None, "method": Method.INFLUENCE_FUNCTION}
        whole, cut = (scores(asked, name, **loss) for name in ("long", "beginning"))
        assert np.abs(whole - cut).max() > 0.1 * np.abs(whole).max()  # losses are added over the windows
    torch.set_num_threads(threads)
