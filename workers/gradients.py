"""Per-example gradient coordinates from one batched forward and backward.

For a linear map with inputs a_t and output gradients g_t an example's weight gradient is
G = Σ_t g_t a_tᵀ. Its coordinates C = P_outᵀ G P_in = Σ_t (P_outᵀ g_t)(P_inᵀ a_t)ᵀ are formed from projected
sides, so G itself is never built. The weights are frozen: the backward computes output gradients only, and
ends at the first tracked modules. Whether the P are random signs or EK-FAC eigenvectors is the caller's
business.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.errors import Invalid
from service.terms import ConceptFunction
from workers.activations import block_outputs, pool, run_until
from workers.batches import Batch

Forward = Callable[[str, Tensor], Any]
Backward = Callable[[str, Any, Tensor], None]


@dataclass(frozen=True)
class Sides:
    """What a module's gradient is projected on: ``out`` (d_out, p_out) and ``into`` (d_in, p_in)."""

    out: Tensor
    into: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(p_out, p_in)."""
        return self.out.shape[1], self.into.shape[1]

    @property
    def size(self) -> int:
        return self.out.shape[1] * self.into.shape[1]


# --- hooks ------------------------------------------------------------------------------------------


@contextmanager
def taps(modules: Mapping[str, nn.Module], *, forward: Forward, backward: Backward) -> Iterator[None]:
    """Listen to linear maps: ``forward(name, input)`` on the way up, and on the way down
    ``backward(name, what forward returned, gradient of the output)``, once per call of the module.

    A map whose input needs no gradient becomes the start of the graph: nothing below it is differentiated.
    """

    def attach(name: str) -> Any:
        def hook(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if inputs[0].ndim != 3:
                detail = f"{name} gets inputs of shape {tuple(inputs[0].shape)}; (batch, tokens, width) is needed."
                raise Invalid("unsupported_module", detail, param="model")
            kept = forward(name, inputs[0].detach())
            if output.requires_grad:
                output.register_hook(lambda gradient: backward(name, kept, gradient))
                return None
            output.requires_grad_(True)

            def at_leaf(leaf: Tensor) -> None:
                gradient, leaf.grad = leaf.grad, None
                assert gradient is not None  # noqa: S101  (autograd has just written it)
                backward(name, kept, gradient)

            output.register_post_accumulate_grad_hook(at_leaf)
            return output.clone()  # some models go on in place (OLMo clips q, k and v), which a leaf does not allow

        return hook

    handles = [module.register_forward_hook(attach(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def project(values: Tensor, side: Tensor) -> Tensor:
    """(…, d) @ (d, p), in the side's precision, accumulated in float32 at least."""
    projected = values.to(side.dtype) @ side
    return projected if projected.dtype == torch.float64 else projected.float()


@contextmanager
def coordinates(
    modules: Mapping[str, nn.Module], sides: Mapping[str, Sides], consume: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """``consume(name, C)`` with C (B, p_out, p_in) for every module of ``sides`` and backward run inside."""

    def forward(name: str, inputs: Tensor) -> Tensor:
        return project(inputs, sides[name].into)  # (B, T, p_in)

    def backward(name: str, projected: Tensor, gradient: Tensor) -> None:
        consume(name, project(gradient, sides[name].out).transpose(1, 2) @ projected)

    with taps({name: modules[name] for name in sides}, forward=forward, backward=backward):
        yield


@dataclass
class Tape:
    """Coordinates by module, filled by the backward: (B, p_out · p_in), summed over calls."""

    coordinates: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        flat = value.flatten(1)
        self.coordinates[name] = self.coordinates[name] + flat if name in self.coordinates else flat

    def rows(self, sides: Mapping[str, Sides], batch_size: int) -> Tensor:
        """(B, k), modules in the order of ``sides``; a module the backward never reached gives zeros."""
        parts = [
            self.coordinates[name] if name in self.coordinates else side.out.new_zeros(batch_size, side.size)
            for name, side in sides.items()
        ]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


@contextmanager
def recording(modules: Mapping[str, nn.Module], sides: Mapping[str, Sides]) -> Iterator[Tape]:
    """Keep the whole coordinates of every backward run inside."""
    tape = Tape()
    with coordinates(modules, sides, tape.add):
        yield tape


# --- objectives -------------------------------------------------------------------------------------


def logits_at(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (n, V) float32 at the True entries of ``positions`` (B, T), row by row; the head runs nowhere else."""
    head: nn.Module = model.get_output_embeddings()  # pyright: ignore[reportCallIssue, reportAssignmentType]

    def only_there(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][positions.to(inputs[0].device)][None],)

    handle = head.register_forward_pre_hook(only_there)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits if logits.dtype == torch.float64 else logits.float()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """L(z) of every example (B,): cross-entropy weighted by ``loss_weight``."""
    weight = batch.loss_weight[:, 1:]  # position t predicts token t + 1
    counted = weight > 0
    logits = logits_at(model, batch.ids, functional.pad(counted, (0, 1)))
    each = functional.cross_entropy(logits, batch.ids[:, 1:][counted].to(logits.device), reduction="none")
    each = each.to(weight.device)
    placed = weight.new_zeros(weight.shape, dtype=each.dtype)
    return placed.masked_scatter(counted, each * weight[counted]).sum(dim=1)


def concept_values(hidden: Tensor, batch: Batch, function: ConceptFunction) -> Tensor:
    """What f_v is linear in: pooled h_l (B, d); ``cosine`` divides each position by its norm first."""
    if function == ConceptFunction.COSINE:
        hidden = functional.normalize(hidden.float() if hidden.dtype != torch.float64 else hidden, dim=-1)
    return pool(hidden, batch.pool_weight)


def loss_coordinates(
    model: nn.Module, modules: Mapping[str, nn.Module], sides: Mapping[str, Sides], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Coordinates of ∇L(z) (B, k) and L(z) (B,) for every example of the batch.

    The examples of a batch do not see each other, so the gradient of the summed loss splits by example.
    """
    with recording(modules, sides) as tape:
        value = losses(model, batch)
        value.sum().backward()
    return tape.rows(sides, len(batch.ids)), value.detach()


def concept_coordinates(
    model: nn.Module,
    blocks: list[nn.Module],
    modules: Mapping[str, nn.Module],
    sides: Mapping[str, Sides],
    batch: Batch,
    *,
    layer: int,
    direction: Tensor,
    function: ConceptFunction = ConceptFunction.DOT,
) -> tuple[Tensor, Tensor]:
    """Coordinates of ∇⟨v̂, a_l(x)⟩ (B, k) and the values (B,); ``direction`` (d,), unit norm.

    The forward stops at block ``layer``; deeper modules get zeros, as their gradient is.
    """
    with recording(modules, sides) as tape, block_outputs(blocks, [layer], stop=True) as outputs:
        run_until(model, batch.ids)
        pooled = concept_values(outputs[layer], batch, function)
        value = pooled @ direction.to(pooled.dtype)
        value.sum().backward()
    return tape.rows(sides, len(batch.ids)), value.detach()
