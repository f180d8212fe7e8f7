"""Which examples run together, and how they are padded: a pure function of lengths and the token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from service.terms import LossReduction, Pooling
from workers.masks import Tokens


@dataclass(frozen=True)
class Batch:
    """B examples padded on the right to T tokens.

    ``ids`` (B, T) int64; ``loss_weight`` (B, T) float32: the weight in L(z) of predicting token t, zero
    elsewhere; ``pool_weight`` (B, T) float32: rows sum to 1 over the pooled positions; ``real`` (B, T) bool:
    not padding.

    There is no attention mask: under causal attention no real position sees the padding behind it.
    """

    ids: torch.Tensor
    loss_weight: torch.Tensor
    pool_weight: torch.Tensor
    real: torch.Tensor


def plan(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Positions grouped into batches of similar length whose padded size stays within the budget.

    An example longer than the budget runs alone. Longest first: memory peaks at the start, not after hours.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for position in order:
        current = batches[-1] if batches else []
        if current and lengths[current[0]] * (len(current) + 1) <= token_budget:
            current.append(position)
        else:
            batches.append([position])
    return batches


def collate(
    examples: Sequence[Tokens], *, pooling: Pooling | None, reduction: LossReduction, device: torch.device
) -> Batch:
    """Pad and weigh; ``pooling`` None leaves the pooling weights at zero."""
    shape = (len(examples), max(len(tokens) for tokens in examples))
    ids = np.zeros(shape, dtype=np.int64)
    loss_weight = np.zeros(shape, dtype=np.float32)
    pool_weight = np.zeros(shape, dtype=np.float32)
    real = np.zeros(shape, dtype=bool)
    for row, tokens in enumerate(examples):
        stop = len(tokens)
        ids[row, :stop] = tokens.ids
        real[row, :stop] = True
        ids[row, stop:] = tokens.ids[-1]  # a token of its own: another one's embedding might be damaged
        predicted = tokens.predicted
        share = max(1, predicted.sum()) if reduction == LossReduction.MEAN else 1
        loss_weight[row, :stop] = predicted / share
        if pooling is not None:
            pooled = tokens.pooled(pooling)
            pool_weight[row, :stop] = pooled / max(1, pooled.sum())
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(loss_weight).to(device),
        torch.from_numpy(pool_weight).to(device),
        torch.from_numpy(real).to(device),
    )
