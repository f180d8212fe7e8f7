"""The query side as rows of coordinates: the concept Jacobian and the gradients of the loss."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from service import artifacts
from service.contracts import Example
from service.errors import Invalid
from service.storage import Storage
from service.terms import LossReduction
from service.work import JacobianWork, LossRowsWork, MixWork, ScoutWork
from workers import eigenbasis
from workers.batches import Batch
from workers.gradients import Sides, loss_coordinates
from workers.jacobian import direction_rows, jacobian
from workers.models import Loaded
from workers.prepare import prepare
from workers.works.result import Result, Tensors


def concept_jacobian(work: JacobianWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    if work.directions is None:
        width = loaded.width
        directions = direction_rows(width, work.start, work.stop, loaded.device)
    else:
        rows = artifacts.read(storage, artifacts.get(storage, work.directions), "directions")["rows"]
        directions = torch.from_numpy(rows[work.start : work.stop]).to(loaded.device)
    sides = eigenbasis.sides(storage, work.curvature, loaded, only=loaded.linear_maps(work.layer))
    sums, count, aside = jacobian_on(work, sides, loaded, examples, directions)
    tensors: Tensors = {name: {"rows": rows.cpu().numpy()} for name, rows in sums.items()}
    return tensors, {"rows": len(directions), "examples": count, "quarantined": aside}


def jacobian_on(
    work: JacobianWork | ScoutWork,
    sides: Mapping[str, Sides],
    loaded: Loaded,
    examples: Sequence[Example],
    directions: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], int, int]:
    """D·J averaged over the query set, by module, on given eigenvectors of modules in blocks up to the layer; the
    examples that were used and those set aside.
    """
    modules = loaded.linear_maps(work.layer)
    if not sides:
        detail = f"No tracked map lies in blocks 1 to {work.layer}: f_v at layer {work.layer} has no gradient."
        raise Invalid("nothing_tracked", detail, param="layers")
    prepared = prepare(loaded, work.reading, examples, trains=False, pooling=work.pooling)

    def of_batch(_members: list[int], batch: Batch) -> dict[str, Sequence[torch.Tensor]]:
        found = jacobian(
            loaded.model,
            loaded.blocks,
            modules,
            sides,
            batch,
            layer=work.layer,
            directions=directions,
            function=work.function,
            token_budget=loaded.memory.within(work.reading.token_budget),
        )
        return {name: (rows,) for name, rows in found.items()}

    sums, used = prepared.finite(loaded, work.reading, of_batch, pooling=work.pooling, reduction=LossReduction.MEAN)
    if not used:
        raise Invalid("empty_query_set", "No example of the query set can be used.", param="query_set")
    aside = len(examples) - len(used)
    return {name: rows.div_(len(used)) for name, (rows,) in sums.items()}, len(used), aside


def mix(work: MixWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    D = artifacts.read(storage, artifacts.get(storage, work.directions), "directions")["rows"]
    first = artifacts.get(storage, work.rows[0])
    tensors: Tensors = {}
    for name in artifacts.stems(first):
        start, total = 0, np.zeros(0)
        for block in blocks(storage, work.rows, name):
            part = D[:, start : start + len(block)] @ block
            total = total + part if start else part
            start += len(block)
        tensors[name] = {"rows": total}
    counts = {name: first.facts[name] for name in ("examples", "quarantined")}
    return tensors, {"rows": len(D), **counts}


def loss_rows(work: LossRowsWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    return loss_rows_on(work, eigenbasis.sides(storage, work.curvature, loaded), loaded, examples)


def loss_rows_on(
    work: LossRowsWork, sides: Mapping[str, Sides], loaded: Loaded, examples: Sequence[Example]
) -> Result:
    """The same on given eigenvectors."""
    prepared = prepare(loaded, work.reading, examples, trains=True, pooling=None, windows=True)
    order = {position: row for row, position in enumerate(sorted(prepared.tokens))}
    k = sum(side.size for side in sides.values())
    table = torch.zeros(1 if work.mean else len(order), k, device=loaded.device)

    def of_batch(_members: list[int], batch: Batch) -> torch.Tensor:
        return loss_coordinates(loaded.model, loaded.modules, sides, batch)[0].to(loaded.device)

    damaged: set[int] = set()
    # Of an example in windows one may be damaged when others have been added: such are added at the end.
    windowed: dict[int, torch.Tensor] = {}
    long = {position for position, tokens in prepared.tokens.items() if len(tokens) > work.reading.max_length}
    about = {"pooling": None, "reduction": work.loss_reduction}
    for members, found in prepared.each(loaded, work.reading, of_batch, **about):
        good = found.isfinite().all(dim=1)
        damaged.update(position for position, fine in zip(members, good.tolist(), strict=True) if not fine)
        if work.mean:
            for row, position in enumerate(members):
                if position in long:
                    windowed[position] = windowed[position] + found[row] if position in windowed else found[row]
                    good[row] = False
        places = torch.tensor([0 if work.mean else order[position] for position in members], device=loaded.device)
        table.index_add_(0, places[good], found[good])
    used = [position for position in order if position not in damaged]
    count = len(used)
    if work.mean:
        for position, row in windowed.items():
            if position not in damaged:
                table[0] += row
        table /= max(1, count)
    else:
        table = table[[order[position] for position in used]]
        if not count:
            detail = "No example of the query set has a token to predict."
            raise Invalid("empty_query_set", detail, param="query_set")
    parts = table.split([side.size for side in sides.values()], dim=1)
    tensors = {name: {"rows": part.cpu().numpy()} for name, part in zip(sides, parts, strict=True)}
    return tensors, {"rows": len(table), "examples": count, "quarantined": len(examples) - count}


def blocks(storage: Storage, rows: Sequence[str], name: str) -> Iterator[NDArray[np.float32]]:
    """The stored blocks of rows of one module, in order: together (r, p_out · p_in)."""
    for key in rows:
        yield artifacts.read(storage, artifacts.get(storage, key), name)["rows"]
