"""What held-out scores say: AUROC, its interval, calibration. Against scikit-learn, loops and known cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binomtest, norm
from sklearn.metrics import brier_score_loss

from service.terms import ProbeMethod
from workers import held_out, probes
from workers.held_out import Scored, fold_of

scores = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]), min_size=5, max_size=20)


def scored(positive, negative) -> Scored:
    p, n = np.array(positive, float), np.array(negative, float)
    return Scored(p, n, fold_of(len(p)), fold_of(len(n)))


def gaussian(seed: int, n: int, m: int, distance: float) -> Scored:
    rng = np.random.default_rng(seed)
    return scored(rng.normal(distance, 1, n), rng.normal(0, 1, m))


# --- AUROC and its interval -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(positive=scores, negative=scores)
def test_the_held_out_auroc_counts_every_pair_of_a_fold_once(positive, negative):
    of = scored(positive, negative)
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, its in zip(positive, of.fold_positive, strict=True)
        for n, theirs in zip(negative, of.fold_negative, strict=True)
        if its == theirs
    ]
    assert held_out.held_out_auroc(of) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_the_interval_is_that_of_resamples_drawn_one_by_one():
    of = gaussian(0, 14, 11, 0.8)
    drawn = held_out.interval(of, draws=4000)
    rng = np.random.default_rng(1)
    areas = []
    for _ in range(1500):
        p, n = rng.integers(0, 14, 14), rng.integers(0, 11, 11)
        again = Scored(of.positive[p], of.negative[n], of.fold_positive[p], of.fold_negative[n])
        pairs = again.fold_positive[:, None] == again.fold_negative
        if pairs.any():
            areas.append(np.mean((again.positive[:, None] > again.negative)[pairs]))
    assert drawn == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.03)
    assert held_out.interval(of, draws=4000) == drawn


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Two unit Gaussians at distance 1: the true AUROC is Φ(1/√2) = .760."""
    truth = norm.cdf(1 / np.sqrt(2))
    found = [held_out.interval(gaussian(seed, 60, 45, 1.0), draws=300) for seed in range(300)]
    covered = np.mean([low <= truth <= high for low, high in found])
    assert 0.91 <= covered <= 0.985  # .95 ± 3 standard errors of 300 draws


def test_resamples_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    of = gaussian(2, 40, 30, 0.5)
    whole = held_out.interval(of, draws=50)
    monkeypatch.setattr(held_out, "_BLOCK", 1)
    assert held_out.interval(of, draws=50) == whole


@pytest.mark.parametrize(("n", "m"), [(5, 5), (20, 50)])
def test_a_perfect_order_of_few_examples_is_no_certainty(n, m):
    """The interval of Clopper and Pearson for n disjoint pairs, all in order."""
    low, high = held_out.interval(scored(np.arange(n) + 100, np.arange(m)))
    assert high == 1.0
    assert low == pytest.approx(binomtest(n, n).proportion_ci(0.95, method="exact").low)
    mirrored = held_out.interval(scored(np.arange(n), np.arange(m) + 100))
    assert mirrored == pytest.approx((0.0, 1 - low))


# --- probabilities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 1.0, -0.7, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_platts_rule_is_the_minimum_of_its_loss(distance, offset):
    of = gaussian(3, 50, 20, distance)
    targets = np.repeat([51 / 52, 1 / 22], [50, 20])
    x = np.concatenate([of.positive, of.negative])

    def loss(at):
        z = at[0] * x + at[1]
        return (np.logaddexp(0, z) - targets * z).sum()

    slope, intercept = held_out.platt(of.positive + offset, of.negative + offset)
    best = minimize(
        loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    )
    assert loss([slope, intercept + slope * offset]) == pytest.approx(best.fun, rel=1e-7)


def test_equal_scores_give_the_share_of_the_positives():
    slope, intercept = held_out.platt(np.full(30, 2.0), np.full(10, 2.0))
    assert held_out.sigmoid(np.array([slope * 2 + intercept]))[0] == pytest.approx(0.75, abs=0.02)


def test_probabilities_of_a_fold_come_from_the_other_folds():
    of = gaussian(4, 20, 20, 1.0)
    before = held_out.probabilities(of)
    changed = of.positive.copy()
    changed[of.fold_positive == 2] += 50
    after = held_out.probabilities(Scored(changed, of.negative, of.fold_positive, of.fold_negative))
    np.testing.assert_array_equal(after[1][of.fold_negative == 2], before[1][of.fold_negative == 2])
    assert not np.allclose(after[1][of.fold_negative == 1], before[1][of.fold_negative == 1])


def test_brier_is_that_of_scikit_learn():
    p, n = np.random.default_rng(5).uniform(size=(2, 40))
    label = np.repeat([1, 0], 40)
    assert held_out.brier(p, n) == pytest.approx(brier_score_loss(label, np.concatenate([p, n])))


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(6)
    p, n = np.append(rng.uniform(size=30), [1.0, 0.3]), np.append(rng.uniform(size=50), 0.0)
    all_p, label = np.concatenate([p, n]), np.repeat([1, 0], [len(p), len(n)])
    total = 0.0
    for b in range(10):
        inside = (all_p >= b / 10) & ((all_p < (b + 1) / 10) | (b == 9))
        if inside.any():
            total += inside.mean() * abs(all_p[inside].mean() - label[inside].mean())
    assert held_out.calibration_error(p, n) == pytest.approx(total)


def test_probabilities_of_gaussian_scores_are_calibrated():
    """For unit Gaussians at distance s the true P is σ(s·x − s²/2): Platt's rule contains it."""
    of = gaussian(7, 3000, 3000, 1.5)
    p, n = held_out.probabilities(of)
    assert held_out.calibration_error(p, n) < 0.03
    truth = held_out.sigmoid(1.5 * of.positive - 1.5**2 / 2)
    assert np.abs(p - truth).max() < 0.03


# --- choices ----------------------------------------------------------------------------------------


def test_the_mean_cosine_is_that_of_all_pairs():
    rows = np.random.default_rng(8).normal(size=(5, 7))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(5) for j in range(i)]
    assert held_out.mean_cosine(rows) == pytest.approx(np.mean(pairs))


def test_the_choice_of_a_layer_is_held_out_too():
    """Of noise nothing is left, however many layers it is chosen from; of something, what is there."""
    rng = np.random.default_rng(9)

    def chosen(shift: float) -> tuple[float, float]:
        sides = [rng.normal(shift, 1, (12, 25, 16)), rng.normal(0, 1, (12, 25, 16))]
        layers = [(sides[0][n].astype(np.float32), sides[1][n].astype(np.float32)) for n in range(12)]
        method = ProbeMethod.DIFFERENCE_OF_MEANS
        areas = np.array([held_out.auroc_by_fold(probes._held_out(*each, method)[0]) for each in layers])
        nested = np.array([probes._nested(*each, method) for each in layers])
        return float(areas.mean(axis=1).max()), held_out.auroc_of_choice(areas, nested)

    best, of_choice = np.mean([chosen(0.0) for _ in range(20)], axis=0)
    assert best > 0.6
    assert abs(of_choice - 0.5) < 0.05
    best, of_choice = chosen(0.7)
    assert 0.9 < of_choice <= best


def test_nested_folds_are_what_a_fit_without_them_says():
    rng = np.random.default_rng(10)
    p, q = rng.normal(0.5, 1, (13, 4)).astype(np.float32), rng.normal(0, 1, (16, 4)).astype(np.float32)
    nested = probes.fit(p, q, nested=True).nested
    assert nested is not None
    for f, g in ((0, 3), (4, 1)):
        left = [np.delete(side, np.isin(np.arange(len(side)) % 5, (f, g)), axis=0) for side in (p, q)]
        v = left[0].mean(axis=0) - left[1].mean(axis=0)
        assert nested[f, g] == pytest.approx(held_out.auroc(p[g::5] @ v, q[g::5] @ v))
