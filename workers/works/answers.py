"""The model's own answers to the prompts of some examples, which projection differences compare with."""

from collections.abc import Iterator, Sequence

import numpy as np

from service import artifacts
from service.contracts import Example, Quarantined
from service.storage import Storage
from service.work import AnswersWork
from workers.answers import Ids, ends_of, generate
from workers.batches import BATCH_COST, plan
from workers.curvature import uniforms
from workers.masks import UnrenderableError, tokenise
from workers.models import Loaded
from workers.prepare import check_vocabulary
from workers.works.result import Result

FILE = "answers"
_NO_GRAPH = 4  # times the token budget: nothing is kept for a backward


def answers(work: AnswersWork, _storage: Storage, loaded: Loaded, examples: Sequence[Example]) -> Result:
    """Token ids of all answers one after another, and their lengths; 0: the example cannot be answered."""
    found: dict[int, Ids] = {}
    by_limit: dict[int, list[int]] = {}
    prompts: dict[int, Ids] = {}
    for position, example in enumerate(examples):
        prompt = prompt_of(example, loaded)
        if isinstance(prompt, Quarantined):
            continue
        check_vocabulary(loaded, work.reading, prompt)
        limit = min(work.spec.max_new_tokens, work.reading.max_length - len(prompt))
        if limit > 0:
            prompts[position] = prompt
            by_limit.setdefault(limit, []).append(position)
    for limit, positions in by_limit.items():
        lengths = [len(prompts[position]) + limit for position in positions]
        cost = BATCH_COST.get(loaded.device.type, BATCH_COST["cuda"])
        for group in plan(lengths, _NO_GRAPH * work.reading.token_budget, cost):
            members = [positions[row] for row in group]
            made = generate(
                loaded,
                [prompts[position] for position in members],
                [uniforms(work.spec.seed, examples[position].id, limit) for position in members],
                limit=limit,
                temperature=work.spec.temperature,
                ends=ends_of(loaded, work.spec.ends),
            )
            found |= dict(zip(members, made, strict=True))
    empty = np.zeros(0, dtype=np.int64)
    each = [found.get(position, empty) for position in range(len(examples))]
    tensors = {
        "ids": np.concatenate([empty, *each]).astype(np.int32),
        "lengths": np.array([len(ids) for ids in each], dtype=np.int32),
    }
    return {FILE: tensors}, {"examples": len(found), "tokens": int(tensors["lengths"].sum())}


def read(storage: Storage, keys: Sequence[str]) -> Iterator[Ids]:
    """The answers of these artifacts, one per example, in order."""
    for key in keys:
        held = artifacts.read(storage, artifacts.get(storage, key), FILE)
        stops = np.cumsum(held["lengths"])
        for start, stop in zip(stops - held["lengths"], stops, strict=True):
            yield held["ids"][start:stop].astype(np.int64)


def prompt_of(example: Example, loaded: Loaded) -> Ids | Quarantined:
    """What stands before the example's last answer, in the very tokens that are trained on."""
    try:
        tokens = tokenise(example.content, loaded.tokenizer)
    except UnrenderableError as error:
        return Quarantined(example.id, error.code, error.detail)
    if not tokens.has_prompt:
        return Quarantined(example.id, "no_prompt", "Plain text has no prompt that a model could answer.")
    prompt = tokens.ids[: tokens.last_answer]
    if tokens.last_answer < 0 or not len(prompt):
        return Quarantined(example.id, "no_prompt", "There is no token before the answer.")
    return prompt
