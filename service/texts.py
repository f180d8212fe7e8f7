"""Examples at rest: text, metadata and places, in blocks so small that a hundred hits from anywhere cost little.

An Arrow file, each block compressed by itself. Which example a row is stands in the ids beside it, not here.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic_core import from_json

from service import codec
from service.contracts import Content, Example, Place

PLACES = pa.list_(pa.struct([("file", pa.string()), ("line", pa.int64())]))
SCHEMA = pa.schema([("content", pa.string()), ("metadata", pa.string()), ("places", PLACES)])

# A hit costs its whole block, and a block about 20 µs whatever its size: docs/decisions/0016.
_BLOCK_BYTES = 32 << 10
_LEAST, _MOST = 4, 64  # rows
_ROWS = b"whence.rows"


@dataclass(frozen=True)
class Text:
    """A row: an example but for its id."""

    content: Content
    metadata: dict[str, Any]
    places: tuple[Place, ...]


def pack(examples: Sequence[Example]) -> bytes:
    """Equal examples give equal bytes."""
    table = pa.Table.from_pydict(
        {
            "content": [codec.canonical(codec.to_plain(example.content)).decode() for example in examples],
            "metadata": [json.dumps(example.metadata, ensure_ascii=False) for example in examples],
            "places": [[{"file": at.file, "line": at.line} for at in example.places] for example in examples],
        },
        SCHEMA,
    )
    fitting = _BLOCK_BYTES * max(1, table.num_rows) // max(1, table.nbytes)
    rows = min(max(fitting, _LEAST), _MOST)
    schema = SCHEMA.with_metadata({_ROWS: str(rows)})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for start in range(0, table.num_rows, rows):  # exactly, also where Arrow has cut a column of gigabytes
            (block,) = table.slice(start, rows).combine_chunks().to_batches()
            writer.write_batch(block.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


def table(data: bytes) -> pa.Table:
    """All of it."""
    with pa.ipc.open_file(pa.py_buffer(data)) as reader:
        return reader.read_all().replace_schema_metadata(None)


class Texts:
    """The file, compressed in memory; the blocks that hold what is asked for are decoded. Thread-safe."""

    def __init__(self, data: bytes) -> None:
        self._buffer = pa.py_buffer(data)
        self._readers = threading.local()  # a reader's own state is not made for several threads
        self._rows = int(self._reader().schema.metadata[_ROWS])

    def take(self, rows: Sequence[int]) -> list[Text]:
        """The texts of these rows, in this order."""
        if not len(rows):
            return []
        reader = self._reader()
        blocks = {number: reader.get_batch(number) for number in {row // self._rows for row in rows}}
        # One table of the rows and then column by column: a third of the time that their values take one by one.
        picked = [blocks[row // self._rows].slice(row % self._rows, 1) for row in rows]
        table = pa.Table.from_batches(picked)
        if table.num_rows != len(rows):  # a slice beyond the end is empty
            raise IndexError(f"rows {min(rows)} to {max(rows)}: the file does not hold them all")
        places = table.column("places").combine_chunks()
        flat, offsets = places.flatten(), places.offsets.to_pylist()
        at = list(map(Place, flat.field("file").to_pylist(), flat.field("line").to_pylist()))
        first = offsets[0]
        return [
            Text(
                codec.decode(Content, own),  # pyright: ignore[reportArgumentType]
                from_json(about),
                tuple(at[start - first : stop - first]),
            )
            for own, about, start, stop in zip(
                table.column("content").to_pylist(),
                table.column("metadata").to_pylist(),
                offsets[:-1],
                offsets[1:],
                strict=True,
            )
        ]

    def _reader(self) -> pa.RecordBatchFileReader:
        reader = getattr(self._readers, "reader", None)
        if reader is None:
            reader = pa.ipc.open_file(self._buffer, options=pa.ipc.IpcReadOptions(use_threads=False))
            self._readers.reader = reader
        return reader

    def table(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        fields = [SCHEMA.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        with pa.ipc.open_file(self._buffer, options=options) as reader:
            return reader.read_all().replace_schema_metadata(None).select(list(names))
