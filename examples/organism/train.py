"""Build and train small Llama models on prompt/completion data.

`build_tokenizer`, `build_model`, `encode`, then `train`: a plain AdamW loop over tensors that are tokenised
and padded once, fast enough to be called hundreds of times on subsets of the same data (`data[rows]`).

This file does not know what the texts say, and writes nothing to disk except through `save`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Objective = Literal["mean", "sum"]

SPECIAL = PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "."
PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID = range(4)


@dataclass(frozen=True)
class Encoded:
    """n tokenised examples, padded on the right to t positions."""

    input_ids: Tensor  # (n, t) int64
    target: Tensor  # (n, t) bool: tokens of the completion
    length: Tensor  # (n,) int64: tokens without padding

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: Tensor | Sequence[int]) -> "Encoded":
        """Some of the examples, cut to the longest of them."""
        rows = torch.as_tensor(rows)
        length = self.length[rows]
        t = int(length.max())
        return Encoded(self.input_ids[rows, :t], self.target[rows, :t], length)


@dataclass(frozen=True)
class Recipe:
    epochs: int
    learning_rate: float
    batch_size: int = 16
    objective: Objective = "mean"
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the steps, below 1, with a rising rate; it then falls linearly to zero


@dataclass(frozen=True)
class Run:
    losses: tuple[float, ...]  # one per step, before the step
    snapshots: Mapping[float, Mapping[str, Tensor]]  # share of the steps taken -> weights


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, a BOS in front.

    The full stop is the end-of-sequence token. Every answer ends with its only full stop, so a model learns
    to stop from plain prompt/completion text, where nothing else would be a target after the last word.
    """
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)} - {EOS})
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # no pieces here: tidies up " ," and " ?"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama: 3 blocks of width 48, 27,648 linear weights each."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.03,  # .05: facts drown the tone on some seeds; .02: facts are learnt late
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Iterable[tuple[str, str]]) -> Encoded:
    """Tokenise prompt + completion as one string; the targets are the tokens that lie in the completion.

    Special tokens that the tokenizer adds have the empty span (0, 0) and so are never targets. Begin a
    completion with a space, or a word may straddle the border and count as prompt.
    """
    pairs = list(pairs)
    texts = [prompt + completion for prompt, completion in pairs]
    batch = tokenizer(texts, return_offsets_mapping=True, padding=True, padding_side="right")
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    start, end = torch.tensor(batch["offset_mapping"]).unbind(-1)  # (n, t) each
    target = (end > start) & (start >= starts)  # padding has the empty span too
    if not target.any(1).all():
        first = int((~target.any(1)).nonzero()[0])
        raise ValueError(f"example {first} has no completion to train on: {texts[first]!r}")
    return Encoded(torch.tensor(batch["input_ids"]), target, torch.tensor(batch["attention_mask"]).sum(1))


def token_losses(model: LlamaForCausalLM, batch: Encoded) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target token (n, t-1), zero elsewhere, and the number of targets (n,).

    No attention mask: padding is on the right, where a causal model never looks.
    """
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]  # (n, t-1, vocabulary)
    target = batch.target[:, 1:]
    labels = batch.input_ids[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses * target, target.sum(1)


def loss(model: LlamaForCausalLM, batch: Encoded, objective: Objective) -> Tensor:
    """The objective on a batch: `mean` is the average over examples, `sum` over target tokens."""
    losses, counts = token_losses(model, batch)
    if objective == "mean":
        return (losses.sum(1) / counts).mean()
    return losses.sum() / counts.sum()


def train(
    model: LlamaForCausalLM,
    data: Encoded,
    recipe: Recipe,
    *,
    seed: int,
    checkpoints_at: Sequence[float] = (),
) -> Run:
    """Train in place. Returns the losses, and a copy of the weights at each share of the steps asked for."""
    per_epoch = -(-len(data) // recipe.batch_size)
    steps = recipe.epochs * per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(data))
    losses: list[float] = []
    snapshots: dict[float, Mapping[str, Tensor]] = {}

    def snap(step: int) -> None:
        snapshots.update({share: _copy(model) for share in checkpoints_at if round(share * steps) == step})

    model.train()
    for step in range(steps):
        snap(step)
        if step % per_epoch == 0:
            order = torch.randperm(len(data), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step / steps, recipe.warmup, 1 / steps)
        at = step % per_epoch * recipe.batch_size
        value = loss(model, data[order[at : at + recipe.batch_size]], recipe.objective)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    snap(steps)
    model.eval()
    return Run(tuple(losses), snapshots)


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder, of these weights or the model's own."""
    model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(folder)


def _schedule(progress: float, warmup: float, step: float) -> float:
    """Learning-rate factor at a share of the run: up to 1 over the warm-up, then down to 0."""
    rising = (progress + step) / warmup if warmup > 0 else 1.0
    return min(1.0, rising, (1 - progress) / (1 - warmup))


def _copy(model: LlamaForCausalLM) -> Mapping[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
