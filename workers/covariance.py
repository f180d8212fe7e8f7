"""A covariance that can be inverted however few rows it comes from: correlations shrunk toward none. Pure
functions.

Σ = D ((1 − s) R + s m I) D, with D the standard deviations of the dimensions, R the correlations, m = tr R / d, and
the shrinkage s of Ledoit and Wolf (2004), which minimises the expected squared error. Shrinking correlations and
not covariances keeps the few residual-stream dimensions of enormous variance from deciding what is small.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

_LEAST_SPREAD = 1e-6  # of the root mean square spread: what a dimension that is constant is taken to have
_NO_VALUE = 1e-10  # of the largest eigenvalue: rounding


@dataclass(frozen=True)
class Covariance:
    """``scale`` (d,) D; ``basis`` (r, d) orthonormal eigenvectors of R and ``values`` (r,) > 0 their eigenvalues, r
    its rank; ``shrinkage`` s; ``target`` m. Nothing is (d, d) when there are fewer rows than dimensions.
    """

    scale: F64
    basis: F64
    values: F64
    shrinkage: float
    target: float

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def shrunk(self) -> F64:
        """(r,) eigenvalues of (1 − s) R + s m I along the basis; beside it they are s m."""
        return (1 - self.shrinkage) * self.values + self.shrinkage * self.target

    def solve(self, vector: F64) -> F64:
        """Σ⁻¹ v, (d,); where nothing was shrunk, within the span of the rows only; v where the rows are all one."""
        if not self.rank:
            return vector
        u = vector / self.scale
        along = self.basis @ u
        found = self.basis.T @ (along / self.shrunk)
        beside = self.shrinkage * self.target
        if beside > 0:
            found += (u - self.basis.T @ along) / beside
        return found / self.scale

    def whiten(self, rows: F64) -> F64:
        """(n, d) → (n, r): W x with W = ((1 − s) R + s m I)^-1/2 D⁻¹ (ZCA-cor; Kessy, Lewin and Strimmer 2018), in
        the coordinates of the basis. Rows that the covariance was made of lie in its span: nothing of them is lost.
        """
        return (rows / self.scale) @ self.basis.T / np.sqrt(self.shrunk)

    def unwhiten(self, weights: F64) -> F64:
        """Wᵀ w, (r,) → (d,): ⟨Wᵀ w, x⟩ = ⟨w, W x⟩."""
        return (self.basis.T @ (weights / np.sqrt(self.shrunk))) / self.scale


def of_rows(rows: F64) -> Covariance:
    """The shrunk covariance of centred rows (n, d), divided by n."""
    n, d = rows.shape
    spread = np.sqrt(np.einsum("nd,nd->d", rows, rows) / n)
    scale = np.maximum(spread, _LEAST_SPREAD * float(np.sqrt(np.mean(spread**2))) or 1.0)
    z = rows / scale
    basis, values = principal(z)
    target = float(values.sum()) / d
    # ‖R − m I‖²/d, and how far single rows scatter about R: both from eigenvalues and norms, without R itself.
    squares = float((values**2).sum())
    distance = (squares - d * target**2) / d
    noise = (float((np.einsum("nd,nd->n", z, z) ** 2).sum()) / n - squares) / (n * d)
    noise = min(max(noise, 0.0), distance)
    shrinkage = noise / distance if noise > 0 else 0.0
    return Covariance(scale, basis, values, shrinkage, target)


def principal(rows: F64) -> tuple[F64, F64]:
    """Eigenvectors (r, d) of rowsᵀ rows / n and their eigenvalues (r,) > 0, largest first, by the smaller of both
    Gram matrices.
    """
    n, d = rows.shape
    few = n < d
    values, vectors = np.linalg.eigh((rows @ rows.T if few else rows.T @ rows) / n)
    kept = np.flatnonzero(values > _NO_VALUE * max(float(values[-1]), 0.0))[::-1]
    values, vectors = values[kept], vectors[:, kept]
    if not few:
        return vectors.T.copy(), values
    basis = (vectors / np.sqrt(n * values)).T @ rows
    return basis, values
