"""The shrunk covariance behind whitening and LDA, against scikit-learn and dense matrices."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from workers import covariance

SHAPES = [(200, 12), (30, 12), (12, 12), (8, 40), (3, 5), (500, 1)]


def centered(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated rows; the spreads of their dimensions lie orders of magnitude apart."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * np.exp(rng.normal(0, 3, d))
    return rows - rows.mean(axis=0)


def dense(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """D (shrunk correlations) D, the slow way: scikit-learn's estimate for standardised rows, scaled back."""
    spread = np.sqrt(np.mean(rows**2, axis=0))
    shrunk, shrinkage = ledoit_wolf(rows / spread, assume_centered=True)
    return spread[:, None] * shrunk * spread, shrinkage


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shrinkage_is_that_of_ledoit_and_wolf(shape):
    rows = centered(0, *shape)
    assert covariance.of_rows(rows).shrinkage == pytest.approx(dense(rows)[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_solving_is_multiplying_with_the_inverse_in_every_direction(shape):
    rows = centered(1, *shape)
    sigma, _ = dense(rows)
    of = covariance.of_rows(rows)
    for vector in np.random.default_rng(2).normal(size=(3, shape[1])) * np.sqrt(np.diag(sigma)):
        np.testing.assert_allclose(sigma @ of.solve(vector), vector, rtol=1e-6, atol=1e-7 * np.abs(vector).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_rows_have_the_inner_products_of_the_inverse(shape):
    rows = centered(3, *shape)
    of = covariance.of_rows(rows)
    sigma, _ = dense(rows)
    white = of.whiten()
    np.testing.assert_allclose(white @ white.T, rows @ np.linalg.solve(sigma, rows.T), rtol=1e-6, atol=1e-6)


def test_unwhitening_scores_raw_rows_as_the_weights_score_white_ones():
    rows = centered(4, 8, 40)
    of = covariance.of_rows(rows)
    weights = np.random.default_rng(5).normal(size=7)
    np.testing.assert_allclose(rows @ of.unwhiten(weights), of.whiten() @ weights, rtol=1e-9)


def test_many_rows_are_hardly_shrunk_and_come_out_white():
    rows = np.random.default_rng(6).normal(size=(20_000, 6)) @ (np.eye(6) + 0.3)
    rows -= rows.mean(axis=0)
    of = covariance.of_rows(rows)
    assert of.shrinkage < 0.01
    np.testing.assert_allclose(np.cov(of.whiten(), rowvar=False), np.eye(6), atol=0.03)


@pytest.mark.parametrize(("n", "d", "rank"), [(100, 6, 6), (5, 20, 4)])
def test_the_rank_is_that_of_the_rows(n, d, rank):
    rows = centered(7, n, d) / np.exp(np.arange(d))
    assert covariance.rank_of(covariance.gram_of(rows)) == np.linalg.matrix_rank(rows) == rank
    again = np.concatenate([rows, rows, rows[:, :1] + 0 * rows])
    assert covariance.rank_of(covariance.gram_of(again)) == np.linalg.matrix_rank(again)
    assert covariance.rank_of(np.zeros((3, 3))) == 0


def test_rows_that_are_all_the_same_are_no_error():
    of = covariance.of_rows(np.zeros((5, 3)))
    assert of.solve(np.array([1.0, 2.0, 3.0])).tolist() == [1, 2, 3]
