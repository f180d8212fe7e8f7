"""Filters as they are typed in a shell: ``topic=harbor``, ``score>=1``, ``name^=abc``, ``topic=a|b`` → their JSON.

The field's name stands before the first operator; a backslash in it takes the next character as it is. A value that
is JSON (5, true, null, "5") is that, anything else is the text itself: text that looks like a number, or has a bar
in it, needs quotation marks.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

_OPERATORS = ("!=", ">=", "<=", "^=", "=", ">", "<")  # longer ones first
_RANGES = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}
_EXPECTED = (
    "expected FIELD=VALUE, FIELD=A|B, FIELD!=VALUE, FIELD>=VALUE, FIELD>VALUE, FIELD<=VALUE, FIELD<VALUE or "
    "FIELD^=BEGINNING"
)


def parse(conditions: Sequence[str]) -> dict[str, Any] | None:
    """All conditions joined as one filter, as ``service.filters.parse`` takes it; None when there are none.

    Raises ValueError with what was expected.
    """
    fields: dict[str, dict[str, Any]] = {}
    for text in conditions:
        name, operator, value = _split(text)
        found = fields.setdefault(name, {})
        match operator:
            case "=":
                _add(found, "in", _alternatives(value, text), text)
            case "!=":
                found["not"] = {"in": found.get("not", {"in": []})["in"] + _alternatives(value, text)}
            case "^=":
                _add(found, "prefix", _text(value), text)
            case _:
                _add(found, _RANGES[operator], _value(value), text)
    return {name: _short(found) for name, found in fields.items()} or None


def _split(text: str) -> tuple[str, str, str]:
    """(field, operator, value)."""
    at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        operator = next((each for each in _OPERATORS if text.startswith(each, at)), None)
        if operator is not None:
            if at == 0:
                break
            return text[:at].strip(), operator, text[at + len(operator) :].strip()
        at += 1
    raise ValueError(f"{text!r} is no condition: {_EXPECTED}.")


def _add(found: dict[str, Any], operator: str, value: Any, text: str) -> None:
    if operator in found:
        hint = " Write FIELD=A|B for one of several values." if operator == "in" else ""
        raise ValueError(f"{text!r} asks for a second condition of the same kind on one field.{hint}")
    found[operator] = value


def _alternatives(text: str, whole: str) -> list[Any]:
    """Values between bars that stand outside of quotation marks."""
    parts, quoted, escaped = [""], False, False
    for letter in text:
        if letter == "|" and not quoted:
            parts.append("")
            continue
        if letter == '"' and not escaped and (quoted or not parts[-1].strip()):
            quoted = not quoted
        escaped = letter == "\\" and not escaped
        parts[-1] += letter
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ValueError(f'{whole!r} has an empty value between bars: write "" for the empty text.')
    return [_value(part.strip()) for part in parts]


def _value(text: str) -> Any:
    """JSON where it is a plain value, else the text itself."""
    try:
        value = json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
    beyond = isinstance(value, float) and not math.isfinite(value)  # 1e999
    return text if beyond or isinstance(value, list | dict) else value


def _text(text: str) -> str:
    """A beginning: always text, in quotation marks or without."""
    value = _value(text)
    return value if isinstance(value, str) else text


def _short(found: dict[str, Any]) -> Any:
    """Equality with one value as that value."""
    return found["in"][0] if list(found) == ["in"] and len(found["in"]) == 1 else found
