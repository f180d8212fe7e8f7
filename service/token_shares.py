"""Per-token attribution as it is stored: one artifact per question, read by the api without a model."""

import json
from collections.abc import Mapping, Sequence
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
    return [
        TokenShares(tuple(texts), tuple(shares.tolist()), tuple(predicted.astype(bool).tolist()))
        for texts, shares, predicted in split(held)
    ]


# One example as it is stored: the texts of its tokens, their shares (T,), which of them were predicted (T,).
Share = tuple[list[str], NDArray[np.float32], NDArray[np.uint8]]
NOTHING: Share = ([], np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.uint8))


def split(held: Mapping[str, NDArray[Any]]) -> list[Share]:
    """The tensors of a file by example."""
    texts = iter(json.loads(held["texts"].tobytes().decode()))
    ends = np.cumsum(held["lengths"])[:-1]
    parts = zip(held["lengths"], np.split(held["shares"], ends), np.split(held["predicted"], ends), strict=True)
    return [(next(texts), shares, predicted) if length else NOTHING for length, shares, predicted in parts]


def join(each: Sequence[Share]) -> dict[str, NDArray[Any]]:
    """The tensors of a file from single examples; the inverse of ``split``."""
    texts = [texts for texts, shares, _ in each if len(shares)]
    return {
        "shares": np.concatenate([NOTHING[1], *(shares for _, shares, _ in each)]),
        "lengths": np.array([len(shares) for _, shares, _ in each], dtype=np.int32),
        "predicted": np.concatenate([NOTHING[2], *(predicted for _, _, predicted in each)]),
        "texts": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
    }
