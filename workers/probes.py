"""Concept directions from two sets of activations, and how well they tell the sets apart. Pure functions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import Invalid
from service.rows import F32

FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """``direction`` (d,) float32 of unit norm; ``norm`` before normalising; AUROC on held-out folds."""

    direction: F32
    norm: float
    auroc_held_out: float


def difference_of_means(positive: F32, negative: F32) -> F32:
    """mean(positive) − mean(negative): (n, d), (m, d) → (d,), accumulated in float64."""
    difference = positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)
    return difference.astype(np.float32)


def auroc(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """P(score of a positive > score of a negative), ties counted half (Mann-Whitney U)."""
    scores = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # average rank of each value, from 1
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fit(positive: F32, negative: F32) -> Probe:
    """Difference of means over all examples, with its AUROC over 5 held-out folds.

    Raises Invalid when a side has fewer examples than folds, or when the means coincide.
    """
    for name, side in (("positive", positive), ("negative", negative)):
        if len(side) < FOLDS:
            raise Invalid(
                "too_few_examples", f"The {name} side has {len(side)} examples, {FOLDS} is least.", param=name
            )
    direction = difference_of_means(positive, negative)
    norm = float(np.linalg.norm(direction))
    if not norm > 0:
        raise Invalid("identical_sides", "Both sides have the same mean activation: there is no direction.")
    areas = []
    for fold in range(FOLDS):
        held_p, held_n = np.arange(len(positive)) % FOLDS == fold, np.arange(len(negative)) % FOLDS == fold
        trained = difference_of_means(positive[~held_p], negative[~held_n])
        areas.append(auroc(positive[held_p] @ trained, negative[held_n] @ trained))
    return Probe(direction / np.float32(norm), norm, float(np.mean(areas)))
