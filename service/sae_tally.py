"""What is kept of an encoded index, and what is counted: pure functions of the features that fire on it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.rows import F32
from service.sae import Firing

I32, I64 = NDArray[np.int32], NDArray[np.int64]

TOP = 100  # examples kept of every feature
_FEWEST, _MOST = 8, 64  # features kept of every example
_ENTRIES = 1 << 25  # of all examples together, where that leaves each the fewest
_PENDING = 1 << 22  # entries gathered before they are sorted in


def kept_per_example(examples: int) -> int:
    """How many of an example's features are stored: 64, or fewer where there are very many examples."""
    return int(np.clip(_ENTRIES // max(1, examples), _FEWEST, _MOST))


class Tally:
    """Takes the firing features of example after example, and keeps what answers need."""

    def __init__(self, features: int, keep: int) -> None:
        self._features, self._keep = features, keep
        self._rows = 0
        self._counts = np.zeros(features, np.int64)
        self._sums = np.zeros(features)
        self._largest = np.zeros(features, np.float32)
        self._l0: list[I32] = []
        self._least: list[F32] = []
        self._examples: list[Firing] = []
        self._pending: list[tuple[I32, I64, F32]] = []  # feature, example, value
        self._waiting = 0

    def add(self, found: Firing) -> None:
        owners = found.owners()
        self._counts += np.bincount(found.features, minlength=self._features)
        self._sums += np.bincount(found.features, weights=found.values, minlength=self._features)
        np.maximum.at(self._largest, found.features, found.values)
        self._l0.append(np.diff(found.starts).astype(np.int32))
        self._least.append(weakest(found))
        self._examples.append(strongest(found, self._keep))
        self._pending.append((found.features, owners + self._rows, found.values))
        self._waiting += len(found.values)
        self._rows += found.rows
        if self._waiting > _PENDING:
            self._sort_in()

    def finish(self) -> dict[str, NDArray[Any]]:
        """The tensors of the artifact: (f,) ``counts``, ``sums``, ``largest``; (n,) ``l0`` and ``least``, the
        weakest that fires there; ``example_*`` and ``feature_*``: starts, what fires there or where it fires, and
        values, strongest first.
        """
        self._sort_in()
        features, rows, values = self._pending[0] if self._pending else _NOTHING
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(features, minlength=self._features))])
        sizes = [np.diff(each.starts) for each in self._examples]
        return {
            "counts": self._counts,
            "sums": self._sums,
            "largest": self._largest,
            "l0": np.concatenate([np.zeros(0, np.int32), *self._l0]),
            "least": np.concatenate([np.zeros(0, np.float32), *self._least]),
            "example_starts": np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))]),
            "example_features": np.concatenate(
                [np.zeros(0, np.int32), *(each.features for each in self._examples)]
            ),
            "example_values": np.concatenate([np.zeros(0, np.float32), *(each.values for each in self._examples)]),
            "feature_starts": starts,
            "feature_examples": rows,
            "feature_values": values,
        }

    def _sort_in(self) -> None:
        """The best of each feature among what was kept and what has come since; of equal ones the first example."""
        if not self._pending:
            return
        features, rows, values = (np.concatenate(each) for each in zip(*self._pending, strict=True))
        order = np.lexsort((rows, -values, features))
        features = features[order]
        place = np.arange(len(features)) - np.searchsorted(features, features)
        order = order[place < TOP]
        self._pending = [(features[place < TOP], rows[order], values[order])]
        self._waiting = 0


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def weakest(found: Firing) -> F32:
    """(n,) the smallest value on each row, 0 where nothing fires."""
    out = np.zeros(found.rows, np.float32)
    some = np.flatnonzero(np.diff(found.starts))
    if len(some):
        out[some] = np.minimum.reduceat(found.values, found.starts[some])
    return out


def strongest(found: Firing, keep: int) -> Firing:
    """At most ``keep`` features of each row, the strongest first; of equal ones the first feature."""
    owners = found.owners()
    order = np.lexsort((found.features, -found.values, owners))
    kept = (np.arange(len(order)) - found.starts[owners]) < keep
    sizes = np.minimum(np.diff(found.starts), keep)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Firing(starts, found.features[order][kept], found.values[order][kept])
