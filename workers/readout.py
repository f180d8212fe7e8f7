"""What a pass reads off the coordinates C of every module: stored gradient rows, and influence embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service import artifacts
from service.basis import SPECTRUM
from service.contracts import ArrayInfo
from service.storage import Storage
from service.terms import IndexKind
from service.work import Eigen, PassSpec, Rademacher, Tracked
from workers import eigenbasis
from workers.gradients import Sides
from workers.models import Loaded, shape
from workers.projections import signs


@dataclass(frozen=True)
class Gather:
    """Columns [start, start + size) of the stored row: C's entries at ``index`` times ``scale``; None: all."""

    start: int
    size: int
    index: Tensor | None = None  # (size,) int64 into the flattened C
    scale: Tensor | None = None  # (size,)


@dataclass(frozen=True)
class Lines:
    """A module's share of an embedding: C's entries at ``index`` (K,), times ``weight`` (r, K)."""

    index: Tensor | None
    weight: Tensor


@dataclass(frozen=True)
class Readout:
    """``sides`` by module; ``gradient`` and each of ``heads`` by module, a module may be missing in them."""

    sides: Mapping[str, Sides]
    gradient: Mapping[str, Gather]
    gradient_array: ArrayInfo | None
    heads: tuple[tuple[ArrayInfo, Mapping[str, Lines]], ...]

    @property
    def arrays(self) -> list[ArrayInfo]:
        own = [self.gradient_array] if self.gradient_array else []
        return own + [info for info, _ in self.heads]


class Rows:
    """Rows of one batch, filled module by module while the backward runs; C itself is not kept."""

    def __init__(self, readout: Readout, batch_size: int, device: torch.device) -> None:
        self._readout = readout
        self.found = {info: torch.zeros(batch_size, info.dims, device=device) for info in readout.arrays}

    def consume(self, name: str, C: Tensor) -> None:
        """``C`` (B, p_out, p_in) of module ``name``; both readings are linear, so repeated calls add up."""
        flat = C.flatten(1)
        gather = self._readout.gradient.get(name)
        if gather is not None and self._readout.gradient_array is not None:
            values = flat if gather.index is None else flat[:, gather.index]
            values = values if gather.scale is None else values * gather.scale
            found = self.found[self._readout.gradient_array][:, gather.start : gather.start + gather.size]
            found += values.to(found.device)
        for info, lines in self._readout.heads:
            if (line := lines.get(name)) is not None:
                values = flat if line.index is None else flat[:, line.index]
                self.found[info] += (values @ line.weight.T).to(self.found[info].device)


EMPTY = Readout({}, {}, None, ())


def make(loaded: Loaded, spec: PassSpec, storage: Storage | None) -> Readout:
    """The readout a pass needs; ``storage`` is read for EK-FAC bases and heads only."""
    gradient, influence = spec.gradient, spec.influence
    if gradient is None and influence is None:
        return EMPTY
    if gradient is not None and isinstance(gradient.projection, Rademacher):
        return _rademacher(loaded, gradient.tracked, gradient.projection)
    assert storage is not None  # noqa: S101  (only a rademacher pass runs without)
    eigen = gradient.projection if gradient is not None else None
    chosen = influence or eigen
    assert chosen is not None and not isinstance(chosen, Rademacher)  # noqa: S101
    sides = beside(loaded, eigenbasis.sides(storage, chosen.curvature, loaded))
    gathers: dict[str, Gather] = {}
    array = None
    if isinstance(eigen, Eigen):
        gathers = _gathers(storage, eigen.basis, sides)
        array = ArrayInfo(IndexKind.GRADIENT, None, sum(each.size for each in gathers.values()))
    heads = tuple(
        (head.array, lines(storage, head.artifact, sides)) for head in (influence.heads if influence else ())
    )
    needed = {name for _, by_module in heads for name in by_module} | set(gathers)
    return Readout({name: side for name, side in sides.items() if name in needed}, gathers, array, heads)


def lines(storage: Storage, key: str, sides: Mapping[str, Sides]) -> dict[str, Lines]:
    """A head by module."""
    artifact = artifacts.get(storage, key)
    found = {}
    for name in artifacts.stems(artifact):
        tensors = artifacts.read(storage, artifact, name)
        everything = tensors["weight"].shape[1] == sides[name].size
        device = sides[name].out.device
        index = None if everything else torch.from_numpy(tensors["index"].astype(np.int64)).to(device)
        found[name] = Lines(index, torch.from_numpy(tensors["weight"]).to(device))
    return found


def _rademacher(loaded: Loaded, tracked: Tracked, chosen: Rademacher) -> Readout:
    sides, gathers, start = {}, {}, 0
    for name, module in loaded.tracked(tracked).items():
        d_out, d_in = shape(module)
        out = signs(chosen.seed, name, "out", min(chosen.p, d_out), d_out)
        into = signs(chosen.seed, name, "in", min(chosen.p, d_in), d_in)
        sides[name] = Sides(out.to(loaded.device_of(name)), into.to(loaded.device_of(name)))
        gathers[name] = Gather(start, sides[name].size)
        start += sides[name].size
    return Readout(beside(loaded, sides), gathers, ArrayInfo(IndexKind.GRADIENT, None, start), ())


def beside(loaded: Loaded, sides: Mapping[str, Sides]) -> dict[str, Sides]:
    """In bfloat16 beside a bfloat16 model, twice as fast on CPUs and far more on GPUs: what is projected carries
    such rounding already, and no score's rank moves by it (benchmarks/precision.py). Gradients in float16 would
    underflow.
    """
    if next(loaded.model.parameters()).dtype != torch.bfloat16:
        return dict(sides)
    return {name: Sides(side.out.bfloat16(), side.into.bfloat16()) for name, side in sides.items()}


def _gathers(storage: Storage, basis: str, sides: Mapping[str, Sides]) -> dict[str, Gather]:
    artifact = artifacts.get(storage, basis)
    found, start = {}, 0
    for name in artifacts.stems(artifact):
        if name == SPECTRUM:
            continue
        tensors = artifacts.read(storage, artifact, name)
        index = torch.from_numpy(tensors["index"].astype(np.int64))
        if len(index):
            scale = torch.from_numpy(tensors["scale"].astype(np.float32))
            everything, device = len(index) == sides[name].size, sides[name].out.device
            found[name] = Gather(start, len(index), None if everything else index.to(device), scale.to(device))
            start += len(index)
    return found
