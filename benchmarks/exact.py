"""Exact EK-FAC scores at one point of a run, with every coordinate in memory: what stored rows are judged by.

Same factors as the index (read from its curvature), nothing selected, nothing rounded, one gradient for each
query instead of a Jacobian. Feasible for models of a few hundred thousand weights.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.contracts import Example
from service.storage import Storage
from service.terms import ConceptFunction, LossReduction, Pooling
from service.work import Reading
from workers import eigenbasis
from workers.batches import Batch
from workers.gradients import concept_coordinates, loss_coordinates
from workers.models import load
from workers.prepare import prepare

F64 = NDArray[np.float64]


class Exact:
    """``curvature`` names the artifact of the point's factors; modules of blocks 1..layer."""

    def __init__(
        self, storage: Storage, curvature: str, path: Path, texts: Path, reading: Reading, layer: int
    ) -> None:
        self._loaded = load(str(path), "float32", tokenizer_path=str(texts))
        self._modules = self._loaded.linear_maps(layer)
        self._sides = eigenbasis.sides(storage, curvature, self._loaded)
        found = eigenbasis.spectra(storage, curvature)
        self.square = np.concatenate([found[name].square.ravel() for name in self._sides])
        self.mean = np.concatenate([np.full(found[name].square.size, found[name].mean) for name in self._sides])
        self._reading = reading
        self._layer = layer

    @property
    def weights(self) -> int:
        return len(self.square)

    def rows(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Coordinates of ∇L(z), mean over targets: (N, P)."""
        prepared = prepare(self._loaded, self._reading, examples, trains=True, pooling=None)
        rows = np.zeros((len(examples), self.weights), dtype=np.float32)

        def of_batch(_members: list[int], batch: Batch) -> torch.Tensor:
            return loss_coordinates(self._loaded.model, self._modules, self._sides, batch)[0]

        about = {"pooling": None, "reduction": LossReduction.MEAN}
        for members, found in prepared.each(self._loaded, self._reading, of_batch, **about):
            rows[members] = found.numpy()
        return rows

    def concept(
        self,
        queries: Sequence[Example],
        direction: NDArray[np.float32],
        pooling: Pooling,
        function: ConceptFunction,
    ) -> F64:
        """Coordinates of −∇f_v(Q): (P,)."""
        prepared = prepare(self._loaded, self._reading, queries, trains=False, pooling=pooling)
        total = np.zeros(self.weights)

        def of_batch(_members: list[int], batch: Batch) -> torch.Tensor:
            return concept_coordinates(
                self._loaded.model,
                self._loaded.blocks,
                self._modules,
                self._sides,
                batch,
                layer=self._layer,
                direction=torch.from_numpy(np.asarray(direction, dtype=np.float32)),
                function=function,
            )[0]

        about = {"pooling": pooling, "reduction": LossReduction.MEAN}
        for _, found in prepared.each(self._loaded, self._reading, of_batch, **about):
            total -= found.numpy().sum(axis=0, dtype=np.float64)
        return total / len(prepared.tokens)

    def loss(self, queries: Sequence[Example]) -> F64:
        """Coordinates of ∇L(Q): (P,)."""
        return self.rows(queries).mean(axis=0, dtype=np.float64)

    def damped(self, damping: float) -> F64:
        """λ + δ for every coordinate."""
        return self.square + damping * self.mean


def random_scores(rows: NDArray[np.float32], queries: Sequence[F64], damped: F64, k: int, seed: int) -> list[F64]:
    """The known alternative at the same k: H^-1/2 on both sides, then one dense Gaussian projection."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.from_numpy((1 / np.sqrt(damped)).astype(np.float32))
    z = torch.zeros(len(rows), k)
    q = torch.zeros(len(queries), k)
    wanted = torch.from_numpy(np.stack(queries).astype(np.float32))
    for start in range(0, len(damped), 8192):
        part = slice(start, start + 8192)
        projection = torch.randn(len(half[part]), k, generator=generator)
        z += (torch.from_numpy(rows[:, part]) * half[part]) @ projection
        q += (wanted[:, part] * half[part]) @ projection
    return [(z.double() @ one.double()).numpy() for one in q]
