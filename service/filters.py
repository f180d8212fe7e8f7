"""What a filter on metadata says: JSON in, a frozen tree out. It knows the language, not the data.

    {"topic": "harbor"}                     equal; null: the example has no such value
    {"score": {"gte": 1, "lt": 5}}          ranges of numbers or strings: gt, gte, lt, lte
    {"topic": {"in": ["a", "b"]}}           one of these
    {"name": {"prefix": "abc"}}             begins with
    {"topic": {"not": {"in": ["a", "b"]}}}  everything else, examples without a topic included
    {"topic": "a", "source.url": "b"}       both; dots lead into nested metadata (service/columns.py has the names)
    {"any": [{"topic": "a"}, {"score": 1}]} at least one of these
    {"id": {"in": ["<64 hex digits>", …]}}  the examples with these ids

Every filter is true or false of every example: an absent value is not equal to, in, beyond or a beginning of
anything, and ``not`` is exactly the rest. Trees of equal meaning by this table are equal and hash equal, whatever
the order in which they were written; ``to_json`` is the same text in every process.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from service import codec
from service.columns import RESERVED, Path, name_of, path_of
from service.errors import Invalid

_DEEPEST = 16
_CONDITIONS = 1000
_VALUES = 100_000  # in all sets together
_OPERATORS = ("gt", "gte", "lt", "lte", "in", "prefix", "not")
_EXPECTED = 'a string, a number, true, false, null (absent), or an object of "' + '", "'.join(_OPERATORS) + '"'
_ID = re.compile(r"[0-9a-f]{64}")

# A value with its kind, since Python takes True for 1: ("bool", True), ("number", 1), ("string", "1"), …
Value = tuple[str, Any]


@dataclass(frozen=True)
class Among:
    values: frozenset[Value]


@dataclass(frozen=True)
class Bound:
    value: Value  # a number or a string
    included: bool


@dataclass(frozen=True)
class Range:
    """At least one bound; two are of one kind."""

    low: Bound | None
    high: Bound | None


@dataclass(frozen=True)
class Prefix:
    text: str


Test = Among | Range | Prefix


@dataclass(frozen=True)
class Field:
    path: Path
    test: Test


@dataclass(frozen=True)
class HasId:
    ids: frozenset[str]


@dataclass(frozen=True)
class Not:
    of: "Filter"


@dataclass(frozen=True)
class All:
    of: "frozenset[Filter]"


@dataclass(frozen=True)
class AnyOf:
    of: "frozenset[Filter]"


Filter = Field | HasId | Not | All | AnyOf


# --- JSON → tree ------------------------------------------------------------------------------------


def parse(data: Any, *, param: str = "filter") -> Filter:
    """The filter that plain JSON data describe.

    Raises Invalid with ``param`` at the place in question: ``bad_filter`` and what was expected there;
    ``filter_kind`` for a value that can be compared with nothing (NaN, a bound that is true).
    """
    return _Parser().filter(data, param, 0)


class _Parser:
    """One parse; counts conditions and values, so that no request makes a server evaluate for minutes."""

    def __init__(self) -> None:
        self._conditions = self._values = 0

    def filter(self, data: Any, at: str, depth: int) -> Filter:
        if depth > _DEEPEST:
            raise _bad(f"Filters may be nested {_DEEPEST} deep.", at)
        if not isinstance(data, Mapping):
            raise _bad(f"Expected an object of field names and conditions, found {_shown(data)}.", at)
        if not data:
            raise _bad("An empty filter says nothing: leave it out, or name a field.", at)
        found: list[Filter] = []
        for name, value in data.items():
            if not isinstance(name, str) or not _is_text(name):
                raise _bad("A field name must be valid text.", at)
            here = f"{at}.{name}"
            found.append(self._any(value, here, depth) if name == "any" else self._field(name, value, here, depth))
        if len({name if name in RESERVED else path_of(name, param=at) for name in data}) < len(data):
            raise _bad("One field is named twice, with and without backslashes.", at)
        return _all(found)

    def _any(self, data: Any, at: str, depth: int) -> Filter:
        if not isinstance(data, list) or not data:
            raise _bad(f"Expected a list of filters of which one must hold, found {_shown(data)}.", at)
        return AnyOf(frozenset(self.filter(each, f"{at}[{i}]", depth + 1) for i, each in enumerate(data)))

    def _field(self, name: str, data: Any, at: str, depth: int) -> Filter:
        if depth > _DEEPEST:
            raise _bad(f"Filters may be nested {_DEEPEST} deep.", at)
        self._conditions += 1
        if self._conditions > _CONDITIONS:
            raise _bad(f"A filter may have {_CONDITIONS} conditions at most.", at)
        path = None if name == "id" else path_of(name, param=at)
        if not isinstance(data, Mapping):
            return _leaf(path, Among(frozenset([_value(data, at)])), at)
        if unknown := [each for each in data if each not in _OPERATORS]:
            nested = isinstance(unknown[0], str) and _is_text(unknown[0])
            hint = f" For nested metadata write {name}.{unknown[0]}." if nested else ""
            raise _bad(f"{unknown[0]!r} is no operator: expected {_EXPECTED}.{hint}", at)
        if not data:
            raise _bad(f"An empty condition says nothing: expected {_EXPECTED}.", at)
        found: list[Filter] = []
        if "in" in data:
            found.append(_leaf(path, Among(self._set(data["in"], f"{at}.in")), f"{at}.in"))
        if "prefix" in data:
            found.append(_leaf(path, Prefix(_prefix(data["prefix"], f"{at}.prefix")), f"{at}.prefix"))
        if bounds := {each: data[each] for each in ("gt", "gte", "lt", "lte") if each in data}:
            found.append(_leaf(path, _range(bounds, at), at))
        if "not" in data:
            found.append(Not(self._field(name, data["not"], f"{at}.not", depth + 1)))
        return _all(found)

    def _set(self, data: Any, at: str) -> frozenset[Value]:
        if not isinstance(data, list) or not data:
            raise _bad(f"Expected a list with at least one value, found {_shown(data)}.", at)
        self._values += len(data)
        if self._values > _VALUES:
            raise _bad(f"The sets of a filter may have {_VALUES} values together; those up to here have more.", at)
        for number, each in enumerate(data):
            if isinstance(each, list | Mapping):
                raise _bad(
                    f"Expected strings, numbers, true, false or null; found {_shown(each)}.", f"{at}[{number}]"
                )
        return frozenset(_value(each, f"{at}[{number}]") for number, each in enumerate(data))


def _all(found: Iterable[Filter]) -> Filter:
    flat = frozenset(each for one in found for each in (one.of if isinstance(one, All) else (one,)))
    return next(iter(flat)) if len(flat) == 1 else All(flat)


def _leaf(path: Path | None, test: Test, at: str) -> Filter:
    if path is not None:
        return Field(path, test)
    ids = [text for kind, text in test.values if kind == "string"] if isinstance(test, Among) else []
    if not isinstance(test, Among) or len(ids) < len(test.values) or not all(map(_ID.fullmatch, ids)):
        detail = (
            "'id' is the id of an example: one of 64 hex digits, or {\"in\": [several]}. A metadata key of that "
            'name is written "\\\\id" in JSON.'
        )
        raise Invalid("filter_kind", detail, param=at)
    return HasId(frozenset(ids))


def _value(data: Any, at: str) -> Value:
    match data:
        case None:
            return ("null", None)
        case bool():
            return ("bool", data)
        case int() | float():
            if isinstance(data, float) and not math.isfinite(data):
                raise Invalid("filter_kind", f"{data} cannot be compared: expected a finite number.", param=at)
            return ("number", int(data) if isinstance(data, float) and data.is_integer() else data)
        case str():
            if not _is_text(data):
                raise _bad("The string is no valid text: it has half a surrogate pair.", at)
            return ("string", data)
    raise _bad(f"Expected {_EXPECTED}; found {_shown(data)}.", at)


def _prefix(data: Any, at: str) -> str:
    if not isinstance(data, str):
        raise _bad(f"Expected the beginning of a string, found {_shown(data)}.", at)
    return _value(data, at)[1]


def _range(bounds: Mapping[str, Any], at: str) -> Range:
    for one, other in (("gt", "gte"), ("lt", "lte")):
        if one in bounds and other in bounds:
            raise _bad(f"Expected one of '{one}' and '{other}', found both.", at)
    found: dict[str, Bound] = {}
    for name, data in bounds.items():
        here = f"{at}.{name}"
        if data is None or isinstance(data, list | Mapping):
            raise _bad(f"Expected a number or a string, found {_shown(data)}.", here)
        value = _value(data, here)
        if value[0] == "bool":
            raise Invalid(
                "filter_kind", f"true and false have no order: '{name}' needs a number or a string.", param=here
            )
        found[name[:1]] = Bound(value, name.endswith("e"))
    low, high = found.get("g"), found.get("l")
    if low and high and low.value[0] != high.value[0]:
        raise Invalid("filter_kind", "Both ends of a range must be numbers, or both strings.", param=at)
    return Range(low, high)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad(detail: str, at: str) -> Invalid:
    return Invalid("bad_filter", detail, param=at[:300])


def _shown(data: Any) -> str:
    if isinstance(data, Mapping):
        return "an object" if data else "an empty object"
    if isinstance(data, list):
        return 'a list: write {"in": […]} for one of several' if data else "an empty list"
    return f"{data!r:.100}"


# --- tree → JSON ------------------------------------------------------------------------------------


def to_json(wanted: Filter) -> dict[str, Any]:
    """Plain data that ``parse`` reads back; equal filters give equal data, lists in one order."""
    match wanted:
        case Field(path, test):
            return {name_of(path): _test(test)}
        case HasId(ids):
            return {"id": {"in": sorted(ids)}}
        case Not(of):
            ((name, condition),) = to_json(of).items()  # one field: that is all that a 'not' stands before
            return {name: {"not": condition}}
        case AnyOf(of):
            return {"any": _sorted(map(to_json, of))}
        case All(of):
            joined: dict[str, Any] = {}
            for name, condition in (item for each in of for item in to_json(each).items()):
                # Conditions on one field share no operator: they were written as one object.
                joined[name] = _in_order(joined[name] | condition) if name in joined else condition
            return _in_order(joined)


def digest(wanted: Filter) -> str:
    """A name for the filter that equal ones share, in every process, however many values it has."""
    return codec.digest(to_json(wanted))


def _test(test: Test) -> dict[str, Any]:
    match test:
        case Among(values):
            return {"in": [value for _, value in sorted(values)]}  # of one kind all can be compared
        case Prefix(text):
            return {"prefix": text}
        case Range(low, high):
            bounds = ((low, "gt"), (high, "lt"))
            return {f"{name}{'e' * one.included}": one.value[1] for one, name in bounds if one is not None}


def _in_order(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(data.items()))


def _sorted(items: Iterable[Any]) -> list[Any]:
    return sorted(items, key=codec.canonical)
