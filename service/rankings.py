"""Whole rankings from the scores of all examples: order, percentiles, groups, and two rankings side by side.

Pure numpy. ``scores`` are (n,) finite numbers, one for each row of an index; ``mask`` (n,) bool says which rows are
ranked (None: all). What a ranking puts first is decided by ``order``: the largest score, the smallest, or the
largest in size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.terms import GroupSort, Order

Scores = NDArray[np.floating[Any]]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

OVERLAPS = (10, 100, 1000)  # k at which two rankings are compared, beside the k asked for


def strengths(scores: NDArray[Any], order: Order) -> NDArray[Any]:
    """(n,) what is ranked by, largest first: s, −s or |s|."""
    match order:
        case Order.MOST:
            return scores
        case Order.LEAST:
            return -scores
        case Order.ABSOLUTE:
            return np.abs(scores)


def ranked(scores: Scores, mask: Mask | None, order: Order) -> I64:
    """Rows that ``mask`` allows, first rank first; of equal scores the lower row comes first."""
    rows = np.arange(len(scores)) if mask is None else np.flatnonzero(mask)
    return rows[np.argsort(-strengths(scores[rows], order), kind="stable")]


def average_ranks(values: Scores) -> F64:
    """(n,) ranks from 1 for the smallest; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(values) else order
    sizes = np.diff(first, append=len(values))
    found = np.empty(len(values), dtype=np.float64)
    found[order] = np.repeat(first + (sizes + 1) / 2, sizes)
    return found


def percentiles(scores: Scores) -> F64:
    """(n,) the share of all n examples with a lower score, from 0 to below 100; equal scores share the mean."""
    return 100 * (average_ranks(scores) - 1) / max(1, len(scores))


def z_scores(scores: Scores) -> F64:
    """(n,) distance from the mean in standard deviations (of the population); 0 where all scores are equal."""
    exact = scores.astype(np.float64)
    if not len(exact) or exact.min() == exact.max():  # rounding of the mean must not become a deviation
        return np.zeros(len(exact))
    return (exact - exact.mean()) / exact.std()


# --- groups -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Examples that share a value. ``lift``: share of the best k over share of all; 1 is what chance gives.

    ``share``: of all that pushes, either way: the sum over the sum of all |scores|. ``error``: half the width of
    the 95 % interval of the mean by Student's t, as of examples drawn at random; None: one example has none.
    """

    value: Any
    code: int
    count: int
    sum: float
    mean: float
    error: float | None
    share: float
    share_of_top: float
    lift: float


def grouped(
    scores: Scores,
    codes: I64,
    names: Sequence[Any],
    k: int,
    *,
    order: Order = Order.MOST,
    by: GroupSort = GroupSort.MEAN,
    limit: int | None = None,
    rows: I64 | None = None,
) -> tuple[list[Group], int]:
    """The groups that come first, and how many there are: every value that at least one example has.

    ``codes`` (n,) of each example are places in ``names``; ``k``: how many of the best examples the shares are of.
    Groups with equal figures stand in the order of ``names``. ``rows`` (m,): the examples that ``codes`` (m,) are
    of, where an example may be in several groups; then neither counts nor shares of groups sum to the whole.
    """
    own = scores if rows is None else scores[rows]
    counts = np.bincount(codes, minlength=len(names))
    sums = np.bincount(codes, weights=own, minlength=len(names))  # float64
    everything = float(np.abs(scores).sum(dtype=np.float64))
    top = ranked(scores, None, order)[:k]
    first = np.zeros(len(scores), dtype=bool)
    first[top] = True
    tops = np.bincount(codes[first if rows is None else first[rows]], minlength=len(names))
    present = np.flatnonzero(counts)
    means = sums[present] / counts[present]
    shares = tops[present] / max(1, len(top))
    off = own.astype(np.float64) - (sums / np.maximum(counts, 1))[codes]
    squares = np.bincount(codes, weights=off * off, minlength=len(names))
    match by:
        case GroupSort.MEAN:
            figures = strengths(means, order)
        case GroupSort.SUM:
            figures = strengths(sums[present], order)
        case GroupSort.SHARE:
            figures = shares
    groups = [
        Group(
            value=names[code],
            code=code,
            count=int(counts[code]),
            sum=float(sums[code]),
            mean=float(means[place]),
            error=half_width(int(counts[code]), float(squares[code])),
            share=float(sums[code]) / everything if everything else 0.0,
            share_of_top=float(shares[place]),
            lift=float(shares[place] * len(scores) / counts[code]),
        )
        for place in np.argsort(-figures, kind="stable")[:limit].tolist()
        for code in [int(present[place])]
    ]
    return groups, len(present)


def half_width(count: int, squares: float) -> float | None:
    """Of the 95 % interval of a mean: t · √(squares / (count − 1) / count); None below two."""
    if count < 2:
        return None
    return student_95(count - 1) * float(np.sqrt(squares / (count - 1) / count))


# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom: there the expansion below is off by over .1 %.
_STUDENT = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058)


def student_95(freedom: int) -> float:
    """That quantile: Cornish–Fisher expansion about the normal one (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z, v = 1.959964, float(freedom)
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + first + second + third


# --- two rankings -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Of the first k of either ranking, the share that is among the first k of the other; k/n is by chance."""

    k: int
    share: float
    by_chance: float


@dataclass(frozen=True)
class Mover:
    """An example whose percentile differs; ranks count from 1."""

    row: int
    rank_a: int
    rank_b: int
    percentile_a: float
    percentile_b: float


@dataclass(frozen=True)
class Comparison:
    """``spearman`` is None where a ranking holds one value only: then it has no order to agree with."""

    n: int
    spearman: float | None
    overlaps: tuple[Overlap, ...]
    up: tuple[Mover, ...]  # higher in b, the largest difference first
    down: tuple[Mover, ...]  # higher in a


def compared(a: Scores, b: Scores, k: int, movers: int) -> Comparison:
    """Two rankings of the same n examples, by strengths ``a`` and ``b`` (n,), largest first.

    Raises ValueError when the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} scores cannot be compared with {len(b)}.")
    n = len(a)
    if n == 0:
        return Comparison(0, None, (), (), ())
    first_a, first_b = ranked(a, None, Order.MOST), ranked(b, None, Order.MOST)
    rank_a, rank_b = _places(first_a), _places(first_b)
    overlaps = []
    for size in sorted({min(k, n), *(each for each in OVERLAPS if each <= n)}):
        both = int(np.count_nonzero(rank_b[first_a[:size]] < size))
        overlaps.append(Overlap(size, both / size, size / n))
    average_a, average_b = average_ranks(a), average_ranks(b)
    moved = average_b - average_a  # in ranks: those of equal scores are not moved by the order of rows
    percent_a, percent_b = 100 * (average_a - 1) / n, 100 * (average_b - 1) / n

    def largest(difference: F64) -> tuple[Mover, ...]:
        rows = np.argsort(-difference, kind="stable")[:movers].tolist()
        return tuple(
            Mover(row, int(rank_a[row]) + 1, int(rank_b[row]) + 1, float(percent_a[row]), float(percent_b[row]))
            for row in rows
            if difference[row] > 0
        )

    return Comparison(n, _correlation(average_a, average_b), tuple(overlaps), largest(moved), largest(-moved))


def _places(order: I64) -> I64:
    """The place of each row in ``order``, from 0."""
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _correlation(a: F64, b: F64) -> float | None:
    """Pearson's, (n,) and (n,); None where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return None if size == 0 else float(np.clip((a @ b) / size, -1, 1))
