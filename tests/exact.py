"""Slow and obvious oracles for curvature, Jacobians and influence, in float64: one example at a time, whole
gradients from autograd, dense matrices. Nothing here uses what it is compared with, except tokens, masks and
the uniform numbers by which labels are drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.terms import ConceptFunction, FactorLabels, FactorPositions, Pooling
from tests import tiny
from workers.masks import Tokens
from workers.models import Loaded

F64 = NDArray[np.float64]

# --- models -----------------------------------------------------------------------------------------


def _norm(self: nn.Module, hidden: Tensor) -> Tensor:
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def exact(model: nn.Module) -> nn.Module:
    """RMS norms cast to float32 in any dtype; without that a float64 model is one throughout."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
    return model


def loaded(family: str, **kwargs: object) -> Loaded:
    found = tiny.loaded(family, dtype=torch.float64, **kwargs)
    exact(found.model)
    return found


# --- losses -------------------------------------------------------------------------------------------


def drawn(p: Tensor, u: float) -> int:
    """The label at which the running sum of ``p`` passes u: inversion, spelled out."""
    running = 0.0
    for label, share in enumerate(p.tolist()):
        running += share
        if running > u:
            return label
    return len(p) - 1


def labels_of(
    model: nn.Module, one: Tokens, positions: FactorPositions, uniform: Sequence[float] | None
) -> dict[int, int]:
    """Position → label that it is to predict; drawn at ``uniform``, or the true next token."""
    ids = torch.from_numpy(one.ids)
    with torch.no_grad():
        p = model(input_ids=ids[None], use_cache=False).logits[0].double().softmax(-1)
    there = [t for t in range(len(ids) - 1) if positions == FactorPositions.ALL or one.target[t + 1]]
    return {t: int(ids[t + 1]) if uniform is None else drawn(p[t], float(uniform[t])) for t in there}


def factor_loss(model: nn.Module, one: Tokens, labels: Mapping[int, int]) -> Tensor:
    log_p = model(input_ids=torch.from_numpy(one.ids)[None], use_cache=False).logits[0].log_softmax(-1)
    return -sum((log_p[t, label] for t, label in labels.items()), log_p.sum() * 0)


# --- gradients ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """Of one module and one example: inputs (T, d_in), output gradients (T, d_out), weight gradient (out, in)."""

    a: Tensor
    g: Tensor
    G: Tensor


def gradients(value: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weight gradient of every module, (d_out, d_in); zero where ``value`` does not depend on it."""
    weights = [module.weight for module in modules.values()]
    found = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
    return {
        name: (G.T if isinstance(module, Conv1D) else G).detach()
        for (name, module), G in zip(modules.items(), found, strict=True)
    }


def traced(value: Callable[[], Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Traced]:
    inputs, outputs, handles = {}, {}, []
    for name, module in modules.items():
        module.weight.requires_grad_()

        def hook(_module: nn.Module, given: tuple[Tensor], output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = given[0][0].detach(), output

        handles.append(module.register_forward_hook(hook))
    result = value()
    for handle in handles:
        handle.remove()
    g = torch.autograd.grad(result, list(outputs.values()), retain_graph=True)
    by_output = dict(zip(outputs, g, strict=True))
    G = gradients(result, modules)
    for module in modules.values():
        module.weight.requires_grad_(False)
    return {name: Traced(inputs[name], by_output[name][0], G[name]) for name in modules}


# --- curvature ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """EK-FAC of one module, dense. ``square`` (out, in) in the eigenbasis, ``mean`` of the whole."""

    A: F64
    S: F64
    U_A: F64
    U_S: F64
    square: F64

    @property
    def mean(self) -> float:
        return float(self.square.mean())

    def dense(self, damping: float) -> F64:
        """H (P, P) over G's entries row by row."""
        Q = np.kron(self.U_S, self.U_A)
        return (Q * (self.square.ravel() + damping * self.mean)) @ Q.T


def fit(per_example: Sequence[Mapping[str, Traced]]) -> dict[str, Factors]:
    found = {}
    for name in per_example[0]:
        mine = [one[name] for one in per_example]
        A = sum(each.a.double().T @ each.a.double() for each in mine).numpy()
        S = sum(each.g.double().T @ each.g.double() for each in mine).numpy()
        U_A, U_S = (np.linalg.eigh(matrix)[1][:, ::-1] for matrix in (A, S))
        square = np.mean([(U_S.T @ each.G.double().numpy() @ U_A) ** 2 for each in mine], axis=0)
        found[name] = Factors(A, S, U_A, U_S, square)
    return found


def fit_sample(
    loaded: Loaded,
    modules: Mapping[str, nn.Module],
    tokens: Sequence[Tokens],
    uniform: Sequence[Sequence[float]] | None,
    labels: FactorLabels = FactorLabels.SAMPLED,
    positions: FactorPositions = FactorPositions.ALL,
) -> dict[str, Factors]:
    per_example = []
    for number, one in enumerate(tokens):
        points = uniform[number] if labels == FactorLabels.SAMPLED and uniform is not None else None
        wanted = labels_of(loaded.model, one, positions, points)
        per_example.append(traced(lambda one=one, w=wanted: factor_loss(loaded.model, one, w), modules))
    return fit(per_example)


# --- the concept ------------------------------------------------------------------------------------------


def pooled(loaded: Loaded, one: Tokens, layer: int, pooling: Pooling, function: ConceptFunction) -> Tensor:
    """(d,) what f_v is linear in."""
    states = tiny.hidden_states(loaded.model, torch.from_numpy(one.ids)[None])[layer][0]
    states = states[tiny.pooled_positions(one, pooling)]
    if function == ConceptFunction.COSINE:
        states = torch.stack([state / state.square().sum().sqrt() for state in states])
    return states.mean(0)


def flat(found: Mapping[str, Tensor]) -> F64:
    return np.concatenate([each.double().numpy().ravel() for each in found.values()])


def loss_rows(
    loaded: Loaded, modules: Mapping[str, nn.Module], tokens: Sequence[Tokens], value: Callable[[Tokens], Tensor]
) -> F64:
    """(N, P) whole gradients of ``value``."""
    for module in modules.values():
        module.weight.requires_grad_()
    rows = np.stack([flat(gradients(value(one), modules)) for one in tokens])
    loaded.model.requires_grad_(False)
    return rows


def jacobian_rows(
    loaded: Loaded,
    modules: Mapping[str, nn.Module],
    tokens: Sequence[Tokens],
    layer: int,
    pooling: Pooling,
    function: ConceptFunction,
) -> F64:
    """(d, P) of the mean over ``tokens``, one hidden dimension of one example at a time."""
    total = []
    for module in modules.values():
        module.weight.requires_grad_()
    for one in tokens:
        values = pooled(loaded, one, layer, pooling, function)
        weights = [module.weight for module in modules.values()]
        rows = []
        for value in values:
            found = torch.autograd.grad(
                value, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            whole = {
                name: G.T if isinstance(module, Conv1D) else G
                for (name, module), G in zip(modules.items(), found, strict=True)
            }
            rows.append(flat(whole))
        total.append(np.stack(rows))
    loaded.model.requires_grad_(False)
    return np.mean(total, axis=0)


def solve(factors: Mapping[str, Factors], rows: F64, damping: float) -> F64:
    """rows H⁻¹ (n, P): one dense solve per module."""
    found, start = [], 0
    for each in factors.values():
        stop = start + each.square.size
        found.append(np.linalg.solve(each.dense(damping), rows[:, start:stop].T).T)
        start = stop
    return np.concatenate(found, axis=1)


# --- comparing --------------------------------------------------------------------------------------------


def spearman(ours: F64, theirs: F64) -> F64:
    """Rank correlation of each column of (n, q), equal values sharing their mean rank."""
    a, b = (_ranks(values) for values in (ours, theirs))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def _ranks(values: F64) -> F64:
    found = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, place, count = np.unique(values[:, column], return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        found[:, column] = (last - (count - 1) / 2)[place]
    return found
