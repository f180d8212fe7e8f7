"""One pass over some examples: tokenise, mask, batch, run the model, collect rows, set aside what cannot be stored.

Every example ends either as one row in every array or in quarantine with its reason.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from service.contracts import ArrayInfo, Example, IndexKind, LossReduction, PassSpec, Pooling, Quarantined
from service.rows import F32
from workers import gradients
from workers.activations import block_outputs, pool, run_until
from workers.batches import Batch, collate, plan
from workers.gradients import Sides
from workers.masks import Tokens, UnrenderableError, fit, tokenise
from workers.models import Loaded, shape
from workers.projections import signs


@dataclass(frozen=True)
class PassResult:
    """``arrays`` hold one finite float32 row per entry of ``ids``, in that order."""

    ids: tuple[str, ...]
    arrays: dict[ArrayInfo, F32]
    quarantined: tuple[Quarantined, ...]
    truncated: int
    tokens: int


def versions() -> dict[str, str]:
    """What a shard's bytes depend on besides its specification."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def tracked_sides(loaded: Loaded, spec: PassSpec) -> dict[str, Sides]:
    """The projection of every tracked module, on the model's device; empty without a gradient kind."""
    if spec.gradient is None:
        return {}
    chosen = spec.gradient
    sides = {}
    for name, module in loaded.linear_maps(chosen.blocks).items():
        d_out, d_in = shape(module)
        out = signs(chosen.seed, name, "out", min(chosen.p, d_out), d_out)
        into = signs(chosen.seed, name, "in", min(chosen.p, d_in), d_in)
        sides[name] = Sides(out.to(loaded.device), into.to(loaded.device))
    return sides


def run(loaded: Loaded, sides: dict[str, Sides], spec: PassSpec, examples: Sequence[Example]) -> PassResult:
    """Rows for ``examples`` as ``spec`` says. Raises Invalid when the model cannot do what is asked."""
    aside: dict[int, Quarantined] = {}
    tokens: dict[int, Tokens] = {}
    for position, example in enumerate(examples):
        ready = _prepare(loaded, spec, example)
        if isinstance(ready, Quarantined):
            aside[position] = ready
        else:
            tokens[position] = ready
    rows: dict[int, dict[ArrayInfo, F32]] = {}
    positions = list(tokens)
    for group in plan([len(tokens[position]) for position in positions], spec.token_budget):
        members = [positions[i] for i in group]
        batch = collate(
            [tokens[position] for position in members],
            pooling=_pooling(spec),
            reduction=spec.gradient.loss_reduction if spec.gradient else LossReduction.MEAN,
            device=loaded.device,
        )
        computed = _compute(loaded, sides, spec, batch)
        for row, position in enumerate(members):
            own = {info: values[row] for info, values in computed.items()}
            if reason := _unstorable(own, zero_allowed=spec.objective is not None):
                aside[position] = Quarantined(examples[position].id, *reason)
            else:
                rows[position] = own
    kept = sorted(rows)
    return PassResult(
        ids=tuple(examples[position].id for position in kept),
        arrays={
            info: np.stack([rows[position][info] for position in kept])
            if kept
            else np.zeros((0, info.dims), dtype=np.float32)
            for info in arrays(loaded, sides, spec)
        },
        quarantined=tuple(aside[position] for position in sorted(aside)),
        truncated=sum(tokens[position].truncated for position in kept),
        tokens=sum(len(item) for item in tokens.values()),
    )


def arrays(loaded: Loaded, sides: dict[str, Sides], spec: PassSpec) -> list[ArrayInfo]:
    """What a shard of this pass holds."""
    width = loaded.model.config.get_text_config().hidden_size
    layers = spec.activation.layers if spec.activation else ()
    found = [ArrayInfo(IndexKind.ACTIVATION, layer, width) for layer in layers]
    if sides:
        found.append(ArrayInfo(IndexKind.GRADIENT, None, sum(side.size for side in sides.values())))
    return found


def _pooling(spec: PassSpec) -> Pooling | None:
    if spec.objective is not None:
        return spec.objective.pooling
    return spec.activation.pooling if spec.activation else None


def _prepare(loaded: Loaded, spec: PassSpec, example: Example) -> Tokens | Quarantined:
    """The example ready to run, or why it cannot be."""
    try:
        whole = tokenise(example.content, loaded.tokenizer)
    except UnrenderableError as error:
        return Quarantined(example.id, error.code, error.detail)
    tokens = fit(whole, spec.max_length, spec.long_examples)
    if tokens is None:
        detail = f"{len(whole)} tokens, the limit is {spec.max_length}."
        return Quarantined(example.id, "too_long", detail)
    cut = f" within the first {spec.max_length} of {len(whole)} tokens" if tokens.truncated else ""
    trains = spec.gradient is not None and spec.objective is None
    if trains and not tokens.predicted.any():
        reason = "target_cut_off" if tokens.truncated else "no_target"
        return Quarantined(example.id, reason, f"There is no token to predict{cut}.")
    pooling = _pooling(spec)
    if pooling is not None and not tokens.pooled(pooling).any():
        return Quarantined(example.id, "nothing_to_pool", f"No token is left to pool by {pooling}{cut}.")
    return tokens


def _compute(loaded: Loaded, sides: dict[str, Sides], spec: PassSpec, batch: Batch) -> dict[ArrayInfo, F32]:
    """(B, dims) float32 for every array of the pass, from one forward and at most one backward."""
    infos = arrays(loaded, sides, spec)
    modules = loaded.linear_maps(spec.gradient.blocks) if spec.gradient else {}
    if spec.objective is not None:
        direction = torch.tensor(spec.objective.vector, dtype=torch.float32, device=loaded.device)
        found, _ = gradients.concept_coordinates(
            loaded.model, loaded.blocks, modules, sides, batch, layer=spec.objective.layer, direction=direction
        )
        return {infos[0]: found.cpu().numpy()}
    layers = spec.activation.layers if spec.activation else ()
    result: dict[ArrayInfo, F32] = {}
    with block_outputs(loaded.blocks, layers, stop=not sides) as outputs:
        if sides:
            found, _ = gradients.loss_coordinates(loaded.model, modules, sides, batch)
            result[infos[-1]] = found.cpu().numpy()
        else:
            with torch.no_grad():
                run_until(loaded.model, batch.ids)
        for info in infos:
            if info.layer is not None:
                result[info] = pool(outputs[info.layer].detach(), batch.pool_weight).cpu().numpy()
    return result


def _unstorable(own: dict[ArrayInfo, F32], *, zero_allowed: bool) -> tuple[str, str] | None:
    """(reason, detail) when a row holds NaN or infinity, or a gradient vanishes: such rows would lie."""
    for info, row in own.items():
        name = f"{info.kind} at layer {info.layer}" if info.layer is not None else str(info.kind)
        if not np.isfinite(row).all():
            return "not_finite", f"The {name} holds NaN or infinity."
        if info.kind == IndexKind.GRADIENT and not row.any() and not zero_allowed:
            return "zero_gradient", "Every gradient coordinate is exactly zero."
    return None
