"""Which rows a filter keeps, over typed columns: exact, without a Python object per row.

A test on strings is made once for each different one where they are few; numbers are compared as what they are,
so that no bound is rounded to the type of its column.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from service.columns import FieldInfo, FieldKind, name_of, scalar_text
from service.errors import Invalid
from service.filters import All, Among, AnyOf, Bound, Field, Filter, HasId, Not, Prefix, Range, Test, Value

pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them
Mask = NDArray[np.bool_]

_TEXTS = (FieldKind.STRING, FieldKind.MIXED)
_NUMBERS = (FieldKind.INT, FieldKind.FLOAT)
_TAKES = {
    FieldKind.BOOL: {"bool"},
    FieldKind.INT: {"number"},
    FieldKind.FLOAT: {"number"},
    FieldKind.STRING: {"string"},
    FieldKind.MIXED: {"bool", "number", "string"},
    FieldKind.NULL: set[str](),
}
_FEW = 8  # values that are compared one by one


def evaluate(wanted: Filter, leaf: Callable[[Field | HasId], Mask]) -> Mask:
    """(n,) of the whole filter, from those of its leaves. May share memory with what ``leaf`` returns."""
    match wanted:
        case Field() | HasId():
            return leaf(wanted)
        case Not(of):
            return ~evaluate(of, leaf)
        case All(of):
            return reduce(np.logical_and, (evaluate(each, leaf) for each in of))
        case AnyOf(of):
            return reduce(np.logical_or, (evaluate(each, leaf) for each in of))


def check(wanted: Field, info: FieldInfo) -> None:
    """Raises Invalid (``filter_kind``) for a test that values of this kind do not have."""
    name = name_of(wanted.path)
    match wanted.test:
        case Among(values):
            wrong = {kind for kind, _ in values} - _TAKES[info.kind] - {"null"}
            asked, at = f"compared with a {min(wrong, default='')}", name
        case Range(low, high):
            kinds = {bound.value[0] for bound in (low, high) if bound is not None}
            ordered = "string" if info.kind == FieldKind.STRING else "number" if info.kind in _NUMBERS else ""
            wrong = kinds - {ordered}
            asked, at = f"compared with a range of {min(kinds)}s", f"{name}.{_first(wanted.test)}"
        case Prefix():
            wrong = set() if info.kind == FieldKind.STRING else {"prefix"}
            asked, at = "searched for a prefix", f"{name}.prefix"
    if wrong:
        raise Invalid(
            "filter_kind",
            f"Field {name!r} is of kind {info.kind} and cannot be {asked}: {_CAN[info.kind]}",
            param=f"filter.{at}",
            context={"field": name, "kind": info.kind},
        )


_CAN = {
    FieldKind.BOOL: "it takes true, false or null.",
    FieldKind.INT: "it takes numbers (without quotation marks), ranges of them, or null.",
    FieldKind.FLOAT: "it takes numbers (without quotation marks), ranges of them, or null.",
    FieldKind.STRING: "it takes strings (numbers and true in quotation marks), ranges of them, a prefix, or null.",
    FieldKind.MIXED: "its values are of several kinds, so it takes single values and sets of them, and no ranges.",
    FieldKind.NULL: "no example has a value there, so it takes null alone.",
}


def matches(test: Test, info: FieldInfo, column: pa.Array) -> Mask:
    """(n,) which values of a column pass. ``column`` as ``Examples.column`` makes it; ``check`` came before."""
    if isinstance(column, pa.DictionaryArray):
        texts = column.dictionary
        table = np.zeros(len(texts) + 1, dtype=bool)
        table[:-1] = _of_texts(test, info.kind, texts)
        table[-1] = _takes_null(test)
        numbers = column.indices.fill_null(len(texts)) if column.null_count else column.indices
        return np.take(table, numbers.to_numpy())
    if info.kind in _TEXTS:
        found = _of_texts(test, info.kind, column)
    elif info.kind == FieldKind.NULL:
        found = np.zeros(len(column), dtype=bool)
    else:
        filled = column.fill_null(False if info.kind == FieldKind.BOOL else 0) if column.null_count else column
        found = _of_values(test, filled.to_numpy(zero_copy_only=False))
    if column.null_count:
        absent = column.is_null().to_numpy(zero_copy_only=False)
        found = found | absent if _takes_null(test) else found & ~absent
    return found


def _takes_null(test: Test) -> bool:
    return isinstance(test, Among) and ("null", None) in test.values


def _first(test: Range) -> str:
    bound, name = (test.low, "gt") if test.low is not None else (test.high, "lt")
    return f"{name}{'e' * bool(bound and bound.included)}"


# --- strings ----------------------------------------------------------------------------------------


def _of_texts(test: Test, kind: FieldKind, texts: pa.Array) -> Mask:
    """(k,) of strings; what stands for null is anything."""
    found: Any
    match test:
        case Among(values):
            plain = [value for of, value in values if of != "null"]
            if kind == FieldKind.MIXED:
                plain = [scalar_text(value) for value in plain]
            if len(plain) == 1:
                found = pc.equal(texts, pa.scalar(plain[0], texts.type))
            else:
                found = pc.is_in(texts, pa.array(plain, texts.type))
        case Prefix(text):
            found = pc.starts_with(texts, text)
        case Range(low, high):
            found = pa.array(np.ones(len(texts), dtype=bool))
            for bound, inside, at in ((low, pc.greater, pc.greater_equal), (high, pc.less, pc.less_equal)):
                if bound is not None:
                    compare = at if bound.included else inside
                    found = pc.and_(found, compare(texts, pa.scalar(bound.value[1], texts.type)))
    return found.fill_null(False).to_numpy(zero_copy_only=False)


# --- numbers and truth values -----------------------------------------------------------------------


def _of_values(test: Test, values: NDArray[Any]) -> Mask:
    """(n,) of int64, float64 or bool."""
    if isinstance(test, Range):
        return _between(test, values)
    assert isinstance(test, Among)  # noqa: S101  (check: the others are of strings)
    wanted = [found for value in test.values if (found := _same(value, values.dtype)) is not None]
    if len(wanted) <= _FEW:
        passes = np.zeros(len(values), dtype=bool)
        for value in wanted:
            passes |= values == value
        return passes
    return np.isin(values, np.array(wanted, dtype=values.dtype))


def _same(value: Value, dtype: np.dtype[Any]) -> Any:
    """The number of this type that equals ``value`` exactly; None: there is none."""
    kind, plain = value
    if kind == "null":
        return None
    if kind == "bool":
        return plain
    if dtype == np.int64:
        whole = int(plain)
        return whole if whole == plain and -(2**63) <= whole < 2**63 else None
    near = _nearest(plain)
    return near if near == plain else None


def _between(test: Range, values: NDArray[Any]) -> Mask:
    passes = np.ones(len(values), dtype=bool)
    if test.low is not None:
        passes &= _beyond(test.low, values, 1)
    if test.high is not None:
        passes &= _beyond(test.high, values, -1)
    return passes


def _beyond(bound: Bound, values: NDArray[Any], way: int) -> Mask:
    """Above (``way`` 1) or below (−1) a bound that the type of the values may not have."""
    limit, included = bound.value[1], bound.included
    if values.dtype == np.int64:
        # x > 1.5 is x ≥ 2; and beyond int64 everything is on one side.
        rounded = math.ceil(limit) if way > 0 else math.floor(limit)
        included, limit = included or rounded != limit, rounded
        if not -(2**63) <= limit < 2**63:
            return np.full(len(values), (limit < 0) == (way > 0))
    else:
        near = _nearest(limit)
        if near != limit:  # between two floats: all that count are on the far side of it
            included = (near > limit) == (way > 0)
        limit = near
    if way > 0:
        return values >= limit if included else values > limit
    return values <= limit if included else values < limit


def _nearest(number: int | float) -> float:
    """The float64 nearest to it, infinite beyond all of them."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
