"""Do two sets of pooled activations come from one domain? A classifier two-sample test. Pure numpy.

A linear classifier is trained to tell the sets apart and scored on examples that it was not trained on (Lopez-Paz
and Oquab 2017, arXiv 1610.06545). Its AUROC is an effect size: it does not grow with the samples, as the
significance of any test does. What must not count is removed first: the concept's direction, along which a query
set differs by intention (``without``), and lengths, on which means over tokens depend (``matched``).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.rankings import average_ranks

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.floating[Any]]

FOLDS = 5
PERMUTATIONS = 499
CALIPER = 0.1  # of the logarithm of lengths: a tenth longer or shorter counts as alike
_ENOUGH = 0.9  # of those that have a match at all: a round that finds fewer would change the lengths


@dataclass(frozen=True)
class Told:
    """``auroc``: mean over held-out folds, .5 by chance. ``p_value``: share of permutations told apart as well."""

    auroc: float
    p_value: float


def without(rows: Rows, direction: Rows) -> F64:
    """(n, d) rows less their part along ``direction`` (d,), of any length but zero."""
    exact, unit = rows.astype(np.float64), direction.astype(np.float64)
    unit = unit / np.linalg.norm(unit)
    return exact - np.outer(exact @ unit, unit)


def told_apart(ours: Rows, theirs: Rows, *, seed: int, permutations: int = PERMUTATIONS) -> Told:
    """How well a linear classifier tells (n, d) from (m, d): AUROC over 5 stratified held-out folds.

    The classifier is linear discriminant analysis with a ridge: every dimension is scaled to unit variance over
    both sets, and the covariance within the sets gets the identity added. Ridge regression of the labels has the
    same direction; it is solved in its dual form, so that all permutations share one factorisation. Labels are
    permuted within folds, which keeps them stratified; the p-value counts the labels as they are as one permutation
    (Phipson and Smyth 2010), so 1/(permutations + 1) is the least. Raises ValueError for fewer rows than folds.
    """
    n, m = len(ours), len(theirs)
    if min(n, m) < FOLDS:
        raise ValueError(f"{n} and {m} rows cannot be cut into {FOLDS} folds.")
    rows = np.concatenate([ours, theirs]).astype(np.float64)
    rows -= rows.mean(axis=0)
    scale = rows.std(axis=0)
    rows /= np.where(scale > 0, scale, 1.0)
    generator = np.random.default_rng(seed)
    fold = np.concatenate([generator.permutation(n) % FOLDS, generator.permutation(m) % FOLDS])
    labels = _permuted(np.arange(n + m) < n, fold, permutations, generator)
    gram = rows @ rows.T
    found = np.zeros(permutations + 1)
    for number in range(FOLDS):
        held, trained = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        scores = _ridge(gram, trained, held, labels[trained])
        for column in range(permutations + 1):
            found[column] += _auroc(scores[:, column], labels[held, column]) / FOLDS
    as_well = int(np.count_nonzero(found[1:] >= found[0] - 1e-12))
    return Told(float(found[0]), (1 + as_well) / (permutations + 1))


def _permuted(labels: Bools, fold: I64, permutations: int, generator: np.random.Generator) -> Bools:
    """(n, 1 + permutations): the labels as they are, then shuffled within every fold."""
    found = np.repeat(labels[:, None], permutations + 1, axis=1)
    for number in range(FOLDS):
        rows = np.flatnonzero(fold == number)
        for column in range(1, permutations + 1):
            found[rows, column] = labels[generator.permutation(rows)]
    return found


def _ridge(gram: F64, trained: I64, held: I64, labels: Bools) -> F64:
    """(held, columns) scores of ridge regressions on centred rows, penalty 1 per example, from products of rows."""
    inner, across = gram[np.ix_(trained, trained)], gram[np.ix_(held, trained)]
    means = inner.mean(axis=0)
    centred = inner - means - means[:, None] + means.mean()
    targets = labels - labels.mean(axis=0)
    solved = np.linalg.solve(centred + len(trained) * np.eye(len(trained)), targets)
    # What is left out is the same for all held-out rows, and so of no weight in an AUROC.
    return (across - across.mean(axis=1, keepdims=True)) @ (solved - solved.mean(axis=0))


def _auroc(scores: F64, positive: Bools) -> float:
    count = int(positive.sum())
    ranks = average_ranks(scores)[positive].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(scores) - count)))


def matched(lengths: I64, pool: I64, most: int, seed: int) -> tuple[I64, Bools, Bools]:
    """Places in ``pool`` whose lengths are distributed like ``lengths`` (n,), none twice, about ``most`` of them;
    which of ``lengths`` have a like at all, (n,); and which have found a partner, (n,): the places match these.

    In rounds: every length takes one of the pool that is within the caliper and free. In the first round one that
    has no like takes the nearest, and one whose likes have all been taken goes without: more texts than the pool
    has of their length must not be compared with longer ones. Rounds end when the scarcest lengths have run out.
    """
    ours, theirs = np.log1p(lengths.astype(np.float64)), np.log1p(pool.astype(np.float64))
    generator = np.random.default_rng(seed)
    free = np.ones(len(pool), dtype=bool)
    alike: Bools = np.logical_or.reduce(np.abs(theirs - ours[:, None]) <= CALIPER, axis=1)
    paired = np.zeros(len(lengths), dtype=bool)
    chosen: list[int] = []
    for round_ in range(max(1, most // max(1, len(lengths)))):
        taken: list[int] = []
        for place in generator.permutation(len(lengths)).tolist():
            gap = np.where(free, np.abs(theirs - ours[place]), np.inf)
            within = np.flatnonzero(gap <= CALIPER)
            if len(within):
                taken.append(int(generator.choice(within)))
            elif round_ or alike[place] or not free.any():
                continue
            else:
                taken.append(int(gap.argmin()))
            free[taken[-1]] = False
            paired[place] = True
        if round_ and len(taken) < _ENOUGH * alike.sum():
            break
        chosen += taken
        if not alike.any():
            break
    return np.array(sorted(chosen), dtype=np.int64), alike, paired
