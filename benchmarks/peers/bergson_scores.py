# pyright: reportMissingImports=false
"""TrackStar scores with bergson 2.5.1; runs in its environment (see ``run.call``).

Options: ``modules`` and ``layer`` (as in ``exchange.linear_names``; the concept lives at ``layer``, default the
last block); ``projection_dim`` (16); ``token_batch_size`` (2048); ``loss_reduction`` ``sum`` (bergson's default)
| ``mean``; ``damping`` (its ``InversionConfig.damping_factor``, default .1); ``target_components`` (1000).

Follows ``bergson.cli.trackstar``, with its functions in its order, fed with our tokens instead of a text column:

1. ``approximate_hessians(method="autocorrelation")`` on the training and on the query set: per module the
   second moment R of the projected gradient of each example's loss, p² × p², true labels. Projection:
   two-sided Rademacher with variance 1/p, P_out G P_inᵀ, seeded by module name. Loss on targets only: bergson
   masks every label that is −100, and takes unshifted labels.
2. ``mix_autocorrelation_matrices``: R = μ R_query + (1 − μ) R_train, μ such that the spectra cross at component
   1,000 (TrackStar, appendix A.1.3).
3. ``collect_gradients``: the training store, p² float32 numbers per module and example.
4. Queries are gradients of the same projection: of each query's loss, and, where the folder has a direction,
   of **−f_v** (f_v(x) = <v̂, mean of h_l over x's targets>), through bergson's collector with the objective
   exchanged. f_v(Q) is the mean over Q, so its gradient is the mean of those rows.
5. ``Attributor(unit_norm=True, hessian_path=R)``: both sides R^(−1/2), then unit length, then the inner product;
   ``unit_norm=False``: R⁻¹ on the query, nothing on the store. R is damped by .1 × its mean eigenvalue.

Sign: positive means that training on z lowers L(Q), or raises f_v(Q).

bergson's leaderboard uses ``unit_normalize`` and mixes, with one column per query; a query set's score is the
mean of its columns. That is ``scores_<query>_mixed_cosine_each``. ``scores_<query>_mixed_cosine`` has one query
column, the mean gradient. To be fair to it every other setting is written too, (N,) each:

    scores_{loss|concept}_{mixed|train}_{cosine|cosine_each|dot}.npy

``train`` is R_train alone (``mix_hessians=false``, which bergson advises where the query set is small).
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.cli.commands import Hessian
from bergson.config import HessianConfig, InversionConfig
from bergson.config.config_io import save_run_config
from bergson.data import column_offsets, load_gradients
from bergson.hessians.hessian_approximations import hessian_worker
from bergson.process_grads import mix_autocorrelation_matrices
from bergson.query.attributor import Attributor
from bergson.utils.worker_utils import processor_for, setup_model_and_peft
from datasets import Dataset

from benchmarks.peers import exchange
from benchmarks.peers.bergson_common import collect, dataset, finish, index_config, targets


def concept_objective(layer: int, v: np.ndarray) -> Callable[..., torch.Tensor]:
    """In the form of bergson's ``fwd_bwd``: backward of −f_v summed over the batch; −f_v of each example."""
    direction = torch.from_numpy(v)

    def forward_backward(model: Any, x: torch.Tensor, y: torch.Tensor, _batch: dict[str, Any]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = exchange.block_list(model)[1][layer - 1].register_forward_hook(
            lambda _module, _inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        try:
            final = model.base_model(x).last_hidden_state
        finally:
            handle.remove()
        along = seen[0] @ direction.to(seen[0])
        target = y != exchange.IGNORED
        values = -(along * target).sum(1) / target.sum(1).clamp(min=1)
        (values.sum() + 0.0 * final.sum()).backward()  # modules past block l get a gradient, of zero
        model.zero_grad()
        return values

    return forward_backward


def fit_hessian(folder: Path, path: Path, data: Dataset, modules: set[str], options: dict[str, Any]) -> Path:
    """``approximate_hessians``, with the dataset given instead of loaded."""
    cfg, hessian_cfg = index_config(folder, path, options), HessianConfig(method="autocorrelation")
    cfg.partial_run_path.mkdir(parents=True)
    save_run_config(Hessian(hessian_cfg=hessian_cfg, index_cfg=cfg), cfg.partial_run_path)
    hessian_worker(0, 0, 1, cfg, hessian_cfg, data, target_modules=modules)
    finish(cfg)
    return path


def store_rows(path: Path, modules: list[str], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """A store's rows per module, as ``Attributor.search`` takes queries."""
    stored = torch.from_numpy(np.array(load_gradients(path), dtype=np.float32))
    spans = column_offsets(sizes)
    return {name: stored[:, slice(*spans[name])] for name in modules}


def in_order(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(Q, N) scores in the order of the examples, from ``search``'s descending ones."""
    values, indices = found
    return torch.zeros_like(values).scatter(1, indices, values)


def score(folder: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fit, collect, query, write the arrays; the content of result.json."""
    train = exchange.read_tokens(folder / exchange.TOKENS)
    query = exchange.read_tokens(folder / exchange.QUERY_TOKENS)
    train_data, query_data = dataset(train), dataset(query)
    model, _ = setup_model_and_peft(index_config(folder, work, options))
    modules = targets(model, options)
    layer = int(options.get("layer") or len(exchange.block_list(model)[1]))
    seconds: dict[str, float] = {}

    began = time.perf_counter()
    hessians = {"train": fit_hessian(folder, work / "hessian_train", train_data, modules, options)}
    seconds["hessian_train"] = time.perf_counter() - began
    of_query = fit_hessian(folder, work / "hessian_query", query_data, modules, options)
    hessians["mixed"] = mix_autocorrelation_matrices(
        of_query, hessians["train"], work / "hessian_mixed", int(options.get("target_components", 1000))
    )

    processor = processor_for(index_config(folder, work, options))
    shared = {"modules": modules, "processor": processor}
    began = time.perf_counter()
    collect(model, train_data, index_config(folder, work / "store", options), **shared)
    seconds["collect"] = time.perf_counter() - began

    queries = {"loss": work / "query_loss"}
    collect(model, query_data, index_config(folder, queries["loss"], options), **shared)
    if (folder / exchange.DIRECTION).exists():
        queries["concept"] = work / "query_concept"
        objective = concept_objective(layer, exchange.direction(folder))
        collect(model, query_data, index_config(folder, queries["concept"], options), **shared, objective=objective)

    began = time.perf_counter()
    arrays = search(work / "store", hessians, queries, float(options.get("damping", 0.1)))
    seconds["query"] = time.perf_counter() - began
    for name, scores in arrays.items():
        np.save(folder / f"scores_{name}.npy", scores.double().numpy())

    return {
        "scores": list(arrays),
        "modules": sorted(modules),
        "bytes_per_example": (work / "store" / "gradients.bin").stat().st_size / len(train),
        "numbers_per_example": load_gradients(work / "store").shape[1],
        "examples": len(train),
        "tokens": train.tokens,
        "queries": len(query),
        "seconds": seconds,
    }


def search(
    store: Path, hessians: dict[str, Path], queries: dict[str, Path], damping: float
) -> dict[str, torch.Tensor]:
    """(N,) scores by name, for every combination of query, Hessian and form."""
    sizes: dict[str, int] = exchange.read_json(store / "info.json")["grad_sizes"]
    made: dict[str, torch.Tensor] = {}
    for hessian, hessian_path in hessians.items():
        for unit_norm in (True, False):
            attributor = Attributor(
                store,
                unit_norm=unit_norm,
                hessian_path=hessian_path,
                inversion_cfg=InversionConfig(damping_factor=damping),
            )
            for kind, query in queries.items():
                rows = store_rows(query, attributor.ordered_modules, sizes)
                mean = {name: row.mean(0, keepdim=True) for name, row in rows.items()}
                name = f"{kind}_{hessian}_{'cosine' if unit_norm else 'dot'}"
                made[name] = in_order(attributor.search(mean, None))[0]
                if unit_norm:
                    made[f"{name}_each"] = in_order(attributor.search(rows, None)).mean(0)
    return made


def main() -> None:
    folder, options = exchange.asked()
    with tempfile.TemporaryDirectory() as work:
        exchange.write_json(folder / exchange.RESULT, score(folder, Path(work), options))


if __name__ == "__main__":
    main()
