"""Singular directions from blocks of rows, against numpy's SVD in float64."""

from collections.abc import Iterator

import numpy as np
import pytest

from service import spectrum
from service.spectrum import exact, top_directions

F64 = np.ndarray


def matrix(n: int, values: F64, seed: int = 0) -> F64:
    """(n, d) float64 with these singular values and random singular vectors."""
    generator = np.random.default_rng(seed)
    d = len(values)
    left = np.linalg.qr(generator.standard_normal((n, d)))[0]
    right = np.linalg.qr(generator.standard_normal((d, d)))[0]
    return (left * values) @ right.T


def cut(rows: F64, *stops: int) -> list[np.ndarray]:
    return np.split(rows.astype(np.float32), stops)


def sine(ours: F64, theirs: F64) -> float:
    """Of the largest angle between the spans of both sets of orthonormal rows."""
    cosines = np.linalg.svd(ours @ theirs.T, compute_uv=False)
    return float(np.sqrt(max(0.0, 1 - cosines.min() ** 2)))


DECAYING = {
    "1/i": lambda d: 1 / np.arange(1, d + 1),
    "1/√i": lambda d: np.arange(1, d + 1) ** -0.5,
    ".9^i": lambda d: 0.9 ** np.arange(d),
    "a few and noise": lambda d: np.where(np.arange(d) < 6, 10.0 - np.arange(d), 0.05),
}
SIZES = {"exact": (1500, 96), "randomised": (1500, 700)}  # rows, d


def test_the_sizes_take_both_ways():
    assert exact(96, 5)
    assert not exact(700, 5)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", DECAYING)
def test_decaying_spectra_agree_with_numpy(kind, shape):
    n, d = SIZES[shape]
    A = matrix(n, DECAYING[kind](d))
    found = top_directions(cut(A, 100, 101, 900), d, 5, seed=3)
    _, values, vectors = np.linalg.svd(A, full_matrices=False)
    np.testing.assert_allclose(found.values, values[:5], rtol=1e-3)
    assert sine(found.directions, vectors[:5]) <= 0.05
    assert found.energy == pytest.approx((values**2).sum(), rel=1e-5)
    np.testing.assert_allclose(found.shares, values[:5] ** 2 / (values**2).sum(), rtol=2e-3)
    np.testing.assert_allclose(found.mean, A.mean(axis=0), atol=1e-6 * np.abs(A).max())
    np.testing.assert_allclose(found.directions @ found.directions.T, np.eye(5), atol=1e-5)
    assert found.rows == n


def test_without_power_iterations_a_slow_spectrum_would_not_agree():
    """Else the test above says nothing about them."""
    A = matrix(1500, DECAYING["1/√i"](700))
    values = np.linalg.svd(A, compute_uv=False)[:5]
    found = top_directions(cut(A), 700, 5, seed=3, power_iterations=0)
    assert np.abs(found.values / values - 1).max() > 0.05
    assert found.energy == pytest.approx(float((A**2).sum()), rel=1e-5)


def test_a_flat_spectrum_is_captured_as_far_as_there_is_anything_to_capture():
    A = np.random.default_rng(1).standard_normal((3000, 900))
    found = top_directions(cut(A, 1000), 900, 10)
    best = (np.linalg.svd(A, compute_uv=False)[:10] ** 2).sum()
    captured = ((A @ found.directions.T.astype(np.float64)) ** 2).sum()
    assert 0.85 * best <= captured <= best * (1 + 1e-6)
    assert (found.values**2).sum() == pytest.approx(captured, rel=1e-4)  # what it says it captures, it does
    arbitrary = np.linalg.qr(np.random.default_rng(2).standard_normal((900, 10)))[0]
    assert captured > 1.8 * ((A @ arbitrary) ** 2).sum()


@pytest.mark.parametrize("shape", SIZES)
def test_blocks_seed_and_calls_do_not_matter(shape):
    n, d = SIZES[shape]
    A = matrix(n, DECAYING["1/i"](d), seed=4)
    one = top_directions(cut(A), d, 4, seed=1)
    again = top_directions(cut(A), d, 4, seed=1)
    assert (one.directions == again.directions).all()
    assert (one.values == again.values).all()
    for other in (top_directions(cut(A, 7, 7, 800), d, 4, seed=1), top_directions(cut(A), d, 4, seed=2)):
        np.testing.assert_allclose(other.values, one.values, rtol=1e-4)
        np.testing.assert_allclose(other.directions, one.directions, atol=2e-3)  # signs included


def test_blocks_are_read_as_often_as_needed_and_never_kept():
    A = matrix(1200, DECAYING["1/i"](700))
    passes = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from cut(A, 400, 800)

    top_directions(blocks, 700, 3)
    assert passes == spectrum.POWER_ITERATIONS + 2
    passes = 0
    top_directions(lambda: (rows[:, :50] for rows in blocks()), 50, 3)
    assert passes == 2


def test_rows_are_not_centred():
    """What all rows share is the first direction, and with the mean taken off it would be lost."""
    generator = np.random.default_rng(5)
    shared = np.eye(40)[3]
    A = 0.1 * generator.standard_normal((500, 40)) + shared
    found = top_directions(cut(A), 40, 1)
    assert found.directions[0] @ shared > 0.99  # and it points where the rows are
    assert found.shares[0] > 0.7
    np.testing.assert_allclose(found.mean, A.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("d", [30, 700])
def test_a_direction_points_to_its_heavier_tail(d, flip):
    generator = np.random.default_rng(6)
    along = generator.exponential(size=400) - 1  # mean 0, a long tail upwards
    v = np.linalg.qr(generator.standard_normal((d, 1)))[0][:, 0] * flip
    A = np.outer(along, v) * 5 + 0.01 * generator.standard_normal((400, d))
    assert top_directions(cut(A, 100), d, 1).directions[0] @ v > 0.99


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("d", [30, 700])
def test_the_size_of_the_rows_does_not_matter(d, size):
    A = matrix(900, DECAYING["1/i"](d), seed=7)
    plain, scaled = top_directions(cut(A), d, 3), top_directions(cut(A * size, 300), d, 3)
    np.testing.assert_allclose(scaled.values, plain.values * size, rtol=1e-4)
    np.testing.assert_allclose(scaled.directions, plain.directions, atol=1e-3)
    assert scaled.energy == pytest.approx(plain.energy * size**2, rel=1e-4)


def test_a_block_far_larger_than_the_others_is_no_trouble():
    A = np.random.default_rng(1).standard_normal((200, 700))
    A[150] *= 1e24
    found = top_directions(cut(A, 100), 700, 2)
    assert found.directions[0] @ (A[150] / np.linalg.norm(A[150])) == pytest.approx(1, abs=1e-5)
    assert found.shares[0] == pytest.approx(1)


@pytest.mark.parametrize("d", [20, 700])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_rows_have_few_directions(n, d):
    A = np.random.default_rng(n).standard_normal((n, d))
    found = top_directions(cut(A), d, 10)
    assert found.directions.shape == (n, d)
    assert found.shares.sum() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(found.values, np.linalg.svd(A, compute_uv=False), rtol=1e-3)


@pytest.mark.parametrize("d", [20, 700])
def test_rows_of_one_kind_have_one_direction(d):
    row = np.random.default_rng(0).standard_normal(d)
    found = top_directions(cut(np.outer([1, 2, 3, -1], row), 2), d, 4)
    assert len(found.values) == 1
    assert found.directions[0] @ row / np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("d", [20, 700])
def test_nothing_has_no_directions(d):
    for rows in (np.zeros((5, d)), np.zeros((0, d))):
        found = top_directions(cut(rows), d, 4)
        assert (found.directions.shape, found.energy, len(found.shares)) == ((0, d), 0.0, 0)
        assert np.isfinite(found.mean).all()


def test_the_count_of_operations_decides():
    assert exact(512, 10)
    assert exact(600, 10)
    assert not exact(700, 10)
    assert exact(1024, 100)  # many directions: the thin products are not that thin
    assert exact(20, 15, power_iterations=0)
