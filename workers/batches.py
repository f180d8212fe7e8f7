"""Which examples run together, and how they are padded: a pure function of lengths and the token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from service.terms import LossReduction, Pooling
from workers.masks import Tokens


@dataclass(frozen=True)
class Batch:
    """B examples, or windows of longer ones, padded on the right to T tokens.

    ``ids`` (B, T) int64; ``loss_weight`` (B, T) float32: the weight in L(z) of predicting token t, zero
    elsewhere; ``pool_weight`` (B, T) float32: those of an example sum to 1, over its pooled positions; ``real``
    (B, T) bool: not padding.

    There is no attention mask: under causal attention no real position sees the padding behind it.
    """

    ids: torch.Tensor
    loss_weight: torch.Tensor
    pool_weight: torch.Tensor
    real: torch.Tensor


# What starting one more batch costs, in tokens: measured on CPUs (7 to 100, widths 512 and 128); a GPU needs some
# hundred tokens at once before its matrix products are worth reading the weights for.
BATCH_COST = {"cpu": 64, "cuda": 512}


def plan(lengths: Sequence[int], token_budget: int, batch_cost: int = BATCH_COST["cpu"]) -> list[list[int]]:
    """Positions grouped into batches of similar length whose padded size stays within the budget: those that
    minimise padded tokens plus ``batch_cost`` tokens for every batch, which is what starting one costs.

    An example longer than the budget runs alone. Longest first: memory peaks at the start, not after hours.
    Sorted by length, the best batches are runs, so that a dynamic programme over their ends finds them.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size = np.array([lengths[i] for i in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the best plan for the first n
    begin = np.zeros(len(order) + 1, dtype=np.int64)  # where its last batch begins
    low = 0  # the earliest begin within the budget; it only moves on, as both factors of the padded size grow
    for stop in range(1, len(order) + 1):
        while low < stop - 1 and size[low] * (stop - low) > token_budget:
            low += 1
        begins = np.arange(low, stop)
        whole = cost[begins] + size[begins] * (stop - begins)
        begin[stop] = low + int(whole.argmin())
        cost[stop] = whole.min() + batch_cost
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[begin[stop] : stop])
        stop = begin[stop]
    return batches[::-1]


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
        share = max(1, tokens.example.predicted.sum()) if reduction == LossReduction.MEAN else 1
        loss_weight[row, :stop] = tokens.predicted / share
        if pooling is not None:
            pool_weight[row, :stop] = tokens.pooled(pooling) / max(1, tokens.example.pooled(pooling).sum())
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(loss_weight).to(device),
        torch.from_numpy(pool_weight).to(device),
        torch.from_numpy(real).to(device),
    )
