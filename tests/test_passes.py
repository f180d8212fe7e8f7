"""A whole pass over examples: what comes out of it, what is set aside, and the models it runs on."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from service.contracts import ArrayInfo, Completion, Content, Example, PlainText
from service.datasets import example_id
from service.errors import Invalid
from service.terms import IndexKind, LongExamples, LossReduction, Pooling
from service.work import ActivationSpec, ConceptObjective, GradientSpec, PassSpec, Rademacher, Tracked
from tests import tiny
from tests.tiny import activation_of, chat, loss_of, oracle_rows
from workers import passes, readout
from workers.masks import tokenise
from workers.models import Loaded, load, shape
from workers.passes import PassResult
from workers.projections import signs

LAYERS = (1, 3)
family = pytest.mark.parametrize("family", tiny.FAMILIES)

CONTENTS: list[Content] = [
    Completion("the question ", "the answer"),
    chat("user: the cat", "assistant: sat on the mat", "user: a", "assistant: the end of the answer"),
    Completion("a", ""),  # no target
    Completion("the cat sat on the mat. " * 3, "the end of the question " * 4),  # long
    chat("user: 😀", "assistant: 🎉 née café"),
    chat("system: the", "user: answer", "assistant: b"),
    Completion("", "the end"),  # no prompt
    Completion("the mat sat on the cat. " * 8, "the end"),  # too long: its answer lies beyond the limit
]
EXAMPLES = [Example(example_id(content), content, {}, ()) for content in CONTENTS]
BASIC = PassSpec(
    model_fingerprint="m",
    tokenizer_fingerprint="t",
    activation=ActivationSpec(LAYERS, Pooling.RESPONSE_MEAN),
    gradient=GradientSpec(Tracked(tiny.BLOCKS), projection=Rademacher(p=4, seed=5)),
    objective=None,
    max_length=40,
    long_examples=LongExamples.TRUNCATE_RIGHT,
    token_budget=120,
    dtype="float32",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(root / name, name, tiny.byte_pairs(bos=True)) for name in tiny.FAMILIES}


@pytest.fixture
def llama(folders) -> Loaded:
    return load(folders["llama"], "float32")


def run(loaded: Loaded, spec: PassSpec, examples: Sequence[Example] = EXAMPLES) -> PassResult:
    return passes.run(loaded, readout.make(loaded, spec, None), spec, examples)


def gradients(result: PassResult) -> np.ndarray:
    return next(rows for info, rows in result.arrays.items() if info.kind == IndexKind.GRADIENT)


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of any row, relative to its norm."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def reasons(result: PassResult) -> dict[str, str]:
    return {item.id: item.reason for item in result.quarantined}


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", LossReduction)
@family
def test_rows_are_the_pooled_activations_and_projected_gradients_of_each_example(folders, family, reduction):
    loaded = load(folders[family], "float32")
    spec = replace(BASIC, gradient=replace(BASIC.gradient, loss_reduction=reduction), max_length=1000)
    sides = readout.make(loaded, spec, None).sides
    result = run(loaded, spec)
    by_id = {example.id: tokenise(example.content, loaded.tokenizer) for example in EXAMPLES}
    tokens = [by_id[name] for name in result.ids]
    expected, _ = oracle_rows(loaded, sides, tokens, loss_of(loaded, reduction))
    assert off(gradients(result), expected.numpy()) <= 1e-4
    for layer in LAYERS:
        activation = activation_of(loaded, layer, Pooling.RESPONSE_MEAN)
        rows = torch.stack([activation(one) for one in tokens]).numpy()
        assert off(result.arrays[ArrayInfo(IndexKind.ACTIVATION, layer, tiny.WIDTH)], rows) <= 1e-5


def test_a_concept_pass_gives_the_gradient_of_the_concept_at_its_layer(llama):
    direction = np.random.default_rng(0).normal(size=tiny.WIDTH)
    direction /= np.linalg.norm(direction)
    objective = ConceptObjective("c", 2, Pooling.LAST_TOKEN, tuple(direction))
    spec = replace(BASIC, activation=None, objective=objective, max_length=1000)
    result = run(llama, spec)
    tokens = [tokenise(example.content, llama.tokenizer) for example in EXAMPLES]
    assert len(result.ids) == len(EXAMPLES)  # without targets, too: nothing is trained on
    activation, v = activation_of(llama, 2, Pooling.LAST_TOKEN), torch.tensor(direction, dtype=torch.float32)
    tracked = readout.make(llama, replace(spec, gradient=replace(BASIC.gradient, tracked=Tracked(2))), None).sides
    expected, _ = oracle_rows(llama, tracked, tokens, lambda one: activation(one) @ v)
    rows = gradients(result)
    assert off(rows[:, : expected.shape[1]], expected.numpy()) <= 1e-4
    assert not rows[:, expected.shape[1] :].any()


def test_projections_are_seeded_signs_no_larger_than_the_module(llama):
    spec = replace(BASIC, gradient=GradientSpec(Tracked(1), Rademacher(p=20, seed=9)))
    for name, side in readout.make(llama, spec, None).sides.items():
        d_out, d_in = shape(llama.linear_maps(1)[name])
        assert torch.equal(side.out, signs(9, name, "out", min(20, d_out), d_out))
        assert torch.equal(side.into, signs(9, name, "in", min(20, d_in), d_in))


def test_a_pass_says_beforehand_which_arrays_it_makes(llama):
    result = run(llama, BASIC)
    declared = passes.arrays(llama, readout.make(llama, BASIC, None), BASIC)
    assert list(result.arrays) == declared
    for info, rows in result.arrays.items():
        assert rows.shape == (len(result.ids), info.dims)
        assert rows.dtype == np.float32


def test_rows_stand_in_the_order_of_the_examples(llama):
    result = run(llama, BASIC)
    backwards = run(llama, BASIC, EXAMPLES[::-1])
    assert result.ids == tuple(example.id for example in EXAMPLES if example.id in result.ids)
    assert backwards.ids == result.ids[::-1]
    assert off(gradients(backwards)[::-1], gradients(result)) <= 1e-5


@family
def test_one_combined_pass_equals_two_separate_ones(folders, family):
    loaded = load(folders[family], "float32")
    both = run(loaded, BASIC)
    kept = [example for example in EXAMPLES if example.id in both.ids]
    only_activation = run(loaded, replace(BASIC, gradient=None), kept)
    only_gradient = run(loaded, replace(BASIC, activation=None), kept)
    assert both.ids == only_activation.ids == only_gradient.ids
    separate = {**only_activation.arrays, **only_gradient.arrays}
    assert both.arrays.keys() == separate.keys()
    for info, rows in both.arrays.items():
        assert off(rows, separate[info]) <= 1e-5


@family
def test_the_batch_budget_does_not_change_the_rows(folders, family):
    loaded = load(folders[family], "float32")
    alone = run(loaded, replace(BASIC, token_budget=1))
    for budget in (50, 100, 10_000):
        together = run(loaded, replace(BASIC, token_budget=budget))
        assert together.ids == alone.ids
        for info, rows in together.arrays.items():
            assert off(rows, alone.arrays[info]) <= 1e-5


def test_the_same_pass_twice_gives_the_same_bytes(folders):
    first, second = (run(load(folders["gpt2"], "float32"), BASIC) for _ in range(2))
    assert (first.ids, first.quarantined) == (second.ids, second.quarantined)
    for info, rows in first.arrays.items():
        assert rows.tobytes() == second.arrays[info].tobytes()


def test_no_examples_give_no_rows(llama):
    result = run(llama, BASIC, [])
    assert result.ids == result.quarantined == ()
    assert all(rows.shape == (0, info.dims) for info, rows in result.arrays.items())


# --- quarantine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LongExamples)
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("max_length", [5, 40, 1000])
def test_every_example_ends_as_a_row_or_in_quarantine(llama, pooling, rule, max_length):
    spec = replace(
        BASIC, activation=ActivationSpec((1,), pooling), long_examples=rule, max_length=max_length, gradient=None
    )
    for result in (run(llama, spec), run(llama, replace(spec, gradient=BASIC.gradient))):
        assert Counter(result.ids) + Counter(item.id for item in result.quarantined) == Counter(
            example.id for example in EXAMPLES
        )
        assert all(item.reason and item.detail for item in result.quarantined)
        assert all(np.isfinite(rows).all() for rows in result.arrays.values())


def test_reasons_are_named(llama):
    by_position = [reasons(run(llama, BASIC)).get(example.id) for example in EXAMPLES]
    expected = [None, None, "no_target", None, None, None, None, "target_cut_off"]
    assert by_position == expected
    quarantining = run(llama, replace(BASIC, long_examples=LongExamples.QUARANTINE))
    expected[3] = expected[7] = "too_long"
    assert [reasons(quarantining).get(example.id) for example in EXAMPLES] == expected


def test_an_example_without_anything_to_pool_is_set_aside(llama):
    spec = replace(BASIC, gradient=None)
    assert reasons(run(llama, spec))[EXAMPLES[2].id] == "nothing_to_pool"


@pytest.mark.parametrize("pooling", [Pooling.LAST_TOKEN, Pooling.ALL_MEAN])
def test_a_lone_bos_is_set_aside_rather_than_stored(llama, pooling):
    spec = replace(BASIC, gradient=None, activation=ActivationSpec((1,), pooling))
    empty = Example("empty", PlainText(""), {}, ())
    assert reasons(run(llama, spec, [empty])) == {"empty": "nothing_to_pool"}


@pytest.mark.parametrize("rule", [LongExamples.TRUNCATE_LEFT, LongExamples.TRUNCATE_RIGHT])
def test_cut_examples_are_counted_when_they_are_kept(llama, rule):
    result = run(llama, replace(BASIC, long_examples=rule))
    too_long = {e.id for e in EXAMPLES if len(tokenise(e.content, llama.tokenizer)) > BASIC.max_length}
    assert len(too_long) == 2
    assert set(result.long) == too_long & set(result.ids)
    assert len(result.long) == (2 if rule == LongExamples.TRUNCATE_LEFT else 1)


def test_a_prompt_cut_away_from_the_left_leaves_no_prompt_token_to_pool(llama):
    spec = replace(
        BASIC,
        gradient=None,
        activation=ActivationSpec((1,), Pooling.LAST_PROMPT_TOKEN),
        long_examples=LongExamples.TRUNCATE_LEFT,
        max_length=8,
    )
    assert reasons(run(llama, spec, [EXAMPLES[3]])) == {EXAMPLES[3].id: "nothing_to_pool"}


def test_a_chat_that_the_template_refuses_is_set_aside_alone():
    loaded = tiny.loaded("llama", tiny.byte_pairs(tiny.NO_SYSTEM))
    refused = [e.id for e in EXAMPLES if e.content == CONTENTS[5]]
    assert [name for name, reason in reasons(run(loaded, BASIC)).items() if reason == "template_refuses"] == refused


def test_plain_text_has_no_prompt_and_the_pass_says_so(llama):
    spec = replace(BASIC, activation=ActivationSpec((1,), Pooling.LAST_PROMPT_TOKEN))
    with pytest.raises(Invalid) as refused:
        run(llama, spec, [Example("text", PlainText("the cat"), {}, ())])
    assert refused.value.code == "no_prompt"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_sets_an_example_aside(llama, bad):
    llama.linear_maps(3)["model.layers.2.mlp.down_proj"].weight.data[0, 0] = bad  # reaches one dimension of h_3
    result = run(llama, replace(BASIC, gradient=None))
    assert result.ids == ()
    assert set(reasons(result).values()) == {"not_finite", "nothing_to_pool"}


def test_an_infinite_row_is_set_aside_as_well():
    loaded = tiny.loaded("gpt2")
    loaded.linear_maps(3)["transformer.h.2.mlp.c_proj"].bias.data[0] = float("inf")
    spec = replace(BASIC, gradient=None, activation=ActivationSpec((3,), Pooling.ALL_MEAN), token_budget=1)
    assert set(reasons(run(loaded, spec)).values()) == {"not_finite"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_store_nothing(llama, bad):
    llama.linear_maps(2)["model.layers.1.mlp.up_proj"].weight.data[0, 0] = bad
    result = run(llama, BASIC)
    assert result.ids == ()
    assert result.long == ()  # one was cut, none is kept
    assert set(reasons(result).values()) == {"not_finite", "no_target", "target_cut_off"}


def test_a_broken_embedding_sets_aside_the_examples_that_use_it_and_no_other(llama):
    whole = run(llama, BASIC)
    (hit,) = llama.tokenizer("🎉", add_special_tokens=False)["input_ids"][:1]
    llama.model.get_input_embeddings().weight.data[hit] = float("nan")
    result = run(llama, BASIC)
    used = {e.id for e in EXAMPLES if hit in tokenise(e.content, llama.tokenizer).ids} & set(whole.ids)
    assert used
    assert {name for name, reason in reasons(result).items() if reason == "not_finite"} == used
    kept = [row for row, name in enumerate(whole.ids) if name not in used]
    assert result.ids == tuple(whole.ids[row] for row in kept)
    assert off(gradients(result), gradients(whole)[kept]) <= 1e-5


def test_a_broken_embedding_that_only_padding_would_use_harms_nobody():
    loaded = tiny.loaded("llama")
    whole = run(loaded, BASIC)
    assert not any(0 in tokenise(example.content, loaded.tokenizer).ids for example in EXAMPLES)
    loaded.model.get_input_embeddings().weight.data[0] = float("nan")
    assert run(loaded, BASIC).ids == whole.ids


@family
def test_a_token_that_the_model_has_no_embedding_for_is_refused_and_not_looked_up(family):
    tokenizer, spec = tiny.byte_pairs(), replace(BASIC, max_length=1000)
    highest = max(int(tokenise(example.content, tokenizer).ids.max(initial=0)) for example in EXAMPLES)
    assert run(tiny.loaded(family, tokenizer, vocab=highest + 1), spec).ids
    with pytest.raises(Invalid, match=f"token {highest}, but .* knows {highest}:") as refused:
        run(tiny.loaded(family, tokenizer, vocab=highest), spec)
    assert (refused.value.code, refused.value.param) == ("vocabulary_too_small", "checkpoints")


def test_a_gradient_that_vanishes_is_set_aside(llama):
    llama.model.lm_head.weight.data.zero_()
    assert set(reasons(run(llama, replace(BASIC, activation=None))).values()) == {
        "zero_gradient",
        "no_target",
        "target_cut_off",
    }


# --- models -----------------------------------------------------------------------------------------


@family
def test_linear_maps_are_all_matrices_of_the_blocks_and_nothing_else(family):
    loaded = tiny.loaded(family)
    names = {id(module): name for name, module in loaded.model.named_modules()}
    for blocks in range(tiny.BLOCKS + 1):
        prefixes = tuple(names[id(block)] + "." for block in loaded.blocks[:blocks])
        matrices = {
            name.removesuffix(".weight")
            for name, parameter in loaded.model.named_parameters()
            if parameter.ndim == 2 and blocks and name.startswith(prefixes)
        }
        assert set(loaded.linear_maps(blocks)) == matrices
        assert len(matrices) == blocks * (7 if family in {"llama", "qwen2"} else 4)


@family
def test_blocks_are_in_order(family):
    loaded = tiny.loaded(family)
    ran: list[int] = []
    for number, block in enumerate(loaded.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    loaded.model(input_ids=torch.tensor([[2, 3]]))
    assert ran == list(range(tiny.BLOCKS))


@family
def test_shape_is_out_by_in(family):
    for module in tiny.loaded(family).linear_maps(1).values():
        d_out, d_in = shape(module)
        assert module(torch.zeros(1, d_in)).shape == (1, d_out)


def test_fused_experts_are_refused_by_name():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=50,
    )
    loaded = Loaded(AutoModelForCausalLM.from_config(config), tiny.byte_pairs(), tiny.CPU)
    with pytest.raises(Invalid, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj") as refused:
        loaded.linear_maps(1)
    assert refused.value.code == "unsupported_parameter"


def test_two_candidates_for_the_blocks_are_refused():
    loaded = tiny.loaded("llama")
    loaded.model.model.others = nn.ModuleList(nn.Identity() for _ in range(tiny.BLOCKS))
    with pytest.raises(Invalid) as refused:
        _ = loaded.blocks
    assert refused.value.code == "unknown_architecture"


@family
def test_a_loaded_model_is_the_saved_one_frozen_and_in_eval_mode(folders, family):
    loaded, built = load(folders[family], "float32"), tiny.model(family, vocab=len(tiny.byte_pairs()))
    saved = dict(built.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, saved[name])
        assert not parameter.requires_grad
    assert not any(module.training for module in loaded.model.modules())
    text = "the cat\n 😀"
    assert loaded.tokenizer(text)["input_ids"] == tiny.byte_pairs(bos=True)(text)["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_dtype_asked_for(folders, dtype):
    assert load(folders["qwen2"], dtype).model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("template", [None, tiny.PLAIN, tiny.TAGGED, tiny.FORGETS_THOUGHTS])
def test_a_chat_template_survives_saving_and_loading(tmp_path, template):
    path = tiny.save(tmp_path, "llama", tiny.byte_pairs(template))
    assert load(path, "float32").tokenizer.chat_template == template


def refuse(folder: Path) -> Invalid:
    with pytest.raises(Invalid) as refused:
        load(str(folder), "float32")
    assert refused.value.param == "model"
    return refused.value


def test_pickled_weights_are_refused(tmp_path):
    tiny.save(tmp_path, "llama", tiny.byte_pairs())
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    assert refuse(tmp_path).code == "model_does_not_load"


def test_code_beside_a_model_is_never_run(tmp_path):
    tiny.save(tmp_path, "llama", tiny.byte_pairs())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: ...\nclass M: ...\n")
    assert refuse(tmp_path).code == "model_does_not_load"
    assert not ran.exists()


@pytest.mark.parametrize("damage", ["garbage", "cut short", "wrong shape", "a weight missing", "gone"])
def test_damaged_weights_are_refused_and_never_filled_with_random_numbers(tmp_path, damage):
    tiny.save(tmp_path, "llama", tiny.byte_pairs())
    weights = tmp_path / "model.safetensors"
    tensors, data = load_file(weights), weights.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "garbage":
        weights.write_bytes(b"garbage")
    elif damage == "cut short":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "wrong shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, metadata={"format": "pt"})
    elif damage == "a weight missing":
        del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.unlink()
    refuse(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_without_tokenizer_is_refused(tmp_path, family):
    tiny.save(tmp_path, family, tiny.byte_pairs())
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    refuse(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    refuse(tmp_path / "nowhere")


# --- which maps are tracked -------------------------------------------------------------------------------


@family
def test_attention_and_mlp_together_are_everything(family):
    loaded = tiny.loaded(family)
    attention, mlp = (set(loaded.tracked(Tracked(tiny.BLOCKS, name))) for name in ("attn", "mlp"))
    assert attention and mlp and attention.isdisjoint(mlp)
    assert attention | mlp == set(loaded.tracked(Tracked(tiny.BLOCKS))) == set(loaded.linear_maps(tiny.BLOCKS))


@pytest.mark.parametrize(("blocks", "stride", "kept"), [(3, 1, "012"), (3, 2, "02"), (2, 2, "1"), (3, 3, "2")])
def test_a_stride_counts_back_from_the_deepest_block(llama, blocks, stride, kept):
    names = llama.tracked(Tracked(blocks, stride=stride))
    assert {name.split(".")[2] for name in names} == set(kept)


def test_a_pattern_is_found_in_the_name_inside_the_block(llama):
    found = llama.tracked(Tracked(2, "q_proj, v_proj,down"))
    assert {name.split(".", 3)[3] for name in found} == {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}


def test_a_pattern_that_fits_nothing_is_refused_with_the_names_there_are(llama):
    with pytest.raises(Invalid, match=r"mlp\.down_proj.*self_attn\.q_proj") as refused:
        llama.tracked(Tracked(2, "query"))
    assert (refused.value.code, refused.value.param) == ("no_modules", "modules")


def test_rows_of_some_maps_are_the_columns_of_all(llama):
    of_all, of_some = (
        GradientSpec(tracked, Rademacher(p=3, seed=5)) for tracked in (Tracked(3), Tracked(3, "mlp", 2))
    )
    whole, some = (gradients(run(llama, replace(BASIC, gradient=gradient))) for gradient in (of_all, of_some))
    names, chosen = list(llama.linear_maps(3)), llama.tracked(of_some.tracked)
    kept = [number for number, name in enumerate(names) if name in chosen]
    expected = whole.reshape(len(whole), len(names), 9)[:, kept].reshape(len(whole), -1)
    np.testing.assert_allclose(some, expected, rtol=1e-5, atol=1e-6)
