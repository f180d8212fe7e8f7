"""Which eigenvectors and coordinates are kept, and what turns coordinates into embeddings."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from service import artifacts
from service.basis import SPECTRUM
from service.contracts import Example
from service.storage import Storage
from service.work import BasisWork, GatherWork, HeadWork, NarrowWork, ScoutWork
from workers import eigenbasis, selection
from workers.eigenbasis import Spectrum
from workers.models import Loaded
from workers.works.result import Result, Tensors
from workers.works.rows import blocks, jacobian_on

SCOUTS = 8  # random directions that stand for all v
AT_ONCE = 2  # of them per backward: every eigenvector is kept here
# What is held of each module beside its eigenvectors, in matrices of its size: rows of a batch, of all batches, and
# the sum of their squares.
HELD = 2 * AT_ONCE + 1
_NUMBERS = 1 << 22  # of λ that are taken in float64 at a time


def scout(work: ScoutWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Σ_j and Σ_i of E_v⟨v, J_ij⟩² λ_ij/(λ_ij+δ)² by module: the marginal importance of each eigenvector.

    As large as they come out; ``total`` is the sum over all modules here, for whoever compares questions.
    """
    generator = np.random.Generator(np.random.Philox(key=SCOUTS))
    directions = torch.from_numpy(generator.standard_normal((SCOUTS, loaded.width)).astype(np.float32))
    sides = eigenbasis.sides(storage, work.curvature, loaded, only=work.modules)
    squares: dict[str, torch.Tensor] = {}
    for chunk in directions.to(loaded.device).split(AT_ONCE):
        rows, _, _ = jacobian_on(work, sides, loaded, examples, chunk)
        for name in list(rows):
            square = rows.pop(name).square_().sum(0)
            squares[name] = squares[name].add_(square) if name in squares else square
    del sides
    facts = artifacts.get(storage, work.curvature).facts
    tensors: Tensors = {}
    total = 0.0
    for name in list(squares):
        of_lambda = artifacts.get(storage, str(facts[eigenbasis.LAMBDA + name]))
        square = artifacts.read(storage, of_lambda, "lambda")["square"]
        norm = squares.pop(name).cpu().numpy().reshape(square.shape)
        out, into = np.zeros(square.shape[0]), np.zeros(square.shape[1])
        few = max(1, _NUMBERS // square.shape[1])
        for start in range(0, len(square), few):
            some = slice(start, start + few)
            delta = work.damping * float(of_lambda.facts["mean"])
            matters = selection.spread(norm[some].astype(np.float64), square[some].astype(np.float64), delta)
            out[some] = matters.sum(axis=1)
            into += matters.sum(axis=0)
        tensors[name] = {"out": out, "into": into}
        total += float(out.sum())
    return tensors, {"total": total}


def narrow(work: NarrowWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    facts = artifacts.get(storage, work.curvature).facts
    eigen = artifacts.read(storage, artifacts.get(storage, str(facts[eigenbasis.EIGEN + work.module])), "eigen")
    of_lambda = artifacts.get(storage, str(facts[eigenbasis.LAMBDA + work.module]))
    square = artifacts.read(storage, of_lambda, "lambda")["square"]
    found: list[tuple[float, Mapping[str, NDArray[np.float64]]]] = []  # by question: its sum over all modules
    for groups in work.scouts:
        scouts = [artifacts.get(storage, key) for key in groups]
        total = sum(float(scout.facts["total"]) for scout in scouts)
        found += [
            (total if total > 0 else 1.0, artifacts.read(storage, scout, work.module))
            for scout in scouts
            if work.module in artifacts.stems(scout)
        ]
    kept: dict[str, NDArray[np.int64]] = {}
    for side in ("out", "into"):
        count = eigen[side].shape[1]
        matters = [of_module[side] / total for total, of_module in found]
        scores = np.sum(matters, axis=0) if matters else -np.arange(count)  # unscouted: the largest eigenvalues
        kept[side] = np.sort(np.argsort(-scores, kind="stable")[: work.p])
    vectors = {side: eigen[side][:, index] for side, index in kept.items()}
    corner = square[np.ix_(kept["out"], kept["into"])]
    return {"eigen": vectors, "lambda": {"square": corner}}, {"mean": of_lambda.facts["mean"]}


def basis(work: BasisWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
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


def head(work: HeadWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
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
        rows = np.concatenate([block[:, index] for block in blocks(storage, work.rows, name)])
        # λ = 0 with damping 0: no gradient of the sample has been there, so the coordinate says nothing.
        weight = np.divide(work.sign * rows, damped, out=np.zeros_like(rows), where=damped > 0).astype(np.float32)
        tensors[name] = {"index": index.astype(np.int32), "weight": weight}
    return tensors, {"coordinates": sum(len(index) for index in choice.values()), "of": sizes}


def gather(work: GatherWork, storage: Storage, _loaded: None, _examples: Sequence[Example]) -> Result:
    basis = artifacts.get(storage, work.basis)
    reached = artifacts.stems(artifacts.get(storage, work.rows[0]))
    parts = []
    for name in artifacts.stems(basis):
        if name == SPECTRUM:
            continue
        kept = artifacts.read(storage, basis, name)
        index = kept["index"]
        if name in reached:
            rows = np.concatenate([block[:, index] for block in blocks(storage, work.rows, name)])
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
            for block in blocks(storage, rows, name):
                total += np.einsum("rk,rk->k", block, block, dtype=np.float64)
        found[name] = total.reshape(spectrum.square.shape)
    return found
