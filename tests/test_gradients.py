"""Gradient coordinates against the definition: one example, one gradient, one matrix product at a time.

The oracle (tests/tiny.py) runs each example alone, unpadded and in float64, lets autograd form the whole
weight gradient G, and projects it. What it is compared with casts to float32 on the way.
"""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from service.errors import Invalid
from service.terms import LossReduction, Pooling
from tests import tiny
from tests.tiny import activation_of, loss_of, oracle_rows
from workers.activations import block_outputs, pool, run_until
from workers.batches import collate
from workers.gradients import Sides, concept_coordinates, loss_coordinates, recording
from workers.masks import Tokens
from workers.models import Loaded, shape
from workers.projections import signs

LENGTHS = (7, 3, 12, 2, 9)  # ragged; the second and fourth are mostly padding
P_OUT, P_IN = 3, 5  # unequal, so that a swap of the sides cannot pass
family = pytest.mark.parametrize("family", tiny.FAMILIES)
layers = pytest.mark.parametrize("layer", range(1, tiny.BLOCKS + 1))


def sides_of(loaded: Loaded, blocks: int = tiny.BLOCKS) -> dict[str, Sides]:
    generator = torch.Generator().manual_seed(1)
    sides = {}
    for name, module in loaded.linear_maps(blocks).items():
        d_out, d_in = shape(module)
        sides[name] = Sides(
            torch.randn(d_out, P_OUT, generator=generator), torch.randn(d_in, P_IN, generator=generator)
        )
    return sides


def examples() -> list[Tokens]:
    return [tiny.random_tokens(seed=i, length=length) for i, length in enumerate(LENGTHS)]


def batch_of(tokens: list[Tokens], pooling: Pooling | None = None, reduction: LossReduction = LossReduction.MEAN):
    return collate(tokens, pooling=pooling, reduction=reduction, device=tiny.CPU)


def direction_of(width: int = tiny.WIDTH) -> Tensor:
    direction = torch.randn(width, generator=torch.Generator().manual_seed(2))
    return direction / direction.norm()


def assert_close_by_module(rows: Tensor, expected: Tensor, sides: Mapping[str, Sides], tolerance: float) -> None:
    """Every module of every example to ``tolerance`` of its own norm, plus a tenth of the row's: the gradient
    of a query map is exactly zero where attention has one position to look at, and float32 noise is not.
    """
    assert rows.shape == expected.shape
    assert rows.dtype == torch.float32
    sizes = [side.size for side in sides.values()]
    floor = 0.1 * expected.norm(dim=1)
    for name, ours, theirs in zip(sides, rows.double().split(sizes, 1), expected.split(sizes, 1), strict=True):
        off = (ours - theirs).norm(dim=1) / (theirs.norm(dim=1) + floor)
        assert off.max() <= tolerance, (name, off)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of any row, relative to the row's norm."""
    return ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()


# --- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", LossReduction)
@family
def test_loss_coordinates_are_the_projected_weight_gradient(family, reduction):
    loaded = tiny.loaded(family, dtype=torch.float64)
    sides = sides_of(loaded)
    expected, losses = oracle_rows(loaded, sides, examples(), loss_of(loaded, reduction))
    batch = batch_of(examples(), reduction=reduction)
    rows, found = loss_coordinates(loaded.model, loaded.linear_maps(tiny.BLOCKS), sides, batch)
    assert_close_by_module(rows, expected, sides, 1e-5)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=0)


@family
def test_float32_models_stay_within_a_ten_thousandth(family):
    exact, single = tiny.loaded(family, dtype=torch.float64), tiny.loaded(family)
    sides, batch = sides_of(exact), batch_of(examples())
    expected, _ = loss_coordinates(exact.model, exact.linear_maps(tiny.BLOCKS), sides, batch)
    rows, _ = loss_coordinates(single.model, single.linear_maps(tiny.BLOCKS), sides, batch)
    assert_close_by_module(rows, expected.double(), sides, 1e-4)


@family
def test_rows_do_not_depend_on_the_company_in_a_batch(family):
    loaded, tokens = tiny.loaded(family), examples()
    modules, sides = loaded.linear_maps(tiny.BLOCKS), sides_of(loaded)

    def rows_of(chosen: list[int]) -> Tensor:
        return loss_coordinates(loaded.model, modules, sides, batch_of([tokens[i] for i in chosen]))[0]

    together = rows_of([0, 1, 2, 3, 4])
    alone = torch.cat([rows_of([i]) for i in range(5)])
    shuffled = rows_of([3, 0, 4, 2, 1])
    assert relative(together, alone) <= 1e-5
    assert relative(shuffled, together[[3, 0, 4, 2, 1]]) <= 1e-5
    assert relative(rows_of([3, 3, 1]), together[[3, 3, 1]]) <= 1e-5


def test_padding_ids_do_not_matter():
    loaded, tokens = tiny.loaded("llama"), examples()
    modules, sides = loaded.linear_maps(tiny.BLOCKS), sides_of(loaded)
    batch = batch_of(tokens)
    rows, _ = loss_coordinates(loaded.model, modules, sides, batch)
    for row, one in enumerate(tokens):
        batch.ids[row, len(one) :] = 17 + row
    assert torch.equal(loss_coordinates(loaded.model, modules, sides, batch)[0], rows)


def test_an_example_without_targets_has_no_gradient_and_leaves_the_others_alone():
    loaded, tokens = tiny.loaded("gpt2"), examples()[:2]
    silent = Tokens(tokens[0].ids, np.zeros(len(tokens[0]), dtype=bool), bos=False, has_prompt=True)
    modules, sides = loaded.linear_maps(tiny.BLOCKS), sides_of(loaded)
    rows, found = loss_coordinates(loaded.model, modules, sides, batch_of([silent, *tokens]))
    assert not rows[0].any()
    assert found[0] == 0
    assert relative(rows[1:], loss_coordinates(loaded.model, modules, sides, batch_of(tokens))[0]) <= 1e-5


def test_only_the_modules_asked_for_are_in_a_row_and_in_their_order():
    loaded, batch = tiny.loaded("qwen2"), batch_of(examples())
    modules, sides = loaded.linear_maps(tiny.BLOCKS), sides_of(loaded)
    every, _ = loss_coordinates(loaded.model, modules, sides, batch)
    by_name = dict(zip(sides, every.split([side.size for side in sides.values()], 1), strict=True))
    chosen = dict(list(reversed(sides.items()))[::3])
    few, _ = loss_coordinates(loaded.model, modules, chosen, batch)
    torch.testing.assert_close(few, torch.cat([by_name[name] for name in chosen], dim=1), rtol=1e-6, atol=0)


# --- the concept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", Pooling)
@layers
@family
def test_concept_coordinates_are_the_projected_gradient_of_the_pooled_dot_product(family, layer, pooling):
    loaded = tiny.loaded(family, dtype=torch.float64)
    tracked, every = sides_of(loaded, blocks=layer), sides_of(loaded)
    direction, tokens = direction_of(), examples()[1:4]
    activation = activation_of(loaded, layer, pooling)
    expected, values = oracle_rows(loaded, tracked, tokens, lambda one: activation(one) @ direction.double())
    modules, batch = loaded.linear_maps(tiny.BLOCKS), batch_of(tokens, pooling)
    rows, found = concept_coordinates(
        loaded.model, loaded.blocks, modules, every, batch, layer=layer, direction=direction
    )
    k = expected.shape[1]
    assert k == sum(side.size for side in tracked.values())
    assert not rows[:, k:].any()  # modules beyond the layer
    assert_close_by_module(rows[:, :k], expected, tracked, 1e-5)
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=1e-6)


@family
def test_concept_rows_do_not_depend_on_the_company_in_a_batch(family):
    loaded, tokens = tiny.loaded(family), examples()
    modules, sides = loaded.linear_maps(2), sides_of(loaded, blocks=2)

    def rows_of(chosen: list[int]) -> Tensor:
        batch = batch_of([tokens[i] for i in chosen], Pooling.RESPONSE_MEAN)
        found, _ = concept_coordinates(
            loaded.model, loaded.blocks, modules, sides, batch, layer=2, direction=direction_of()
        )
        return found

    together = rows_of([0, 1, 2, 3, 4])
    assert relative(together, torch.cat([rows_of([i]) for i in range(5)])) <= 1e-5
    assert relative(rows_of([3, 0, 4, 2, 1]), together[[3, 0, 4, 2, 1]]) <= 1e-5


# --- what is refused --------------------------------------------------------------------------------


class Flattened(nn.Module):
    """A linear map that sees (batch · tokens, width), as in routers of experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # nn.Linear and Conv1D
def test_a_map_whose_inputs_are_not_batch_by_tokens_is_refused_by_name(family):
    loaded = tiny.loaded(family)
    mlp, name = loaded.blocks[1].mlp, {"llama": "up_proj", "gpt2": "c_fc"}[family]
    batch, before = batch_of(examples(), Pooling.ALL_MEAN), tiny.loaded(family)
    setattr(mlp, name, Flattened(getattr(mlp, name)))
    torch.testing.assert_close(loaded.model(batch.ids).logits, before.model(batch.ids).logits)  # the same model
    modules, sides = loaded.linear_maps(tiny.BLOCKS), sides_of(loaded)
    (flat,) = [each for each in modules if each.endswith("inner")]
    about = {"layer": tiny.BLOCKS, "direction": direction_of()}
    for ask in (
        lambda: loss_coordinates(loaded.model, modules, sides, batch),
        lambda: concept_coordinates(loaded.model, loaded.blocks, modules, sides, batch, **about),
    ):
        with pytest.raises(Invalid) as refused:
            ask()
        assert (refused.value.code, refused.value.param) == ("unsupported_module", "model")
        assert flat in refused.value.detail
    del sides[flat]  # a map that nobody asks for is no obstacle
    rows, _ = loss_coordinates(loaded.model, modules, sides, batch)
    expected, _ = loss_coordinates(before.model, before.linear_maps(tiny.BLOCKS), sides, batch)
    torch.testing.assert_close(rows, expected)


# --- no traces --------------------------------------------------------------------------------------


@family
def test_a_model_is_left_as_it_was_found(family):
    loaded, tokens = tiny.loaded(family), examples()
    batch, modules, sides = batch_of(tokens, Pooling.ALL_MEAN), loaded.linear_maps(3), sides_of(loaded)

    def logits() -> Tensor:
        return loaded.model(input_ids=batch.ids, output_hidden_states=True).hidden_states[-1]

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in loaded.model.modules())

    before, hooks_before = logits(), hooks()  # in this order: transformers installs hooks of its own
    loss_coordinates(loaded.model, modules, sides, batch)
    concept_coordinates(loaded.model, loaded.blocks, modules, sides, batch, layer=2, direction=direction_of())
    with pytest.raises(IndexError):
        loss_coordinates(loaded.model, modules, sides, batch_of([tiny.random_tokens(0, 5, vocab=10**6)]))
    assert torch.equal(logits(), before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in loaded.model.parameters())
    assert hooks() == hooks_before


def test_a_tape_adds_up_over_backwards():
    linear = nn.Linear(4, 3).requires_grad_(False)
    sides = {"map": Sides(torch.eye(3), torch.eye(4))}
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with recording({"map": linear}, sides) as tape:
        linear(x).sum().backward()
        (2 * linear(x)).sum().backward()
    expected = 3 * torch.ones(2, 5, 3).transpose(1, 2) @ x.detach()
    torch.testing.assert_close(tape.rows(sides, 2), expected.flatten(1))


# --- pooled activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", Pooling)
@family
def test_pooled_activations_are_means_of_hidden_states(family, pooling):
    loaded, tokens = tiny.loaded(family), examples()
    batch = batch_of(tokens, pooling)
    with torch.no_grad(), block_outputs(loaded.blocks, [1, 2, 3], stop=True) as outputs:
        run_until(loaded.model, batch.ids)
    for layer in (1, 2, 3):
        expected = torch.stack([activation_of(loaded, layer, pooling)(one) for one in tokens])
        assert relative(pool(outputs[layer], batch.pool_weight), expected) <= 1e-5


@layers
@family
def test_stopping_at_a_layer_gives_the_same_and_runs_nothing_deeper(family, layer):
    loaded, batch = tiny.loaded(family), batch_of(examples())
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
        for depth, block in enumerate(loaded.blocks, start=1)
    ]
    kept = {}
    for stop in (False, True):
        with torch.no_grad(), block_outputs(loaded.blocks, [layer], stop=stop) as outputs:
            run_until(loaded.model, batch.ids)
        kept[stop] = outputs[layer]
    for handle in handles:
        handle.remove()
    assert torch.equal(kept[True], kept[False])
    assert max(ran[tiny.BLOCKS :]) == layer


def test_the_last_layer_is_taken_before_the_final_norm():
    loaded, batch = tiny.loaded("llama"), batch_of(examples())
    with torch.no_grad(), block_outputs(loaded.blocks, [tiny.BLOCKS], stop=False) as outputs:
        run_until(loaded.model, batch.ids)
    after = loaded.model(input_ids=batch.ids, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(outputs[tiny.BLOCKS], after)
    torch.testing.assert_close(loaded.model.model.norm(outputs[tiny.BLOCKS]), after)


# --- random projections -----------------------------------------------------------------------------


def test_signs_are_plus_or_minus_one_over_root_p():
    found = signs(0, "layer.0", "in", 8, 500)
    assert found.shape == (500, 8)
    assert found.dtype == torch.float32
    assert torch.equal(found.abs(), torch.full((500, 8), 8**-0.5))
    assert abs((found > 0).double().mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_signs_are_the_same_every_time():
    assert torch.equal(signs(3, "a", "out", 4, 64), signs(3, "a", "out", 4, 64))


@pytest.mark.parametrize("other", [(1, "a", "out"), (0, "b", "out"), (0, "a", "in")])
def test_signs_of_another_seed_module_or_side_are_unrelated(other):
    agree = (signs(0, "a", "out", 8, 512) == signs(*other, 8, 512)).double().mean()
    assert abs(agree - 0.5) < 5 * 0.5 / 4096**0.5


def test_projected_inner_products_are_right_on_average():
    generator = torch.Generator().manual_seed(4)
    G, other = torch.randn(2, 12, 10, generator=generator).double()
    exact = (G * other).sum()
    p, seeds = 4, 3000
    found = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        out, into = signs(seed, "m", "out", p, 12).double(), signs(seed, "m", "in", p, 10).double()
        found[seed] = ((out.T @ G @ into) * (out.T @ other @ into)).sum()
    error = found.std() / seeds**0.5
    assert abs(found.mean() - exact) < 4 * error
    assert error < 0.1 * G.norm() * other.norm()  # else the line above would say nothing


# --- torch.func -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over attention falls back to a loop
@family
def test_loss_coordinates_agree_with_torch_func_vmapped_over_the_batch(family):
    """An independent route: per-example gradients by vmap(grad(functional_call)), then the two products."""
    loaded = tiny.loaded(family, dtype=torch.float64)
    sides, tokens = sides_of(loaded), [tiny.random_tokens(seed=i, length=9) for i in range(4)]
    batch = batch_of(tokens)
    names = [f"{name}.weight" for name in sides]
    parameters = dict(loaded.model.named_parameters())

    def loss(tracked: dict[str, Tensor], ids: Tensor, weight: Tensor) -> Tensor:
        rest = {name: value.detach() for name, value in parameters.items() if name not in tracked}
        arguments = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(loaded.model, tracked | rest, (), arguments).logits[0]
        each = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        return (each * weight[1:]).sum()

    tracked = {name: parameters[name].detach() for name in names}
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    gradients = per_example(tracked, batch.ids, batch.loss_weight.double())
    expected = []
    for name, side in sides.items():
        gradient = gradients[f"{name}.weight"]
        if isinstance(loaded.linear_maps(tiny.BLOCKS)[name], nn.Linear):
            out_in = gradient
        else:  # Conv1D keeps (in, out)
            out_in = gradient.transpose(1, 2)
        expected.append((side.out.double().T @ out_in @ side.into.double()).flatten(1))
    rows, _ = loss_coordinates(loaded.model, loaded.linear_maps(tiny.BLOCKS), sides, batch)
    assert_close_by_module(rows, torch.cat(expected, dim=1), sides, 1e-5)
