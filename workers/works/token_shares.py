"""What every token of an example adds to its score: shares that sum to ⟨u, row⟩ before the row was rounded.

A score is linear in the row, the row in C = Σ_t (P_outᵀ g_t)(P_inᵀ a_t)ᵀ, and C is a sum over positions: with the
score's weights Q on C, token t has the share Σ_modules (P_outᵀ g_t)ᵀ Q (P_inᵀ a_t). That is where the gradient was
computed, not whose loss it is of.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from service import artifacts
from service.contracts import Example
from service.storage import Storage
from service.terms import IndexKind, LossReduction, Pooling
from service.token_shares import FILE
from service.work import PassSpec, TokenSharesWork
from workers import readout
from workers.activations import block_outputs, run_until
from workers.batches import Batch, collate
from workers.gradients import Sides, losses, project, taps
from workers.masks import Tokens, Window, split
from workers.models import Loaded
from workers.passes import reduction_of
from workers.prepare import prepare
from workers.readout import Readout
from workers.works.result import Result


def token_shares(work: TokenSharesWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Shares, token ids and texts of all examples one after another; length 0: the example cannot run."""
    spec, activation = work.spec, work.array.kind == IndexKind.ACTIVATION
    vector = artifacts.read(storage, artifacts.get(storage, work.vector), "vector")["u"]
    u = torch.from_numpy(vector).to(loaded.device)
    pooling = spec.activation.pooling if activation and spec.activation else None
    prepared = prepare(loaded, spec, examples, trains=not activation, pooling=pooling, windows=True)
    weights: dict[str, Tensor] = {}
    sides: Mapping[str, Sides] = {}
    if not activation:
        reads = readout.make(loaded, spec, storage)
        weights, sides = on_coordinates(reads, work, u), reads.sides
    shares: list[np.ndarray] = []
    kept: list[Tokens | None] = [prepared.tokens.get(position) for position in range(len(examples))]
    for tokens in kept:
        if tokens is None:
            continue
        total = np.zeros(len(tokens), dtype=np.float64)
        for window in split(tokens, spec.max_length):
            batch = _alone(window, spec, pooling, loaded)
            if activation:
                found = _of_activation(loaded, work, batch, u)
            else:
                found = of_gradient(loaded, {name: sides[name] for name in weights}, weights, batch)
            places = window.index if isinstance(window, Window) else np.arange(len(tokens))
            np.add.at(total, places, found[0].double().cpu().numpy())
        shares.append(work.weight * total)
    ids = [tokens.ids for tokens in kept if tokens is not None]
    predicted = [tokens.predicted for tokens in kept if tokens is not None]
    texts = [pieces(loaded, some.tolist()) for some in ids]
    tensors = {
        "shares": np.concatenate([np.zeros(0), *shares]).astype(np.float32),
        "lengths": np.array([0 if tokens is None else len(tokens) for tokens in kept], dtype=np.int32),
        "predicted": np.concatenate([np.zeros(0, bool), *predicted]).astype(np.uint8),
        "texts": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
    }
    return {FILE: tensors}, {"examples": len(ids)}


def pieces(loaded: Loaded, ids: Sequence[int]) -> list[str]:
    """The text of every token as it stands behind the one before it, blanks included."""

    def text(some: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode(list(some)))

    found = []
    for place in range(len(ids)):
        before, both = text(ids[place - 1 : place]) if place else "", text(ids[max(0, place - 1) : place + 1])
        found.append(both[len(before) :] if both.startswith(before) else text(ids[place : place + 1]))
    return found


def on_coordinates(reads: Readout, work: TokenSharesWork, u: Tensor) -> dict[str, Tensor]:
    """Q (p_out, p_in) of every module: the score's weights on C."""
    found: dict[str, Tensor] = {}
    if work.array.kind == IndexKind.GRADIENT:
        for name, gather in reads.gradient.items():
            part = u[gather.start : gather.start + gather.size].to(reads.sides[name].out.device)
            scaled = part if gather.scale is None else part * gather.scale
            found[name] = _placed(reads.sides[name], gather.index, scaled)
        return found
    by_module = next(lines for info, lines in reads.heads if info == work.array)
    return {
        name: _placed(reads.sides[name], lines.index, u.to(lines.weight.device) @ lines.weight)
        for name, lines in by_module.items()
    }


def of_gradient(loaded: Loaded, sides: Mapping[str, Sides], weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """(B, T) shares of ⟨Q, C⟩ summed over modules; ``weights``: Q by module."""
    total = torch.zeros(batch.ids.shape, device=loaded.device)

    def forward(name: str, inputs: Tensor) -> Tensor:
        return project(inputs, sides[name].into)

    def backward(name: str, projected: Tensor, gradient: Tensor) -> None:
        total.add_(((project(gradient, sides[name].out) @ weights[name]) * projected).sum(-1).to(total.device))

    with taps({name: loaded.modules[name] for name in sides}, forward=forward, backward=backward):
        losses(loaded.model, batch).sum().backward()
    return total


def _of_activation(loaded: Loaded, work: TokenSharesWork, batch: Batch, v: Tensor) -> Tensor:
    """(B, T): the pooling weight of a position times ⟨v̂, h_l⟩ there."""
    layer = work.array.layer
    assert layer is not None  # noqa: S101  (activations have one)
    with block_outputs(loaded.blocks, [layer], stop=True) as outputs, torch.no_grad():
        run_until(loaded.model, batch.ids)
    states = outputs[layer].float()  # with several GPUs, where the block is
    return batch.pool_weight.to(states.device) * (states @ v.to(states.device))


def _placed(side: Sides, index: Tensor | None, values: Tensor) -> Tensor:
    if index is None:
        return values.reshape(side.shape)
    return values.new_zeros(side.size).index_copy_(0, index, values).reshape(side.shape)


def _alone(tokens: Tokens, spec: PassSpec, pooling: Pooling | None, loaded: Loaded) -> Batch:
    reduction: LossReduction = reduction_of(spec)
    return collate([tokens], pooling=pooling, reduction=reduction, device=loaded.device)
