"""Directions by five methods: against scikit-learn and dense matrices, with the sign and the space they promise."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from service.errors import Invalid
from service.terms import ProbeMethod
from workers import probes
from workers.held_out import auroc
from workers.probes import C_GRID, FOLDS, direction, fit

EVERY = list(ProbeMethod)
WHITENED = [ProbeMethod.LDA, ProbeMethod.WHITENED_DIFFERENCE_OF_MEANS, ProbeMethod.WHITENED_LOGISTIC]


def sides(seed: int, n: int, m: int, d: int, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Correlated Gaussians about a large common mean, with spreads far apart, shifted along one random
    direction.
    """
    rng = np.random.default_rng(seed)
    mix = (np.eye(d) + 0.5 * rng.normal(size=(d, d)) / np.sqrt(d)) * np.exp(rng.normal(0, 1, d))
    mean, along = 20 * rng.normal(size=d), rng.normal(size=d) @ mix
    p, n_ = rng.normal(size=(n, d)) @ mix + mean + shift * along, rng.normal(size=(m, d)) @ mix + mean
    return p.astype(np.float32), n_.astype(np.float32)


def dense(rows: np.ndarray) -> np.ndarray:
    """The covariance of docs/reference.md as one matrix, with scikit-learn's shrinkage."""
    spread = rows.std(axis=0)
    return spread[:, None] * ledoit_wolf(rows / spread, assume_centered=True)[0] * spread


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def stacked(p: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([p, n]).astype(np.float64)
    return rows - rows.mean(axis=0), np.repeat([1, 0], [len(p), len(n)])


# --- what each of them is -----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [6, 80])
def test_lda_is_the_inverse_of_the_covariance_within_sides_times_the_difference(d):
    p, n = sides(0, 40, 25, d)
    p64, n64 = p.astype(np.float64), n.astype(np.float64)
    within = np.concatenate([p64 - p64.mean(0), n64 - n64.mean(0)])
    slow = np.linalg.solve(dense(within), p64.mean(0) - n64.mean(0))
    np.testing.assert_allclose(
        direction(p, n, ProbeMethod.LDA).vector, slow, rtol=1e-6, atol=1e-7 * abs(slow).max()
    )


def test_with_many_examples_lda_is_that_of_scikit_learn():
    p, n = sides(1, 4000, 3000, 8)
    rows, label = stacked(p, n)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(rows, label).coef_[0]
    assert cosine(direction(p, n, ProbeMethod.LDA).vector, theirs) > 0.9999


@pytest.mark.parametrize("d", [6, 80])
def test_the_whitened_difference_of_means_is_taken_between_white_rows_and_pulled_back(d):
    p, n = sides(2, 40, 25, d)
    rows, label = stacked(p, n)
    values, vectors = np.linalg.eigh(dense(rows))
    white = (
        vectors / np.sqrt(values) @ vectors.T
    )  # another root of the inverse: the direction does not depend on it
    slow = white.T @ ((rows @ white.T)[label == 1].mean(0) - (rows @ white.T)[label == 0].mean(0))
    fast = direction(p, n, ProbeMethod.WHITENED_DIFFERENCE_OF_MEANS).vector
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6 * abs(slow).max())


@pytest.mark.parametrize("d", [6, 80])
@pytest.mark.parametrize("method", [ProbeMethod.LOGISTIC, ProbeMethod.WHITENED_LOGISTIC])
def test_logistic_directions_are_scikit_learns_with_the_penalty_that_held_out_thirds_chose(method, d):
    p, n = sides(3, 33, 21, d, shift=0.3)
    rows, label = stacked(p, n)
    white = np.eye(d)
    if method == ProbeMethod.WHITENED_LOGISTIC:
        values, vectors = np.linalg.eigh(dense(rows))
        white = vectors / np.sqrt(values) @ vectors.T
    seen = rows @ white.T
    seen /= np.sqrt(np.mean((seen**2).sum(axis=1)))
    third = np.concatenate([np.arange(33) % 3, np.arange(21) % 3])
    weight = np.where(label == 1, 1 / 33, 1 / 21)

    def fitted(c, keep):
        model = LogisticRegression(C=c, solver="newton-cg", class_weight="balanced", tol=1e-8, max_iter=1000)
        return model.fit(seen[keep], label[keep])

    losses = []
    for c in C_GRID:
        each = [(fitted(c, third != k), third == k) for k in range(3)]
        losses.append(
            sum(
                log_loss(label[held], model.predict_proba(seen[held])[:, 1], sample_weight=weight[held])
                for model, held in each
            )
        )
    best = C_GRID[int(np.argmin(losses))]
    found = direction(p, n, method)
    assert found.c == best
    assert cosine(found.vector, white.T @ fitted(best, np.full(len(rows), True)).coef_[0]) > 0.9999


def test_shrinkage_is_told_where_there_is_any():
    p, n = sides(4, 20, 20, 60)
    for method in EVERY:
        found = direction(p, n, method)
        assert (found.shrinkage is not None) == (method in WHITENED)
    assert 0.05 < direction(p, n, ProbeMethod.LDA).shrinkage < 1
    assert fit(p, n).evidence.rank == 39


# --- what all of them promise -------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(("n", "m"), [(30, 30), (12, 60)])
def test_positive_examples_score_higher_and_swapping_the_sides_turns_the_direction_round(method, n, m):
    p, q = sides(5, n, m, 50, shift=3)
    there, back = direction(p, q, method).vector, direction(q, p, method).vector
    assert auroc(p @ there, q @ there) > 0.8
    assert there @ (p.astype(np.float64).mean(0) - q.astype(np.float64).mean(0)) > 0
    assert cosine(there, back) < -0.9999


@pytest.mark.parametrize("method", EVERY)
def test_labels_without_meaning_have_a_sign_all_the_same(method):
    """The proof in ``direction`` needs no separation."""
    p, q = sides(6, 60, 60, 5, shift=0.0)
    assert direction(p, q, method).vector @ (p.astype(np.float64).mean(0) - q.astype(np.float64).mean(0)) > 0


@pytest.mark.parametrize("method", EVERY)
def test_the_same_rows_give_the_same_bytes(method):
    p, q = sides(7, 25, 25, 40)
    assert direction(p, q, method).vector.tobytes() == direction(p.copy(), q.copy(), method).vector.tobytes()


@pytest.mark.parametrize("method", WHITENED)
def test_whitening_makes_the_units_of_single_dimensions_meaningless(method):
    """Scores stay what they are when a dimension is measured in other units; plain differences do not."""
    p, q = sides(8, 40, 40, 10)
    units = np.exp2(np.arange(10, dtype=np.float32) - 4)
    there, scaled = direction(p, q, method).vector, direction(p * units, q * units, method).vector
    np.testing.assert_allclose(scaled * units, there, rtol=2e-3, atol=2e-3 * abs(there).max())


@pytest.mark.parametrize("method", EVERY)
def test_identical_sides_and_rounding_apart_are_refused(method):
    p = sides(9, 20, 20, 6)[0]
    for other in (p, p[::-1], np.roll(p, 7, axis=0)):
        with pytest.raises(Invalid) as refused:
            fit(p, other, method)
        assert refused.value.code == "identical_sides"


def test_a_dimension_that_is_constant_is_counted_and_left_out():
    """The others are found as if it were not there: no variance of none pulls the target of shrinkage down."""
    p, q = sides(10, 31, 23, 8)
    p[:, 3] = q[:, 3] = 3001.7
    for method in EVERY:
        probe = fit(p, q, method)
        assert (probe.evidence.constant_dimensions, probe.evidence.rank) == (1, 7)
        assert probe.direction[3] == 0
        others = direction(np.delete(p, 3, axis=1), np.delete(q, 3, axis=1), method).vector
        unit = (others / np.linalg.norm(others)).astype(np.float32)
        np.testing.assert_array_equal(np.delete(probe.direction, 3), unit)


def test_sides_that_are_points_are_told_apart_along_their_difference():
    """Nothing varies within a side: there is no covariance, and no error."""
    p, q = np.tile(np.float32([1, 2, 0]), (8, 1)), np.tile(np.float32([1, 0, 0]), (8, 1))
    for method in EVERY:
        np.testing.assert_allclose(fit(p, q, method).direction, [0, 1, 0], atol=1e-6)


# --- the evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_every_example_is_scored_by_the_folds_without_it(method):
    p, q = sides(11, 23, 31, 12)
    probe = fit(p, q, method)
    in_order = pairs = 0.0
    for k in range(FOLDS):
        v = direction(np.delete(p, np.s_[k::FOLDS], 0), np.delete(q, np.s_[k::FOLDS], 0), method).vector
        held = p[k::FOLDS] @ v, q[k::FOLDS] @ v
        assert probe.by_fold[k] == pytest.approx(auroc(*held))
        in_order += auroc(*held) * len(held[0]) * len(held[1])
        pairs += len(held[0]) * len(held[1])
    assert probe.auroc_held_out == pytest.approx(in_order / pairs)
    low, high = probe.evidence.auroc_interval
    assert low < probe.auroc_held_out < high


def test_what_is_compared_are_the_directions_over_all_examples():
    p, q = sides(12, 40, 40, 10)
    probe = fit(p, q, ProbeMethod.LDA, compare=EVERY, layer=7)
    assert probe.evidence.layer == 7
    assert set(probe.evidence.cosine_methods) == set(EVERY) - {ProbeMethod.LDA}
    for method, found in probe.evidence.cosine_methods.items():
        assert found == pytest.approx(cosine(probe.direction, direction(p, q, method).vector), abs=1e-6)
    # Two covariances, of nearly the same shape.
    assert probe.evidence.cosine_methods[ProbeMethod.WHITENED_DIFFERENCE_OF_MEANS] > 0.98


def test_slope_and_intercept_turn_scores_of_raw_activations_into_probabilities():
    p, q = sides(13, 400, 400, 6, shift=1)
    probe = fit(p, q, ProbeMethod.LDA)
    new = sides(13, 4000, 4000, 6, shift=1)  # other rows of the same populations
    found = [1 / (1 + np.exp(-(probe.slope * (rows @ probe.direction) + probe.intercept))) for rows in new]
    assert probes.held_out.calibration_error(*(each.astype(np.float64) for each in found)) < 0.05
    assert found[0].mean() > 0.6 and found[1].mean() < 0.4


def test_folds_agree_more_the_more_examples_there_are():
    few, many = (fit(*sides(14, n, n, 20)).evidence.cosine_folds for n in (10, 400))
    assert few < many < 1
    assert many > 0.97
