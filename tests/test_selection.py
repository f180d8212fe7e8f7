"""Which coordinates are kept, against loops over every coordinate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import selection

SHAPES = {"a": (3, 4), "b": (2, 1), "c": (1, 5)}
SIZE = 12 + 2 + 5


def random(seed, *, levels=None):
    """Non-negative matrices by module; with ``levels`` few different values, so that many tie."""
    generator = np.random.default_rng(seed)
    draw = generator.exponential if levels is None else lambda size: generator.integers(0, levels, size) * 1.0
    return {name: draw(size=shape) for name, shape in SHAPES.items()}


def means(square, seed=0):
    """As after truncation: the mean of the whole module is not the mean of the corner."""
    generator = np.random.default_rng(seed)
    return {name: float(values.mean() * generator.uniform(0.2, 1)) for name, values in square.items()}


def places(choice):
    """(module, row, column) of every chosen coordinate."""
    assert list(choice) == list(SHAPES)
    found = []
    for name, index in choice.items():
        assert index.dtype == np.int64
        assert (np.diff(index) > 0).all()  # sorted, none twice
        assert ((index >= 0) & (index < np.prod(SHAPES[name]))).all()
        found += [(name, *map(int, np.unravel_index(i, SHAPES[name]))) for i in index]
    return found


def best(scores, count, without=()):
    """The slow way: every coordinate in order, sorted by score alone (Python's sort keeps ties in order)."""
    every = [(name, i, j) for name, (rows, columns) in SHAPES.items() for i in range(rows) for j in range(columns)]
    left = [place for place in every if place not in without]
    return sorted(left, key=lambda place: -scores[place[0]][place[1], place[2]])[:count]


# --- scores -------------------------------------------------------------------------------------------


def test_curvature_scores_are_lambda_over_the_mean_of_the_whole_module():
    square = random(0)
    mean = means(square)
    for name, found in selection.by_curvature(square, mean).items():
        for (i, j), value in np.ndenumerate(found):
            assert value == pytest.approx(square[name][i, j] / mean[name], rel=1e-12)


@pytest.mark.parametrize("damping", [0.01, 1.0, 30.0])
def test_the_curvature_order_is_that_of_lambda_over_lambda_plus_delta_at_any_damping(damping):
    square = random(1)
    mean = means(square)
    order = [best(selection.by_curvature(square, mean), SIZE)]
    share = {name: values / (values + damping * mean[name]) for name, values in square.items()}
    order.append(best(share, SIZE))
    assert order[0] == order[1]


def test_a_module_without_curvature_scores_zero():
    square = random(2) | {"b": np.zeros(SHAPES["b"])}
    mean = means(square)
    with np.errstate(all="raise"):
        found = selection.by_curvature(square, mean)
    assert not found["b"].any()
    assert found["a"].any()


@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0, 100.0])
def test_jacobian_scores_are_shares_of_the_variance_of_the_terms_of_m(damping):
    norm, square = random(3), random(4)
    mean = means(square)
    expected = {}
    for name in SHAPES:
        for (i, j), value in np.ndenumerate(norm[name]):
            lam = square[name][i, j]
            expected[name, i, j] = value * lam / (lam + damping * mean[name]) ** 2
    total = sum(expected.values())
    found = selection.by_jacobian(norm, square, mean, damping)
    for (name, i, j), value in expected.items():
        assert found[name][i, j] == pytest.approx(value / total, rel=1e-12)
    assert sum(values.sum() for values in found.values()) == pytest.approx(1)


def test_the_jacobian_score_is_the_variance_it_says_it_is():
    """Coordinates drawn with variance λ: the mean over examples of ‖J_ij C_ij/(λ_ij + δ)‖²."""
    generator = np.random.default_rng(5)
    square = random(6)
    mean = means(square)
    J = {name: generator.standard_normal((4, *shape)) for name, shape in SHAPES.items()}
    norm = {name: (rows**2).sum(axis=0) for name, rows in J.items()}
    found = selection.by_jacobian(norm, square, mean, 0.5)
    raw = {}
    for name, shape in SHAPES.items():
        C = generator.standard_normal((100_000, *shape)) * np.sqrt(square[name])
        term = C / (square[name] + 0.5 * mean[name])
        raw[name] = (term**2).mean(axis=0) * norm[name]
    total = sum(values.sum() for values in raw.values())
    for name in SHAPES:
        np.testing.assert_allclose(found[name], raw[name] / total, rtol=0.05)


def test_zero_lambda_at_zero_damping_scores_zero_and_not_nan():
    norm, square = random(7), random(8) | {"b": np.zeros(SHAPES["b"])}
    square["a"][1, 2] = 0
    with np.errstate(all="raise"):
        found = selection.by_jacobian(norm, square, means(square), 0.0)
    assert found["a"][1, 2] == 0
    assert not found["b"].any()
    assert all(np.isfinite(values).all() for values in found.values())


def test_a_jacobian_of_zeros_scores_zero():
    nothing = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    square = random(9)
    with np.errstate(all="raise"):
        found = selection.by_jacobian(nothing, square, means(square), 1.0)
    assert not any(values.any() for values in found.values())


def test_scores_leave_what_they_are_given_alone():
    norm, square = random(10), random(11)
    before = {name: values.copy() for name, values in square.items()}
    selection.by_curvature(square, means(square))
    selection.by_jacobian(norm, square, means(square), 1.0)
    selection.halves(norm, square, 7)
    for name, values in before.items():
        np.testing.assert_array_equal(square[name], values)


# --- choices ------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([None, 1, 2, 3]), st.integers(0, SIZE + 5))
def test_top_is_what_sorting_every_coordinate_gives(seed, levels, count):
    scores = random(seed, levels=levels)
    assert sorted(places(selection.top(scores, count))) == sorted(best(scores, count))


@given(st.integers(0, 1000), st.sampled_from([None, 1, 2, 3]), st.integers(0, SIZE + 5))
def test_halves_are_the_best_by_the_first_then_the_best_others_by_the_second(seed, levels, count):
    first, second = random(seed, levels=levels), random(seed + 1, levels=levels)
    mine = best(first, (count + 1) // 2)
    rest = best(second, max(0, min(count, SIZE) - len(mine)), without=mine)
    assert sorted(places(selection.halves(first, second, count))) == sorted(mine + rest)


def test_more_coordinates_than_there_are_means_all_of_them():
    for choice in (selection.top(random(0), 10**6), selection.halves(random(0), random(1), 10**6)):
        assert len(places(choice)) == SIZE


def test_a_module_that_loses_out_is_there_with_nothing():
    scores = random(0) | {"b": np.full(SHAPES["b"], 100.0)}
    choice = selection.top(scores, 2)
    assert [len(index) for index in choice.values()] == [0, 2, 0]


def test_ties_go_to_the_earlier_module_and_the_earlier_entry():
    even = {name: np.ones(shape) for name, shape in SHAPES.items()}
    choice = selection.top(even, 13)
    np.testing.assert_array_equal(choice["a"], np.arange(12))
    np.testing.assert_array_equal(choice["b"], [0])
    assert not len(choice["c"])
