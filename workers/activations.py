"""Pooled hidden states a_l(x), with the forward stopped at the deepest layer that is needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, einsum, float64, nn


class _Stop(Exception):
    """Unwinds the forward once the deepest wanted block has answered."""


@contextmanager
def block_outputs(blocks: Sequence[nn.Module], layers: Sequence[int], *, stop: bool) -> Iterator[dict[int, Tensor]]:
    """Collect h_l (B, T, d), the outputs of blocks ``layers`` (1-based), during the forwards run inside.

    With ``stop`` the forward ends after the deepest of them: run it through ``run_until``.
    """
    outputs: dict[int, Tensor] = {}
    deepest = max(layers, default=0)

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output
            if stop and layer == deepest:
                raise _Stop

        return hook

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def run_until(model: nn.Module, ids: Tensor) -> None:
    """A forward that a stopping ``block_outputs`` may cut short."""
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        return


def pool(hidden: Tensor, weight: Tensor) -> Tensor:
    """a_l = Σ_t weight_t h_t in float32 at least: (B, T, d), (B, T) → (B, d)."""
    exact = hidden if hidden.dtype == float64 else hidden.float()
    return einsum("btd,bt->bd", exact, weight.to(exact))
