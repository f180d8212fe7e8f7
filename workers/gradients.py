"""Per-example gradient coordinates from one batched forward and backward.

For a linear map with inputs a_t and output gradients g_t an example's weight gradient is
G = Σ_t g_t a_tᵀ. Its coordinates C = P_outᵀ G P_in = Σ_t (P_outᵀ g_t)(P_inᵀ a_t)ᵀ are formed from projected
sides, so G itself is never built. The weights are frozen: the backward computes output gradients only.
Whether the P are random signs or (later) EK-FAC eigenvectors is the caller's business.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.activations import block_outputs, pool, run_until
from workers.batches import Batch


@dataclass(frozen=True)
class Sides:
    """What a module's gradient is projected on: ``out`` (d_out, p_out) and ``into`` (d_in, p_in)."""

    out: Tensor
    into: Tensor

    @property
    def size(self) -> int:
        return self.out.shape[1] * self.into.shape[1]


@dataclass
class Tape:
    """Coordinates by module, filled by the backward: (B, p_out · p_in) float32, summed over calls."""

    coordinates: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, sides: Mapping[str, Sides], batch_size: int, device: torch.device) -> Tensor:
        """(B, k) float32, modules in the order of ``sides``; a module the backward never reached gives zeros."""
        parts = [
            self.coordinates[name]
            if name in self.coordinates
            else torch.zeros(batch_size, side.size, device=device)
            for name, side in sides.items()
        ]
        return torch.cat(parts, dim=1)


@contextmanager
def recording(modules: Mapping[str, nn.Module], sides: Mapping[str, Sides]) -> Iterator[Tape]:
    """Record coordinates of every backward run inside. Inputs (B, T, d_in), outputs (B, T, d_out)."""
    tape = Tape()

    def attach(name: str, side: Sides) -> Any:
        def forward_hook(_module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not output.requires_grad:
                return
            projected_input = inputs[0].detach().float() @ side.into  # (B, T, p_in)

            def backward_hook(gradient: Tensor) -> None:
                projected_output = gradient.float() @ side.out  # (B, T, p_out)
                value = torch.einsum("bto,bti->boi", projected_output, projected_input).flatten(1)
                tape.coordinates[name] = tape.coordinates[name] + value if name in tape.coordinates else value

            output.register_hook(backward_hook)

        return forward_hook

    handles = [modules[name].register_forward_hook(attach(name, side)) for name, side in sides.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiable_inputs(model: nn.Module) -> Iterator[None]:
    """Let gradients flow although every weight is frozen: the embedding's output becomes a leaf."""
    embedding: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue, reportAssignmentType]

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """L(z) per example: cross-entropy weighted by ``loss_weight``. (B, T, V) → (B,) float32."""
    weight = batch.loss_weight[:, 1:]
    counted = weight > 0
    # Position t predicts token t + 1; the softmax runs over the positions that count only.
    each = functional.cross_entropy(logits[:, :-1][counted].float(), batch.ids[:, 1:][counted], reduction="none")
    placed = torch.zeros_like(weight).masked_scatter(counted, each * weight[counted])
    return placed.sum(dim=1)


def loss_coordinates(
    model: nn.Module, modules: Mapping[str, nn.Module], sides: Mapping[str, Sides], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Coordinates of ∇L(z) (B, k) and L(z) (B,) for every example of the batch.

    The examples of a batch do not see each other, so the gradient of the summed loss splits by example.
    """
    with differentiable_inputs(model), recording(modules, sides) as tape:
        value = losses(model(input_ids=batch.ids, use_cache=False).logits, batch)
        value.sum().backward()
    return tape.rows(sides, len(batch.ids), batch.ids.device), value.detach()


def concept_coordinates(
    model: nn.Module,
    blocks: list[nn.Module],
    modules: Mapping[str, nn.Module],
    sides: Mapping[str, Sides],
    batch: Batch,
    *,
    layer: int,
    direction: Tensor,
) -> tuple[Tensor, Tensor]:
    """Coordinates of ∇⟨v̂, a_l(x)⟩ (B, k) and the values (B,); ``direction`` (d,) float32, unit norm.

    The forward stops at block ``layer``; deeper modules get zeros, as their gradient is.
    """
    with (
        differentiable_inputs(model),
        recording(modules, sides) as tape,
        block_outputs(blocks, [layer], stop=True) as outputs,
    ):
        run_until(model, batch.ids)
        value = pool(outputs[layer], batch.pool_weight) @ direction
        value.sum().backward()
    return tape.rows(sides, len(batch.ids), batch.ids.device), value.detach()
