"""Answers under system prompts, and the mean activations of their tokens: what persona vectors are made of."""

import json
from collections.abc import Sequence

import numpy as np

from service import codec
from service.contracts import Conversation, Example, Message, Quarantined
from service.errors import Invalid
from service.storage import Storage
from service.terms import Pooling
from service.work import AnswersWork, ElicitWork, ResponsesWork
from workers import differences
from workers.answers import Ids, ends_of
from workers.masks import Tokens
from workers.models import Loaded
from workers.prepare import Prepared
from workers.works import answers
from workers.works.result import Result

TEXTS, ROWS = "texts", "responses"
_PLACEHOLDER = "The"  # stands where the answer begins, and is cut off again


def elicit(work: ElicitWork, storage: Storage | None, loaded: Loaded, _examples: Sequence[Example]) -> Result:
    """Token ids and lengths as ``answers`` leaves them, the length of every prompt, and the answers as texts.

    Raises Invalid where the chat template has no place for a system prompt.
    """
    examples = [_example(work, *prompt) for prompt in work.prompts]
    lengths = [len(prompt) for prompt in _prompts(work, loaded, examples)]
    tensors, facts = answers.answers(AnswersWork(work.reading, work.spec), storage, loaded, examples)
    made = tensors[answers.FILE]
    stops = np.cumsum(made["lengths"])
    each = (made["ids"][start:stop] for start, stop in zip(stops - made["lengths"], stops, strict=True))
    ends = ends_of(loaded, work.spec.ends)
    told = [loaded.tokenizer.decode(_said(ids, ends).tolist(), skip_special_tokens=True) for ids in each]
    texts = np.frombuffer(json.dumps(told, ensure_ascii=False).encode(), dtype=np.uint8)
    tensors[TEXTS] = {"json": texts, "prompts": np.array(lengths, dtype=np.int32)}
    return tensors, facts


def responses(work: ResponsesWork, storage: Storage, loaded: Loaded, _examples: Sequence[Example]) -> Result:
    """``rows`` (n, layers, d) float32 of the answers at ``positions`` (n,) among the prompts: those that have a
    token, and finite activations. The token that ends an answer is none of it, as in the paper.
    """
    ends = ends_of(loaded, work.elicit.spec.ends)
    examples = [_example(work.elicit, *prompt) for prompt in work.elicit.prompts]
    prompts = _prompts(work.elicit, loaded, examples)
    tokens: dict[int, Tokens] = {}
    for position, (prompt, answer) in enumerate(zip(prompts, answers.read(storage, [work.answers]), strict=True)):
        said = _said(answer, ends)
        if len(said):
            ids = np.concatenate([prompt, said])
            tokens[position] = Tokens(ids, np.arange(len(ids)) >= len(prompt), bos=False, has_prompt=True)
    prepared = Prepared(examples, tokens, {})
    about = {"layers": work.layers, "pooling": Pooling.RESPONSE_MEAN}
    rows = differences.pooled(loaded, work.reading, prepared, **about)
    kept = [position for position in sorted(rows) if np.isfinite(rows[position]).all()]
    found = np.array([rows[position] for position in kept], dtype=np.float32)
    tensors = {
        "rows": found.reshape(len(kept), len(work.layers), loaded.width),
        "positions": np.array(kept, dtype=np.int32),
    }
    return {ROWS: tensors}, {"examples": len(kept), "tokens": sum(map(len, tokens.values()))}


def _said(answer: Ids, ends: Sequence[int]) -> Ids:
    """Without the token that ends it, if one does."""
    return answer[:-1] if len(answer) and answer[-1] in ends else answer


def _example(work: ElicitWork, system: str, question: str, sample: int) -> Example:
    """Its id, which decides what is drawn, knows the texts and the sample: not its number, batch or model."""
    if work.in_question:
        said = [Message("user", f"{system}\n\n{question}")]
    else:
        said = [Message("system", system), Message("user", question)]
    content = Conversation((*said, Message("assistant", _PLACEHOLDER)))
    return Example(codec.digest(["elicit", system, question, sample]), content, {}, ())


def _prompts(work: ElicitWork, loaded: Loaded, examples: Sequence[Example]) -> list[Ids]:
    """The tokens before each answer. Raises Invalid where a system prompt is refused, or leaves no trace."""
    found = []
    for example, (system, question, sample) in zip(examples, work.prompts, strict=True):
        prompt = answers.prompt_of(example, loaded, work.reading)
        if isinstance(prompt, Quarantined):
            if work.in_question:
                raise Invalid(prompt.reason, prompt.detail, param="model")
            raise _refused(prompt.detail)
        found.append(prompt)
        if not work.in_question and sample == 0:
            other = answers.prompt_of(_example(work, f"{system} {question}", question, 0), loaded, work.reading)
            if not isinstance(other, Quarantined) and np.array_equal(other, prompt):
                raise _refused("The chat template leaves system prompts out without a word.")
    return found


def _refused(why: str) -> Invalid:
    return Invalid(
        "system_prompt_refused",
        f"{why} Ask with system_prompt 'in_question', which puts the text in front of the question, a blank line "
        "between them, or register the model with a template that has a system role.",
        param="system_prompt",
    )
