"""What takes long to load: once for all that ask, within bounds, and nothing left of what failed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.cache import LoadingCache


def test_a_value_is_loaded_once_for_all_that_ask() -> None:
    cache: LoadingCache[int] = LoadingCache(10)
    started, loads = threading.Event(), []

    def load() -> int:
        loads.append(1)
        started.wait(10)
        return 7

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cache.get, "key", load) for _ in range(8)]
        started.set()
        assert [each.result() for each in asked] == [7] * 8
    assert len(loads) == 1
    assert not cache._loading


def test_the_longest_unused_make_room() -> None:
    cache: LoadingCache[str] = LoadingCache(3, len)
    for key in ("a", "b", "a", "cc"):
        cache.get(key, lambda key=key: key)
    assert list(cache._values) == ["a", "cc"]
    assert cache.get("huge", lambda: "x" * 9) == "x" * 9
    assert list(cache._values) == ["huge"]  # the newest stays, however heavy


def test_what_fails_leaves_nothing_and_is_tried_again_by_those_that_wait() -> None:
    cache: LoadingCache[int] = LoadingCache(10)
    tries = []

    def load() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError(len(tries))
        return 5

    def ask(_number: int) -> int | str:
        try:
            return cache.get("key", load)
        except ValueError:
            return "failed"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(6)))
    assert (found.count("failed"), found.count(5)) == (2, 4)
    assert not cache._loading  # else every bad question would be remembered for good
    with pytest.raises(ZeroDivisionError):
        cache.get("other", lambda: 1 // 0)
    assert not cache._loading
