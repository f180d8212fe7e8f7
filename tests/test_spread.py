"""Mean and deviation of all scores: from moments or from the scores themselves, it must not show."""

import numpy as np
import pytest
from numpy.typing import NDArray

from service import rows as stored
from service.search import VectorIndex
from service.spread import Sample

N, D = 400, 16


def sample(rows: NDArray[np.floating]) -> Sample:
    packed, exponents = stored.pack(rows.astype(np.float32))
    return Sample(VectorIndex(packed, exponents, threads=2))


def check(rows: NDArray[np.floating], query: NDArray[np.floating]) -> None:
    """Against every score in float64, from the rows as they are stored."""
    some = sample(rows)
    query = query.astype(np.float32)
    scores = some._rows.take(np.arange(len(rows))).astype(np.float64) @ query.astype(np.float64)
    found = some.spread(query)
    deviation = scores.std()
    assert found.mean == pytest.approx(scores.mean(), abs=1e-5 * deviation + 1e-6 * np.abs(scores).max())
    assert found.deviation == pytest.approx(deviation, rel=1e-3, abs=1e-6 * np.abs(scores).max())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("n", [1, 2, 2 * D - 1, N])
def test_rows_and_queries_of_any_size(n: int, size: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(1, 1, (n, D)) * np.exp(rng.normal(0, 1, (n, 1)))
    check(size * rows, rng.normal(size=D) / size)
    check(rows, size * rng.normal(size=D))


def test_moments_answer_where_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    many = sample(rng.normal(size=(N, D)))
    monkeypatch.setattr(Sample, "scores", lambda *_: pytest.fail("all rows were read"))
    assert many.spread(rng.normal(size=D).astype(np.float32)).deviation > 0


def test_directions_in_which_rows_hardly_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(N, D)) * np.geomspace(1, 1e-4, D) + 3
    for direction in np.eye(D):
        check(rows, direction)


@pytest.mark.parametrize("value", [0.0, 0.1, 3e4])
def test_equal_rows_lie_nowhere(value: float) -> None:
    some = sample(np.full((N, D), value))
    found = some.spread(np.ones(D, dtype=np.float32))
    assert found.deviation <= 1e-6 * abs(found.mean)
    assert sample(np.zeros((0, D))).spread(np.ones(D, dtype=np.float32)).deviation == 0
