"""Examples that do the same to the model: clusters of the directions of their influence embeddings.

A job finds the centres once (spherical k-means); which cluster an example is in is read off the rows in memory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec
from service.contracts import ArrayInfo, IndexRecord
from service.loading import Rows
from service.rows import F32
from service.specs import ClustersSpec
from service.storage import Storage

FILE = "centres"


@dataclass(frozen=True)
class Centres:
    """``directions`` (c, r) of unit norm; ``cohesion``: mean cosine of the rows with the centre of their own."""

    directions: F32
    cohesion: float


def plan(index: IndexRecord, array: ArrayInfo, count: int, seed: int) -> ClustersSpec:
    """The job's specification; its key covers everything that decides the result."""
    key = codec.digest(["clusters of", index.manifest_sha256, codec.to_plain(array), count, seed])
    return ClustersSpec(key, index.id, array, count, seed)


def find(storage: Storage, spec: ClustersSpec) -> Centres | None:
    """What the job left, None before it has."""
    known = artifacts.find_answer(storage, spec.key, FILE)
    if known is None:
        return None
    stored, tensors = known
    return Centres(tensors["directions"], float(stored.facts["cohesion"]))


def assign(rows: Rows, centres: F32) -> NDArray[np.int64]:
    """(n,) the centre that each row points along most; −1: the row is zero and points nowhere."""
    best, scores = rows.index.nearest(centres)
    best[scores <= 0] = -1  # a row against every centre is along none
    return best
