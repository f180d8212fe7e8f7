"""Curvature by parts: sums over a share of the sample, eigenvectors and λ of a module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service import artifacts
from service.contracts import Example
from service.errors import Invalid
from service.storage import Storage
from service.terms import FactorLabels, FactorPositions, LossReduction
from service.work import CovarianceWork, EigenWork, LambdaWork, MomentWork, ShapesWork, Tracked
from workers import curvature
from workers.batches import Batch
from workers.gradients import Sides
from workers.models import Loaded, shape
from workers.prepare import prepare
from workers.works.result import Facts, Result, Tensors


def shapes(work: ShapesWork, _storage: Storage, loaded: Loaded, _examples: Sequence[Example]) -> Result:
    return {}, {name: "{} {} {}".format(*facts) for name, facts in shapes_of(loaded, work.tracked).items()}


def shapes_of(loaded: Loaded, tracked: Tracked) -> dict[str, tuple[int, int, int]]:
    """d_out, d_in and the block, from 1, of every tracked module, in the order of the model."""
    modules = loaded.tracked(tracked)
    inside = {
        f"{name}.{path}" if path else name: number
        for number, (name, block) in enumerate(loaded.named_blocks.items(), start=1)
        for path, _ in block.named_modules()
    }
    return {name: (*shape(module), inside[name]) for name, module in modules.items()}


def covariances(
    work: CovarianceWork, _storage: Storage | None, loaded: Loaded, examples: Sequence[Example]
) -> Result:
    tracked = loaded.tracked(work.tracked)
    modules = {name: tracked[name] for name in work.modules}

    def of_batch(batch: Batch, loss: dict[str, Any]) -> dict[str, Sequence[torch.Tensor]]:
        found: dict[str, curvature.Covariance] = {}
        curvature.add_covariances(found, modules, loaded.model, batch, **loss)
        return {name: (each.into, each.out) for name, each in found.items()}

    sums, facts = _over_sample(work, loaded, examples, of_batch)
    tensors = {name: {"into": into.cpu().numpy(), "out": out.cpu().numpy()} for name, (into, out) in sums.items()}
    return tensors, facts


def eigen(work: EigenWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    found: dict[str, NDArray[Any]] = {}
    for side in ("into", "out"):
        covariance = _total(storage, work.parts, work.module, side)
        if not np.isfinite(covariance).all():
            detail = f"The covariance of {work.module} holds NaN or infinity: a weight or an example is damaged."
            raise Invalid("not_finite", detail, param="model")
        vectors, values = curvature.eigenvectors(covariance)
        found[side], found[f"{side}_values"] = vectors.astype(np.float32), values
    return {"eigen": found}, {}


def moments(work: MomentWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    sides = {}
    for name, key in work.bases:
        eigen = artifacts.read(storage, artifacts.get(storage, key), "eigen")
        out, into = (torch.from_numpy(eigen[side]).to(loaded.device_of(name)) for side in ("out", "into"))
        sides[name] = Sides(out, into)
    return moments_on(work, sides, loaded, examples)


def moments_on(work: MomentWork, sides: Mapping[str, Sides], loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Σ C² on the given eigenvectors."""
    modules = loaded.tracked(work.tracked)

    def of_batch(batch: Batch, loss: dict[str, Any]) -> dict[str, Sequence[torch.Tensor]]:
        found: dict[str, torch.Tensor] = {}
        curvature.add_moments(found, modules, sides, loaded.model, batch, **loss)
        return {name: (square,) for name, square in found.items()}

    sums, facts = _over_sample(work, loaded, examples, of_batch)
    tensors: Tensors = {name: {"square": square.cpu().numpy()} for name, (square,) in sums.items()}
    return tensors, facts


def eigenvalues(work: LambdaWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    count = sum(int(artifacts.get(storage, key).facts["examples"]) for key in work.parts)
    if count == 0:
        detail = "No example of the curvature's sample has a token to predict."
        raise Invalid("empty_sample", detail, param="dataset")
    square = _total(storage, work.parts, work.module, "square") / count
    if not np.isfinite(square).all():
        detail = f"λ of {work.module} holds NaN or infinity: a weight or an example is damaged."
        raise Invalid("not_finite", detail, param="model")
    return {"lambda": {"square": square.astype(np.float32)}}, {"mean": float(square.mean()), "examples": count}


def _over_sample(
    work: CovarianceWork | MomentWork,
    loaded: Loaded,
    examples: Sequence[Example],
    of_batch: Callable[[Batch, dict[str, Any]], Mapping[str, Sequence[torch.Tensor]]],
) -> tuple[dict[str, list[torch.Tensor]], Facts]:
    """Sums over the sample, and of how many examples and tokens; what cannot run or is damaged is left out."""
    spec = work.spec
    prepared = prepare(
        loaded, work.reading, examples, trains=spec.positions == FactorPositions.TARGETS, pooling=None
    )
    for position in [position for position, tokens in prepared.tokens.items() if len(tokens) < 2]:
        del prepared.tokens[position]  # nothing follows its only token

    def compute_batch(members: list[int], batch: Batch) -> Mapping[str, Sequence[torch.Tensor]]:
        points = []
        if spec.labels == FactorLabels.SAMPLED:
            points = [
                curvature.uniforms(spec.seed, examples[position].id, len(prepared.tokens[position]))
                for position in members
            ]
        return of_batch(batch, {"labels": spec.labels, "positions": spec.positions, "uniform": points})

    sums, used = prepared.finite(loaded, work.reading, compute_batch, pooling=None, reduction=LossReduction.SUM)
    return sums, {"examples": len(used), "tokens": sum(len(prepared.tokens[position]) for position in used)}


def _total(storage: Storage, parts: Sequence[str], module: str, name: str) -> NDArray[np.float64]:
    """The float64 sum of one tensor over all parts, in their order."""
    return sum(  # pyright: ignore[reportReturnType]
        artifacts.read(storage, artifacts.get(storage, key), module)[name].astype(np.float64) for key in parts
    )
