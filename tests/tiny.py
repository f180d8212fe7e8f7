"""Tiny random models and tokenizers, built in milliseconds: the real classes, with nothing learnt.

Everything is seeded. ``save`` turns a pair into the Hugging Face folder that the product loads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D

from service.contracts import Conversation, Message
from service.terms import LossReduction, Pooling
from workers.gradients import Sides
from workers.masks import Tokens
from workers.models import Loaded

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2")  # Conv1D, parallel blocks, biases and grouped heads among them
BLOCKS, WIDTH, CONTEXT = 3, 16, 256
VOCAB = 340
CPU = torch.device("cpu")

# --- models -----------------------------------------------------------------------------------------


def config(family: str, blocks: int = BLOCKS, vocab: int = VOCAB) -> PreTrainedConfig:
    ids = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family == "gpt2":
        return GPT2Config(n_embd=WIDTH, n_layer=blocks, n_head=2, n_positions=CONTEXT, **ids)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**sizes, **ids)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    return kind(**sizes, num_key_value_heads=2, **ids)


def model(
    family: str, *, blocks: int = BLOCKS, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Frozen, in eval mode; weights, biases and norms are noise large enough for every path to matter.

    The same numbers in every dtype.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        built = AutoModelForCausalLM.from_config(config(family, blocks, vocab))
        for parameter in built.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
            parameter.data = parameter.data.to(dtype)  # and no buffer: as models are loaded
    return built.eval().requires_grad_(False)


def loaded(family: str, tokenizer: PreTrainedTokenizerFast | None = None, **kwargs) -> Loaded:
    return Loaded(model(family, **kwargs), tokenizer or byte_pairs(), CPU)


def save(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast) -> str:
    model(family, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- tokenizers -------------------------------------------------------------------------------------

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<unk>")
_CORPUS = "the cat sat on the mat. the end of the answer 😀😀 née café 🎉 the question\n\n the assistant\n"

_HEAD = "{{ '<|' + m.role + '|>' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def _template(turn: str, tagged_turn: str | None = None) -> str:
    """Every turn as head + ``turn``; assistant turns with ``tagged_turn`` inside generation tags where given."""
    body = "{{ " + turn + " }}"
    if tagged_turn is not None:
        tagged = "{% generation %}{{ " + tagged_turn + " }}{% endgeneration %}"
        body = "{% if m.role == 'assistant' %}" + tagged + "{% else %}" + body + "{% endif %}"
    return "{{ bos_token }}{% for m in messages %}" + _HEAD + body + "{% endfor %}" + _PROMPT


PLAIN = _template("m.content + '<|end|>'")
TAGGED = _template("m.content + '<|end|>'", "m.content + '<|end|>'")
# The same without a mark at the end of a turn: the answer's own last character ends the span.
OPEN_PLAIN = _template("m.content")
OPEN_TAGGED = _template("m.content", "m.content")
_LATEST = "(m.content if loop.last else m.content.split('</think>')[-1]) + '<|end|>'"
FORGETS_THOUGHTS = _template(_LATEST)  # as reasoning models do: earlier turns lose their <think> part
FORGETS_THOUGHTS_TAGGED = _template(_LATEST, _LATEST)
# Two parts of a turn, a mark that is no target between them; only the last message keeps the first part.
_IN_PARTS = (
    "{% if loop.last or not FORGETS %}"
    "{% generation %}{{ 'the thought' }}{% endgeneration %}{{ '<|system|>' }}{% endif %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
)
_PARTS = TAGGED.replace("{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}", _IN_PARTS)
IN_PARTS, IN_PARTS_AT_LAST = _PARTS.replace("FORGETS", "false"), _PARTS.replace("FORGETS", "true")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|system|>the cat<|end|>' }}{% endif %}"
    "{% for m in messages %}" + _HEAD + "{{ m.content + '<|end|>' }}{% endfor %}" + _PROMPT
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


@cache
def _byte_pair_model() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS] * 3, trainer)
    return tokenizer.to_str()


def byte_pairs(
    template: str | None = None, *, bos: bool = False, eos: bool = False, trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen. ``bos`` and ``eos`` write one around every text;
    ``trim_offsets`` as in Pythia: a token's character offsets leave out the whitespace at its ends.
    """
    backend = Tokenizer.from_str(_byte_pair_model())
    around = processors.TemplateProcessing(
        single="<s> " * bos + "$A" + " </s>" * eos, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), around])
    return _wrap(backend, template)


def words(template: str | None = None, *, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word; whitespace is no token at all, so that decoded ids read as a list of words."""
    vocabulary = [*SPECIAL, *sorted(set(_CORPUS.split()) | set("abcdefghijklmnopqrstuvwxyz"))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(backend, template, eos=eos)


def _wrap(backend: Tokenizer, template: str | None, *, eos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1] if eos else None, unk_token=SPECIAL[-1]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:6])})
    tokenizer.chat_template = template
    return tokenizer


_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


def as_bytes(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> bytes:
    """What byte-level tokens stand for, exact even where they split a character."""
    return bytes(_BYTE_OF[char] for token in tokenizer.convert_ids_to_tokens(list(ids)) for char in token)


# --- examples ---------------------------------------------------------------------------------------


def chat(*turns: str) -> Conversation:
    """``"user: hello"`` and so on."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns))


def random_tokens(seed: int, length: int, *, vocab: int = VOCAB) -> Tokens:
    """Random ids from 2 up; a prompt of about a third, then answers with a gap in between."""
    generator = np.random.default_rng((seed, length))
    target = np.arange(length) >= max(1, length // 3)
    if length > 6:
        target[length // 2] = False
    return Tokens(generator.integers(2, vocab, size=length), target, bos=False, has_prompt=True)


# --- oracles: slow and obvious ------------------------------------------------------------------------


def hidden_states(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Entry l is the output of block l, the last one too: the final norm is taken out for the time being."""
    trunk = model.base_model
    name = next(name for name in ("norm", "ln_f", "final_layer_norm") if hasattr(trunk, name))
    norm = getattr(trunk, name)
    setattr(trunk, name, torch.nn.Identity())
    try:
        return list(model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states)
    finally:
        setattr(trunk, name, norm)


def pooled_positions(tokens: Tokens, pooling: Pooling) -> list[int]:
    targets = np.flatnonzero(tokens.target).tolist()
    match pooling:
        case Pooling.RESPONSE_MEAN:
            return targets
        case Pooling.LAST_PROMPT_TOKEN:
            return [max(t for t in targets if t - 1 not in targets) - 1]
        case Pooling.LAST_TOKEN:
            return [len(tokens) - 1]
        case Pooling.ALL_MEAN:
            return list(range(tokens.bos, len(tokens)))


def oracle_rows(
    loaded: Loaded, sides: Mapping[str, Sides], tokens: Sequence[Tokens], value: Callable[[Tokens], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """P_outᵀ G P_in of ``value``'s whole weight gradients G, one example at a time: (B, k), and values (B,)."""
    modules = dict(loaded.model.named_modules())
    weights = [modules[name].weight.requires_grad_() for name in sides]
    rows, values = [], []
    for one in tokens:
        result = value(one)
        values.append(result.detach())
        parts = []
        for (name, side), G in zip(sides.items(), torch.autograd.grad(result, weights), strict=True):
            out_in = G.T if isinstance(modules[name], Conv1D) else G  # Conv1D keeps its weight the other way round
            parts.append((side.out.to(G.dtype).T @ out_in @ side.into.to(G.dtype)).flatten())
        rows.append(torch.cat(parts))
    loaded.model.requires_grad_(False)
    return torch.stack(rows), torch.stack(values)


def loss_of(loaded: Loaded, reduction: LossReduction) -> Callable[[Tokens], torch.Tensor]:
    def value(one: Tokens) -> torch.Tensor:
        """−log p of every target but one at position 0."""
        ids = torch.from_numpy(one.ids)
        log_p = loaded.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        terms = [-log_p[t - 1, ids[t]] for t in range(1, len(ids)) if one.target[t]]
        return sum(terms) / (len(terms) if reduction == LossReduction.MEAN else 1)

    return value


def activation_of(loaded: Loaded, layer: int, pooling: Pooling) -> Callable[[Tokens], torch.Tensor]:
    def value(one: Tokens) -> torch.Tensor:
        """(d,) mean of h_l over the pooled positions."""
        states = hidden_states(loaded.model, torch.from_numpy(one.ids)[None])[layer][0]
        return states[pooled_positions(one, pooling)].mean(0)

    return value
