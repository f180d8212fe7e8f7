"""Which eigen-coordinates are kept. Pure functions of λ and ‖J_ij‖² by module.

Matrices are (p_out, p_in) per module; a choice is, per module, the sorted positions in the flattened matrix.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Scores = Mapping[str, F64]
Choice = dict[str, NDArray[np.int64]]


def by_curvature(square: Scores, mean: Mapping[str, float]) -> dict[str, F64]:
    """λ_ij / mean λ of the module: how much of a loss gradient lies in a coordinate. Damping does not matter
    to this order, since λ/(λ + c·mean λ) grows with it for every c.
    """
    return {name: values / mean[name] if mean[name] > 0 else 0 * values for name, values in square.items()}


def by_jacobian(norm: Scores, square: Scores, mean: Mapping[str, float], damping: float) -> dict[str, F64]:
    """‖J_ij‖² λ_ij/(λ_ij + δ)²: the variance over examples of a coordinate's term in m_z; sums to 1."""
    found = {name: spread(values, square[name], damping * mean[name]) for name, values in norm.items()}
    total = sum(float(values.sum()) for values in found.values())
    return {name: values / total if total > 0 else values for name, values in found.items()}


def spread(norm: F64, square: F64, delta: float) -> F64:
    """‖J_ij‖² λ_ij/(λ_ij + δ)² of some coordinates of one module; 0 where λ and δ are."""
    damped = square + delta
    return np.divide(norm * square, damped**2, out=np.zeros_like(norm), where=damped > 0)


def top(scores: Scores, count: int) -> Choice:
    """The ``count`` highest scores over all modules; ties go to the earlier coordinate."""
    flat = np.concatenate([values.ravel() for values in scores.values()])
    order = np.argsort(-flat, kind="stable")[:count]
    return _split(scores, order)


def halves(first: Scores, second: Scores, count: int) -> Choice:
    """Half of ``count`` by ``first``, then the best by ``second`` among the others."""
    a, b = (np.concatenate([values.ravel() for values in scores.values()]) for scores in (first, second))
    chosen = np.argsort(-a, kind="stable")[: (count + 1) // 2]
    rest = b.copy()
    rest[chosen] = -np.inf
    more = np.argsort(-rest, kind="stable")[: max(0, min(count, len(a)) - len(chosen))]
    return _split(first, np.concatenate([chosen, more]))


def _split(scores: Scores, order: NDArray[np.int64]) -> Choice:
    order = np.sort(order)
    choice, start = {}, 0
    for name, values in scores.items():
        inside = order[(order >= start) & (order < start + values.size)]
        choice[name] = inside - start
        start += values.size
    return choice
