"""From examples to batches: tokenise, mask, fit into the context, or say why an example cannot run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.contracts import Example, Quarantined
from service.errors import Invalid
from service.terms import LongExamples, LossReduction, Pooling
from service.work import Reading
from workers.batches import BATCH_COST, Batch, collate, plan
from workers.masks import Tokens, UnrenderableError, fit, split, tokenise
from workers.models import Loaded

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """``tokens`` by position among the ``examples`` that were given; the others are in ``aside``."""

    examples: Sequence[Example]
    tokens: dict[int, Tokens]
    aside: dict[int, Quarantined]

    def each(
        self,
        loaded: Loaded,
        reading: Reading,
        compute: Callable[[list[int], Batch], T],
        *,
        pooling: Pooling | None,
        reduction: LossReduction,
    ) -> Iterator[tuple[list[int], T]]:
        """What ``compute`` gives for every batch, and the positions in it: an example in windows stands in several.

        When a batch does not fit into memory, it and what is left are planned again with half its size, and so is
        every later one on this model. Raises Invalid for an example that does not fit alone: to set it aside would
        make the result depend on who else used the memory.
        """
        pieces = self._pieces(reading, pooling)
        waiting = planned(loaded, reading, pieces, range(len(pieces)))
        while waiting:
            group, waiting = waiting[0], waiting[1:]
            members = [pieces[row][0] for row in group]
            chosen = [pieces[row][1] for row in group]
            try:
                batch = collate(chosen, pooling=pooling, reduction=reduction, device=loaded.device)
                found = compute(members, batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                found = None  # and no longer inside the handler, whose traceback holds on to the tensors
            if found is not None:
                yield members, found
                found = None  # free before the next one is made
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            padded, budget = len(group) * max(map(len, chosen)), loaded.memory.within(reading.token_budget)
            if len(group) == 1 and budget <= padded:
                raise too_large(self.examples[members[0]], len(chosen[0]))
            # A Jacobian repeats its batch up to the budget: a single example may fit with fewer copies.
            loaded.memory.full(padded if len(group) > 1 else budget)
            left = [row for rest in (group, *waiting) for row in rest]
            waiting = planned(loaded, reading, pieces, left)

    def is_long(self, position: int, reading: Reading) -> bool:
        """Whether the example is longer than the context, and so was cut or runs in windows."""
        tokens = self.tokens[position]
        return tokens.truncated or len(tokens) > reading.max_length

    def finite(
        self,
        loaded: Loaded,
        reading: Reading,
        compute: Callable[[list[int], Batch], Mapping[str, Sequence[Tensor]]],
        *,
        pooling: Pooling | None,
        reduction: LossReduction,
    ) -> tuple[dict[str, list[Tensor]], list[int]]:
        """Sums over all batches of what ``compute`` gives by name, and the positions that went into them.

        A batch whose result holds NaN or infinity is done again example by example; the damaged ones are left out.
        """
        sums: dict[str, list[Tensor]] = {}
        used: list[int] = []
        about = {"pooling": pooling, "reduction": reduction}
        for members, found in self.each(loaded, reading, compute, **about):
            fine = _add(sums, found)
            del found  # as large as the sums, and about to be made again
            if fine:
                used.extend(members)
                continue
            for position in members:
                alone = Prepared(self.examples, {position: self.tokens[position]}, self.aside)
                if all(_add(sums, each) for _, each in alone.each(loaded, reading, compute, **about)):
                    used.append(position)
        return sums, used

    def _pieces(self, reading: Reading, pooling: Pooling | None) -> list[tuple[int, Tokens]]:
        """Position and tokens of every example, or of each of its windows that counts for anything."""
        pieces = []
        for position, tokens in self.tokens.items():
            windows = split(tokens, reading.max_length)
            for window in windows:
                pooled = pooling is not None and window.pooled(pooling).any()
                if len(windows) == 1 or pooled or window.predicted.any():
                    pieces.append((position, window))
        return pieces


def _add(sums: dict[str, list[Tensor]], found: Mapping[str, Sequence[Tensor]]) -> bool:
    """Add to the sums what is finite throughout; whether it was."""
    if not all(bool(each.isfinite().all()) for values in found.values() for each in values):
        return False
    for name, values in found.items():
        known = sums.get(name)
        pairs = zip(known, values, strict=True) if known else ()
        sums[name] = [total.add_(value) for total, value in pairs] or list(values)
    return True


def too_large(example: Example, tokens: int) -> Invalid:
    """The example does not fit into memory, even alone."""
    return Invalid(
        "out_of_memory",
        f"Example {example.id} does not fit into a worker's memory: {tokens} tokens at once. Lower max_length or "
        "WHENCE_CURVATURE_BYTES, use WHENCE_DTYPE=bfloat16, track fewer modules, or leave the example out.",
        param="dataset",
        context={"example": example.id},
    )


def planned(
    loaded: Loaded, reading: Reading, pieces: Sequence[tuple[int, Tokens]], rows: Sequence[int]
) -> list[list[int]]:
    """``rows`` of the pieces in batches, by lengths and what fits; longest first."""
    cost = BATCH_COST.get(loaded.device.type, BATCH_COST["cuda"])
    budget = loaded.memory.within(reading.token_budget)
    found: list[list[int]] = []
    for regime in range(len(loaded.switches), -1, -1):
        some = [row for row in rows if loaded.regime(len(pieces[row][1])) == regime]
        groups = plan([len(pieces[row][1]) for row in some], budget, cost)
        found += [[some[place] for place in group] for group in groups]
    return found


_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc", "PyObject pointer is null")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is the device's, or the machine's, memory being full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in _FULL)


@contextmanager
def naming_memory(title: str) -> Iterator[None]:
    """What runs out of memory here although batches have been halved says so: its tables did not fit."""
    try:
        yield
    except BaseException as error:  # Rust libraries panic, which is no Exception
        if not out_of_memory(error):
            raise
        raise Invalid(
            "out_of_memory",
            f"{title[:1].upper()}{title[1:]} does not fit into a worker's memory ({str(error)[:300]}). Start the "
            "api with a lower WHENCE_CURVATURE_BYTES or WHENCE_DTYPE=bfloat16, or ask for fewer modules, a smaller "
            "projection_dim or fewer coordinates.",
        ) from error


def prepare(
    loaded: Loaded,
    reading: Reading,
    examples: Sequence[Example],
    *,
    trains: bool,
    pooling: Pooling | None,
    windows: bool = False,
) -> Prepared:
    """``trains``: an example without a token to predict is set aside; ``pooling``: one without a token to pool;
    ``windows``: the caller adds up the windows of a split example. Elsewhere such an example is cut on the right.
    """
    if reading.long_examples == LongExamples.SPLIT_AND_SUM and not windows:
        reading = replace(reading, long_examples=LongExamples.TRUNCATE_RIGHT)
    found = Prepared(examples, {}, {})
    for position, example in enumerate(examples):
        ready = _one(loaded, reading, example, trains, pooling)
        if isinstance(ready, Quarantined):
            found.aside[position] = ready
        else:
            check_vocabulary(loaded, reading, ready.ids)
            found.tokens[position] = ready
    return found


def check_vocabulary(loaded: Loaded, reading: Reading, ids: NDArray[np.int64]) -> None:
    """Raise Invalid for a token that the model has no embedding for: looked up on a GPU it would end the worker."""
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])  # pyright: ignore
    if ids.max(initial=0) >= vocabulary:
        raise Invalid(
            "vocabulary_too_small",
            f"The tokenizer gives token {ids.max()}, but the model of fingerprint {reading.model_fingerprint[:12]} "
            f"knows {vocabulary}: a base or checkpoint from before the vocabulary grew. Build with checkpoints "
            "'end' and without kind 'difference', or declare others.",
            param="checkpoints",
        )


def _one(
    loaded: Loaded, reading: Reading, example: Example, trains: bool, pooling: Pooling | None
) -> Tokens | Quarantined:
    try:
        whole = tokenise(example.content, loaded.tokenizer)
    except UnrenderableError as error:
        return Quarantined(example.id, error.code, error.detail)
    tokens = fit(whole, reading.max_length, reading.long_examples)
    if tokens is None:
        detail = f"{len(whole)} tokens, the limit is {reading.max_length}."
        return Quarantined(example.id, "too_long", detail)
    cut = f" within the first {reading.max_length} of {len(whole)} tokens" if tokens.truncated else ""
    if trains and not tokens.predicted.any():
        reason = "target_cut_off" if tokens.truncated else "no_target"
        return Quarantined(example.id, reason, f"There is no token to predict{cut}.")
    if pooling is not None and not tokens.pooled(pooling).any():
        return Quarantined(example.id, "nothing_to_pool", f"No token is left to pool by {pooling}{cut}.")
    return tokens
