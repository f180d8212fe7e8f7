"""A retraining: train a model on some examples, measure it on a query set, and leave numbers alone behind."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from service import artifacts, datasets
from service.contracts import Example, Quarantined
from service.errors import Invalid
from service.storage import Storage
from service.terms import ConceptFunction, LossReduction
from service.training import ReadAnswersWork, RetrainWork
from service.work import AnswersWork
from workers.activations import block_outputs, pool, run_until
from workers.batches import Batch
from workers.gradients import concept_values, losses
from workers.masks import Tokens
from workers.models import Loaded
from workers.prepare import Prepared, prepare
from workers.training import train, trainable
from workers.works import answers
from workers.works.result import Result, Tensors

STATE, ALONG = "state", "along"


def retrain(work: RetrainWork, storage: Storage, loaded: Loaded, _examples: Sequence[Example]) -> Result:
    """``state``: ``dot`` and ``cosine`` (layers, d), the means over the query set of a_l(x), and of the same from
    hidden states divided by their norm; ``loss`` (1,). ``answers``, where asked for. The model is put back.
    """
    began = time.perf_counter()
    examples = sorted(_read(work, storage), key=lambda each: each.id)
    prepared = prepare(loaded, work.reading, examples, trains=True, pooling=None, windows=True)
    queries = datasets.to_examples(datasets.read_table(storage, work.query_set))
    by_id = {examples[position].id: tokens for position, tokens in prepared.tokens.items()}
    with trainable(loaded, work.recipe, work.seed) as parameters:
        trained = train(loaded, parameters, work.reading, by_id, work.recipe, work.seed)
        loaded.model.eval()
        measuring = time.perf_counter()
        state, used = measure(loaded, work, queries)
        tensors: Tensors = {STATE: state}
        if work.answers is not None:
            tensors |= answers.answers(AnswersWork(work.reading, work.answers), storage, loaded, queries)[0]
    ended = time.perf_counter()
    facts: dict[str, float | int | str] = {
        "examples": len(by_id),
        "set_aside": len(prepared.aside),
        "steps": len(trained.losses),
        "tokens": trained.tokens,
        "queries": used,
        "train_s": round(measuring - began, 4),
        "measure_s": round(ended - measuring, 4),
    }
    if trained.losses:
        facts |= {"loss_first": trained.losses[0], "loss_last": trained.losses[-1]}
    return tensors, facts


def _read(work: RetrainWork, storage: Storage) -> Iterator[Example]:
    for source in work.data:
        if source.rows:
            yield from datasets.to_examples(datasets.read_table(storage, source.dataset).take(list(source.rows)))


def measure(loaded: Loaded, work: RetrainWork, queries: Sequence[Example]) -> tuple[dict[str, Any], int]:
    """The state of the model on the query set, and how many of its examples could be used. Raises Invalid when
    none can, or when a number is not finite.
    """
    prepared = prepare(loaded, work.reading, queries, trains=True, pooling=work.pooling)
    if not prepared.tokens:
        reasons = sorted({each.reason for each in prepared.aside.values()})
        detail = f"No example of {work.query_set.id!r} can be measured: {', '.join(reasons) or 'it is empty'}."
        raise Invalid("empty_query_set", detail, param="query_set")
    reduction = work.recipe.loss_reduction
    shape = (2, len(loaded.blocks), loaded.width)
    total, loss = np.zeros(shape), 0.0

    def compute(_members: list[int], batch: Batch) -> tuple[np.ndarray, float]:
        with torch.no_grad(), _pooled(loaded.blocks, batch) as found:
            each = losses(loaded.model, batch).double().sum().item()
        return np.stack([row.double().sum(dim=1).cpu().numpy() for row in found], axis=1), each

    for _, (states, value) in prepared.each(
        loaded, work.reading, compute, pooling=work.pooling, reduction=reduction
    ):
        total += states
        loss += value
    dot, cosine = (total / len(prepared.tokens)).astype(np.float32)
    mean = np.array([loss / len(prepared.tokens)])
    if not all(np.isfinite(each).all() for each in (dot, cosine, mean)):
        detail = "The retrained model gives NaN or infinity on the query set: lower the learning rate."
        raise Invalid("training_diverged", detail, param="recipe.learning_rate")
    return {"dot": dot, "cosine": cosine, "loss": mean}, len(prepared.tokens)


@contextmanager
def _pooled(blocks: Sequence[nn.Module], batch: Batch) -> Iterator[list[Tensor]]:
    """(2, B, d) of every block in order: pooled as they come, so that no layer's states are kept."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        own = Batch(*(each.to(hidden.device) for each in vars(batch).values()))
        both = [concept_values(hidden, own, function) for function in (ConceptFunction.DOT, ConceptFunction.COSINE)]
        found.append(torch.stack(both).to(batch.ids.device))

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def read_answers(work: ReadAnswersWork, storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """``values`` (n,): ⟨v̂, a_l(x, y)⟩ of every prompt's answer y by the run's model; NaN where there is none."""
    direction = artifacts.read(storage, artifacts.get(storage, work.direction), "directions")["rows"][0]
    v = torch.tensor(direction, device=loaded.device)
    tokens: dict[int, Tokens] = {}
    for position, answer in enumerate(answers.read(storage, [work.run])):
        prompt = answers.prompt_of(examples[position], loaded, work.reading)
        if isinstance(prompt, Quarantined) or not len(answer):
            continue
        ids = np.concatenate([prompt, answer])
        bos = bool(ids[0] == loaded.tokenizer.bos_token_id)
        made = Tokens(ids, np.arange(len(ids)) >= len(prompt), bos, has_prompt=True)
        if made.pooled(work.pooling).any():
            tokens[position] = made
    values = np.full(len(examples), np.nan)

    def along(_members: list[int], batch: Batch) -> np.ndarray:
        with torch.no_grad(), block_outputs(loaded.blocks, [work.layer], stop=True) as outputs:
            run_until(loaded.model, batch.ids)
        pooled = pool(outputs[work.layer], batch.pool_weight)
        return (pooled @ v.to(pooled)).double().cpu().numpy()

    whole = Prepared(examples, tokens, {})
    for members, rows in whole.each(
        loaded, work.reading, along, pooling=work.pooling, reduction=LossReduction.MEAN
    ):
        values[members] = rows
    return {ALONG: {"values": values}}, {"examples": len(tokens), "tokens": sum(map(len, tokens.values()))}
