"""How f_v(Q) moved along a training run: its change, whether that is more than chance, and whether it turned.

Pure numpy. ``values`` (points, n): f_v of every example of Q at every point of the run, base first and end last.
What is judged are differences of the same examples.
"""

import numpy as np
from numpy.typing import NDArray

from service.health_records import Change, Estimate, Turn
from service.rankings import student_95

F64 = NDArray[np.float64]

FLIPS = 9999
_CHUNK = 1 << 22  # signs that are drawn at once


def estimate(values: F64) -> Estimate:
    """(n,) → mean, error and interval."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Estimate(mean, None, None, None)
    error = float(values.std(ddof=1) / np.sqrt(n))
    half = student_95(n - 1) * error
    return Estimate(mean, error, mean - half, mean + half)


def sign_flip(differences: F64, *, seed: int, flips: int = FLIPS) -> float:
    """Two-sided p-value of (n,) differences having mean zero: the share of random sign flips whose mean is as far
    from zero. Exact up to sampling where each difference is symmetric about zero under the null hypothesis.
    """
    generator = np.random.default_rng(seed)
    observed = abs(float(differences.sum()))
    slack = 1e-12 * float(np.abs(differences).sum())
    each, as_far = max(1, _CHUNK // max(1, len(differences))), 0
    for start in range(0, flips, each):
        signs = generator.integers(0, 2, (min(each, flips - start), len(differences)), dtype=np.int8) * 2 - 1
        as_far += int(np.count_nonzero(np.abs(signs @ differences) >= observed - slack))
    return (1 + as_far) / (flips + 1)


def change(values: F64, *, seed: int) -> Change | None:
    """From the first to the last point; None where there is one only."""
    if len(values) < 2:
        return None
    difference = values[-1] - values[0]
    spread = float(values[0].std(ddof=1)) if values.shape[1] > 1 else 0.0
    mean = estimate(difference)
    return Change(mean, sign_flip(difference, seed=seed), spread, mean.value / spread if spread > 0 else None)


def turn(values: F64, *, seed: int) -> Turn | None:
    """The most marked extreme inside the run, significant or not; None where f_v lies between base and end."""
    means = values.mean(axis=1)
    inner = range(1, len(values) - 1)
    beyond = [min(sign * (means[p] - means[0]), sign * (means[p] - means[-1])) for p in inner for sign in (1, -1)]
    if not beyond or max(beyond) <= 0:
        return None
    point = 1 + int(np.argmax(beyond)) // 2
    tests = [values[point] - values[0], values[-1] - values[point]]
    p_value = max(sign_flip(each, seed=seed) for each in tests) * len(beyond)
    rise, back = (float(each.mean()) for each in tests)
    return Turn(point, rise, back, min(1.0, p_value))
