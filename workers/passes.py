"""One pass over some examples: batch, run the model, collect rows, set aside what cannot be stored.

Every example ends either as one row in every array or in quarantine with its reason.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from service.contracts import ArrayInfo, Example, Quarantined
from service.errors import Invalid
from service.rows import F32
from service.terms import IndexKind, LossReduction, Pooling
from service.work import ConceptObjective, PassSpec
from workers.activations import block_outputs, pool, run_until
from workers.batches import Batch
from workers.gradients import concept_values, coordinates, losses
from workers.models import Loaded
from workers.prepare import prepare
from workers.readout import Readout, Rows


@dataclass(frozen=True)
class PassResult:
    """``arrays`` hold one finite float32 row per entry of ``ids``, in that order."""

    ids: tuple[str, ...]
    arrays: dict[ArrayInfo, F32]
    quarantined: tuple[Quarantined, ...]
    long: tuple[str, ...]  # of ``ids``: longer than the context, cut or split
    tokens: int


def versions() -> dict[str, str]:
    """What the bytes of a result depend on besides its specification."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def run(loaded: Loaded, readout: Readout, spec: PassSpec, examples: Sequence[Example]) -> PassResult:
    """Rows for ``examples`` as ``spec`` says. Raises Invalid when the model cannot do what is asked."""
    trains = bool(readout.sides) and not isinstance(spec.objective, ConceptObjective)
    prepared = prepare(loaded, spec, examples, trains=trains, pooling=_pooling(spec), windows=True)
    aside, tokens = prepared.aside, prepared.tokens
    rows: dict[int, dict[ArrayInfo, F32]] = {}
    about = {"pooling": _pooling(spec), "reduction": reduction_of(spec)}

    def compute(_members: list[int], batch: Batch) -> dict[ArrayInfo, F32]:
        return _compute(loaded, readout, spec, batch)

    for members, computed in prepared.each(loaded, spec, compute, **about):
        for row, position in enumerate(members):
            own = rows.setdefault(position, {})
            for info, values in computed.items():  # windows of one example add up
                own[info] = own[info] + values[row] if info in own else values[row]
    for position, own in rows.items():
        if reason := _unstorable(own, zero_allowed=spec.objective is not None):
            aside.setdefault(position, Quarantined(examples[position].id, *reason))
    kept = sorted(set(rows) - set(aside))
    return PassResult(
        ids=tuple(examples[position].id for position in kept),
        arrays={
            info: np.stack([rows[position][info] for position in kept])
            if kept
            else np.zeros((0, info.dims), dtype=np.float32)
            for info in arrays(loaded, readout, spec)
        },
        quarantined=tuple(aside[position] for position in sorted(aside)),
        long=tuple(examples[position].id for position in kept if prepared.is_long(position, spec)),
        tokens=sum(len(item) for item in tokens.values()),
    )


def arrays(loaded: Loaded, readout: Readout, spec: PassSpec) -> list[ArrayInfo]:
    """What a shard of this pass holds."""
    width = loaded.width
    layers = spec.activation.layers if spec.activation else ()
    return [ArrayInfo(IndexKind.ACTIVATION, layer, width) for layer in layers] + readout.arrays


def _pooling(spec: PassSpec) -> Pooling | None:
    if isinstance(spec.objective, ConceptObjective):
        return spec.objective.pooling
    return spec.activation.pooling if spec.activation else None


def reduction_of(spec: PassSpec) -> LossReduction:
    chosen = spec.gradient or spec.influence
    return chosen.loss_reduction if chosen else LossReduction.MEAN


def _compute(loaded: Loaded, readout: Readout, spec: PassSpec, batch: Batch) -> dict[ArrayInfo, F32]:
    """(B, dims) float32 for every array of the pass, from one forward and at most one backward."""
    rows = Rows(readout, len(batch.ids), loaded.device)
    objective = spec.objective if isinstance(spec.objective, ConceptObjective) else None
    layers = (objective.layer,) if objective else spec.activation.layers if spec.activation else ()
    stop = objective is not None or not readout.sides
    with (
        coordinates(loaded.modules, readout.sides, rows.consume),
        block_outputs(loaded.blocks, layers, stop=stop) as outputs,
    ):
        if objective is not None:
            run_until(loaded.model, batch.ids)
            pooled = concept_values(outputs[objective.layer], batch, objective.function)
            if not pooled.requires_grad:
                detail = f"No tracked map lies in blocks 1 to {objective.layer}: f_v there has no gradient."
                raise Invalid("nothing_tracked", detail, param="concept")
            (pooled @ torch.tensor(objective.vector, dtype=pooled.dtype, device=pooled.device)).sum().backward()
        elif readout.sides:
            losses(loaded.model, batch).sum().backward()
        else:
            with torch.no_grad():
                run_until(loaded.model, batch.ids)
    found = {info: values.cpu().numpy() for info, values in rows.found.items()}
    if objective is not None:
        return found
    width = loaded.width
    pooled = {layer: pool(outputs[layer].detach(), batch.pool_weight).cpu().numpy() for layer in layers}
    return {ArrayInfo(IndexKind.ACTIVATION, layer, width): rows for layer, rows in pooled.items()} | found


def _unstorable(own: dict[ArrayInfo, F32], *, zero_allowed: bool) -> tuple[str, str] | None:
    """(reason, detail) when a row holds NaN or infinity, or a gradient vanishes: such rows would lie."""
    for info, row in own.items():
        name = f"{info.kind} at layer {info.layer}" if info.layer is not None else str(info.kind)
        if not np.isfinite(row).all():
            return "not_finite", f"The {name} holds NaN or infinity."
        if info.kind == IndexKind.GRADIENT and not row.any() and not zero_allowed:
            return "zero_gradient", "Every gradient coordinate is exactly zero."
        if info.kind == IndexKind.INFLUENCE and not row.any() and not zero_allowed:
            return "zero_gradient", f"The {name} is exactly zero: no gradient reaches the tracked modules."
    return None
