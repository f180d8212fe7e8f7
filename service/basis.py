"""The coordinates of an EK-FAC ``gradient`` index, as queries need them.

Stored are c/√(λ+δ₀), for examples and for queries alike (float16 would lose the small ones else), so
qᵀ(Λ+δ)⁻¹c = Σ u_i · stored_i with u = stored query · (λ+δ₀)/(λ+δ): damping is chosen when asking.
"""

import numpy as np

from service import artifacts
from service.rows import F32
from service.storage import Storage

STORED_DAMPING = 1.0  # δ₀: any value would do, the default one keeps stored and asked-for numbers close
SPECTRUM = "spectrum"  # the file of a basis artifact with λ and mean λ of every kept coordinate


def damped(storage: Storage, basis: str, coordinates: F32, damping: float) -> F32:
    """u (…, k) float32 from the stored coordinates of queries (…, k), H at ``damping``."""
    artifact = artifacts.get(storage, basis)
    spectrum = artifacts.read(storage, artifact, SPECTRUM)
    square, mean = spectrum["square"], spectrum["mean"]
    upper, lower = square + float(artifact.facts["damping"]) * mean, square + damping * mean
    # λ = 0 with damping 0: no gradient of the sample has been there, so the coordinate says nothing
    factor = np.divide(upper, lower, out=np.zeros_like(upper), where=lower > 0)
    return (coordinates * factor).astype(np.float32)
