"""How well scores tell two sides apart: AUROC with its interval, and calibrated probabilities. Pure functions.

Scores are those of examples that the direction behind them has not seen; ``Scored`` says in which fold each was
left out. Only scores of one fold are compared with each other: those of different folds come from different
directions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

FOLDS = 5
DRAWS = 2000  # of the bootstrap
BINS = 10  # of the calibration error
_TAIL = 0.025  # of a 95 % interval, on either side
_BLOCK = 1 << 21  # weights of resamples held at a time


@dataclass(frozen=True)
class Scored:
    """Held-out scores (n,), (m,) of both sides, and the fold of each."""

    positive: F64
    negative: F64
    fold_positive: I64
    fold_negative: I64

    @property
    def folds(self) -> range:
        return range(int(max(self.fold_positive.max(), self.fold_negative.max())) + 1)


def fold_of(count: int, folds: int = FOLDS) -> I64:
    """(count,) example i of a side lies in fold i mod ``folds``: both sides are spread evenly, and where the sides
    stand in pairs (the same prompt, answered both ways) a pair stays together.
    """
    return np.arange(count) % folds


# --- AUROC ------------------------------------------------------------------------------------------


def auroc(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """P(score of a positive > score of a negative), ties counted half (Mann-Whitney U)."""
    scores = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # average rank of each value, from 1
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def held_out_auroc(scored: Scored) -> float:
    """The share of held-out pairs (one of each side, of the same fold) in the right order, ties half."""
    ones = np.ones((1, len(scored.positive))), np.ones((1, len(scored.negative)))
    return float(_resampled(scored, *ones)[0])


def auroc_by_fold(scored: Scored) -> list[float]:
    """The AUROC of each fold."""
    return [
        auroc(scored.positive[scored.fold_positive == fold], scored.negative[scored.fold_negative == fold])
        for fold in scored.folds
    ]


def interval(scored: Scored, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % of the held-out AUROC: percentiles over ``draws`` resamples of the examples of each side.

    It covers which examples were drawn, not that other training examples would give another direction. Where every
    pair is in order the resamples have nothing to vary; the lower end is then the one of Clopper and Pearson (1934)
    for as many disjoint pairs, all of them in order, as there are.
    """
    n, m = len(scored.positive), len(scored.negative)
    streams = [np.random.default_rng([seed, side]) for side in (0, 1)]
    areas = []
    block = max(1, _BLOCK // (n + m))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        weights = [_weights(rng, count, size) for rng, size in zip(streams, (n, m), strict=True)]
        areas.append(_resampled(scored, *weights))
    low, high = np.nanquantile(np.concatenate(areas), [_TAIL, 1 - _TAIL])
    area = held_out_auroc(scored)
    disjoint = sum(
        min(int((scored.fold_positive == fold).sum()), int((scored.fold_negative == fold).sum()))
        for fold in scored.folds
    )
    if area == 1:
        low = _TAIL ** (1 / disjoint)
    if area == 0:
        high = 1 - _TAIL ** (1 / disjoint)
    return float(low), float(high)


def _weights(rng: np.random.Generator, count: int, size: int) -> F64:
    """(count, size) how often each of ``size`` examples comes in a resample of as many."""
    drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _resampled(scored: Scored, positive: F64, negative: F64) -> F64:
    """(B,) held-out AUROC where examples count as often as the weights (B, n), (B, m) say; NaN: no pair is left."""
    in_order, pairs = np.zeros(len(positive)), np.zeros(len(positive))
    for fold in scored.folds:
        of_p, of_n = scored.fold_positive == fold, scored.fold_negative == fold
        order = np.argsort(scored.negative[of_n], kind="stable")
        sorted_n = scored.negative[of_n][order]
        mine, theirs = positive[:, of_p], negative[:, of_n][:, order]
        below = np.concatenate([np.zeros((len(theirs), 1)), np.cumsum(theirs, axis=1)], axis=1)
        first, last = (np.searchsorted(sorted_n, scored.positive[of_p], side) for side in ("left", "right"))
        in_order += (mine * (below[:, first] + below[:, last])).sum(axis=1) / 2
        pairs += mine.sum(axis=1) * theirs.sum(axis=1)
    return np.divide(in_order, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


# --- probabilities ----------------------------------------------------------------------------------


def platt(positive: F64, negative: F64) -> tuple[float, float]:
    """(slope, intercept): P(positive | s) = σ(slope · s + intercept), the likeliest for targets that are smoothed
    so that it is finite for any scores (Platt 1999), by the damped Newton steps of Lin, Lin and Weng (2007).
    """
    n, m = len(positive), len(negative)
    scores = np.concatenate([positive, negative])
    center, spread = scores.mean(), scores.std() or 1.0
    rows = np.stack([(scores - center) / spread, np.ones(n + m)])
    targets = np.repeat([(n + 1) / (n + 2), 1 / (m + 2)], [n, m])
    at = np.array([0.0, np.log((n + 1) / (m + 1))])
    loss = _log_loss(at @ rows, targets)
    for _ in range(100):
        p = sigmoid(at @ rows)
        gradient = rows @ (p - targets)
        hessian = (rows * (p * (1 - p))) @ rows.T + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and _log_loss((at - size * step) @ rows, targets) > loss:
            size /= 2
        before, loss = loss, _log_loss((at - size * step) @ rows, targets)
        at = at - size * step
        if before - loss <= 1e-13 * abs(before):
            break
    return float(at[0] / spread), float(at[1] - at[0] * center / spread)


def probabilities(scored: Scored) -> tuple[F64, F64]:
    """(n,), (m,) P(positive) of every example, by Platt's rule fitted on the held-out scores of the other folds."""
    found = np.empty(len(scored.positive)), np.empty(len(scored.negative))
    for fold in scored.folds:
        of_p, of_n = scored.fold_positive == fold, scored.fold_negative == fold
        slope, intercept = platt(scored.positive[~of_p], scored.negative[~of_n])
        found[0][of_p] = sigmoid(slope * scored.positive[of_p] + intercept)
        found[1][of_n] = sigmoid(slope * scored.negative[of_n] + intercept)
    return found


def brier(positive: F64, negative: F64) -> float:
    """Mean (p − y)² of probabilities: 0 is perfect, p (1 − p) for who knows the share p of the positives only."""
    return float(np.concatenate([1 - positive, negative]) @ np.concatenate([1 - positive, negative])) / (
        len(positive) + len(negative)
    )


def calibration_error(positive: F64, negative: F64, bins: int = BINS) -> float:
    """Expected calibration error: |mean probability − share of positives| over equal ``bins`` of probability, each
    weighted by its examples. Few examples make it large by chance.
    """
    p = np.concatenate([positive, negative])
    label = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(bin_of, weights=p - label, minlength=bins)).sum()) / len(p)


def sigmoid(x: F64) -> F64:
    return np.exp(-np.logaddexp(0.0, -x))


def _log_loss(logits: F64, targets: F64) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


# --- choices ----------------------------------------------------------------------------------------


def mean_cosine(directions: F64) -> float:
    """Mean cosine of all pairs of rows (k, d)."""
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
    k = len(unit)
    return float((np.linalg.norm(unit.sum(axis=0)) ** 2 - (norms > 0).sum()) / (k * (k - 1)))


def auroc_of_choice(areas: F64, nested: F64) -> float:
    """What the best of L layers is worth when the choice is held out too: the mean over folds f of the area, on f,
    of the layer that is best without f. ``areas`` (L, folds); ``nested`` (L, folds, folds): the area on fold g of
    what was fitted on neither f nor g, at [:, f, g]; its diagonal is not read.

    ``areas`` of the other folds will not do: their directions have seen f, and noise that f and g share speaks for
    its layer on both.
    """
    count = areas.shape[1]
    others = np.where(np.eye(count, dtype=bool), 0.0, nested).sum(axis=2)
    return float(np.mean(areas[others.argmax(axis=0), np.arange(count)]))
