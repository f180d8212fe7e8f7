"""The examples of an index version by position. Stand-in for what branch filter builds: take theirs."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service import datasets
from service.contracts import Example


class Examples:
    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.ids = np.array(table.column("id").to_pylist(), dtype="S64")
        self._row = {item_id: row for row, item_id in enumerate(self.ids.tolist())}

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> list[Example]:
        return datasets.to_examples(self._table.take(pa.array(positions)))

    def positions(self, ids: Sequence[bytes]) -> NDArray[np.int64]:
        return np.array([self._row.get(bytes(item), -1) for item in ids], dtype=np.int64)

    def field(self, name: str) -> list[Any]:
        return [json.loads(text).get(name) for text in self._table.column("metadata").to_pylist()]
