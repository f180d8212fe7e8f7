"""The examples of an index version by position. Stand-in for what branch filter builds: take theirs."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service import datasets
from service.contracts import Example
from service.errors import Invalid


class Examples:
    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.ids = np.array(table.column("id").to_pylist(), dtype="S64")
        self._row = {item_id: row for row, item_id in enumerate(self.ids.tolist())}

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> list[Example]:
        return datasets.to_examples(self._table.take(pa.array(positions)))

    def positions(self, ids: Sequence[bytes] | NDArray[np.bytes_]) -> NDArray[np.int64]:
        return np.array([self._row.get(bytes(item), -1) for item in ids], dtype=np.int64)

    def stored(self, names: Sequence[str]) -> pa.Table:
        """Of all examples, as at rest: columns ``metadata`` (JSON text) and ``places`` (lists of file, line)."""
        return self._table.select(list(names))

    def fields(self) -> dict[str, str]:
        read = [json.loads(text) for text in self._table.column("metadata").to_pylist()]
        kinds = {key: {type(row[key]) for row in read if row.get(key) is not None} for row in read for key in row}
        return {key: "mixed" if len(types) > 1 else next(iter(types)).__name__ for key, types in kinds.items()}

    def field(self, name: str, *, param: str = "field") -> pa.ChunkedArray:
        fields = self.fields()
        if name not in fields:
            detail = f"No example has metadata {name!r}; there is: {', '.join(fields) or 'none'}."
            raise Invalid("unknown_field", detail, param=param, context={"fields": list(fields)})
        values = [json.loads(text).get(name) for text in self._table.column("metadata").to_pylist()]
        if fields[name] == "mixed":
            values = [None if value is None else json.dumps(value) for value in values]
        return pa.chunked_array([pa.array(values)])
