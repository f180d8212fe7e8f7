"""How all scores of a query lie around the best of them: exact where rows are few, else from 8,192 of them.

A hit's z-score needs a mean and a deviation. Both follow from the mean row and the covariance of the rows, which
are computed once, at width 1024 a quarter of what the rows are; the scores are needed for percentiles only.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.cache import Once
from service.rows import F32
from service.search import VectorIndex

SAMPLE = 1 << 13  # rows; of an index no larger than that, all
# Of the variance in all directions together: less in one is lost in the rounding of the others.
_LEAST_VARIANCE = 1e-5


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of all scores of a query."""

    mean: float
    deviation: float

    def z_score(self, scores: F32) -> NDArray[np.float64]:
        return (scores.astype(np.float64) - self.mean) / self.deviation if self.deviation else np.zeros(len(scores))


def percentile(sample: F32, scores: F32) -> NDArray[np.float64]:
    """Share of a sorted sample that scores lower, in percent; of equal scores half count as lower."""
    low = np.searchsorted(sample, scores, side="left")
    high = np.searchsorted(sample, scores, side="right")
    return 50.0 * (low + high) / max(1, len(sample))


@dataclass(frozen=True)
class _Moments:
    """Of rows divided by ``unit``: their mean (d,) and covariance (d, d), and its trace."""

    unit: float
    mean: NDArray[np.float64]
    covariance: F32
    total: float


class Sample:
    """Some rows of an index, side by side. Thread-safe."""

    def __init__(self, rows: VectorIndex) -> None:
        self._rows = rows
        self._moments = Once(partial(_measured, rows))
        self._enough = 2 * rows.d <= rows.n  # rows, for their moments to be less to read than they are

    def prepare(self) -> None:
        """What the first ``spread`` would compute."""
        if self._enough:
            self._moments()

    def scores(self, query: F32) -> F32:
        """Of every row, ascending."""
        return np.sort(self._rows.scores(query))

    def spread(self, query: F32) -> Spread:
        """Mean and deviation of the scores: from the moments of the rows where that is less to read."""
        found = self._by_moments(query) if self._enough else None
        if found is not None:
            return found
        scores = self.scores(query)
        if not len(scores):
            return Spread(0.0, 0.0)
        return Spread(float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64)))

    def _by_moments(self, query: F32) -> Spread | None:
        """None: the rounding of the moments would show."""
        moments, length = self._moments(), float(np.linalg.norm(query.astype(np.float64)))
        if moments is None or not length:
            return None
        unit = (query / length).astype(np.float32)
        variance = float(unit @ (moments.covariance @ unit))
        if not variance > _LEAST_VARIANCE * moments.total:
            return None
        scale = moments.unit * length
        return Spread(scale * float(moments.mean @ unit.astype(np.float64)), scale * math.sqrt(variance))


def _measured(index: VectorIndex) -> _Moments | None:
    """None where float32 cannot hold them."""
    rows = index.take(np.arange(index.n))
    unit = float(np.abs(rows).max(initial=0.0))
    if not 0 < unit < math.inf:
        return None
    rows /= np.float32(unit)
    mean = rows.mean(axis=0, dtype=np.float64)
    rows -= mean.astype(np.float32)
    covariance = (rows.T @ rows) / np.float32(len(rows))
    total = float(np.trace(covariance, dtype=np.float64))
    return _Moments(unit, mean, covariance, total) if math.isfinite(total) else None
