"""Whole rankings against slow oracles and scipy: order, percentiles, groups, and two rankings side by side."""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from service.rankings import (
    average_ranks,
    compared,
    grouped,
    percentiles,
    ranked,
    strengths,
    student_95,
    z_scores,
)
from service.terms import GroupSort, Order

ORDERS = pytest.mark.parametrize("order", list(Order))
# Few different values, so that ties are the rule.
TIED = st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1.0, 1.0000001, 3.5]), min_size=1, max_size=40)
_WIDE = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
ANY = st.lists(_WIDE, min_size=1, max_size=40)
SCORES = (TIED | ANY).map(lambda values: np.array(values, dtype=np.float32))


def pair(data: st.DataObject) -> tuple[np.ndarray, np.ndarray]:
    first = data.draw(SCORES)
    other = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=len(first), max_size=len(first))
    return first, np.array(data.draw(other), dtype=np.float32)


# --- order --------------------------------------------------------------------------------------------


@ORDERS
@settings(deadline=None)
@given(data=st.data())
def test_rows_that_may_be_ranked_come_best_first_and_ties_by_row(order: Order, data: st.DataObject) -> None:
    scores = data.draw(SCORES)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    sign = {Order.MOST: lambda s: -s, Order.LEAST: lambda s: s, Order.ABSOLUTE: lambda s: -abs(s)}[order]
    expected = sorted((sign(float(score)), row) for row, score in enumerate(scores) if mask[row])
    assert ranked(scores, mask, order).tolist() == [row for _, row in expected]
    assert ranked(scores, None, order).tolist() == ranked(scores, np.ones(len(scores), bool), order).tolist()


def test_nothing_is_ranked_where_nothing_may_be() -> None:
    assert ranked(np.float32([1, 2]), np.zeros(2, bool), Order.MOST).tolist() == []
    assert ranked(np.zeros(0, np.float32), None, Order.MOST).tolist() == []


# --- percentiles, z-scores ------------------------------------------------------------------------------


@settings(deadline=None)
@given(SCORES)
def test_average_ranks_are_those_of_scipy(scores: np.ndarray) -> None:
    assert average_ranks(scores).tolist() == stats.rankdata(scores).tolist()


@settings(deadline=None)
@given(SCORES)
def test_a_percentile_is_the_share_of_lower_scores_and_the_mean_of_it_among_equals(scores: np.ndarray) -> None:
    n, found = len(scores), percentiles(scores)
    lower = np.argsort(np.argsort(scores, kind="stable"), kind="stable")  # how many stand below, ties by row
    for score, percentile in zip(scores, found, strict=True):
        assert percentile == pytest.approx(100 * lower[scores == score].mean() / n)
        if np.count_nonzero(scores == score) == 1:
            assert percentile == pytest.approx(stats.percentileofscore(scores, score, kind="strict"))


@settings(deadline=None)
@given(SCORES)
def test_z_scores_are_those_of_scipy(scores: np.ndarray) -> None:
    if len(set(scores.tolist())) == 1:
        assert z_scores(scores).tolist() == [0] * len(scores)
    else:
        np.testing.assert_allclose(z_scores(scores), stats.zscore(scores.astype(np.float64)), rtol=1e-6, atol=1e-9)


def test_one_example_and_none() -> None:
    one, none = np.float32([3.3]), np.zeros(0, np.float32)
    assert (percentiles(one).tolist(), z_scores(one).tolist(), average_ranks(one).tolist()) == ([0], [0], [1])
    assert (percentiles(none).tolist(), z_scores(none).tolist(), average_ranks(none).tolist()) == ([], [], [])


def test_equal_scores_have_no_deviation_however_the_mean_is_rounded() -> None:
    assert z_scores(np.full(7, 0.1, np.float32)).tolist() == [0] * 7


# --- groups ---------------------------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("by", list(GroupSort))
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_groups_are_counted_as_a_loop_would(by: GroupSort, order: Order, data: st.DataObject) -> None:
    scores = data.draw(SCORES)
    n = len(scores)
    names = ["x", None, "y", 3]
    codes = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    k, limit = data.draw(st.integers(1, n + 3)), data.draw(st.none() | st.integers(1, 5))
    groups, found = grouped(scores, codes, names, k, order=order, by=by, limit=limit)
    best = ranked(scores, None, order).tolist()[:k]
    expected = []
    for code, name in enumerate(names):
        members = [row for row in range(n) if codes[row] == code]
        if members:
            exact = [float(scores[row]) for row in members]
            share = len([row for row in best if row in members]) / len(best)
            lift = share / (len(members) / n)
            total = reduce(add, exact)  # in turn: from Python 3.12 on, sum() compensates
            expected.append((name, len(members), total, total / len(members), share, lift))
    figure = {GroupSort.MEAN: 3, GroupSort.SUM: 2, GroupSort.SHARE: 4}[by]
    key = (lambda group: group[4]) if by == GroupSort.SHARE else (lambda group: strengths(group[figure], order))
    expected.sort(key=lambda group: -key(group))
    assert found == len(expected)
    assert [group.value for group in groups] == [name for name, *_ in expected][:limit]
    for group, (_, count, total_score, mean, share, lift) in zip(groups, expected, strict=False):
        assert group.count == count
        told = [group.sum, group.mean, group.share_of_top, group.lift]
        assert told == pytest.approx([total_score, mean, share, lift], rel=1e-12)


def test_shares_of_the_top_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 7, 1000)
    groups, total = grouped(rng.normal(size=1000), codes, list("abcdefg"), 37)
    assert total == 7
    assert sum(group.share_of_top for group in groups) == pytest.approx(1)
    assert sum(group.count for group in groups) == 1000


def test_a_group_that_holds_all_of_the_top_is_lifted_by_the_inverse_of_its_share() -> None:
    scores = np.float32([5, 4, 1, 0, -1, -2, -3, -4])
    groups, _ = grouped(scores, np.array([0, 0, 1, 1, 1, 1, 1, 1]), ["planted", "rest"], 2)
    assert [(group.value, group.share_of_top, group.lift) for group in groups] == [
        ("planted", 1.0, 4.0),
        ("rest", 0.0, 0.0),
    ]


@ORDERS
def test_an_example_may_be_in_several_groups(order: Order) -> None:
    rng = np.random.default_rng(2)
    scores, inside = rng.normal(size=60).astype(np.float32), rng.random((60, 4)) < [0.0, 0.1, 0.5, 1.0]
    rows, codes = np.nonzero(inside)
    mixed = rng.permutation(len(rows))
    about: dict[str, Any] = {"order": order, "by": GroupSort.SUM}
    groups, total = grouped(scores, codes[mixed], list("abcd"), 7, rows=rows[mixed], **about)
    assert ({each.value for each in groups}, total) == (set("bcd"), 3)
    for each in groups:
        member = inside[:, each.code]
        (alone,) = (one for one in grouped(scores, np.int64(member), [0, 1], 7, **about)[0] if one.value)
        assert (each.count, each.error) == (alone.count, pytest.approx(alone.error))
        told = [each.sum, each.mean, each.share, each.share_of_top, each.lift]
        assert told == pytest.approx([alone.sum, alone.mean, alone.share, alone.share_of_top, alone.lift])


def test_intervals_and_shares_of_groups() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=400).astype(np.float32)
    codes = np.repeat([0, 1, 2, 3, 4], [1, 2, 4, 93, 300])
    groups, _ = grouped(scores, codes, list("abcde"), 10)
    for group in groups:
        own = scores[codes == group.code].astype(np.float64)
        assert group.share == pytest.approx(own.sum() / np.abs(scores).sum(dtype=np.float64))
        if len(own) == 1:
            assert group.error is None
            continue
        low, high = stats.t.interval(0.95, len(own) - 1, loc=own.mean(), scale=stats.sem(own))
        assert group.error == pytest.approx((high - low) / 2, rel=1e-3)
        assert group.mean == pytest.approx((high + low) / 2)


@pytest.mark.parametrize("freedom", [*range(1, 40), 100, 10_000])
def test_quantiles_of_student(freedom: int) -> None:
    assert student_95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_no_examples_make_no_groups() -> None:
    assert grouped(np.zeros(0), np.zeros(0, np.int64), [], 10) == ([], 0)


# --- two rankings -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data())
def test_the_correlation_is_scipys_also_with_ties(data: st.DataObject) -> None:
    a, b = pair(data)
    found = compared(a, b, 5, 3)
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert found.spearman is None
    else:
        assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@settings(deadline=None)
@given(data=st.data())
def test_overlaps_and_movers_are_what_a_loop_finds(data: st.DataObject) -> None:
    a, b = pair(data)
    n, k, movers = len(a), data.draw(st.integers(1, 50)), data.draw(st.integers(0, 5))
    found = compared(a, b, k, movers)
    best_a, best_b = ranked(a, None, Order.MOST).tolist(), ranked(b, None, Order.MOST).tolist()
    assert [each.k for each in found.overlaps] == sorted({min(k, n)} | ({10} if n >= 10 else set()))
    for each in found.overlaps:
        both = set(best_a[: each.k]) & set(best_b[: each.k])
        assert (each.share, each.by_chance) == (len(both) / each.k, each.k / n)
    gains = percentiles(b) - percentiles(a)
    for sign, listed in ((1, found.up), (-1, found.down)):
        expected = sorted((row for row in range(n) if sign * gains[row] > 1e-9), key=lambda row: -sign * gains[row])
        assert len(listed) == min(movers, len(expected))
        told = [sign * (mover.percentile_b - mover.percentile_a) for mover in listed]
        assert told == pytest.approx([sign * gains[row] for row in expected[:movers]])
        for mover in listed:
            assert (best_a[mover.rank_a - 1], best_b[mover.rank_b - 1]) == (mover.row, mover.row)
            assert mover.percentile_a == pytest.approx(percentiles(a)[mover.row])
            assert mover.percentile_b == pytest.approx(percentiles(b)[mover.row])


def test_a_ranking_agrees_with_itself_and_opposes_its_reverse() -> None:
    scores = np.random.default_rng(1).normal(size=2000).astype(np.float32)
    same, turned = compared(scores, scores, 100, 5), compared(scores, -scores, 100, 5)
    assert (same.spearman, turned.spearman) == (pytest.approx(1), pytest.approx(-1))
    assert [(each.k, each.share) for each in same.overlaps] == [(10, 1), (100, 1), (1000, 1)]
    assert [(each.k, each.share) for each in turned.overlaps] == [(10, 0), (100, 0), (1000, 0)]
    assert (same.up, same.down) == ((), ())
    assert [mover.rank_b for mover in turned.up] == [1, 2, 3, 4, 5]
    assert [mover.rank_a for mover in turned.down] == [1, 2, 3, 4, 5]


def test_rows_of_equal_scores_have_not_moved() -> None:
    found = compared(np.float32([1, 1, 1, 1]), np.float32([1, 1, 1, 2]), 2, 10)
    assert [mover.row for mover in found.up] == [3]
    assert [mover.row for mover in found.down] == [0, 1, 2]
    assert [mover.percentile_b - mover.percentile_a for mover in found.down] == [-12.5] * 3


def test_one_example_and_none_are_compared() -> None:
    one = compared(np.float32([1]), np.float32([-5]), 100, 10)
    assert (one.n, one.spearman, one.up, one.down) == (1, None, (), ())
    assert [(each.k, each.share, each.by_chance) for each in one.overlaps] == [(1, 1, 1)]
    none = compared(np.zeros(0), np.zeros(0), 100, 10)
    assert (none.n, none.spearman, none.overlaps) == (0, None, ())


def test_rankings_of_different_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 scores"):
        compared(np.zeros(2), np.zeros(3), 1, 1)
