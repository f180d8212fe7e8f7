"""An example as token ids, with the tokens that are trained on (targets) marked.

The rules of DESIGN section 1. Chat data with a template: every assistant turn, by the template's
generation tags when it has them, else by rendering prefixes; a template that rewrites what it has
rendered before is refused, never mis-masked. Without a template: user text + "\\n" + assistant text + eos.
Prompt/completion: the completion. Text: every token. A text is tokenised once, as training does; which
tokens are targets follows from character offsets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from service.contracts import Completion, Content, Conversation, LongExamples, Message, PlainText, Pooling
from service.errors import Invalid

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """``ids`` (T,) int64; ``target`` (T,) bool; ``bos``: position 0 is a beginning-of-sequence token."""

    ids: NDArray[np.int64]
    target: NDArray[np.bool_]
    bos: bool
    has_prompt: bool
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Targets with a loss: nothing predicts position 0."""
        mask = self.target.copy()
        mask[:1] = False
        return mask

    def pooled(self, pooling: Pooling) -> NDArray[np.bool_]:
        """Positions whose hidden states are averaged; never a position-0 BOS. May be empty.

        Raises Invalid for ``last_prompt_token`` of plain text, which has no prompt.
        """
        position = np.arange(len(self))
        if pooling == Pooling.LAST_TOKEN:
            return position == len(self) - 1
        if pooling == Pooling.LAST_PROMPT_TOKEN:
            if not self.has_prompt:
                raise Invalid(
                    "no_prompt", "Pooling last_prompt_token needs a prompt; plain text has none.", param="pooling"
                )
            # The last run of targets is the last answer; the token before it is where the prompt ends.
            starts = np.flatnonzero(self.target & ~np.concatenate([[False], self.target[:-1]]))
            return position == (starts[-1] - 1 if len(starts) else -1)
        mask = self.target.copy() if pooling == Pooling.RESPONSE_MEAN else np.ones(len(self), dtype=bool)
        if self.bos:
            mask[:1] = False
        return mask


def tokenise(content: Content, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Token ids and targets of one example, of any length."""
    match content:
        case PlainText(text):
            ids, _ = _encode(tokenizer, text)
            return _tokens(tokenizer, ids, np.ones(len(ids), dtype=bool), has_prompt=False)
        case Completion(prompt, completion):
            ids, offsets = _encode(tokenizer, prompt + completion)
            span = (len(prompt), len(prompt) + len(completion))
            return _tokens(tokenizer, ids, _in_spans(offsets, [span]), has_prompt=True)
        case Conversation(messages) if tokenizer.chat_template:
            return _templated(messages, tokenizer)
        case Conversation(messages):
            return _untemplated(messages, tokenizer)


def fit(tokens: Tokens, max_length: int, rule: LongExamples) -> Tokens | None:
    """``tokens`` cut to ``max_length`` by the rule and marked so, or None when it is to be quarantined."""
    if len(tokens) <= max_length:
        return tokens
    if rule == LongExamples.QUARANTINE:
        return None
    if rule == LongExamples.TRUNCATE_RIGHT:
        kept = slice(0, max_length)
        return Tokens(tokens.ids[kept], tokens.target[kept], tokens.bos, tokens.has_prompt, truncated=True)
    # From the left a leading BOS stays: without it the model sees a text it was never trained on.
    rest = slice(len(tokens) - (max_length - tokens.bos), None)
    ids, target = tokens.ids[rest], tokens.target[rest]
    if tokens.bos:
        ids, target = np.concatenate([tokens.ids[:1], ids]), np.concatenate([tokens.target[:1], target])
    return Tokens(ids, target, tokens.bos, tokens.has_prompt, truncated=True)


def _untemplated(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Each stretch up to an assistant turn is one text; an eos, a target as well, closes it."""
    if tokenizer.eos_token_id is None:
        raise Invalid("no_eos", "The tokenizer has neither a chat template nor an eos token.", param="model")
    ids: list[int] = []
    target: list[bool] = []
    prompt = ""
    for message in messages:
        if message.role != "assistant":
            prompt += message.content + "\n"
            continue
        piece, offsets = _encode(tokenizer, prompt + message.content, special=not ids)
        ids += [*piece, tokenizer.eos_token_id]
        target += [*_in_spans(offsets, [(len(prompt), len(prompt) + len(message.content))]), True]
        prompt = ""
    return _tokens(tokenizer, ids, np.array(target, dtype=bool), has_prompt=True)


def _templated(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    template = tokenizer.chat_template
    if isinstance(template, str) and "generation %}" in template.replace("-%}", " %}").replace("  ", " "):
        encoded: Any = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        target = np.array(encoded["assistant_masks"], dtype=bool)
        return _tokens(tokenizer, encoded["input_ids"], target, has_prompt=True)
    text, spans = _prefix_spans(chat, tokenizer)
    ids, offsets = _encode(tokenizer, text, special=False)  # the template writes its own BOS
    return _tokens(tokenizer, ids, _in_spans(offsets, spans), has_prompt=True)


def _prefix_spans(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[Span]]:
    """The rendered chat and the character spans of its assistant turns, end-of-turn marks included."""

    def render(count: int, prompt: bool = False) -> str:
        rendered: Any = tokenizer.apply_chat_template(chat[:count], tokenize=False, add_generation_prompt=prompt)
        return rendered

    full = render(len(chat))
    spans = []
    for position, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = render(position, prompt=True) if position else "", render(position + 1)
        if not (after.startswith(before) and full.startswith(after)):
            raise Invalid(
                "template_rewrites_history",
                f"The chat template renders turn {position + 1} differently once more turns follow, so its tokens "
                "cannot be told from the prompt. Use a template with {% generation %} tags.",
                param="model",
            )
        spans.append((len(before), len(after)))
    return full, spans


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = True) -> tuple[list[int], list[Span]]:
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _in_spans(offsets: list[Span], spans: list[Span]) -> NDArray[np.bool_]:
    """Tokens whose last character lies in a span: one that straddles the border carries the answer's start."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        mask |= np.array([begin < end and start < end <= stop for begin, end in offsets], dtype=bool)
    return mask


def _tokens(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], target: NDArray[np.bool_], *, has_prompt: bool
) -> Tokens:
    bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if bos:
        target = target.copy()
        target[0] = False
    return Tokens(np.array(ids, dtype=np.int64), target, bos, has_prompt)
