"""R: the directions an influence embedding has numbers for, where all d of them would be too many.

Registered concepts come first, then the top principal components of the activations, made orthonormal.
"""

from dataclasses import dataclass

import numpy as np

from service import concepts
from service.contracts import DatasetRecord, ModelRecord
from service.registry import Registry
from service.rows import F32
from service.specs import BuildIndexSpec
from service.work import ActivationSpec, Location, PassSpec, Reading
from workers.stages import Stages, sample_rows

FILE = "directions"


@dataclass(frozen=True)
class Directions:
    """``rows`` (count, d) float32, orthonormal; ``artifact`` holds them as ``rows``."""

    artifact: str
    rows: F32

    @property
    def count(self) -> int:
        return len(self.rows)


def choose(
    stages: Stages,
    registry: Registry,
    location: Location,
    reading: Reading,
    spec: BuildIndexSpec,
    dataset: DatasetRecord,
    model: ModelRecord,
) -> dict[int, Directions]:
    """R for every layer of the plan; empty when it is the identity."""
    plan = spec.influence
    if plan is None or (plan.rank or model.width) >= model.width:
        return {}
    assert plan.rank is not None  # noqa: S101
    found = {}
    for layer in plan.layers:
        named = []
        for name in plan.directions:
            concept = concepts.get(registry, name, param="directions")
            if concept.layer == layer:
                named.append(concepts.direction(stages.storage, concept))
        of_layer = ActivationSpec((layer,), plan.pooling)
        activation = PassSpec(**vars(reading), activation=of_layer, gradient=None, objective=None)
        sample = sample_rows(stages.ids(dataset), spec.curvature.examples, spec.curvature.seed)
        manifests = stages.rows(
            f"activations for R, layer {layer}", location, activation, dataset, size=spec.shard_size, chosen=sample
        )
        concept_rows = np.array(named, dtype=np.float32).reshape(-1, model.width)
        rows = orthonormal(concept_rows, stages.stored(manifests), plan.rank)
        key = ["directions", layer, plan.rank, list(plan.directions), [item.key for item in manifests]]
        found[layer] = Directions(stages.store(key, FILE, {"rows": rows}), rows)
    return found


def orthonormal(named: F32, activations: F32, rank: int) -> F32:
    """(≤ rank, d): an orthonormal basis of ``named`` and of the top components of centred ``activations``."""
    centred = activations.astype(np.float64) - activations.mean(axis=0, dtype=np.float64)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    basis: list[np.ndarray] = []
    for row in [*named.astype(np.float64), *components]:
        rest = row.copy()
        for _ in range(2):  # twice: once leaves rounding errors that grow with the number of rows
            for known in basis:
                rest -= (known @ rest) * known
        norm = np.linalg.norm(rest)
        if norm > 1e-6 * max(np.linalg.norm(row), 1e-30) and len(basis) < rank:
            basis.append(rest / norm)
    return np.array(basis, dtype=np.float32)
