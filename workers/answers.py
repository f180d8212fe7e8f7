"""What a model answers itself: sampled in batches, and the same whatever the batch.

Each position of each example has its own uniform number, drawn by seed and example id, and the token is where the
model's distribution reaches it: company, order and restarts change nothing but rounding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from workers.curvature import sample
from workers.models import Loaded

Ids = NDArray[np.int64]
_GREEDY = 1e-3  # what is sampled colder than this is the likeliest token, as far as float32 can tell


class _Draw(LogitsProcessor):
    """Leaves one token of every row: greedy decoding then takes it."""

    def __init__(self, uniform: Tensor, start: int, temperature: float) -> None:
        self._uniform, self._start, self._temperature = uniform, start, temperature
        self.damaged = torch.zeros(len(uniform), dtype=torch.bool, device=uniform.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = scores.float()
        self.damaged |= ~logits.isfinite().any(-1) | logits.isnan().any(-1)
        logits = logits.nan_to_num(nan=0.0, posinf=0.0)
        if self._temperature <= _GREEDY:
            token = logits.argmax(-1)
        else:
            token = sample(logits / self._temperature, self._uniform[:, input_ids.shape[1] - self._start])
        return torch.full_like(logits, -torch.inf).scatter_(1, token[:, None], 0.0)


def generate(
    loaded: Loaded,
    prompts: Sequence[Ids],
    uniform: Sequence[NDArray[np.float64]],
    *,
    limit: int,
    temperature: float,
    ends: Sequence[int],
) -> list[Ids]:
    """An answer to every prompt, of at most ``limit`` tokens, its end token included where one came; empty where
    the model gave NaN. ``uniform``: at least ``limit`` numbers each; ``temperature`` up to 0.001 is greedy;
    ``ends``: the tokens that end an answer.
    """
    longest = max(len(prompt) for prompt in prompts)
    padding = ends[0] if ends else 0
    ids = np.full((len(prompts), longest), padding, dtype=np.int64)
    real = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):  # on the left, so that all answers begin at one position
        ids[row, longest - len(prompt) :] = prompt
        real[row, longest - len(prompt) :] = 1
    points = torch.from_numpy(np.stack([each[:limit] for each in uniform])).to(loaded.device)
    draw = _Draw(points, longest, temperature)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=list(ends) or None, pad_token_id=padding, use_cache=True
    )
    model: Any = loaded.model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:  # whatever is not set would be taken from the model's folder: penalties, top-k, temperature
        with torch.no_grad():
            found: Tensor = model.generate(
                torch.from_numpy(ids).to(loaded.device),
                attention_mask=torch.from_numpy(real).to(loaded.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
    finally:
        model.generation_config = own
    damaged = draw.damaged.tolist()
    answers = found[:, longest:].cpu().numpy()
    return [answer[:0] if bad else until_end(answer, ends) for answer, bad in zip(answers, damaged, strict=True)]


def ends_of(loaded: Loaded, told: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's folder, and the tokenizer's."""
    own: Any = loaded.tokenizer.eos_token_id
    return tuple(dict.fromkeys([*told, *([] if own is None else [int(own)])]))


def until_end(answer: Ids, ends: Sequence[int]) -> Ids:
    stops = np.flatnonzero(np.isin(answer, ends))
    return answer[: stops[0] + 1] if len(stops) else answer
