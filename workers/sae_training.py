"""Training a TopK sparse autoencoder: pure functions of tensors, the same seed and device the same numbers.

x̂ = z W_dec + b_dec with z = relu(top k of (x − b_dec) W_enc + b_enc). The loss is the squared error over the rows'
variance, plus an auxiliary one by which features that have not fired for long learn what the others leave (Gao et
al. 2024, arXiv 2406.04093, sections 2.3 and A.2). Rows of W_dec have unit norm; b_dec begins at the rows' geometric
median.

Inputs are ``scale`` · row. Biases are divided by it afterwards, which makes the same SAE one of raw rows: z and x̂
are then those of scaled rows over ``scale``, since relu and top k take a positive factor along.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import Invalid
from service.sae_records import SaeRecipe

WEIGHTS: tuple[str, ...] = ("W_enc", "W_dec", "b_enc", "b_dec")
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 6.25e-10  # of Adam, as in section A.1 there
_DECAY = 0.2  # of the steps, at the end, over which the learning rate falls to zero
_DEAD_PASSES = 2  # a feature is dead that has fired on no row for so many passes over them
_MEDIAN_STEPS = 32
_SAME = 1e-5  # of their norm: rows that are no further apart than rounding puts them


@dataclass
class State:
    """What one step leaves to the next. ``weights``: W_enc (d, f), W_dec (f, d), b_enc (f,), b_dec (d,).

    ``first``, ``second``: Adam's moments; ``silent`` (f,): steps since a feature fired last.
    """

    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    silent: Tensor
    scale: float
    variance: float  # of a scaled row, per dimension

    def flat(self) -> dict[str, Tensor]:
        """Every tensor under one name."""
        named = {f"first.{k}": v for k, v in self.first.items()} | {
            f"second.{k}": v for k, v in self.second.items()
        }
        return {**self.weights, **named, "silent": self.silent}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scale: float, variance: float) -> "State":
        own, first, second = ({k: tensors[f"{prefix}{k}"] for k in WEIGHTS} for prefix in ("", "first.", "second."))
        return cls(own, first, second, tensors["silent"], scale, variance)


def begin(rows: Tensor, recipe: SaeRecipe) -> State:
    """A state before the first step, for ``rows`` (n, d) float32. Raises Invalid when all of them are equal."""
    median = geometric_median(rows)
    distance = float((rows - median).norm(dim=1).double().mean())
    if not distance > _SAME * float(rows.norm(dim=1).double().mean()):
        raise Invalid("no_variance", "All rows are the same: there is nothing to learn.", param="index")
    d, f = rows.shape[1], recipe.features
    scale = d**0.5 / distance
    variance = float(((rows - rows.double().mean(dim=0).float()) * scale).double().square().mean())
    decoder = torch.randn(f, d, generator=_generator(recipe.seed, 0))
    decoder = (decoder / decoder.norm(dim=1, keepdim=True)).to(rows.device)
    weights = {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.zeros(f, device=rows.device),
        "b_dec": median * scale,
    }
    moments = [{name: torch.zeros_like(each) for name, each in weights.items()} for _ in range(2)]
    silent = torch.zeros(f, dtype=torch.int32, device=rows.device)
    return State(weights, moments[0], moments[1], silent, scale, variance)


def advance(state: State, rows: Tensor, recipe: SaeRecipe, start: int, stop: int) -> State:
    """Steps ``start`` to ``stop`` − 1, in place: each step depends on its number, the state and the rows alone."""
    size = min(recipe.batch, len(rows))
    per_pass = len(rows) // size
    dead_after = max(_DEAD_PASSES * per_pass, 10)
    order, of_pass = torch.empty(0, dtype=torch.int64), -1
    for step in range(start, stop):
        number, place = divmod(step, per_pass)
        if number != of_pass:
            order, of_pass = torch.randperm(len(rows), generator=_generator(recipe.seed, 1 + number)), number
        batch = rows[order[place * size : (place + 1) * size].to(rows.device)] * state.scale
        gradients, fired = _gradients(state, batch, recipe, state.silent >= dead_after)
        state.silent = torch.where(fired, 0, state.silent + 1).to(torch.int32)
        left = (recipe.steps - step) / max(1.0, _DECAY * recipe.steps)
        _adam(state, gradients, step + 1, recipe.learning_rate * min(1.0, left))
    return state


def raw(state: State) -> dict[str, Tensor]:
    """The weights that do to raw rows what the trained ones do to scaled ones."""
    biases = {name: state.weights[name] / state.scale for name in ("b_enc", "b_dec")}
    return {**state.weights, **biases}


def loss(
    weights: Mapping[str, Tensor], x: Tensor, recipe: SaeRecipe, variance: float, dead: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of scaled rows (n, d), and which features fired on one of them, (f,).

    ``dead`` (f,): those that the auxiliary loss teaches; d/2 of them at most on a row.
    """
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    features = _top(pre, recipe.k)
    error = x - features @ weights["W_dec"] - weights["b_dec"]
    total = error.square().mean() / variance
    count = min(max(1, x.shape[1] // 2), int(dead.sum()))
    if count and recipe.auxiliary:
        left = error.detach()
        guess = _top(pre.masked_fill(~dead, -torch.inf), count) @ weights["W_dec"]
        total = total + recipe.auxiliary * (left - guess).square().mean() / left.square().mean().clamp(min=1e-12)
    return total, (features > 0).any(dim=0)


def geometric_median(rows: Tensor) -> Tensor:
    """The point (d,) with the least sum of distances to the rows, by Weiszfeld's iteration from their mean."""
    point = rows.double().mean(dim=0)
    for _ in range(_MEDIAN_STEPS):
        weight = 1 / (rows - point.float()).norm(dim=1).double().clamp(min=1e-12)
        point = (weight.float() @ rows).double() / weight.sum()
    return point.float()


def _top(pre: Tensor, k: int) -> Tensor:
    """relu of the k largest of each row, zeros elsewhere; by a mask, so that gradients need no scattered sum."""
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, dim=1).indices, True)
    return torch.where(kept, pre, torch.zeros((), device=pre.device)).relu()


def _gradients(state: State, batch: Tensor, recipe: SaeRecipe, dead: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    weights = {name: each.detach().requires_grad_(True) for name, each in state.weights.items()}
    total, fired = loss(weights, batch, recipe, state.variance, dead)
    found = dict(zip(WEIGHTS, torch.autograd.grad(total, [weights[name] for name in WEIGHTS]), strict=True))
    # Along its own row a decoder's gradient only changes a norm that is put back to 1.
    decoder = state.weights["W_dec"]
    found["W_dec"] = found["W_dec"] - (found["W_dec"] * decoder).sum(dim=1, keepdim=True) * decoder
    return found, fired


def _adam(state: State, gradients: Mapping[str, Tensor], number: int, rate: float) -> None:
    with torch.no_grad():
        for name, gradient in gradients.items():
            first, second = state.first[name], state.second[name]
            first.mul_(_BETA1).add_(gradient, alpha=1 - _BETA1)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            size = (second / (1 - _BETA2**number)).sqrt_().add_(_EPSILON)
            state.weights[name] = state.weights[name] - rate / (1 - _BETA1**number) * first / size
        decoder = state.weights["W_dec"]
        state.weights["W_dec"] = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _generator(seed: int, number: int) -> torch.Generator:
    """Of its own for every use, on the CPU: no use depends on how often others have drawn."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 63))
