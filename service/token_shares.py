"""Per-token attribution as it is stored: one artifact per question, read by the api without a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifacts
from service.storage import Storage

FILE = "tokens"


@dataclass(frozen=True)
class TokenShares:
    """One example: its tokens, what each adds to the score, and which of them were predicted in training.

    Empty where the example is not in the index.
    """

    texts: tuple[str, ...]
    shares: tuple[float, ...]
    predicted: tuple[bool, ...]

    @property
    def score(self) -> float:
        return float(np.sum(self.shares, dtype=np.float64))


def find(storage: Storage, key: str) -> list[TokenShares] | None:
    """In the order in which the examples were asked for; None where they must be computed, first or again."""
    known = artifacts.find_answer(storage, key, FILE)
    return None if known is None else _apart(known[1])


def read(storage: Storage, key: str) -> list[TokenShares]:
    """Like ``find``, of shares that are there. Raises Damaged."""
    return _apart(artifacts.read(storage, artifacts.get(storage, key), FILE))


def _apart(held: Mapping[str, NDArray[Any]]) -> list[TokenShares]:
    texts = iter(json.loads(held["texts"].tobytes().decode()))
    found, start = [], 0
    for length in held["lengths"].tolist():
        stop = start + length
        found.append(
            TokenShares(
                tuple(next(texts)) if length else (),
                tuple(held["shares"][start:stop].tolist()),
                tuple(held["predicted"][start:stop].astype(bool).tolist()),
            )
        )
        start = stop
    return found
