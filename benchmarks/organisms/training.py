"""Train a base model on some of its data, and say where that leaves it: a pure function of task, subset, seed.

What is kept of a trained model is the mean pooled state of each query set at one layer, and its mean loss.
f_v is linear in the direction v, so the value for every v follows, and no direction enters a cache key.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.organism.train import Encoded, Recipe, save, train
from service.contracts import Example
from service.terms import Pooling
from workers.masks import tokenise

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

FORMAT = 1  # of an outcome; a change of training or measuring raises it


@dataclass(frozen=True)
class Task:
    """Everything but the subset and the training seed that decides an outcome."""

    base: Path  # HF folder
    examples: tuple[Example, ...]  # N training examples
    recipe: Recipe
    query_sets: Mapping[str, tuple[Example, ...]]
    layer: int
    pooling: Pooling

    def key(self) -> str:
        """sha256 over the base's weights and tokenizer, data, recipe, query sets, layer and pooling."""
        files = (self.base / "model.safetensors", self.base / "tokenizer.json")
        described = {
            "format": FORMAT,
            "torch": torch.__version__,
            "base": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
            "examples": [example.id for example in self.examples],
            "recipe": asdict(self.recipe),
            "query_sets": {name: [example.id for example in rows] for name, rows in self.query_sets.items()},
            "layer": self.layer,
            "pooling": self.pooling,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """A model on a query set: `dot` (d,) is the mean of a_l(x), `cosine` (d,) the same of hidden states divided
    by their norms, `loss` the mean over x of the mean token cross-entropy."""

    dot: Floats
    cosine: Floats
    loss: float


Outcome = Mapping[str, State]  # by the name of the query set


@dataclass(frozen=True)
class Measured:
    """n examples in batches: ids (B, T); pool_weight (B, T) and loss_weight (B, T), whose rows sum to 1."""

    batches: tuple[tuple[Tensor, Tensor, Tensor], ...]


def load_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return cast(LlamaForCausalLM, model), tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> Encoded:
    """Tokenised as the service does it, padded on the right: (n, t)."""
    tokens = [tokenise(example.content, tokenizer) for example in examples]
    shape = (len(tokens), max(map(len, tokens)))
    ids, target = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = torch.from_numpy(one.ids)
        target[row, : len(one)] = torch.from_numpy(one.predicted)
    return Encoded(ids, target, torch.tensor([len(one) for one in tokens]))


def measurable(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], pooling: Pooling, batch_size: int = 32
) -> Measured:
    """Examples made ready to be measured often; batches of similar length, so not in their order."""
    ordered = sorted(examples, key=lambda one: len(tokenise(one.content, tokenizer)))
    batches = []
    for at in range(0, len(ordered), batch_size):
        some = ordered[at : at + batch_size]
        data = encode(tokenizer, some)
        pooled = torch.zeros(data.input_ids.shape)
        for row, one in enumerate(some):
            mask = tokenise(one.content, tokenizer).pooled(pooling)
            pooled[row, : len(mask)] = torch.from_numpy(mask / mask.sum())
        batches.append((data.input_ids, pooled, data.target / data.target.sum(1, keepdim=True)))
    return Measured(tuple(batches))


@torch.inference_mode()
def measure(model: LlamaForCausalLM, data: Measured, layer: int) -> State:
    dot, cosine, losses = [], [], []
    hidden: list[Tensor] = []

    def keep(_module: Module, _inputs: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[layer - 1].register_forward_hook(keep)
    try:
        for ids, pool_weight, loss_weight in data.batches:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            states = hidden.pop()  # (B, T, d)
            unit = states / states.norm(dim=-1, keepdim=True)
            dot.append(torch.einsum("btd,bt->bd", states, pool_weight))
            cosine.append(torch.einsum("btd,bt->bd", unit, pool_weight))
            tokens = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            losses.append((tokens * loss_weight[:, 1:]).sum(1))
    finally:
        handle.remove()
    means = [torch.cat(values).double().mean(0).numpy() for values in (dot, cosine, losses)]
    return State(means[0], means[1], float(means[2]))


class Trainer:
    """A task made ready to run many times: model loaded, everything tokenised."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.base, self.tokenizer = load_model(task.base)
        self.data = encode(self.tokenizer, task.examples)
        self.query_sets = {
            name: measurable(self.tokenizer, rows, task.pooling) for name, rows in task.query_sets.items()
        }

    def outcome(self, subset: Bools, seed: int) -> Outcome:
        """After training the base on the examples of the subset (N,), in batches shuffled by the seed."""
        model = deepcopy(self.base)
        train(model, self.data[torch.from_numpy(np.flatnonzero(subset))], self.task.recipe, seed=seed)
        return {name: measure(model, data, self.task.layer) for name, data in self.query_sets.items()}


def full_run(
    base: Path, examples: Sequence[Example], recipe: Recipe, *, seed: int, points: Sequence[tuple[float, Path]]
) -> None:
    """Train on all of the data and save the model at every point, the base at share 0 among them."""
    model, tokenizer = load_model(base)
    shares = [share for share, _ in points]
    run = train(model, encode(tokenizer, examples), recipe, seed=seed, checkpoints_at=shares)
    for share, folder in points:
        save(model, tokenizer, folder, run.snapshots[share])
