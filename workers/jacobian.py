"""The concept Jacobian J = ∂(mean a_l(Q))/∂θ, in coordinates.

f_v(Q) = ⟨v̂, mean a_l(Q)⟩ is linear in v, so ∇f_v(Q) = Jᵀv̂ for every v: rows of J are gradients of single
hidden dimensions, or of any other directions that are given. One forward of a batch serves all rows; each
backward carries as many of them as the token budget allows, as copies of the batch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from service.terms import ConceptFunction
from workers.activations import block_outputs, run_until
from workers.batches import Batch
from workers.gradients import Sides, concept_values, project, taps


def jacobian(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    modules: Mapping[str, nn.Module],
    sides: Mapping[str, Sides],
    batch: Batch,
    *,
    layer: int,
    directions: Tensor,
    function: ConceptFunction = ConceptFunction.DOT,
    token_budget: int = 8192,
) -> dict[str, Tensor]:
    """Σ over the batch of ∇⟨direction, a_l(x)⟩ for each row of ``directions`` (n, d).

    Module → (n, p_out · p_in); modules deeper than ``layer`` are left out, as their gradient is zero.
    """
    count = len(directions)
    copies = max(1, min(count, token_budget // batch.ids.numel()))
    repeated = Batch(
        *(value.repeat(copies, 1) for value in (batch.ids, batch.loss_weight, batch.pool_weight, batch.real))
    )
    found = {name: side.out.new_zeros(count, *side.shape) for name, side in sides.items()}
    reached: set[str] = set()
    first = 0  # the rows in flight are first, first + 1, …

    def forward(name: str, inputs: Tensor) -> Tensor:
        return project(inputs, sides[name].into).unflatten(0, (copies, -1)).flatten(1, 2)  # (copies, B·T, p_in)

    def backward(name: str, projected: Tensor, gradient: Tensor) -> None:
        rows = min(copies, count - first)
        into = project(gradient, sides[name].out).unflatten(0, (copies, -1)).flatten(1, 2)
        found[name][first : first + rows] += into[:rows].transpose(1, 2) @ projected[:rows]
        reached.add(name)

    tracked = {name: modules[name] for name in sides}
    with taps(tracked, forward=forward, backward=backward), block_outputs(blocks, [layer], stop=True) as outputs:
        run_until(model, repeated.ids)
        value = concept_values(outputs[layer], repeated, function).unflatten(0, (copies, -1)).sum(1)  # (copies, d)
        for first in range(0, count, copies):
            chosen = directions[first : first + copies].to(value)
            (value[: len(chosen)] * chosen).sum().backward(retain_graph=first + copies < count)
    return {name: found[name].flatten(1) for name in sides if name in reached}


def direction_rows(width: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows start … stop − 1 of the identity (d, d): every hidden dimension by itself."""
    return torch.eye(width, device=device)[start:stop]
