"""The top singular directions of a tall matrix that is read block by block: what a whole dataset does at once.

Randomised subspace iteration on AᵀA, whose eigenvectors are the right singular vectors of A (Halko, Martinsson and
Tropp 2011, algorithms 4.4 and 5.5); memory is O(d · count + a block). Narrow matrices go through AᵀA itself.

A is not centred. Its rows are effects, and effects add up: the sum over the dataset is what training on all of it
does, so what all rows share is the first thing to be told, and centring would take away just that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.rows import F32

F64 = NDArray[np.float64]
Blocks = Callable[[], Iterable[F32]]  # called once for every pass; the same rows in the same order

OVERSAMPLING = 8  # Halko et al., section 4.2: 5 or 10 beyond what is wanted
POWER_ITERATIONS = 2
_READ = 200  # FLOP in the time that one stored number takes to be read, hashed and unpacked (measured: 1.8 ns)
_NOISE = 1e-6  # of the first direction's energy: less than that is float32 rounding


@dataclass(frozen=True)
class Spectrum:
    """``values`` (c,) ‖A v‖, falling; ``directions`` (c, d) orthonormal rows v; c ≤ count, as there may be fewer.

    ``energy`` is ‖A‖²_F, so values[i]² / energy is a direction's share; ``mean`` (d,) the mean row.
    """

    values: F64
    directions: F32
    energy: float
    mean: F64
    rows: int

    @property
    def shares(self) -> F64:
        return self.values**2 / self.energy if self.energy > 0 else np.zeros(len(self.values))


def top_directions(
    blocks: Blocks | Sequence[F32],
    d: int,
    count: int,
    *,
    seed: int = 0,
    power_iterations: int = POWER_ITERATIONS,
) -> Spectrum:
    """The ``count`` largest singular values and right singular vectors of the rows (n, d) in ``blocks``, finite.

    The same seed and blocks give the same bytes. Products are float32, sums over blocks float64. Each direction
    points where Σ_z ⟨v, row_z⟩³ is positive: to the side with the larger projections, be it that most rows lie
    there or that its tail is the heavier one.
    """
    read = blocks if callable(blocks) else lambda: iter(blocks)
    total = _Totals(d)
    if exact(d, count, power_iterations):
        gram = np.zeros((d, d))
        for block, scale in _scaled(read, total):
            gram += scale**2 * (block.T @ block).astype(np.float64)
        square, vectors = np.linalg.eigh(gram)
    else:
        wide = min(d, count + OVERSAMPLING)
        generator = np.random.Generator(np.random.Philox(key=seed))
        Q, Z = np.zeros((0, 0), dtype=np.float32), generator.standard_normal((d, wide))
        for iteration in range(power_iterations + 1):
            Q, Z = _orthonormal(Z), np.zeros((d, wide))
            for block, scale in _scaled(read, None if iteration else total):
                Z += scale**2 * (block.T @ (block @ Q)).astype(np.float64)
        square, vectors = _nystrom(Q.astype(np.float64), Z)
    order = np.argsort(-square)[: min(count, total.rows)]
    order = order[square[order] > _NOISE * max(square.max(initial=0.0), 0.0)]
    V = np.ascontiguousarray(vectors[:, order].T).astype(np.float32)
    energies, cubes = _along(read, V)
    order = np.argsort(-energies, kind="stable")  # as measured now, exactly
    V = V[order] * _signs(V, cubes)[order, None]
    mean = total.sum / max(1, total.rows)
    return Spectrum(np.sqrt(energies[order]), V, total.energy, mean, total.rows)


def exact(d: int, count: int, power_iterations: int = POWER_ITERATIONS) -> bool:
    """Whether AᵀA is the cheaper way: d FLOP for every number that is read, against 4 (count + 8) in every pass of
    the other one, which reads everything once more for each (10 directions: up to d = 616).
    """
    passes = power_iterations + 1
    return d <= count + OVERSAMPLING or d + _READ <= passes * (4 * (count + OVERSAMPLING) + _READ)


class _Totals:
    """What is summed on the first pass, beside the products."""

    def __init__(self, d: int) -> None:
        self.rows, self.energy, self.sum = 0, 0.0, np.zeros(d)


def _scaled(read: Blocks, total: _Totals | None = None) -> Iterator[tuple[F32, float]]:
    """Blocks with their largest number brought to 1, and what they were divided by: rows of 1e25 or 1e-25 have
    squares that float32 cannot hold.
    """
    for block in read():
        if not len(block):
            continue
        scale = float(np.abs(block).max()) or 1.0
        unit = block / np.float32(scale)
        if total is not None:
            total.rows += len(block)
            total.sum += scale * unit.sum(axis=0, dtype=np.float64)
            total.energy += scale**2 * float(np.einsum("ij,ij->i", unit, unit).sum(dtype=np.float64))
        yield unit, scale


def _orthonormal(columns: F64) -> F32:
    """An orthonormal basis of the columns; float64, since powers of AᵀA bring them close to each other."""
    return np.linalg.qr(columns)[0].astype(np.float32)


def _nystrom(Q: F64, Z: F64) -> tuple[F64, F64]:
    """Eigenvalues (r,) and eigenvectors (d, r) of Z (QᵀZ)⁻¹ Zᵀ ≈ AᵀA, where Z = AᵀAQ (Halko et al., algorithm
    5.5): the last product is used as well, which looking within Q alone would waste.
    """
    core, rotation = np.linalg.eigh((Q.T @ Z + Z.T @ Q) / 2)
    kept = core > _NOISE * max(core[-1], 0.0)
    vectors, values, _ = np.linalg.svd(Z @ (rotation[:, kept] / np.sqrt(core[kept])), full_matrices=False)
    return values**2, vectors


def _along(read: Blocks, V: F32) -> tuple[F64, F64]:
    """Sums over all rows of the squares and of the cubes of their projections on each direction, (c,) each."""
    squares, cubes = np.zeros(len(V)), np.zeros(len(V))
    for block, scale in _scaled(read):
        p = (block @ V.T).astype(np.float64)
        squares += scale**2 * (p**2).sum(axis=0)
        cubes += scale**3 * (p**3).sum(axis=0)
    return squares, cubes


def _signs(V: F32, cubes: F64) -> F32:
    """(c,) ±1 by the sum of cubes; where that is zero, the largest component is positive."""
    largest = V[np.arange(len(V)), np.abs(V).argmax(axis=1)] if len(V) else np.zeros(0)
    return np.where(np.where(cubes != 0, cubes, largest) < 0, -1.0, 1.0).astype(np.float32)
