"""An example as token ids, with the tokens that are trained on (targets) marked.

The rules of DESIGN section 1. Chat data with a template: every assistant turn, by the template's
generation tags when it has them, else by rendering prefixes; a template that rewrites what it has
rendered before is refused, never mis-masked. Without a template: user text + "\\n" + assistant text + eos.
Prompt/completion: the completion. Text: every token. A text is tokenised once, as training does; which
tokens are targets follows from character offsets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from service.contracts import Completion, Content, Conversation, Message, PlainText
from service.errors import Invalid
from service.terms import LongExamples, Pooling

Span = tuple[int, int]

_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# A template is a small programme: what its own arithmetic, filters and look-ups raise is no TemplateError.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class UnrenderableError(Invalid):
    """The chat template refuses this conversation: the example is at fault, not the model."""


@dataclass(frozen=True)
class Tokens:
    """``ids`` (T,) int64; ``target`` (T,) bool; ``bos``: position 0 is a beginning-of-sequence token.

    ``answer``: position of the first token of the last answer; None: where the last run of targets begins.
    """

    ids: NDArray[np.int64]
    target: NDArray[np.bool_]
    bos: bool
    has_prompt: bool
    truncated: bool = False
    answer: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def example(self) -> "Tokens":
        """The whole example, which the weights of its tokens are shares of."""
        return self

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
        match pooling:
            case Pooling.RESPONSE_MEAN:
                mask = self.target.copy()
            case Pooling.ALL_MEAN:
                mask = np.ones(len(self), dtype=bool)
            case Pooling.LAST_TOKEN:
                mask = position == len(self) - 1
            case Pooling.LAST_PROMPT_TOKEN if self.has_prompt:
                mask = position == self.last_answer - 1
            case _:
                detail = "Pooling last_prompt_token needs a prompt; plain text has none."
                raise Invalid("no_prompt", detail, param="pooling")
        if self.bos:
            mask[:1] = False
        return mask

    @property
    def last_answer(self) -> int:
        """Where the last answer begins; −1 when there is none."""
        if self.answer is not None:
            return self.answer
        starts = np.flatnonzero(self.target & ~np.concatenate([[False], self.target[:-1]]))
        return int(starts[-1]) if len(starts) else -1


@dataclass(frozen=True)
class Window(Tokens):
    """A stretch of a longer example. ``index`` (T,): its positions there; ``counted`` (T,): False for tokens that
    are repeated from before as context.
    """

    whole: Tokens = field(kw_only=True)
    index: NDArray[np.int64] = field(kw_only=True)
    counted: NDArray[np.bool_] = field(kw_only=True)

    @property
    def example(self) -> Tokens:
        return self.whole

    @property
    def predicted(self) -> NDArray[np.bool_]:
        return self.whole.predicted[self.index] & self.counted

    def pooled(self, pooling: Pooling) -> NDArray[np.bool_]:
        return self.whole.pooled(pooling)[self.index] & self.counted


def split(tokens: Tokens, max_length: int) -> list[Tokens]:
    """``tokens`` in windows of at most ``max_length``, or as they are when they fit.

    A window begins with the token before it, so that its first is predicted as well, and with the BOS if there is
    one: every target counts exactly once.
    """
    if len(tokens) <= max_length:
        return [tokens]
    found: list[Tokens] = []
    start = 0  # the first token that no window has counted
    while start < len(tokens):
        context = [start - 1] if start else []
        if tokens.bos and start > 1 and max_length > 2:
            context = [0, *context]
        stop = min(start + max_length - len(context), len(tokens))
        index = np.array([*context, *range(start, stop)], dtype=np.int64)
        counted = np.arange(len(index)) >= len(context)
        target, bos = tokens.target[index] & counted, tokens.bos and index[0] == 0
        part = Window(tokens.ids[index], target, bos, tokens.has_prompt, whole=tokens, index=index, counted=counted)
        found.append(part)
        start = stop
    return found


def tokenise(content: Content, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Token ids and targets of one example, of any length."""
    match content:
        case PlainText(text):
            ids, _ = _encode(tokenizer, text)
            return _tokens(tokenizer, ids, np.ones(len(ids), dtype=bool), has_prompt=False)
        case Completion(prompt, completion):
            ids, ends = _encode(tokenizer, prompt + completion)
            return _tokens(tokenizer, ids, _in_spans(ends, [(len(prompt), len(prompt) + len(completion))]))
        case Conversation(messages) if tokenizer.chat_template:
            return _templated(messages, tokenizer)
        case Conversation(messages):
            return _untemplated(messages, tokenizer)


def fit(tokens: Tokens, max_length: int, rule: LongExamples) -> Tokens | None:
    """``tokens`` cut to ``max_length`` by the rule and marked so, or None when it is to be quarantined; what is to
    be split stays whole here.
    """
    if len(tokens) <= max_length or rule == LongExamples.SPLIT_AND_SUM:
        return tokens
    if rule == LongExamples.QUARANTINE:
        return None
    if rule == LongExamples.TRUNCATE_RIGHT:
        kept = np.arange(max_length)
    else:  # a leading BOS stays: without it the model sees a text it was never trained on
        kept = np.arange(len(tokens) - max_length, len(tokens))
        kept[:1] = 0 if tokens.bos else kept[0]
    answer = None if tokens.answer is None else tokens.answer - int(kept[-1] - (max_length - 1))
    return replace(tokens, ids=tokens.ids[kept], target=tokens.target[kept], truncated=True, answer=answer)


def last_answer_only(tokens: Tokens) -> Tokens:
    """The same text with the last answer as its only target."""
    return replace(tokens, target=tokens.target & (np.arange(len(tokens)) >= tokens.last_answer))


def up_to_end(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """Cut behind its last answer: at the first end token in it, else at its last target. A template may write a
    line break, or further turns, that no answer of a model ends with.
    """
    targets = np.flatnonzero(tokens.target)
    closing = targets[np.isin(tokens.ids[targets], ends)]
    stop = int(closing[0] if len(closing) else targets[-1]) + 1
    return replace(tokens, ids=tokens.ids[:stop], target=tokens.target[:stop])


def _untemplated(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Each stretch up to an assistant turn is one text; an eos, a target as well, closes it."""
    if tokenizer.eos_token_id is None:
        raise Invalid("no_eos", "The tokenizer has neither a chat template nor an eos token.", param="model")
    written: Any = tokenizer("")["input_ids"]  # only the BOS of these: the eos is ours to write
    ids: list[int] = [token for token in written[:1] if token == tokenizer.bos_token_id]
    target: list[bool] = [False] * len(ids)
    prompt, answer = "", None
    for message in messages:
        if message.role != "assistant":
            prompt += message.content + "\n"
            continue
        piece, ends = _encode(tokenizer, prompt + message.content, special=False)
        inside = _in_spans(ends, [(len(prompt), len(prompt) + len(message.content))])
        answer = len(ids) + _first(inside)
        ids += [*piece, tokenizer.eos_token_id]
        target += [*inside, True]
        prompt = ""
    return _tokens(tokenizer, ids, np.array(target, dtype=bool), answer=answer)


def _templated(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Spans come from the generation tags when the template has them, else from rendering prefixes."""
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text, spans = _render(chat, tokenizer)
    if _has_tags(tokenizer.get_chat_template()):
        last = _last_turn(chat, text, spans, tokenizer)
    else:
        spans = _prefix_spans(chat, text, tokenizer)
        last = spans[-1:]
    ids, ends = _encode(tokenizer, text, special=False)  # the template writes its own BOS
    answer = _first(_in_spans(ends, last)) if spans else None
    return _tokens(tokenizer, ids, _in_spans(ends, spans), answer=answer)


def _last_turn(
    chat: list[dict[str, str]], text: str, spans: list[Span], tokenizer: PreTrainedTokenizerFast
) -> list[Span]:
    """Those of the spans that lie in the last assistant turn: a template may tag several parts of one (thoughts,
    then what is said), or leave out a turn.

    Raises UnrenderableError where nothing tells them from those of the turn before.
    """
    turns = [position for position, message in enumerate(chat) if message["role"] == "assistant"]
    if len(turns) <= 1:
        return spans
    try:
        before, _ = _render(chat[: turns[-1]], tokenizer)
    except UnrenderableError:
        before = None
    if before is not None and text.startswith(before):
        return [span for span in spans if span[0] >= len(before)]
    if len(spans) == len(turns):  # one each
        return spans[-1:]
    raise UnrenderableError(
        "last_answer_unclear",
        f"The chat template tags {len(spans)} parts of {len(turns)} assistant turns and renders earlier turns "
        "differently once more follow, so where the last answer begins cannot be told.",
    )


def _prefix_spans(chat: list[dict[str, str]], full: str, tokenizer: PreTrainedTokenizerFast) -> list[Span]:
    """Character spans of the assistant turns in the rendered chat, end-of-turn marks included."""
    spans = []
    for position, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, _ = _render(chat[:position], tokenizer, prompt=True)
        after, _ = _render(chat[: position + 1], tokenizer)
        if not (after.startswith(before) and full.startswith(after)):
            raise Invalid(
                "template_rewrites_history",
                f"The chat template renders turn {position + 1} differently once more turns follow, so its tokens "
                "cannot be told from the prompt. Use a template with {% generation %} tags.",
                param="model",
            )
        spans.append((len(before), len(after)))
    return spans


def _render(
    chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, *, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The chat as text, and the character spans inside the template's generation tags."""
    template: Any = tokenizer.get_chat_template()
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=_has_tags(template),
            add_generation_prompt=prompt,
            **special,
        )
    except _REFUSALS as error:
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        detail = f"The chat template does not accept this conversation: {kind}{str(error)[:500]}."
        raise UnrenderableError("template_refuses", detail) from error
    texts, spans = rendered
    return texts[0], [(start, stop) for start, stop in spans[0]] if spans else []


def _has_tags(template: str) -> bool:
    return _TAGS.search(_COMMENT.sub("", template)) is not None


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = True) -> tuple[list[int], list[int]]:
    """Token ids, and for each the character position where it ends; special tokens that were added end at 0."""
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def _in_spans(ends: list[int], spans: list[Span]) -> NDArray[np.bool_]:
    """Tokens whose last character lies in a span: one that straddles the border carries the answer's start.

    Only ends are looked at: tokenizers that trim offsets give blank tokens an empty range at their end.
    """
    end = np.array(ends, dtype=np.int64)
    mask = np.zeros(len(ends), dtype=bool)
    for start, stop in spans:
        mask |= (start < end) & (end <= stop)
    return mask


def _first(mask: NDArray[np.bool_]) -> int:
    """Position of the first True; the length when there is none (an empty answer: its eos comes next)."""
    return int(mask.argmax()) if mask.any() else len(mask)


def _tokens(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    target: NDArray[np.bool_],
    *,
    has_prompt: bool = True,
    answer: int | None = None,
) -> Tokens:
    bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if bos:
        target = target.copy()
        target[0] = False
    return Tokens(np.array(ids, dtype=np.int64), target, bos, has_prompt, answer=answer)
