"""Seeded two-sided Rademacher projection of a module's gradient: the known baseline.

C = P_out G P_inᵀ with entries ±1/√p, so that E⟨C, C'⟩ = ⟨G, G'⟩. The signs come from a counter-based
generator on the CPU keyed by (seed, module, side): the same on every device, batch and run.
"""

import hashlib

import numpy as np
import torch


def signs(seed: int, module: str, side: str, p: int, d: int) -> torch.Tensor:
    """(d, p) float32 entries ±1/√p; ``side`` is "in" or "out"."""
    key = hashlib.sha256(f"{seed}:{module}:{side}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))
    bits = generator.integers(0, 2, size=(d, p), dtype=np.int8)
    return torch.from_numpy((2 * bits - 1).astype(np.float32) / np.float32(np.sqrt(p)))
