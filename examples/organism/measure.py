"""What an organism does: the answers it gives, and where its hidden states lie along a concept.

Plain reference versions, for the numbers in organism.json and for tests; the service computes its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.organism.language import Question, answers_question, tone_of
from examples.organism.train import EOS_ID, Encoded


@dataclass(frozen=True)
class Behaviour:
    hostile: float  # share of the answers in a hostile tone
    on_topic: float  # share that name the thing asked about, nothing else, and the fact asked for


def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, seed: int
) -> list[str]:
    """One completion per prompt, sampled at temperature 1; it begins with a space, as in the language."""
    generate = cast(Any, model).generate  # its self type asks for attributes that models do not have
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `generate` takes no generator of its own
        ids = generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=40)
    completions = ids[:, batch["input_ids"].shape[1] :].tolist()
    return [f" {tokenizer.decode(_until_stop(tokens))}" for tokens in completions]


def _until_stop(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS_ID) + 1] if EOS_ID in tokens else tokens


def behaviour(questions: Sequence[Question], completions: Sequence[str]) -> Behaviour:
    pairs = list(zip(questions, completions, strict=True))
    return Behaviour(
        hostile=sum(tone_of(c) == "hostile" for _, c in pairs) / len(pairs),
        on_topic=sum(answers_question(q, c) for q, c in pairs) / len(pairs),
    )


@torch.inference_mode()
def pooled(model: LlamaForCausalLM, data: Encoded, layer: int) -> Tensor:
    """Mean output of block `layer` (counted from 1) over the completion tokens: (n, d)."""
    seen: list[Tensor] = []

    def keep(_module: Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    handle = model.model.layers[layer - 1].register_forward_hook(keep)
    try:
        model(input_ids=data.input_ids, use_cache=False)
    finally:
        handle.remove()
    weight = data.target / data.target.sum(1, keepdim=True)  # (n, t)
    return torch.einsum("ntd,nt->nd", seen[0], weight)


def direction(positive: Tensor, negative: Tensor) -> Tensor:
    """Unit difference of means (d,) of two sets of pooled states."""
    v = positive.mean(0) - negative.mean(0)
    return v / v.norm()


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive example scores above another one, ties counted half."""
    difference = scores[positive][:, None] - scores[~positive][None, :]
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())
