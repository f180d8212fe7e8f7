# pyright: reportMissingImports=false
"""What the bergson scripts share: our tokens as its dataset, our modules as its targets. Runs where it is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bergson.collection import collect_gradients
from bergson.collector.collector import CollectorComputer
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig, PreprocessConfig
from bergson.data import allocate_batches
from bergson.gradients import GradientProcessor
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel

from benchmarks.peers import exchange

PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


def dataset(batch: exchange.Batch) -> Dataset:
    """The columns that bergson's own pipeline makes; labels are unshifted, −100 where there is no target."""
    disable_progress_bars()
    return Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids in batch.ids],
            "labels": [labels.tolist() for labels in batch.labels()],
            "length": [len(ids) for ids in batch.ids],
        }
    )


def index_config(folder: Path, path: Path, options: dict[str, Any]) -> IndexConfig:
    return IndexConfig(
        run_path=str(path),
        model=str(folder / "model"),
        precision=PRECISION[options.get("dtype", "float32")],
        projection_dim=int(options.get("projection_dim", 16)),
        token_batch_size=int(options.get("token_batch_size", 2048)),
        loss_reduction=options.get("loss_reduction", "sum"),
        overwrite=True,
    )


def targets(model: PreTrainedModel, options: dict[str, Any]) -> set[str]:
    """Names as bergson has them: inside ``model.base_model``."""
    names = exchange.linear_names(model, options.get("modules"), options.get("layer"))
    return {name.removeprefix(model.base_model_prefix + ".") for name in names}


def collect(
    model: PreTrainedModel,
    data: Dataset,
    cfg: IndexConfig,
    *,
    modules: set[str],
    processor: GradientProcessor,
    objective: Callable[..., torch.Tensor] | None = None,
) -> None:
    """A finished store at ``cfg.run_path``, by ``collect_gradients``, of bergson's loss or of another objective.

    bergson itself swaps ``forward_backward`` like this where it fits Hessians with sampled labels.
    """
    cfg.partial_run_path.mkdir(parents=True)
    batches = allocate_batches(data["length"][:], cfg.token_batch_size)
    if objective is None:
        collect_gradients(model, data, processor, cfg, batches=batches, target_modules=modules)
        finish(cfg)
        return
    collector = GradientCollector(
        model=model.base_model,
        cfg=cfg,
        processor=processor,
        target_modules=modules,
        data=data,
        preprocess_cfg=PreprocessConfig(),
    )
    computer = CollectorComputer(model=model, data=data, collector=collector, batches=batches, cfg=cfg)
    computer.forward_backward = objective
    computer.run_with_collector_hooks(desc="objective")
    finish(cfg)


def finish(cfg: IndexConfig) -> None:
    """What bergson's commands do at the end of a run."""
    shutil.move(cfg.partial_run_path, cfg.run_path)
