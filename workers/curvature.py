"""EK-FAC, as DESIGN section 1 pins it down: covariances, eigenbases, λ.

For a linear map with inputs a_t and output gradients g_t: A = E[a aᵀ], S = E[g gᵀ] over positions, with
eigenvectors U_A and U_S, largest first. In the basis C = U_Sᵀ G U_A of an example's whole gradient G,
λ_ij = E[C_ij²] over examples (George et al. 2018, arXiv 1806.03884, eq. 9), and

    H⁻¹ G = U_S (C / (λ + δ)) U_Aᵀ,     δ = damping · mean λ of the module.

Everything here is a pure function of a frozen model and one batch; sums over batches and shards are the
caller's. Gradients are those of the summed loss.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.errors import Invalid
from service.terms import FactorLabels, FactorPositions
from workers.batches import Batch
from workers.gradients import Sides, logits_at, project, taps

_ROWS = 4096  # positions whose label distribution is held at a time
_C_NUMBERS = 1 << 25  # of C, over examples, that are held at a time: 128 MiB


@dataclass
class Covariance:
    """Σ a aᵀ (d_in, d_in) and Σ g gᵀ (d_out, d_out) over positions, not yet divided by anything."""

    into: Tensor
    out: Tensor


def uniforms(seed: int, example_id: str, length: int) -> np.ndarray:
    """(length,) numbers in [0, 1), one per position: keyed by the example, never by its batch."""
    key = hashlib.sha256(f"{seed}:{example_id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))
    return generator.random(length)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """(n,) labels drawn from softmax(logits (n, V)) by inversion at ``uniform`` (n,)."""
    drawn = []
    for rows, points in zip(logits.split(_ROWS), uniform.split(_ROWS), strict=True):
        steps = rows.softmax(dim=-1).double().cumsum(dim=-1)
        drawn.append(torch.searchsorted(steps, points[:, None] * steps[:, -1:], right=True).squeeze(1))
    return torch.cat(drawn).clamp_(max=logits.shape[-1] - 1) if drawn else uniform.long()


def factor_loss(
    model: nn.Module,
    batch: Batch,
    *,
    labels: FactorLabels,
    positions: FactorPositions,
    uniform: Sequence[np.ndarray] = (),
) -> Tensor:
    """Summed cross-entropy of the batch, a scalar.

    ``labels`` sampled from the model at ``uniform`` (one array of T numbers per example), or the true ones;
    ``positions`` ``all``: wherever a token follows, prompts included; ``targets``: what is trained on.
    """
    follows = batch.real[:, 1:] if positions == FactorPositions.ALL else batch.loss_weight[:, 1:] > 0
    logits = logits_at(model, batch.ids, functional.pad(follows, (0, 1)))
    if labels == FactorLabels.TRUE:
        label = batch.ids[:, 1:][follows]
    else:
        padded = torch.zeros(follows.shape, dtype=torch.float64)
        for row, points in enumerate(uniform):
            padded[row, : len(points) - 1] = torch.from_numpy(points[:-1])
        label = sample(logits.detach(), padded[follows.cpu()].to(logits.device))
    return functional.cross_entropy(logits, label.to(logits.device), reduction="sum")


def add_covariances(
    sums: dict[str, Covariance], modules: Mapping[str, nn.Module], model: nn.Module, batch: Batch, **loss: object
) -> None:
    """Add the batch to ``sums``, made on first use; ``loss`` as in ``factor_loss``.

    A counts every real position; S needs no mask, since padding has no gradient.
    """
    exact = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32

    def forward(name: str, inputs: Tensor) -> None:
        values = inputs[batch.real.to(inputs.device)].to(exact)
        _add(name, 0, values.T @ values)

    def backward(name: str, _kept: None, gradient: Tensor) -> None:
        values = gradient.flatten(0, 1).to(exact)
        _add(name, 1, values.T @ values)

    found: dict[tuple[str, int], Tensor] = {}

    def _add(name: str, side: int, value: Tensor) -> None:
        found[name, side] = found[name, side] + value if (name, side) in found else value

    with taps(modules, forward=forward, backward=backward):
        factor_loss(model, batch, **loss).backward()  # pyright: ignore[reportArgumentType]
    for name in modules:
        into, out = found[name, 0], found[name, 1]
        if name in sums:
            sums[name].into += into
            sums[name].out += out
        else:
            sums[name] = Covariance(into, out)


def add_moments(
    sums: dict[str, Tensor],
    modules: Mapping[str, nn.Module],
    sides: Mapping[str, Sides],
    model: nn.Module,
    batch: Batch,
    **loss: object,
) -> None:
    """Add Σ C² (d_out, d_in) over the batch's examples to ``sums``; ``sides`` hold all eigenvectors.

    C of a whole batch may be larger than the model: it is made for a few examples at a time.
    """
    seen: set[str] = set()

    def forward(name: str, inputs: Tensor) -> Tensor:
        return project(inputs, sides[name].into)

    def backward(name: str, projected: Tensor, gradient: Tensor) -> None:
        if name in seen:  # C must be summed over the calls before it is squared
            detail = f"{name} runs more than once in a forward pass; EK-FAC is not defined for shared maps."
            raise Invalid("module_reused", detail, param="model")
        seen.add(name)
        into = project(gradient, sides[name].out)
        few = max(1, _C_NUMBERS // sides[name].size)
        for outs, ins in zip(into.split(few), projected.split(few), strict=True):
            square = (outs.transpose(1, 2) @ ins).square_().sum(0)
            sums[name] = sums[name].add_(square) if name in sums else square

    with taps({name: modules[name] for name in sides}, forward=forward, backward=backward):
        factor_loss(model, batch, **loss).backward()  # pyright: ignore[reportArgumentType]


def eigenvectors(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d, d) eigenvectors of a symmetric matrix, as columns, and their eigenvalues, largest first; float64.

    Each vector's largest entry is positive, so that the sign does not depend on the linear algebra library.
    """
    symmetric = torch.from_numpy((covariance + covariance.T) / 2).double()
    values, vectors = (found.numpy() for found in torch.linalg.eigh(symmetric))  # torch's threads, not numpy's
    values, vectors = values[::-1], vectors[:, ::-1]
    peaks = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[peaks, np.arange(vectors.shape[1])]), values
