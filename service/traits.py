"""Trait files: what a persona is, as pairs of system prompts, questions, and a prompt for a judge.

The format of the persona vectors paper (arXiv 2507.21509): ``{"instruction": [{"pos": …, "neg": …}, …],
"questions": […], "eval_prompt": …}``.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from service import codec
from service.errors import Invalid

MOST_BYTES = 1 << 20
_MOST_INSTRUCTIONS, _MOST_QUESTIONS = 100, 1000
_FIELDS = ("instruction", "questions", "eval_prompt")
_PLACE = re.compile(r"\{(question|answer)\}")


@dataclass(frozen=True)
class Instruction:
    """Two system prompts: one asks for the trait, the other for its opposite."""

    pos: str
    neg: str


@dataclass(frozen=True)
class Trait:
    """``eval_prompt`` None: no judge can be asked about it."""

    instruction: tuple[Instruction, ...]
    questions: tuple[str, ...]
    eval_prompt: str | None = None


@dataclass(frozen=True)
class TraitFile:
    """A trait, and the sha256 of the file it stands in; of its canonical JSON where it came without one."""

    trait: Trait
    sha256: str


def read(data: bytes, *, param: str) -> TraitFile:
    """A trait file. Raises Invalid (``bad_trait``) naming the place."""
    if len(data) > MOST_BYTES:
        raise _bad(f"it is larger than {MOST_BYTES >> 20} MiB", param)
    try:
        plain = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_repeats)
    except json.JSONDecodeError as error:
        raise _bad(f"no valid JSON: {error.msg}", f"{param} line {error.lineno}") from error
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise _bad(f"no valid JSON: {error}", param) from error
    return TraitFile(parse(plain, param=param), hashlib.sha256(data).hexdigest())


def from_object(plain: Any, *, param: str) -> TraitFile:
    """A trait that was sent as an object instead of a file. Raises Invalid (``bad_trait``) naming the place."""
    trait = parse(plain, param=param)
    return TraitFile(trait, codec.digest(plain))


def parse(plain: Any, *, param: str) -> Trait:
    """Checked field by field. Raises Invalid (``bad_trait``) whose ``param`` is the place."""
    if not isinstance(plain, dict):
        raise _bad(f"expected an object with {', '.join(_FIELDS)}; found {_kind(plain)}", param)
    for name in plain:
        if name not in _FIELDS:
            raise _bad(f"no such field; a trait has {', '.join(_FIELDS)}", f"{param}.{name!s:.100}")
    pairs = _list(plain, "instruction", param, least=1, most=_MOST_INSTRUCTIONS)
    instructions = tuple(_instruction(pair, f"{param}.instruction[{n}]") for n, pair in enumerate(pairs))
    asked = _list(plain, "questions", param, least=2, most=_MOST_QUESTIONS)
    questions = tuple(_text(each, f"{param}.questions[{n}]") for n, each in enumerate(asked))
    for name, found in (("instruction", instructions), ("questions", questions)):
        for number, each in enumerate(found):
            if (first := found.index(each)) != number:  # their answers would be the same, counted twice
                raise _bad(f"it repeats {name}[{first}]", f"{param}.{name}[{number}]")
    told = plain.get("eval_prompt")
    if told is None:
        return Trait(instructions, questions)
    prompt = _text(told, f"{param}.eval_prompt")
    if missing := {"question", "answer"} - set(_PLACE.findall(prompt)):
        raise _bad(
            f"it needs a place for {' and '.join(f'{{{n}}}' for n in sorted(missing))}", f"{param}.eval_prompt"
        )
    return Trait(instructions, questions, prompt)


def rendered(eval_prompt: str, question: str, answer: str) -> str:
    """What the judge reads. Filled in one go: an answer that contains "{question}" stays as it is."""
    texts = {"question": question, "answer": answer}
    return _PLACE.sub(lambda place: texts[place[1]], eval_prompt)


def _instruction(pair: Any, param: str) -> Instruction:
    if not isinstance(pair, dict) or set(pair) != {"pos", "neg"}:
        found = f"the keys {sorted(map(str, pair))[:8]}" if isinstance(pair, dict) else _kind(pair)
        raise _bad(f"expected an object with exactly 'pos' and 'neg', found {found}", param)
    found = Instruction(*(_text(pair[side], f"{param}.{side}") for side in ("pos", "neg")))
    if found.pos == found.neg:
        raise _bad("'pos' and 'neg' are the same system prompt", param)
    return found


def _list(plain: dict[str, Any], name: str, param: str, *, least: int, most: int) -> list[Any]:
    found = plain.get(name)
    if not isinstance(found, list):
        said = "it is missing" if name not in plain else f"expected a list, found {_kind(found)}"
        raise _bad(said, f"{param}.{name}")
    if not least <= len(found) <= most:
        held = " (the concept is tested on questions that it was not fitted on)" if name == "questions" else ""
        raise _bad(f"{len(found)} entries, {least} to {most} are allowed{held}", f"{param}.{name}")
    return found


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise _bad(f"expected a string, found {_kind(value)}", param)
    if not value.strip():
        raise _bad("it is empty", param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _bad("it holds half a character (a lone surrogate)", param) from error
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands more than once in one object")
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _bad(what: str, param: str) -> Invalid:
    return Invalid("bad_trait", f"{param}: {what}.", param=param)
