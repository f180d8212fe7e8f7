"""Conditions as typed in a shell, and what they become."""

from typing import Any

import pytest

from api import where
from service import filters


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], None),
        (["topic=harbor"], {"topic": "harbor"}),
        (["topic = harbor "], {"topic": "harbor"}),
        (["topic=a|b"], {"topic": {"in": ["a", "b"]}}),
        (['topic="a|b"|c'], {"topic": {"in": ["a|b", "c"]}}),
        (['topic="a\\"|b"'], {"topic": 'a"|b'}),
        (['topic=say "a|b'], {"topic": {"in": ['say "a', "b"]}}),
        (["topic="], {"topic": ""}),
        (['topic=""|x'], {"topic": {"in": ["", "x"]}}),
        (["n=5"], {"n": 5}),
        (['n="5"'], {"n": "5"}),
        (["n=5|5.5|five"], {"n": {"in": [5, 5.5, "five"]}}),
        (["n=1e999", "m=NaN"], {"n": "1e999", "m": "NaN"}),
        (["n=[1]"], {"n": "[1]"}),
        (["x=true", "y=null", "z=True"], {"x": True, "y": None, "z": "True"}),
        (["score>=1"], {"score": {"gte": 1}}),
        (["score>=1", "score<5.5"], {"score": {"gte": 1, "lt": 5.5}}),
        (["score>1", "score<=5"], {"score": {"gt": 1, "lte": 5}}),
        (["day>2024-01-01"], {"day": {"gt": "2024-01-01"}}),
        (["name^=abc"], {"name": {"prefix": "abc"}}),
        (["name^=12"], {"name": {"prefix": "12"}}),
        (['name^="12"'], {"name": {"prefix": "12"}}),
        (["topic!=a"], {"topic": {"not": {"in": ["a"]}}}),
        (["topic!=a", "topic!=b|null"], {"topic": {"not": {"in": ["a", "b", None]}}}),
        (["topic=a", "score>1"], {"topic": "a", "score": {"gt": 1}}),
        (["topic=a", "topic^=a"], {"topic": {"in": ["a"], "prefix": "a"}}),
        (["source.url=x=y"], {"source.url": "x=y"}),
        (["a\\=b=c"], {"a\\=b": "c"}),
        (["a\\.b=c"], {"a\\.b": "c"}),
        (["a\\\\=c"], {"a\\\\": "c"}),
    ],
)
def test_what_is_typed_becomes_a_filter(typed: list[str], expected: dict[str, Any] | None) -> None:
    found = where.parse(typed)
    assert found == expected
    assert repr(found) == repr(expected)  # True is not 1
    if found is not None:
        filters.parse(found)


@pytest.mark.parametrize("typed", ["", "topic", "=a", ">=1", "topic\\=a", "x=a|", "x=|a", "x=a||b", "\\"])
def test_what_is_no_condition_says_what_is(typed: str) -> None:
    with pytest.raises(ValueError, match=r"expected FIELD=VALUE|empty value"):
        where.parse([typed])


@pytest.mark.parametrize("typed", [["x=a", "x=b"], ["x>1", "x>2"], ["x^=a", "x^=b"]])
def test_a_second_condition_of_one_kind_is_refused(typed: list[str]) -> None:
    with pytest.raises(ValueError, match="second condition"):
        where.parse(typed)
