"""How each artifact is computed: one function per kind of work, from stored inputs to tensors and facts."""

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service import artifacts
from service.basis import SPECTRUM
from service.contracts import Example
from service.errors import Invalid
from service.storage import Storage
from service.terms import FactorLabels, FactorPositions, LossReduction
from service.work import (
    BasisWork,
    CovarianceWork,
    EigenWork,
    GatherWork,
    HeadWork,
    JacobianWork,
    LambdaWork,
    LossRowsWork,
    MixWork,
    MomentWork,
    NarrowWork,
    ScoutWork,
)
from workers import curvature, eigenbasis, selection
from workers.batches import Batch
from workers.eigenbasis import Spectrum
from workers.gradients import Sides, loss_coordinates
from workers.jacobian import direction_rows, jacobian
from workers.models import Loaded
from workers.prepare import prepare

Tensors = dict[str, dict[str, NDArray[Any]]]
Facts = dict[str, float | int | str]
Result = tuple[Tensors, Facts]


@singledispatch
def compute(work: Any, storage: Storage, loaded: Loaded | None, examples: Sequence[Example]) -> Result:
    """Tensors by file and name, and facts. ``loaded`` is given when the work has a reading."""
    raise TypeError(f"unknown work {type(work).__name__}")


# --- curvature --------------------------------------------------------------------------------------


@compute.register
def _covariances(work: CovarianceWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    modules = loaded.linear_maps(work.blocks)

    def of_batch(batch: Batch, loss: dict[str, Any]) -> dict[str, Sequence[torch.Tensor]]:
        found: dict[str, curvature.Covariance] = {}
        curvature.add_covariances(found, modules, loaded.model, batch, **loss)
        return {name: (each.into, each.out) for name, each in found.items()}

    sums, count = _over_sample(work, loaded, examples, of_batch)
    tensors = {name: {"into": into.cpu().numpy(), "out": out.cpu().numpy()} for name, (into, out) in sums.items()}
    return tensors, {"examples": count}


@compute.register
def _eigen(work: EigenWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    found: dict[str, NDArray[Any]] = {}
    facts: Facts = {}
    for side in ("into", "out"):
        covariance = _total(storage, work.parts, work.module, side)
        if not np.isfinite(covariance).all():
            detail = f"The covariance of {work.module} holds NaN or infinity: a weight or an example is damaged."
            raise Invalid("not_finite", detail, param="model")
        vectors, values = curvature.eigenvectors(covariance, work.p or len(covariance))
        found[side], found[f"{side}_values"] = vectors.astype(np.float32), values
        facts[f"d_{side}"] = len(covariance)
    return {"eigen": found}, facts


@compute.register
def _moments(work: MomentWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    modules, sides = loaded.linear_maps(work.blocks), {}
    for name, key in work.bases:
        eigen = artifacts.read(storage, artifacts.get(storage, key), "eigen")
        out, into = (torch.from_numpy(eigen[side]).to(loaded.device) for side in ("out", "into"))
        sides[name] = Sides(out, into)

    def of_batch(batch: Batch, loss: dict[str, Any]) -> dict[str, Sequence[torch.Tensor]]:
        found: dict[str, curvature.Moments] = {}
        curvature.add_moments(found, modules, sides, loaded.model, batch, **loss)
        return {name: (each.square, each.norm) for name, each in found.items()}

    sums, count = _over_sample(work, loaded, examples, of_batch)
    tensors = {
        name: {"square": square.cpu().numpy(), "norm": np.array([float(norm)])}
        for name, (square, norm) in sums.items()
    }
    return tensors, {"examples": count}


@compute.register
def _lambda(work: LambdaWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    count = sum(int(artifacts.get(storage, key).facts["examples"]) for key in work.parts)
    if count == 0:
        detail = "No example of the curvature's sample has a token to predict."
        raise Invalid("empty_sample", detail, param="dataset")
    square = _total(storage, work.parts, work.module, "square") / count
    norm = float(_total(storage, work.parts, work.module, "norm")[0]) / count
    if not (np.isfinite(square).all() and np.isfinite(norm)):
        detail = f"λ of {work.module} holds NaN or infinity: a weight or an example is damaged."
        raise Invalid("not_finite", detail, param="model")
    size = artifacts.get(storage, work.eigen).facts
    mean = norm / (int(size["d_out"]) * int(size["d_into"]))
    return {"lambda": {"square": square.astype(np.float32)}}, {"mean": mean, "examples": count}


def _over_sample(
    work: CovarianceWork | MomentWork,
    loaded: Loaded,
    examples: Sequence[Example],
    of_batch: Callable[[Batch, dict[str, Any]], Mapping[str, Sequence[torch.Tensor]]],
) -> tuple[dict[str, list[torch.Tensor]], int]:
    """Sums over the sample, and how many examples they are of; what cannot run or is damaged is left out."""
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
    return sums, len(used)


def _total(storage: Storage, parts: Sequence[str], module: str, name: str) -> NDArray[np.float64]:
    """The float64 sum of one tensor over all parts, in their order."""
    return sum(  # pyright: ignore[reportReturnType]
        artifacts.read(storage, artifacts.get(storage, key), module)[name].astype(np.float64) for key in parts
    )


# --- which eigenvectors -----------------------------------------------------------------------------

_SCOUTS = 8
_AT_ONCE = 2


@compute.register
def _scout(work: ScoutWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Σ_j and Σ_i of E_v⟨v, J_ij⟩² λ_ij/(λ_ij+δ)² by module: the marginal importance of each eigenvector."""
    width = loaded.model.config.get_text_config().hidden_size
    generator = np.random.Generator(np.random.Philox(key=_SCOUTS))
    directions = torch.from_numpy(generator.standard_normal((_SCOUTS, width)).astype(np.float32))
    total: dict[str, torch.Tensor] = {}
    for chunk in directions.to(loaded.device).split(_AT_ONCE):
        sums, _, _ = _rows_of_jacobian(work, storage, loaded, examples, chunk)
        for name, rows in sums.items():
            square = rows.square().sum(0)
            total[name] = total[name] + square if name in total else square
    tensors: Tensors = {}
    for name, spectrum in eigenbasis.spectra(storage, work.curvature).items():
        if name not in total:
            continue
        norm = {name: total[name].cpu().numpy().astype(np.float64).reshape(spectrum.square.shape)}
        square, mean = {name: spectrum.square}, {name: spectrum.mean}
        matters = selection.by_jacobian(norm, square, mean, work.damping)[name]
        tensors[name] = {"out": matters.sum(axis=1), "into": matters.sum(axis=0)}
    return tensors, {}


@compute.register
def _narrow(work: NarrowWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    facts = artifacts.get(storage, work.curvature).facts
    eigen = artifacts.read(storage, artifacts.get(storage, str(facts[eigenbasis.EIGEN + work.module])), "eigen")
    of_lambda = artifacts.get(storage, str(facts[eigenbasis.LAMBDA + work.module]))
    square = artifacts.read(storage, of_lambda, "lambda")["square"]
    scouts = [artifacts.get(storage, key) for key in work.scouts]
    scouts = [scout for scout in scouts if work.module in artifacts.stems(scout)]
    kept: dict[str, NDArray[np.int64]] = {}
    for side in ("out", "into"):
        count = eigen[side].shape[1]
        matters = [artifacts.read(storage, scout, work.module)[side] for scout in scouts]
        scores = np.sum(matters, axis=0) if matters else -np.arange(count)  # unscouted: the largest eigenvalues
        kept[side] = np.sort(np.argsort(-scores, kind="stable")[: work.p])
    vectors = {side: eigen[side][:, index] for side, index in kept.items()}
    corner = square[np.ix_(kept["out"], kept["into"])]
    return {"eigen": vectors, "lambda": {"square": corner}}, {"mean": of_lambda.facts["mean"]}


# --- Jacobian and heads -----------------------------------------------------------------------------


@compute.register
def _jacobian(work: JacobianWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    if work.directions is None:
        width = loaded.model.config.get_text_config().hidden_size
        directions = direction_rows(width, work.start, work.stop, loaded.device)
    else:
        rows = artifacts.read(storage, artifacts.get(storage, work.directions), "directions")["rows"]
        directions = torch.from_numpy(rows[work.start : work.stop]).to(loaded.device)
    sums, count, aside = _rows_of_jacobian(work, storage, loaded, examples, directions)
    tensors: Tensors = {name: {"rows": rows.cpu().numpy()} for name, rows in sums.items()}
    return tensors, {"rows": len(directions), "examples": count, "quarantined": aside}


def _rows_of_jacobian(
    work: JacobianWork | ScoutWork,
    storage: Storage,
    loaded: Loaded,
    examples: Sequence[Example],
    directions: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], int, int]:
    """D·J averaged over the query set, by module; the examples that were used and those set aside."""
    modules = loaded.linear_maps(work.layer)
    sides = eigenbasis.sides(storage, work.curvature, loaded.device, only=modules)
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
            token_budget=work.reading.token_budget,
        )
        return {name: (rows,) for name, rows in found.items()}

    sums, used = prepared.finite(loaded, work.reading, of_batch, pooling=work.pooling, reduction=LossReduction.MEAN)
    if not used:
        raise Invalid("empty_query_set", "No example of the query set can be used.", param="query_set")
    aside = len(examples) - len(used)
    return {name: rows / len(used) for name, (rows,) in sums.items()}, len(used), aside


@compute.register
def _mix(work: MixWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    D = artifacts.read(storage, artifacts.get(storage, work.directions), "directions")["rows"]
    first = artifacts.get(storage, work.rows[0])
    tensors: Tensors = {}
    for name in artifacts.stems(first):
        start, total = 0, np.zeros(0)
        for block in _blocks(storage, work.rows, name):
            part = D[:, start : start + len(block)] @ block
            total = total + part if start else part
            start += len(block)
        tensors[name] = {"rows": total}
    counts = {name: first.facts[name] for name in ("examples", "quarantined")}
    return tensors, {"rows": len(D), **counts}


@compute.register
def _loss_rows(work: LossRowsWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    sides = eigenbasis.sides(storage, work.curvature, loaded.device)
    modules = dict(loaded.model.named_modules())
    prepared = prepare(loaded, work.reading, examples, trains=True, pooling=None)
    order = {position: row for row, position in enumerate(sorted(prepared.tokens))}
    k = sum(side.size for side in sides.values())
    table = torch.zeros(1 if work.mean else len(order), k, device=loaded.device)

    def of_batch(members: list[int], batch: Batch) -> dict[str, Sequence[torch.Tensor]]:
        found, _ = loss_coordinates(loaded.model, modules, sides, batch)
        if not work.mean:
            table[[order[position] for position in members]] = found
        return {"sum": (found.sum(0),)}

    sums, used = prepared.finite(loaded, work.reading, of_batch, pooling=None, reduction=work.loss_reduction)
    count = len(used)
    if work.mean and count:
        table[0] = sums["sum"][0] / count
    if not work.mean:
        table = table[sorted(order[position] for position in used)]
        if not count:
            detail = "No example of the query set has a token to predict."
            raise Invalid("empty_query_set", detail, param="query_set")
    parts = table.split([side.size for side in sides.values()], dim=1)
    tensors = {name: {"rows": part.cpu().numpy()} for name, part in zip(sides, parts, strict=True)}
    return tensors, {"rows": len(table), "examples": count, "quarantined": len(examples) - count}


@compute.register
def _basis(work: BasisWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    found = eigenbasis.spectra(storage, work.curvature)
    square = {name: each.square for name, each in found.items()}
    mean = {name: each.mean for name, each in found.items()}

    def importance(sets: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
        total = {name: np.zeros_like(values) for name, values in square.items()}
        for rows in sets:
            norms = row_norms(storage, rows, found)
            for name, share in selection.by_jacobian(norms, square, mean, work.damping).items():
                total[name] += share
        return total

    if work.jacobians:
        losses = (
            importance([(key,) for key in work.losses]) if work.losses else selection.by_curvature(square, mean)
        )
        choice = selection.halves(importance(work.jacobians), losses, work.coordinates)
    else:
        choice = selection.top(selection.by_curvature(square, mean), work.coordinates)
    tensors: Tensors = {}
    spectrum: dict[str, list[NDArray[np.float64]]] = {"square": [], "mean": []}
    for name, index in choice.items():
        kept = square[name].ravel()[index]
        damped = kept + work.damping * mean[name]
        scale = np.divide(1, np.sqrt(damped), out=np.zeros_like(damped), where=damped > 0)
        tensors[name] = {"index": index.astype(np.int32), "scale": scale.astype(np.float32)}
        spectrum["square"].append(kept)
        spectrum["mean"].append(np.full(len(index), mean[name]))
    tensors[SPECTRUM] = {name: np.concatenate(values) for name, values in spectrum.items()}
    return tensors, {"damping": work.damping, "coordinates": len(tensors[SPECTRUM]["square"])}


@compute.register
def _head(work: HeadWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    found = eigenbasis.spectra(storage, work.curvature)
    reached = artifacts.stems(artifacts.get(storage, work.rows[0]))
    found = {name: each for name, each in found.items() if name in reached}
    sizes = sum(each.square.size for each in found.values())
    norms = row_norms(storage, work.rows, found)
    square = {name: each.square for name, each in found.items()}
    mean = {name: each.mean for name, each in found.items()}
    wanted = min(sizes, work.coordinates or sizes)
    choice = selection.top(selection.by_jacobian(norms, square, mean, work.damping), wanted)
    tensors: Tensors = {}
    for name, index in choice.items():
        if not len(index):
            continue
        damped = found[name].square.ravel()[index] + work.damping * found[name].mean
        rows = np.concatenate([block[:, index] for block in _blocks(storage, work.rows, name)])
        # λ = 0 with damping 0: no gradient of the sample has been there, so the coordinate says nothing.
        weight = np.divide(work.sign * rows, damped, out=np.zeros_like(rows), where=damped > 0).astype(np.float32)
        tensors[name] = {"index": index.astype(np.int32), "weight": weight}
    return tensors, {"coordinates": sum(len(index) for index in choice.values()), "of": sizes}


@compute.register
def _gather(work: GatherWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    basis = artifacts.get(storage, work.basis)
    reached = artifacts.stems(artifacts.get(storage, work.rows[0]))
    parts = []
    for name in artifacts.stems(basis):
        if name == SPECTRUM:
            continue
        kept = artifacts.read(storage, basis, name)
        index = kept["index"]
        if name in reached:
            rows = np.concatenate([block[:, index] for block in _blocks(storage, work.rows, name)])
            parts.append(rows * kept["scale"])
        else:  # deeper than the layer
            count = sum(int(artifacts.get(storage, key).facts["rows"]) for key in work.rows)
            parts.append(np.zeros((count, len(index)), dtype=np.float32))
    facts = artifacts.get(storage, work.rows[0]).facts
    return {"jacobian": {"rows": np.concatenate(parts, axis=1)}}, {
        "examples": facts["examples"],
        "quarantined": facts["quarantined"],
    }


def row_norms(
    storage: Storage, rows: Sequence[str], spectra: Mapping[str, Spectrum]
) -> dict[str, NDArray[np.float64]]:
    """‖J_ij‖² over all rows, (p_out, p_in) for every module; zero for modules that J does not reach."""
    reached = artifacts.stems(artifacts.get(storage, rows[0]))
    found = {}
    for name, spectrum in spectra.items():
        total = np.zeros(spectrum.square.size)
        if name in reached:
            for block in _blocks(storage, rows, name):
                total += np.einsum("rk,rk->k", block, block, dtype=np.float64)
        found[name] = total.reshape(spectrum.square.shape)
    return found


def _blocks(storage: Storage, rows: Sequence[str], name: str) -> Any:
    for key in rows:
        yield artifacts.read(storage, artifacts.get(storage, key), name)["rows"]
