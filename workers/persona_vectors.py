"""Difference of means over pairs of answers, at many layers, tested on questions it was not fitted on. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.rows import F32
from workers.held_out import auroc, auroc_of_choice

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """n answers: ``rows`` (n, layers, d), ``positive`` (n,) bool, ``fold`` (n,) of their questions."""

    rows: F32
    positive: NDArray[np.bool_]
    fold: NDArray[np.int64]


@dataclass(frozen=True)
class Layered:
    """Of every layer: ``vectors`` (layers, d), mean(positive) − mean(negative) over all answers; the held-out
    AUROC (layers,), and how far apart both sides lie there in standard deviations (layers,): tells layers of equal
    AUROC apart. ``auroc_of_choice``: that of the best layer, where the choice of it is held out as well; None for
    less than three folds, or one layer.
    """

    vectors: F64
    auroc: F64
    separation: F64
    auroc_of_choice: float | None

    def best(self) -> int:
        """The layer of the highest held-out AUROC; of equal ones that with the widest separation."""
        return max(range(len(self.auroc)), key=lambda n: (self.auroc[n], self.separation[n]))


def folds_of(questions: Iterable[int], most: int) -> dict[int, int]:
    """Question → fold; all answers to a question fall into one. Fewer folds where there are fewer questions."""
    told = sorted(set(questions))
    return {question: number % min(most, len(told)) for number, question in enumerate(told)}


def fit(blocks: Callable[[], Iterable[Block]], folds: int) -> Layered:
    """Read ``blocks`` twice, and once more for every fold where a layer will be chosen: sums by side and fold, then
    every answer against the direction of the other folds, and of the others but one.

    Every fold must hold both sides, and there must be two of them at least. Memory: (2, folds, layers, d) float64.
    """
    sums: F64 | None = None
    counts = np.zeros((2, folds))
    for block in blocks():
        if sums is None:
            sums = np.zeros((2, folds, *block.rows.shape[1:]))
        for side in (0, 1):
            for fold in range(folds):
                chosen = (block.positive == (side == 0)) & (block.fold == fold)
                sums[side, fold] += block.rows[chosen].sum(axis=0, dtype=np.float64)
                counts[side, fold] += chosen.sum()
    assert sums is not None  # noqa: S101  (the caller has pairs)
    means = sums.sum(axis=1) / counts.sum(axis=1)[:, None, None]
    others = (sums.sum(axis=1, keepdims=True) - sums) / (counts.sum(axis=1, keepdims=True) - counts)[
        ..., None, None
    ]
    held_out = others[0] - others[1]  # (folds, layers, d)
    found = [(np.einsum("nld,nld->nl", b.rows, held_out[b.fold]), b.positive, b.fold) for b in blocks()]
    scores, positive, fold = (np.concatenate(part) for part in zip(*found, strict=True))
    areas, apart = [], []
    for number in range(folds):
        sides = [scores[(fold == number) & (positive == side)] for side in (True, False)]
        areas.append([auroc(*(side[:, layer] for side in sides)) for layer in range(scores.shape[1])])
        spread = np.sqrt((sides[0].var(axis=0) + sides[1].var(axis=0)) / 2)
        gap = sides[0].mean(axis=0) - sides[1].mean(axis=0)
        apart.append(np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0))
    of_choice = None
    if folds > 2 and scores.shape[1] > 1:
        of_choice = auroc_of_choice(np.transpose(areas), _nested(blocks, sums, counts))
    return Layered(means[0] - means[1], np.mean(areas, axis=0), np.mean(apart, axis=0), of_choice)


def _nested(blocks: Callable[[], Iterable[Block]], sums: F64, counts: F64) -> F64:
    """(layers, folds, folds) the AUROC on fold g of the direction without f and g, at [:, f, g]; 0 where f = g.

    ``sums`` (2, folds, layers, d) and ``counts`` (2, folds) of both sides.
    """
    folds, layers = sums.shape[1:3]
    left = 1.0 - np.eye(folds)[:, None] - np.eye(folds)[None] + np.eye(folds)[:, None] * np.eye(folds)[None]
    found = np.zeros((layers, folds, folds))
    for f in range(folds):  # which folds count, for every g: left[f] (folds, folds)
        means = np.einsum("gk,skld->sgld", left[f], sums) / np.einsum("gk,sk->sg", left[f], counts)[..., None, None]
        apart = means[0] - means[1]
        said = [(np.einsum("nld,nld->nl", b.rows, apart[b.fold]), b.positive, b.fold) for b in blocks()]
        scores, positive, fold = (np.concatenate(part) for part in zip(*said, strict=True))
        for g in set(range(folds)) - {f}:
            sides = [scores[(fold == g) & (positive == side)] for side in (True, False)]
            found[:, f, g] = [auroc(sides[0][:, layer], sides[1][:, layer]) for layer in range(layers)]
    return found
