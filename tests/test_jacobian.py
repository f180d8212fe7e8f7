"""J in coordinates against ``torch.func.jacrev`` over the whole weights, in float64."""

from itertools import cycle

import pytest
import torch
from torch.func import functional_call, jacrev
from transformers.pytorch_utils import Conv1D

from service.terms import ConceptFunction, Pooling
from tests import exact, tiny
from workers.batches import Batch, collate
from workers.gradients import Sides, concept_coordinates
from workers.jacobian import direction_rows, jacobian
from workers.models import shape

LENGTHS = (7, 4, 2)  # ragged: two rows hold padding
TOKENS = [tiny.random_tokens(seed=i, length=length) for i, length in enumerate(LENGTHS)]
P_OUT, P_IN = 3, 5
LAYERS = range(1, tiny.BLOCKS + 1)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def loaded(request):
    return exact.loaded(request.param)


@pytest.fixture(scope="module")
def llama():
    return exact.loaded("llama")


def sides_of(loaded, blocks=tiny.BLOCKS, *, whole=False):
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in loaded.linear_maps(blocks).items():
        d_out, d_in = shape(module)
        out, into = (d_out, d_in) if whole else (P_OUT, P_IN)
        found[name] = Sides(
            torch.randn(d_out, out, generator=generator, dtype=torch.float64),
            torch.randn(d_in, into, generator=generator, dtype=torch.float64),
        )
    return found


def batch_of(tokens, pooling=Pooling.RESPONSE_MEAN) -> Batch:
    made = collate(tokens, pooling=pooling, reduction="sum", device=tiny.CPU)
    # Pooling weights are float32: 1/3 is not. The real thing here, to compare to the last digits.
    weight = made.pool_weight.double()
    return Batch(made.ids, made.loss_weight, weight / weight.sum(1, keepdim=True), made.real)


def everything(width=tiny.WIDTH):
    return torch.eye(width, dtype=torch.float64)


def found_by(loaded, sides, batch, layer, directions=None, **kwargs):
    rows = everything() if directions is None else directions
    modules = loaded.linear_maps(tiny.BLOCKS)
    return jacobian(loaded.model, loaded.blocks, modules, sides, batch, layer=layer, directions=rows, **kwargs)


def whole_jacobian(loaded, modules, one, layer, pooling, function):
    """∂(pooled h_l)/∂W of every module, (d, d_out, d_in): functional, with nothing of ours in between."""
    weights = {f"{name}.weight": module.weight for name, module in modules.items()}

    def activation(given):
        return functional_call(
            _Pooled(loaded, one, layer, pooling, function), {f"model.{k}": given[k] for k in given}
        )

    found = jacrev(activation, chunk_size=1)(weights)
    return {
        name: found[f"{name}.weight"].transpose(1, 2) if isinstance(module, Conv1D) else found[f"{name}.weight"]
        for name, module in modules.items()
    }


class _Pooled(torch.nn.Module):
    def __init__(self, loaded, one, layer, pooling, function):
        super().__init__()
        self.model = loaded.model
        self._about = (loaded, one, layer, pooling, function)

    def forward(self):
        return exact.pooled(*self._about)


def close(ours, theirs, tolerance=1e-9):
    assert set(ours) == set(theirs)
    size = max(each.norm() for each in theirs.values())
    for name, rows in theirs.items():
        assert ours[name].shape == rows.shape
        off = (ours[name] - rows).norm() / (rows.norm() + 1e-3 * size)
        assert off <= tolerance, (name, float(off))


def cases():
    """Every layer with both functions; poolings take turns so that each meets each function."""
    poolings = cycle([*Pooling, Pooling.LAST_TOKEN])  # five, prime to two functions and three layers
    for layer in LAYERS:
        for function in ConceptFunction:
            yield pytest.param(layer, function, next(poolings), id=f"{layer}-{function}")


def compare(loaded, layer, function, pooling):
    tracked = loaded.linear_maps(layer)
    sides = sides_of(loaded)
    expected = {name: torch.zeros(tiny.WIDTH, P_OUT * P_IN, dtype=torch.float64) for name in tracked}
    for one in TOKENS:
        for name, J in whole_jacobian(loaded, tracked, one, layer, pooling, function).items():
            expected[name] += torch.einsum("op,doi,iq->dpq", sides[name].out, J, sides[name].into).flatten(1)
    batch = batch_of(TOKENS, pooling)
    close(found_by(loaded, sides, batch, layer, function=function), expected)


@pytest.mark.parametrize(("layer", "function", "pooling"), list(cases()))
def test_rows_are_the_projected_jacobian(loaded, layer, function, pooling):
    compare(loaded, layer, function, pooling)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("function", ConceptFunction)
def test_every_pooling_with_both_functions(llama, function, pooling):
    compare(llama, 2, function, pooling)


@pytest.mark.parametrize("function", ConceptFunction)
def test_any_v_is_a_combination_of_the_rows(loaded, function):
    """Jᵀv is the gradient of ⟨v, a_l⟩, which is formed without J."""
    sides, batch = sides_of(loaded), batch_of(TOKENS)
    J = found_by(loaded, sides, batch, 2, function=function)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        v = torch.randn(tiny.WIDTH, generator=generator, dtype=torch.float64)
        rows, _ = concept_coordinates(
            loaded.model,
            loaded.blocks,
            loaded.linear_maps(tiny.BLOCKS),
            sides,
            batch,
            layer=2,
            direction=v,
            function=function,
        )
        parts = dict(zip(sides, rows.sum(0).split([side.size for side in sides.values()]), strict=True))
        close({name: v @ rows for name, rows in J.items()}, {name: parts[name] for name in J})
        assert not any(parts[name].any() for name in sides if name not in J)


def test_rows_for_given_directions_are_combinations_of_those_of_the_identity(loaded):
    sides, batch = sides_of(loaded), batch_of(TOKENS)
    D = torch.randn(5, tiny.WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    J = found_by(loaded, sides, batch, 3)
    close(found_by(loaded, sides, batch, 3, D), {name: D @ rows for name, rows in J.items()})


@pytest.mark.parametrize("token_budget", [1, 21, 43, 21 * 7, 21 * 16, 10**6])
def test_how_many_rows_go_together_changes_nothing(loaded, token_budget):
    """21 padded tokens: one row at a time, two, seven (16 is no multiple), all, room to spare."""
    sides, batch = sides_of(loaded), batch_of(TOKENS)
    assert batch.ids.numel() == 21
    for function in ConceptFunction:
        one_by_one = found_by(loaded, sides, batch, 2, function=function, token_budget=1)
        close(found_by(loaded, sides, batch, 2, function=function, token_budget=token_budget), one_by_one)


def test_a_batch_is_the_sum_of_its_examples(loaded):
    sides = sides_of(loaded)
    together = found_by(loaded, sides, batch_of(TOKENS), 2)
    alone = [found_by(loaded, sides, batch_of([one]), 2) for one in TOKENS]
    close(together, {name: sum(each[name] for each in alone) for name in together})
    backwards = found_by(loaded, sides, batch_of(TOKENS[::-1]), 2)
    close(backwards, together)


def test_modules_deeper_than_the_layer_are_left_out(loaded):
    batch, sides = batch_of(TOKENS), sides_of(loaded)
    for layer in LAYERS:
        assert list(found_by(loaded, sides, batch, layer)) == list(loaded.linear_maps(layer))


def test_slices_of_the_identity_are_slices_of_the_jacobian(llama):
    sides, batch = sides_of(llama), batch_of(TOKENS)
    every = found_by(llama, sides, batch, 2)
    parts = [
        found_by(llama, sides, batch, 2, direction_rows(tiny.WIDTH, start, stop, tiny.CPU).double())
        for start, stop in ((0, 7), (7, 8), (8, 16))
    ]
    close({name: torch.cat([part[name] for part in parts]) for name in every}, every)


def test_float32_is_within_a_hundred_thousandth():
    single, double = tiny.loaded("llama"), exact.loaded("llama")
    narrow = {name: Sides(side.out.float(), side.into.float()) for name, side in sides_of(double).items()}
    batch = collate(TOKENS, pooling=Pooling.ALL_MEAN, reduction="sum", device=tiny.CPU)
    ours = found_by(single, narrow, batch, 3, direction_rows(tiny.WIDTH, 0, tiny.WIDTH, tiny.CPU))
    theirs = found_by(double, sides_of(double), batch_of(TOKENS, Pooling.ALL_MEAN), 3)
    assert all(rows.dtype == torch.float32 for rows in ours.values())
    close({name: rows.double() for name, rows in ours.items()}, theirs, 1e-4)


def test_the_model_is_left_as_it_was_found(llama):
    batch = batch_of(TOKENS)
    before = llama.model(input_ids=batch.ids).logits
    hooks = sum(len(module._forward_hooks) for module in llama.model.modules())
    found_by(llama, sides_of(llama), batch, 2)
    assert torch.equal(llama.model(input_ids=batch.ids).logits, before)
    assert sum(len(module._forward_hooks) for module in llama.model.modules()) == hooks
    assert all(weight.grad is None and not weight.requires_grad for weight in llama.model.parameters())
