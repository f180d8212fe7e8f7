"""The model's own answers to the prompts of some examples, which projection differences compare with."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from service import artifacts
from service.contracts import Example, Quarantined
from service.storage import Storage
from service.terms import LongExamples
from service.work import AnswersWork, Reading
from workers.answers import Ids, ends_of, generate
from workers.batches import BATCH_COST, plan
from workers.curvature import uniforms
from workers.masks import UnrenderableError, fit, tokenise
from workers.models import Loaded
from workers.prepare import check_vocabulary, out_of_memory, too_large
from workers.works.result import Result

FILE = "answers"
_NO_GRAPH = 4  # times the token budget: nothing is kept for a backward


def answers(work: AnswersWork, _storage: Storage | None, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Token ids of all answers one after another, and their lengths; 0: the example cannot be answered."""
    prompts: dict[int, Ids] = {}
    limits: dict[int, int] = {}
    for position, example in enumerate(examples):
        prompt = prompt_of(example, loaded, work.reading)
        if isinstance(prompt, Quarantined):
            continue
        check_vocabulary(loaded, work.reading, prompt)
        limit = min(work.spec.max_new_tokens, work.reading.max_length - len(prompt))
        if limit > 0:
            prompts[position], limits[position] = prompt, limit
    found: dict[int, Ids] = {}
    waiting = _planned(work, loaded, prompts, limits)
    while waiting:
        group, waiting = waiting[0], waiting[1:]
        try:
            answered = _group(work, loaded, examples, {each: prompts[each] for each in group}, limits)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            answered = None  # and no longer inside the handler, whose traceback holds on to the tensors
        if answered is not None:
            found |= answered
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        padded = len(group) * max(len(prompts[each]) + limits[each] for each in group)
        if len(group) == 1:
            raise too_large(examples[group[0]], padded)
        loaded.memory.full(padded // _NO_GRAPH)
        left = [each for rest in (group, *waiting) for each in rest]
        waiting = _planned(work, loaded, {each: prompts[each] for each in left}, limits)
    empty = np.zeros(0, dtype=np.int64)
    each = [found.get(position, empty) for position in range(len(examples))]
    tensors = {
        "ids": np.concatenate([empty, *each]).astype(np.int32),
        "lengths": np.array([len(ids) for ids in each], dtype=np.int32),
    }
    return {FILE: tensors}, {"examples": len(found), "tokens": int(tensors["lengths"].sum())}


def _planned(
    work: AnswersWork, loaded: Loaded, prompts: Mapping[int, Ids], limits: Mapping[int, int]
) -> list[list[int]]:
    """The prompts in groups that are answered together; those with similar limits are neighbours."""
    positions = sorted(prompts, key=lambda position: (limits[position], position))
    lengths = [len(prompts[position]) + limits[position] for position in positions]
    cost = BATCH_COST.get(loaded.device.type, BATCH_COST["cuda"])
    budget = _NO_GRAPH * loaded.memory.within(work.reading.token_budget)
    return [[positions[row] for row in group] for group in plan(lengths, budget, cost)]


def _group(
    work: AnswersWork,
    loaded: Loaded,
    examples: Sequence[Example],
    prompts: Mapping[int, Ids],
    limits: Mapping[int, int],
) -> dict[int, Ids]:
    """Answers to prompts of one batch. Where the context leaves them different limits, those that have reached
    theirs leave the batch: no position beyond the context is ever computed. So do those that reach a length from
    which the model computes something else; they go on together when no other is below it.
    """
    ends = ends_of(loaded, work.spec.ends)
    uniform = {each: uniforms(work.spec.seed, examples[each].id, limits[each]) for each in prompts}
    made = {each: np.zeros(0, dtype=np.int64) for each in prompts}
    running = list(prompts)
    while running:
        texts = {each: np.concatenate([prompts[each], made[each]]) for each in running}
        regime = {each: loaded.regime(len(texts[each])) for each in running}
        lowest = min(regime.values())
        some = [each for each in running if regime[each] == lowest]
        steps = min(limits[each] - len(made[each]) for each in some)
        if lowest < len(loaded.switches):  # the token after the switch is still drawn from what lies before it
            steps = min(steps, loaded.switches[lowest] + 1 - max(len(texts[each]) for each in some))
        parts = generate(
            loaded,
            [texts[each] for each in some],
            [uniform[each][len(made[each]) : len(made[each]) + steps] for each in some],
            limit=steps,
            temperature=work.spec.temperature,
            ends=ends,
        )
        running = [each for each in running if regime[each] != lowest]
        for each, part in zip(some, parts, strict=True):
            made[each] = np.concatenate([made[each], part]) if len(part) else part  # empty: the model gave NaN
            if len(part) and limits[each] > len(made[each]) and part[-1] not in ends:
                running.append(each)
    return made


def read(storage: Storage, keys: Sequence[str]) -> Iterator[Ids]:
    """The answers of these artifacts, one per example, in order."""
    for key in keys:
        held = artifacts.read(storage, artifacts.get(storage, key), FILE)
        stops = np.cumsum(held["lengths"])
        for start, stop in zip(stops - held["lengths"], stops, strict=True):
            yield held["ids"][start:stop].astype(np.int64)


def prompt_of(example: Example, loaded: Loaded, reading: Reading) -> Ids | Quarantined:
    """What stands before the example's last answer, in the very tokens that are trained on: where a long example is
    cut on the left, that is what is left of it.
    """
    try:
        tokens = tokenise(example.content, loaded.tokenizer)
    except UnrenderableError as error:
        return Quarantined(example.id, error.code, error.detail)
    if reading.long_examples == LongExamples.TRUNCATE_LEFT:
        tokens = fit(tokens, reading.max_length, reading.long_examples) or tokens
    if not tokens.has_prompt:
        return Quarantined(example.id, "no_prompt", "Plain text has no prompt that a model could answer.")
    prompt = tokens.ids[: tokens.last_answer]
    if tokens.last_answer < 0 or not len(prompt):
        return Quarantined(example.id, "no_prompt", "There is no token before the answer.")
    return prompt
