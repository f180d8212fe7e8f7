"""Pooled activations of single examples, as an artifact: f_v of each of them follows for every v."""

import numpy as np
import torch

from service.contracts import Example
from service.storage import Storage
from service.terms import LossReduction
from service.work import PooledWork
from workers.activations import block_outputs, run_until
from workers.batches import Batch
from workers.gradients import concept_values
from workers.models import Loaded
from workers.prepare import prepare
from workers.works.result import Result, Tensors


def pooled(work: PooledWork, _storage: Storage, loaded: Loaded, examples: list[Example]) -> Result:
    """``rows`` (n, d) float32, finite, and ``places`` (n,) of their examples among those given, ascending."""
    prepared = prepare(loaded, work.reading, examples, trains=False, pooling=work.pooling)

    def of_batch(_members: list[int], batch: Batch) -> torch.Tensor:
        with torch.no_grad(), block_outputs(loaded.blocks, (work.layer,), stop=True) as outputs:
            run_until(loaded.model, batch.ids)
        return concept_values(outputs[work.layer], batch, work.function).float().cpu()

    found: dict[int, np.ndarray] = {}
    about = {"pooling": work.pooling, "reduction": LossReduction.MEAN}
    for members, values in prepared.each(loaded, work.reading, of_batch, **about):
        found |= {place: row for place, row in zip(members, values.numpy(), strict=True) if np.isfinite(row).all()}
    places = sorted(found)
    rows = np.stack([found[place] for place in places]) if places else np.zeros((0, loaded.width), dtype=np.float32)
    tensors: Tensors = {"pooled": {"rows": rows, "places": np.array(places, dtype=np.int64)}}
    tokens = sum(len(each) for each in prepared.tokens.values())
    return tensors, {"examples": len(places), "quarantined": len(examples) - len(places), "tokens": tokens}
