"""Some steps of the training of a sparse autoencoder on rows that an index holds."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from service import artifacts, codec, sae, saelens
from service.contracts import Example
from service.errors import Invalid
from service.indexes import MANIFEST
from service.row_blocks import RowBlocks
from service.rows import F32
from service.sae_records import SaeRecipe, TrainSaeWork
from service.saelens import SaeConfig
from service.specs import IndexManifest
from service.storage import Storage
from workers import sae_training
from workers.models import Loaded
from workers.sae_training import State
from workers.works.result import Result

STATE, SAE = "state", "sae"
FEWEST_ROWS = 32


def train(work: TrainSaeWork, storage: Storage, _loaded: Loaded | None, _examples: Sequence[Example]) -> Result:
    """The state after step ``stop``; after the last one the weights for raw rows, and what they are worth."""
    began = time.perf_counter()
    recipe = work.recipe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, held_out = split(_rows(storage, work), recipe)
    rows = torch.from_numpy(training).to(device)
    before = 0.0
    if work.state is None:
        state = sae_training.begin(rows, recipe)
    else:
        artifact = artifacts.get(storage, work.state)
        tensors = {
            name: torch.from_numpy(each).to(device)
            for name, each in artifacts.read(storage, artifact, STATE).items()
        }
        state = State.of(tensors, float(artifact.facts["scale"]), float(artifact.facts["variance"]))
        before = float(artifact.facts["seconds"])
    state = sae_training.advance(state, rows, recipe, work.start, work.stop)
    facts: dict[str, float | int | str] = {"scale": state.scale, "variance": state.variance}
    tensors = {name: each.cpu().numpy() for name, each in state.flat().items()}
    if not all(np.isfinite(each).all() for each in tensors.values()):
        detail = f"Training diverged before step {work.stop}: lower the learning_rate ({recipe.learning_rate:g})."
        raise Invalid("sae_diverged", detail, param="learning_rate")
    files = {STATE: tensors}
    if work.stop == recipe.steps:
        weights = {name: each.cpu().numpy() for name, each in sae_training.raw(state).items()}
        files = {SAE: weights}
        facts |= _worth(weights, training, held_out, recipe)
    facts["seconds"] = round(before + time.perf_counter() - began, 3)
    return files, facts


def split(rows: F32, recipe: SaeRecipe) -> tuple[F32, F32]:
    """Rows to train on and rows held out, drawn by the seed. Raises Invalid when there are too few."""
    if len(rows) < FEWEST_ROWS:
        detail = f"The index holds {len(rows)} rows; an SAE is trained on {FEWEST_ROWS} at least."
        raise Invalid("too_few_rows", detail, param="index")
    order = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(len(rows))
    count = max(1, round(recipe.held_out * len(rows)))
    return rows[np.sort(order[count:])], rows[np.sort(order[:count])]


def _rows(storage: Storage, work: TrainSaeWork) -> F32:
    """The rows of the index, or as many of them as are wanted, drawn by the seed."""
    data = storage.read(f"indexes/{work.index}/{MANIFEST}", sha256=work.manifest_sha256)
    manifest = codec.decode(IndexManifest, data)
    total, most = manifest.counts.indexed, work.recipe.most_rows
    chosen = np.arange(total)
    if total > most:
        draw = np.random.Generator(np.random.Philox(key=[work.recipe.seed, 1]))
        chosen = np.sort(draw.choice(total, most, replace=False))
    parts, start = [], 0
    for block in RowBlocks(storage, manifest, work.array):
        here = chosen[(chosen >= start) & (chosen < start + len(block))] - start
        parts.append(block[here])
        start += len(block)
    return np.concatenate(parts) if parts else np.zeros((0, work.array.dims), np.float32)


def _worth(
    weights: dict[str, F32], training: F32, held_out: F32, recipe: SaeRecipe
) -> dict[str, float | int | str]:
    """Measured with the numpy maths that answers are made of."""
    config = SaeConfig("topk", training.shape[1], recipe.features, saelens.hook_of(1), 1, k=recipe.k)
    held = sae.Sae(config, weights["W_enc"], weights["W_dec"], weights["b_dec"], {"b_enc": weights["b_enc"]})
    rebuilt = [sae.decode(held, *sae.encode(held, block)) for block in sae.blocks_of(held_out, recipe.features)]
    fired = np.bincount(sae.firing(held, training).features, minlength=recipe.features)
    return {
        "rows": len(training),
        "rows_held_out": len(held_out),
        "explained_variance": sae.explained_variance(held_out, np.concatenate(rebuilt)),
        "l0": len(sae.firing(held, held_out).values) / len(held_out),
        "dead": float((fired == 0).mean()),
    }
