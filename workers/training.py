"""Training a loaded model in place, and putting it back: a plain AdamW loop on what the service's masks mark.

What decides the result is the examples, the recipe and the seed. Examples are taken in an order drawn by seed,
epoch and id, so that two subsets see what they share in the same order, and a dataset's own order is of no matter.
Nothing here knows what is measured afterwards, or writes anything.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.errors import Invalid
from service.terms import LossReduction
from service.training import LoraRecipe, Recipe, Schedule
from service.work import Reading
from workers.batches import collate
from workers.gradients import losses
from workers.masks import Tokens, split
from workers.models import Loaded
from workers.prepare import out_of_memory, planned

Pieces = dict[str, list[Tokens]]  # of every example the windows that it runs in, one as a rule


@dataclass(frozen=True)
class Trained:
    """``losses`` (steps,): the objective of every step's batch, before the step."""

    losses: tuple[float, ...]
    tokens: int


@contextmanager
def trainable(loaded: Loaded, recipe: Recipe, seed: int) -> Iterator[list[nn.Parameter]]:
    """The parameters that the recipe trains; afterwards the model is as it was, bit for bit, whatever happens.

    A LoRA starts at random by the seed. Raises Invalid when it fits no linear map.
    """
    model: nn.Module = loaded.model
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # of a LoRA's start and of dropout
        with _lora(loaded, recipe.lora) if recipe.lora is not None else _whole(model) as parameters:
            try:
                yield parameters
            finally:
                model.eval()


@contextmanager
def _whole(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    before = [each.detach().to("cpu", copy=True) for each in parameters]  # a GPU has enough to hold already
    try:
        for each in parameters:
            each.requires_grad_(True)
        yield parameters
    finally:
        with torch.no_grad():
            for each, saved in zip(parameters, before, strict=True):
                each.requires_grad_(False)
                each.grad = None
                each.copy_(saved)


@contextmanager
def _lora(loaded: Loaded, recipe: LoraRecipe) -> Iterator[list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    targets = list(recipe.targets) if recipe.targets else sorted(loaded.linear_maps(len(loaded.blocks)))
    alpha: Any = recipe.alpha
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=alpha,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(each, Conv1D) for each in loaded.modules.values()),
    )
    try:
        wrapped = get_peft_model(loaded.model, config)
    except ValueError as error:
        raise Invalid("no_modules", f"The LoRA fits nothing: {str(error)[:500]}", param="recipe.lora") from error
    try:
        yield [each for each in wrapped.parameters() if each.requires_grad]
    finally:
        wrapped.unload()  # pyright: ignore[reportCallIssue]
        loaded.model.requires_grad_(False)


def train(
    loaded: Loaded,
    parameters: Sequence[nn.Parameter],
    reading: Reading,
    examples: Mapping[str, Tokens],
    recipe: Recipe,
    seed: int,
) -> Trained:
    """Train on ``examples`` by id, all of which have a token to predict. No example: no step.

    Raises Invalid (``training_diverged``) when a loss is not finite.
    """
    if not examples:
        return Trained((), 0)
    pieces = {item: _pieces(tokens, reading) for item, tokens in examples.items()}
    per_epoch = -(-len(examples) // recipe.batch_size)
    steps = recipe.epochs * per_epoch
    fused = all(each.device.type in {"cpu", "cuda"} for each in parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
    )
    loaded.model.train()
    told: list[float] = []
    for epoch in range(recipe.epochs):
        ids = order(list(examples), seed, epoch)
        for start in range(0, len(ids), recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(recipe, len(told), steps)
            batch = [piece for item in ids[start : start + recipe.batch_size] for piece in pieces[item]]
            value = _gradient(loaded, parameters, reading, recipe, batch)
            if not math.isfinite(value):
                raise Invalid(
                    "training_diverged",
                    f"The loss is not finite at step {len(told) + 1} of {steps}: lower the learning rate "
                    f"({recipe.learning_rate:g}) or set a clip.",
                    param="recipe.learning_rate",
                )
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            told.append(value)
    return Trained(tuple(told), recipe.epochs * sum(len(each) for own in pieces.values() for each in own))


def order(ids: Sequence[str], seed: int, epoch: int) -> list[str]:
    """The examples as an epoch takes them: of any subset, in the order in which the whole takes them."""
    return sorted(ids, key=lambda item: hashlib.sha256(f"{seed}:{epoch}:{item}".encode()).digest())


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate at a step from 0, as a factor: linearly up over the warm-up, then as the schedule says."""
    warmup = recipe.warmup * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    done = max(0.0, step - warmup) / max(1.0, steps - warmup)
    match recipe.schedule:
        case Schedule.CONSTANT:
            return 1.0
        case Schedule.COSINE:
            return 0.5 * (1 + math.cos(math.pi * done))
        case Schedule.LINEAR:
            return 1 - done


def _pieces(tokens: Tokens, reading: Reading) -> list[Tokens]:
    return [window for window in split(tokens, reading.max_length) if window.predicted.any()]


def _gradient(
    loaded: Loaded, parameters: Sequence[nn.Parameter], reading: Reading, recipe: Recipe, batch: Sequence[Tokens]
) -> float:
    """The batch's objective, whose gradient is left in the parameters: what does not fit at once is added up.

    ``mean``: the average over examples of their mean token loss; ``sum``: the average over tokens.
    """
    reduction = recipe.loss_reduction
    counted = np.sum([each.predicted.sum() for each in batch])
    total = float(counted) if reduction == LossReduction.SUM else len({id(each.example) for each in batch})
    while True:
        for each in parameters:
            each.grad = None
        value, padded, alone = 0.0, 0, False
        try:
            for group in planned(loaded, reading, [(0, each) for each in batch], range(len(batch))):
                some = [batch[row] for row in group]
                padded, alone = len(some) * max(map(len, some)), len(some) == 1
                rows = collate(some, pooling=None, reduction=reduction, device=loaded.device)
                with torch.autocast(loaded.device.type, dtype=torch.bfloat16, enabled=recipe.autocast):
                    loss = losses(loaded.model, rows).sum() / total
                loss.backward()
                value += loss.item()
            return value
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # No longer inside the handler, whose traceback holds on to the tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if alone:
            raise Invalid(
                "out_of_memory",
                f"Training does not fit into a worker's memory: one example of {padded} tokens. Lower max_length, "
                "or train a LoRA.",
                param="recipe.lora",
            )
        loaded.memory.full(padded)
