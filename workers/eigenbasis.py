"""A stored curvature as workers use it: eigenvectors, λ, mean λ, by module."""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from service import artifacts
from service.storage import Storage
from workers.gradients import Sides
from workers.models import Loaded

EIGEN, LAMBDA = "eigen:", "lambda:"  # facts of a curvature artifact: module → artifact


@dataclass(frozen=True)
class Spectrum:
    """λ (p_out, p_in) float64 of the eigenvectors that are kept, and the mean λ of the whole module."""

    square: NDArray[np.float64]
    mean: float


def modules(storage: Storage, curvature: str) -> list[str]:
    """The tracked modules, in the order of the model."""
    facts = artifacts.get(storage, curvature).facts
    return [name.removeprefix(EIGEN) for name in facts if name.startswith(EIGEN)]


def sides(storage: Storage, curvature: str, loaded: Loaded, only: Container[str] | None = None) -> dict[str, Sides]:
    """The eigenvectors of every module, or of those in ``only``, each where its module is."""
    facts = artifacts.get(storage, curvature).facts
    found = {}
    for name in modules(storage, curvature):
        if only is not None and name not in only:
            continue
        eigen = artifacts.read(storage, artifacts.get(storage, str(facts[EIGEN + name])), "eigen")
        out, into = (torch.from_numpy(eigen[side]) for side in ("out", "into"))
        found[name] = Sides(out.to(loaded.device_of(name)), into.to(loaded.device_of(name)))
    return found


def spectra(storage: Storage, curvature: str) -> dict[str, Spectrum]:
    """λ of every module."""
    facts = artifacts.get(storage, curvature).facts
    found = {}
    for name in modules(storage, curvature):
        artifact = artifacts.get(storage, str(facts[LAMBDA + name]))
        square = artifacts.read(storage, artifact, "lambda")["square"]
        found[name] = Spectrum(square.astype(np.float64), float(artifact.facts["mean"]))
    return found
