"""Filters: what they say, what they refuse, and which rows they keep, against an evaluation row by row."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import filters, masks
from service.columns import path_of
from service.contracts import Example
from service.errors import Invalid
from service.examples import Examples, select_ids
from service.storage import Storage
from tests.test_examples import opened

SEEDED = settings(derandomize=True, deadline=None, database=None, max_examples=150)

# --- the oracle ---------------------------------------------------------------------------------------


def keeps(data: Mapping[str, Any], example: Example) -> bool:
    """A filter's JSON, looked up in one example, as its documentation reads."""
    for name, condition in data.items():
        if name == "any":
            if not any(keeps(each, example) for each in condition):
                return False
            continue
        value: Any = example.id if name == "id" else example.metadata
        if name != "id":
            for key in path_of(name, param=""):
                value = value.get(key) if isinstance(value, dict) else None
        if not holds(condition, value):
            return False
    return True


def same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def holds(condition: Any, value: Any) -> bool:
    if not isinstance(condition, dict):
        return same(condition, value)
    tests = {
        "in": lambda wanted: any(same(each, value) for each in wanted),
        "prefix": lambda wanted: isinstance(value, str) and value.startswith(wanted),
        "gt": lambda bound: value is not None and value > bound,
        "gte": lambda bound: value is not None and value >= bound,
        "lt": lambda bound: value is not None and value < bound,
        "lte": lambda bound: value is not None and value <= bound,
        "not": lambda inner: not holds(inner, value),
    }
    return all(tests[operator](wanted) for operator, wanted in condition.items())


# --- rows and filters ---------------------------------------------------------------------------------

BIG = [2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]
POOLS: dict[str, list[Any]] = {
    "b": [True, False],
    "i": [0, 1, -1, 2, 7, *BIG],
    "f": [0, -0.0, 1, 1.5, -2.5, 1e300, 2**53, 9007199254740994.0, 5e-324],
    "s": ["", "a", "ab", "abc", "b", "ä", "z", "\U0001f600", "\uffff", "1", "true", "null"],
    "m": ["1", 1, 1.5, True, "true", "null", "", 2**70, 0, 2.0, -0.0],
    "o.x": ["p", "q"],
    "o.y.z": [1, 2],
}
BOUNDS = [0, 0.5, -0.5, 1, 1.5, 2**53 + 1, 2**53 + 1.0, 2**64, -(2**64), 10**400, -(10**400), 1e308, 5e-324, 6.999]
ROW = st.fixed_dictionaries({}, optional={name: st.sampled_from([*pool, None]) for name, pool in POOLS.items()})
NUMBERS = st.sampled_from([*POOLS["i"], *POOLS["f"], *BOUNDS])
VALUES = {
    "b": st.sampled_from([True, False]),
    "i": NUMBERS,
    "f": NUMBERS,
    "s": st.sampled_from(POOLS["s"]) | st.text(max_size=2),
    "m": st.sampled_from(POOLS["m"]) | NUMBERS,
    "o.x": st.sampled_from(POOLS["o.x"]),
    "o.y.z": NUMBERS,
}


@st.composite
def conditions(draw: st.DrawFn, name: str) -> Any:
    plain = VALUES[name] | st.none()

    def operators() -> dict[str, Any]:
        allowed = {"in": st.lists(plain, min_size=1, max_size=12)}
        if name in {"i", "f", "s", "o.y.z"}:
            for pair in (("gt", "gte"), ("lt", "lte")):
                allowed[draw(st.sampled_from(pair))] = VALUES[name]
        if name in {"s", "o.x"}:
            allowed["prefix"] = VALUES[name]
        chosen = draw(st.lists(st.sampled_from(sorted(allowed)), min_size=1, unique=True))
        return {operator: draw(allowed[operator]) for operator in chosen}

    match draw(st.sampled_from(["plain", "some", "not", "some and not", "not not"])):
        case "plain":
            return draw(plain)
        case "some":
            return operators()
        case "not":
            return {"not": draw(st.sampled_from([operators(), draw(plain)]))}
        case "some and not":
            return {**operators(), "not": operators()}
    return {"not": {"not": operators()}, **operators()}


@st.composite
def some_filters(draw: st.DrawFn, depth: int = 0) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(POOLS)), min_size=1, max_size=3, unique=True))
    found = {name: draw(conditions(name)) for name in names}
    if depth < 2 and draw(st.booleans()):
        inner = {"any": [draw(some_filters(depth + 1)) for _ in range(draw(st.integers(1, 3)))]}
        return inner if draw(st.booleans()) else found | inner
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"o.x": 1} → {"o": {"x": 1}}"""
    row: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        inner = row
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return row


# One of every value, so that each field has its kind whatever else is drawn.
ALL = [nested({name: pool[at % len(pool)] for name, pool in POOLS.items()}) for at in range(12)]


@SEEDED
@given(rows=st.lists(ROW, max_size=12), data=some_filters(), cuts=st.lists(st.integers(0, 24), max_size=2))
def test_a_mask_is_what_the_oracle_keeps(rows: list[dict[str, Any]], data: dict[str, Any], cuts: list[int]) -> None:
    everything = [{"text": f"t{n}", **row} for n, row in enumerate([*ALL, *map(nested, rows)])]
    ends = [0, *sorted(cut for cut in cuts if 0 < cut < len(everything)), len(everything)]
    parts = [everything[a:b] for a, b in itertools.pairwise(ends) if a < b]
    parts.append(everything[::5])  # repeats
    examples = opened(Storage("memory://filters"), *parts)
    wanted = filters.parse(data)
    expected = [keeps(data, example) for example in examples.take(range(len(examples)))]
    assert examples.mask(wanted).tolist() == expected
    assert select_ids(examples, wanted) == [
        item.decode() for item, kept in zip(examples.ids.tolist(), expected, strict=True) if kept
    ]
    # And as plain data in one canonical form, which means the same.
    plain = filters.to_json(wanted)
    assert filters.parse(plain) == wanted
    assert filters.to_json(filters.parse(json.loads(json.dumps(plain)))) == plain


@pytest.fixture(scope="module")
def table() -> Examples:
    rows = [{"text": f"t{n}", **row} for n, row in enumerate(ALL)]
    return opened(Storage("memory://filter-table"), [*rows, {"text": "bare"}, {"text": "listed", "tags": ["x"]}])


def count(table: Examples, data: dict[str, Any]) -> int:
    return int(table.mask(filters.parse(data)).sum())


def test_an_absent_value_passes_no_test_but_null_and_not_is_exactly_the_rest(table: Examples) -> None:
    n = len(table)
    for name, value in {"b": True, "i": 1, "f": 1.5, "s": "a", "m": "1", "o.x": "p"}.items():
        passing = count(table, {name: value})
        assert 0 < passing < n - 2
        assert count(table, {name: {"not": value}}) == n - passing
        assert count(table, {name: None}) == 2
        assert count(table, {name: {"not": None}}) == n - 2
        assert count(table, {name: {"in": [value, None]}}) == passing + 2
        assert count(table, {name: {"not": {"in": [value, None]}}}) == n - passing - 2
        assert count(table, {name: {"not": {"not": value}}}) == passing
    for bounds in ({"gte": -(10**400)}, {"lte": 10**400}, {"gt": -(2**63) - 1, "lt": 2**63}):
        assert count(table, {"i": bounds}) == n - 2
    assert count(table, {"i": {"gt": 3, "lt": 3}}) == 0
    assert count(table, {"s": {"prefix": ""}}) == n - 2


def test_ends_of_a_range_belong_to_it_or_not(table: Examples) -> None:
    for name in ("s", "i", "f"):
        for bound in POOLS[name]:
            at, above, below = (count(table, {name: test}) for test in (bound, {"gt": bound}, {"lt": bound}))
            assert at > 0
            assert count(table, {name: {"gte": bound}}) == above + at
            assert count(table, {name: {"lte": bound}}) == below + at
            assert above + at + below == len(table) - 2


def test_values_of_different_kinds_are_never_the_same(table: Examples) -> None:
    found = {str(value): table.mask(filters.parse({"m": value})) for value in POOLS["m"]}
    for name, mask in found.items():
        assert mask.any(), name
    assert not (table.mask(filters.parse({"m": "1"})) & table.mask(filters.parse({"m": 1}))).any()
    assert not (table.mask(filters.parse({"m": True})) & table.mask(filters.parse({"m": "true"}))).any()
    assert count(table, {"m": 1.0}) == count(table, {"m": 1})
    assert count(table, {"m": 2}) == 1
    assert count(table, {"m": 0}) == 2
    assert count(table, {"m": {"in": [True]}}) != count(table, {"m": {"in": [True, 1]}})
    assert count(table, {"m": "null"}) == 1


def test_examples_by_their_ids(table: Examples) -> None:
    ids = [item.decode() for item in table.ids.tolist()]
    assert np.flatnonzero(table.mask(filters.parse({"id": ids[3]}))).tolist() == [3]
    assert np.flatnonzero(table.mask(filters.parse({"id": {"in": [ids[5], ids[1], "0" * 64]}}))).tolist() == [1, 5]
    assert count(table, {"id": {"not": {"in": ids[:4]}}}) == len(table) - 4
    assert count(table, {"id": {"in": ids[:4]}, "b": True}) == 2


def test_a_metadata_key_of_a_reserved_name_is_reached_with_a_backslash() -> None:
    rows = [{"text": f"t{n}", "id": n, "any": n % 2, "a.b": n % 3, "a": {"b": 1}} for n in range(6)]
    examples = opened(Storage("memory://filter-names"), rows)
    assert count(examples, {"\\id": 3}) == 1
    assert count(examples, {"\\any": 1}) == 3
    assert count(examples, {"a\\.b": 2}) == 2
    assert count(examples, {"a.b": 1}) == 6
    with pytest.raises(Invalid, match=r'written "\\\\id" in JSON'):
        filters.parse({"id": 3})


# --- what is equal ------------------------------------------------------------------------------------

EQUAL = [
    [{"a": 1, "b": "x"}, {"b": "x", "a": 1}, {"a": 1.0, "b": {"in": ["x", "x"]}}],
    [{"a": {"in": [1, "x", None]}}, {"a": {"in": [None, "x", 1.0, 1]}}],
    [{"a": {"gte": 1, "lt": 2}}, {"a": {"lt": 2.0, "gte": 1}}],
    [{"any": [{"a": 1}, {"b": 2}]}, {"any": [{"b": 2}, {"a": 1}, {"a": 1}]}],
    [{"a.b": 1}, {"\\a.b": 1}],
]


@pytest.mark.parametrize("group", EQUAL)
def test_filters_that_say_the_same_are_equal_and_have_one_form(group: list[dict[str, Any]]) -> None:
    parsed = [filters.parse(data) for data in group]
    assert len(set(parsed)) == 1
    assert len({json.dumps(filters.to_json(each)) for each in parsed}) == 1


def test_filters_that_differ_are_different() -> None:
    different = [
        {"a": 1}, {"a": True}, {"a": "1"}, {"a": None}, {"a": "null"}, {"b": 1}, {"a": {"not": 1}},
        {"a": {"in": [1, 2]}}, {"a": {"gt": 1}}, {"a": {"gte": 1}}, {"a": {"lt": 1}}, {"a": {"lte": 1}},
        {"a": {"gt": "1"}}, {"a": {"prefix": "1"}}, {"a.b": 1}, {"a\\.b": 1}, {"a": 1, "b": 1},
        {"any": [{"a": 1}, {"b": 1}]}, {"id": "0" * 64}, {"\\id": "0" * 64},
    ]  # fmt: skip
    assert len({filters.parse(data) for data in different}) == len(different)


def test_the_plain_form_is_the_same_in_every_process() -> None:
    data = {
        "any": [{"a": {"in": [*"qwertyuiop", 1, 2.5, None, True]}}, {"b": {"gt": 1}}],
        "c": {"not": "x"},
        "d": 1,
    }
    code = f"import json; from service import filters; print(json.dumps(filters.to_json(filters.parse({data!r}))))"
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)} for seed in ("1", "2"))
    }
    assert len(told) == 1


# --- what is refused ----------------------------------------------------------------------------------

deep: Any = 1
for _ in range(40):
    deep = {"not": deep}
wide: Any = {"a": 1}
for _ in range(40):
    wide = {"any": [wide]}

BAD: list[tuple[Any, str, str, str]] = [
    (None, "bad_filter", "filter", "an object of field names"),
    ([], "bad_filter", "filter", "an object of field names"),
    ("topic", "bad_filter", "filter", "an object of field names"),
    ({}, "bad_filter", "filter", "leave it out"),
    ({"a": {}}, "bad_filter", "filter.a", "gte"),
    ({"a": [1]}, "bad_filter", "filter.a", '"in": \\[…\\]'),
    ({"a": {"eq": 1}}, "bad_filter", "filter.a", "'eq' is no operator.*gte"),
    ({"source": {"url": "x"}}, "bad_filter", "filter.source", "write source.url"),
    ({"a": {"in": 1}}, "bad_filter", "filter.a.in", "a list with at least one"),
    ({"a": {"in": []}}, "bad_filter", "filter.a.in", "at least one"),
    ({"a": {"in": [1, [2]]}}, "bad_filter", "filter.a.in\\[1\\]", "strings, numbers"),
    ({"a": {"in": ["x"] * 100_001}}, "bad_filter", "filter.a.in", "100000"),
    ({"any": [{"a": {"in": ["x"] * 50_001}}] * 2}, "bad_filter", "filter.any\\[1\\].a.in", "together"),
    ({"a": {"\ud800": 1}}, "bad_filter", "filter.a", "no operator"),
    ({"a": {"prefix": 1}}, "bad_filter", "filter.a.prefix", "beginning of a string"),
    ({"a": {"gt": None}}, "bad_filter", "filter.a.gt", "number or a string"),
    ({"a": {"gt": [1]}}, "bad_filter", "filter.a.gt", "number or a string"),
    ({"a": {"gt": 1, "gte": 1}}, "bad_filter", "filter.a", "'gt' and 'gte'"),
    ({"a": {"lt": 1, "lte": 1}}, "bad_filter", "filter.a", "'lt' and 'lte'"),
    ({"a": {"not": {}}}, "bad_filter", "filter.a.not", "empty condition"),
    ({"a": deep}, "bad_filter", "filter.a.not", "nested 16 deep"),
    ({"any": []}, "bad_filter", "filter.any", "a list of filters"),
    ({"any": {"a": 1}}, "bad_filter", "filter.any", "a list of filters"),
    ({"any": [{"a": 1}, {}]}, "bad_filter", "filter.any\\[1\\]", "empty filter"),
    ({"any": [{"a": 1}, {"b": {"lt": {}}}]}, "bad_filter", "filter.any\\[1\\].b.lt", "number or a string"),
    (wide, "bad_filter", "filter.any", "nested 16 deep"),
    ({f"f{n}": 1 for n in range(1001)}, "bad_filter", "filter.f1000", "1000 conditions"),
    ({"a": "\ud800"}, "bad_filter", "filter.a", "surrogate"),
    ({"\ud800": 1}, "bad_filter", "filter", "valid text"),
    ({"a": {"prefix": "\ud800"}}, "bad_filter", "filter.a.prefix", "surrogate"),
    ({"a": 1, "\\a": 2}, "bad_filter", "filter", "named twice"),
    ({"a\\": 1}, "bad_field_name", "filter.a", "backslash"),
    ({"a": float("nan")}, "filter_kind", "filter.a", "finite"),
    ({"a": {"lt": float("inf")}}, "filter_kind", "filter.a.lt", "finite"),
    ({"a": {"in": [1, float("-inf")]}}, "filter_kind", "filter.a.in\\[1\\]", "finite"),
    ({"a": {"gt": True}}, "filter_kind", "filter.a.gt", "no order"),
    ({"a": {"gt": 1, "lt": "2"}}, "filter_kind", "filter.a", "both strings"),
    ({"id": "abc"}, "filter_kind", "filter.id", "64 hex digits"),
    ({"id": None}, "filter_kind", "filter.id", "64 hex digits"),
    ({"id": {"prefix": "a"}}, "filter_kind", "filter.id.prefix", "64 hex digits"),
    ({"id": {"in": ["0" * 64, 1]}}, "filter_kind", "filter.id.in", "64 hex digits"),
    ({"id": "A" * 64}, "filter_kind", "filter.id", "64 hex digits"),
]


@pytest.mark.parametrize(("data", "code", "param", "says"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_a_filter_that_is_none_says_where_and_what_was_expected(
    data: Any, code: str, param: str, says: str
) -> None:
    with pytest.raises(Invalid, match=says) as refused:
        filters.parse(data)
    assert refused.value.code == code
    assert re.match(param, refused.value.param or "")
    assert len(refused.value.detail) < 1000


MISFITS = [
    (
        {"topic": "a"},
        "unknown_filter_field",
        "filter.topic",
        r"no field 'topic'.*b \(bool\), f \(float\)",
    ),
    ({"o": "a"}, "filter_kind", "filter.o", r"holds objects.*o\.x, o\.y\.z"),
    ({"tags": "x"}, "filter_kind", "filter.tags", "holds lists"),
    ({"tags": None}, "filter_kind", "filter.tags", "holds lists"),
    ({"i": "1"}, "filter_kind", "filter.i", "kind int.*string.*without quotation marks"),
    ({"i": True}, "filter_kind", "filter.i", "kind int.*bool"),
    ({"f": {"in": [1, "x"]}}, "filter_kind", "filter.f", "kind float"),
    ({"s": 1}, "filter_kind", "filter.s", "kind string.*number"),
    ({"b": 1}, "filter_kind", "filter.b", "kind bool"),
    ({"b": {"gte": 1}}, "filter_kind", "filter.b.gte", "kind bool.*range"),
    ({"i": {"lt": "2"}}, "filter_kind", "filter.i.lt", "kind int.*range of strings"),
    ({"s": {"gt": 2}}, "filter_kind", "filter.s.gt", "kind string.*range of numbers"),
    ({"m": {"gt": 2}}, "filter_kind", "filter.m.gt", "kind mixed.*no ranges"),
    ({"m": {"prefix": "x"}}, "filter_kind", "filter.m.prefix", "kind mixed"),
    ({"i": {"prefix": "1"}}, "filter_kind", "filter.i.prefix", "kind int.*prefix"),
    ({"o.y.z": {"not": {"prefix": "1"}}}, "filter_kind", "filter.o.y.z.prefix", "kind int"),
    ({"any": [{"i": 1}, {"i": {"not": {"gt": "x"}}}]}, "filter_kind", "filter.i.gt", "kind int"),
]


@pytest.mark.parametrize(("data", "code", "param", "says"), MISFITS)
def test_a_filter_that_does_not_fit_the_metadata_says_what_would(
    table: Examples, data: Any, code: str, param: str, says: str
) -> None:
    wanted = filters.parse(data)
    with pytest.raises(Invalid, match=says) as refused:
        table.mask(wanted)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_a_field_without_values_takes_null_alone() -> None:
    examples = opened(Storage("memory://filter-null"), [{"text": "a", "x": None}, {"text": "b"}])
    assert count(examples, {"x": None}) == 2
    assert count(examples, {"x": {"not": None}}) == 0
    with pytest.raises(Invalid, match="null alone"):
        examples.mask(filters.parse({"x": 1}))


# --- numbers, at the edges of their types -------------------------------------------------------------


@SEEDED
@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from(BIG), min_size=1, max_size=8),
    bound=st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(BOUNDS),
    near=st.booleans(),
)
def test_integers_are_compared_exactly(values: list[int], bound: float, near: bool) -> None:
    if near and abs(bound) < 2**62:
        values = [*values, int(bound) - 1, int(bound), int(bound) + 1]
    compare(np.array(values, dtype=np.int64), values, bound)


@SEEDED
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    bound=st.integers(-(2**70), 2**70) | st.sampled_from(BOUNDS),
    near=st.booleans(),
)
def test_floats_are_compared_exactly(values: list[float], bound: float, near: bool) -> None:
    if near and abs(bound) < 2**1000:
        values = [
            *values,
            float(bound),
            float(np.nextafter(float(bound), np.inf)),
            float(np.nextafter(float(bound), -np.inf)),
        ]
    compare(np.array(values), values, bound)


def compare(array: np.ndarray, values: list[Any], bound: float) -> None:
    for included in (True, False):
        end = filters.Bound(("number", bound), included)
        above = masks._of_values(filters.Range(end, None), array)
        below = masks._of_values(filters.Range(None, end), array)
        assert above.tolist() == [x >= bound if included else x > bound for x in values]
        assert below.tolist() == [x <= bound if included else x < bound for x in values]
    equal = masks._of_values(filters.Among(frozenset([("number", bound)])), array)
    assert equal.tolist() == [x == bound for x in values]


def test_sets_of_many_numbers_and_of_few_agree() -> None:
    rng = random.Random(0)
    rows = [{"text": f"t{n}", "i": rng.randrange(40), "f": rng.randrange(40) / 2} for n in range(300)]
    examples = opened(Storage("memory://filter-sets"), rows)
    for size in (1, 3, 8, 9, 30):
        wanted = [*rng.sample(range(40), size), 2**70, 0.3]
        for name in ("i", "f"):
            expected = [row[name] in wanted for row in rows]
            assert examples.mask(filters.parse({name: {"in": wanted}})).tolist() == expected
