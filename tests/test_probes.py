"""Concept directions and how well they separate: against scikit-learn and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from service.errors import Invalid
from workers.probes import FOLDS, auroc, difference_of_means, fit

scores = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 1e-20, 3e30]), min_size=1, max_size=20)


def normal(seed: int, n: int, d: int = 12, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def sklearn_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return roc_auc_score(truth, np.concatenate([positive, negative]))


# --- AUROC ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(positive=scores, negative=scores)
def test_auroc_is_that_of_scikit_learn_ties_included(positive, negative):
    p, n = np.array(positive), np.array(negative)
    assert auroc(p, n) == pytest.approx(sklearn_auroc(p, n), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auroc_of_many_scores_without_ties(dtype):
    p, n = normal(0, 700, 1)[:, 0].astype(dtype) + 1, normal(1, 300, 1)[:, 0].astype(dtype)
    assert auroc(p, n) == pytest.approx(sklearn_auroc(p, n), abs=1e-12)


@pytest.mark.parametrize(
    ("positive", "negative", "area"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1, 1], 0.5),
        ([0, 2], [1], 0.5),
        ([1], [1, 0], 0.75),
    ],
)
def test_auroc_by_hand(positive, negative, area):
    assert auroc(np.array(positive, float), np.array(negative, float)) == area


# --- the direction ----------------------------------------------------------------------------------


def test_the_difference_of_means_points_from_negative_to_positive():
    positive, negative = np.float32([[3, 1], [5, 1]]), np.float32([[1, 1], [1, 1], [1, 4]])
    assert difference_of_means(positive, negative).tolist() == [3.0, -1.0]


def test_the_difference_of_means_survives_a_large_common_offset():
    """Summed in float32 the difference would drown in rounding."""
    positive, negative = np.full((50_000, 1), 1000.25, np.float32), np.full((30_000, 1), 1000.0, np.float32)
    assert difference_of_means(positive, negative).tolist() == [0.25]


def test_a_fitted_direction_is_the_normalised_difference_of_means():
    positive, negative = normal(0, 40, shift=0.7), normal(1, 31)
    probe = fit(positive, negative)
    exact = positive.astype(np.float64).mean(0) - negative.astype(np.float64).mean(0)
    assert probe.norm == pytest.approx(np.linalg.norm(exact), rel=1e-6)
    np.testing.assert_allclose(probe.direction, exact / np.linalg.norm(exact), rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(probe.direction.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    assert probe.direction.dtype == np.float32


def test_swapping_the_sides_turns_the_direction_round():
    positive, negative = normal(0, 40, shift=0.7), normal(1, 31)
    there, back = fit(positive, negative), fit(negative, positive)
    np.testing.assert_array_equal(there.direction, -back.direction)
    assert there.auroc_held_out == pytest.approx(back.auroc_held_out, abs=1e-12)


# --- held-out quality -------------------------------------------------------------------------------


def test_separated_sides_have_a_held_out_auroc_of_one():
    assert fit(normal(0, 50, shift=3), normal(1, 50)).auroc_held_out == 1.0


def test_noise_has_a_held_out_auroc_near_one_half():
    """Even with more dimensions than examples, where a probe judged on its own examples looks perfect."""
    positive, negative = normal(0, 100, d=400), normal(1, 100, d=400)
    probe = fit(positive, negative)
    assert auroc(positive @ probe.direction, negative @ probe.direction) > 0.95
    assert abs(probe.auroc_held_out - 0.5) < 0.1


def test_overlapping_sides_have_the_auroc_of_their_overlap():
    """Two unit Gaussians at distance s: AUROC = Φ(s/√2), s = 1 gives .76."""
    positive, negative = normal(0, 4000, d=3), normal(1, 4000, d=3)
    positive[:, 0] += 1
    assert fit(positive, negative).auroc_held_out == pytest.approx(0.760, abs=0.015)


def test_every_example_is_held_out_once():
    """One outlier that decides its own side's mean must not help to classify itself."""
    positive, negative = normal(0, 10, d=2) * 1e-3, normal(1, 10, d=2) * 1e-3
    positive[:, 0] += 1  # a clear direction
    positive[7] = [-100, 0]  # labelled wrongly, and far out
    folds = [
        auroc(positive[k::FOLDS] @ v, negative[k::FOLDS] @ v)
        for k in range(FOLDS)
        for v in [np.delete(positive, np.s_[k::FOLDS], 0).mean(0) - np.delete(negative, np.s_[k::FOLDS], 0).mean(0)]
    ]
    assert len(set(folds)) > 1
    assert fit(positive, negative).auroc_held_out == pytest.approx(np.mean(folds))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("few", range(FOLDS))
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_fewer_examples_than_folds_are_refused_by_side(side, few):
    sides = {"positive": normal(0, 20), "negative": normal(1, 20)}
    sides[side] = sides[side][:few]
    with pytest.raises(Invalid) as refused:
        fit(**sides)
    assert (refused.value.code, refused.value.param) == ("too_few_examples", side)


def test_as_many_examples_as_folds_are_enough():
    assert fit(normal(0, FOLDS, shift=3), normal(1, FOLDS)).auroc_held_out == 1.0


@pytest.mark.parametrize("other", [np.arange(30), np.arange(30)[::-1], np.r_[0:30, 0:30]])
def test_sides_with_the_same_mean_are_refused(other):
    same = normal(0, 30)
    with pytest.raises(Invalid) as refused:
        fit(same, same[other])
    assert refused.value.code == "identical_sides"
