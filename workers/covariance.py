"""A covariance that can be inverted however few rows it comes from: correlations shrunk toward none. Pure
functions.

Σ = D M D, M = (1 − s) R + s m I, with D the standard deviations of the dimensions, R the correlations, m = tr R /
d, and the shrinkage s of Ledoit and Wolf (2004), which minimises the expected squared error. Shrinking correlations
and not covariances keeps the few residual-stream dimensions of enormous variance from deciding what is small.

With fewer rows than dimensions nothing here is (d, d): all that is needed is in the inner products of the rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpstrf  # pyright: ignore[reportAttributeAccessIssue]

F64 = NDArray[np.float64]

_LEAST_SPREAD = 1e-6  # of the root mean square spread: what a dimension that is constant is taken to have
_LEAST_SHRINKAGE = 1e-10  # for an inverse where there is no noise to shrink for
_NO_VALUE = 1e-10  # of the largest eigenvalue: rounding


@dataclass(frozen=True)
class Covariance:
    """``scale`` (d,) D; ``rows`` (n, d) those it was made of, divided by D; ``gram`` (k, k), k = min(n, d), their
    inner products, or those of their columns, divided by n; ``shrinkage`` s; ``beside`` s m.
    """

    scale: F64
    rows: F64
    gram: F64
    shrinkage: float
    beside: float

    def solve(self, vector: F64) -> F64:
        """Σ⁻¹ v, (d,); of fewer rows than dimensions by the identity of Woodbury."""
        n, d = self.rows.shape
        u = vector / self.scale
        shrunk = (1 - self.shrinkage) * self.gram + self.beside * np.eye(len(self.gram))
        if n >= d:
            return cho_solve(cho_factor(shrunk), u) / self.scale
        inner = cho_solve(cho_factor(shrunk), self.rows @ u)
        return (u - (1 - self.shrinkage) / n * (self.rows.T @ inner)) / self.beside / self.scale

    def whiten(self) -> F64:
        """(n, r): W x for every row x, W = M^-1/2 D⁻¹ (ZCA-cor; Kessy, Lewin and Strimmer 2018), in the r principal
        coordinates of their span.
        """
        basis, values = self._principal
        return self.rows @ basis.T / np.sqrt((1 - self.shrinkage) * values + self.beside)

    def unwhiten(self, weights: F64) -> F64:
        """Wᵀ w, (r,) → (d,): ⟨Wᵀ w, x⟩ = ⟨w, W x⟩."""
        basis, values = self._principal
        return basis.T @ (weights / np.sqrt((1 - self.shrinkage) * values + self.beside)) / self.scale

    @cached_property
    def _principal(self) -> tuple[F64, F64]:
        return principal(self.rows, self.gram)


def of_rows(rows: F64) -> Covariance:
    """The shrunk covariance of centred rows (n, d), divided by n; of rows that are all zero the identity."""
    n, d = rows.shape
    spread = np.sqrt(np.einsum("nd,nd->d", rows, rows) / n)
    scale = np.maximum(spread, _LEAST_SPREAD * float(np.sqrt(np.mean(spread**2))) or 1.0)
    z = rows / scale
    gram = gram_of(z)
    target = float(np.trace(gram)) / d
    # ‖R − m I‖²/d, and how far single rows scatter about R, from either gram: their eigenvalues are the same.
    squares = float((gram**2).sum())
    distance = (squares - d * target**2) / d
    noise = (float((np.einsum("nd,nd->n", z, z) ** 2).sum()) / n - squares) / (n * d)
    noise = min(max(noise, 0.0), distance)
    shrinkage = noise / distance if noise > 0 else 0.0
    return Covariance(scale, z, gram, shrinkage, max(shrinkage, _LEAST_SHRINKAGE) * target or 1.0)


def gram_of(rows: F64) -> F64:
    """Inner products of the rows (n, d), divided by n, or of the columns where those are fewer: (k, k)."""
    n, d = rows.shape
    return (rows @ rows.T if n < d else rows.T @ rows) / n


def principal(rows: F64, gram: F64) -> tuple[F64, F64]:
    """Eigenvectors (r, d) of rowsᵀ rows / n and their eigenvalues (r,) > 0, from the gram of the rows."""
    n, d = rows.shape
    values, vectors = np.linalg.eigh(gram)
    kept = values > _NO_VALUE * max(float(values[-1]), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    return (vectors / np.sqrt(n * values)).T @ rows if n < d else vectors.T, values


def rank_of(gram: F64) -> int:
    """How many dimensions rows span, from their gram, by a pivoted Cholesky factorisation."""
    largest = float(np.diag(gram).max())
    return int(dpstrf(gram, tol=_NO_VALUE * largest)[2]) if largest > 0 else 0
