"""Per-token attribution as it is stored: one artifact per question, read by the api without a model."""

import json
from dataclasses import dataclass

import numpy as np

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


def read(storage: Storage, key: str) -> list[TokenShares]:
    """In the order in which the examples were asked for."""
    held = artifacts.read(storage, artifacts.get(storage, key), FILE)
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
