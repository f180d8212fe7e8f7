"""Things that take long to load: each is loaded once, when it is first asked for; others do not wait for it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class LoadingCache(Generic[V]):
    """Keeps the most recently used values, ``most`` of them by weight. Thread-safe; a load that raises is not
    remembered. The newest value stays, however heavy it is.
    """

    def __init__(self, most: int, weigh: Callable[[V], int] = lambda _value: 1) -> None:
        self._most = most
        self._weigh = weigh
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._weight = 0
        self._loading: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], V]) -> V:
        """The value of ``key``; ``load`` runs at most once at a time for a key."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            gate = self._loading.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                if key in self._values:
                    return self._values[key][0]
            value = load()  # when it raises, the gate stays for the next one
            weight = self._weigh(value)
            with self._lock:
                # Loaded twice at once where one waited at the gate while the value came and went again.
                _, other = self._values.pop(key, (None, 0))
                self._values[key] = (value, weight)
                self._weight += weight - other
                self._loading.pop(key, None)
                while self._weight > self._most and len(self._values) > 1:
                    _, (_, lighter) = self._values.popitem(last=False)
                    self._weight -= lighter
            return value


class Once(Generic[V]):
    """One value, loaded when it is first asked for. Thread-safe; a load that raises is tried again."""

    def __init__(self, load: Callable[[], V]) -> None:
        self._load = load
        self._value: list[V] = []
        self._lock = threading.Lock()

    def __call__(self) -> V:
        if not self._value:
            with self._lock:
                if not self._value:
                    self._value.append(self._load())
        return self._value[0]
