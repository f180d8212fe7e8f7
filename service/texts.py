"""Examples at rest: text, metadata and places, in blocks so small that a hundred hits from anywhere cost little.

An Arrow file of blocks, each some lines (content, metadata and places as JSON, with tabs between) compressed as one
buffer: docs/decisions/0016. Which example a row is stands in the ids beside it, not here.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv
from pyarrow import json as arrow_json
from pydantic_core import from_json, to_json

from service import codec
from service.contracts import Completion, Content, Conversation, Example, Message, Place, PlainText

PLACES = pa.list_(pa.struct([("file", pa.string()), ("line", pa.int64())]))
SCHEMA = pa.schema([("content", pa.string()), ("metadata", pa.string()), ("places", PLACES)])

_BLOCKS = pa.schema([("block", pa.large_binary()), ("bytes", pa.int64())])
_CODEC = "lz4_raw"
_BLOCK_BYTES = 16 << 10
_MOST = 16  # rows
_TOGETHER = 16 << 20  # bytes that are parsed at a time where all rows are wanted
_ROWS, _COUNT = b"whence.rows", b"whence.count"


class Text(NamedTuple):
    """A row: an example but for its id."""

    content: Content
    metadata: dict[str, Any]
    places: tuple[Place, ...]


def pack(examples: Sequence[Example]) -> bytes:
    """Equal examples give equal bytes."""
    lines = [_line(example) for example in examples]
    fitting = _BLOCK_BYTES * len(lines) // max(1, sum(map(len, lines)))
    rows = min(max(fitting, 1), _MOST)
    blocks = [b"".join(lines[start : start + rows]) for start in range(0, len(lines), rows)]
    packed = [pa.compress(block, codec=_CODEC, asbytes=True) for block in blocks]
    schema = _BLOCKS.with_metadata({_ROWS: str(rows), _COUNT: str(len(lines))})
    columns = [pa.array(packed, pa.large_binary()), pa.array(map(len, blocks), pa.int64())]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def _line(example: Example) -> bytes:
    """JSON escapes the tabs and line ends of what it writes."""
    content = codec.canonical(codec.to_plain(example.content))
    metadata = json.dumps(example.metadata, ensure_ascii=False).encode()
    return b"%s\t%s\t%s\n" % (content, metadata, to_json(example.places))


def table(data: bytes) -> pa.Table:
    """All of it."""
    return Texts(data).table(SCHEMA.names)


class Texts:
    """The file, compressed in memory; the blocks that hold what is asked for are decoded. Thread-safe."""

    def __init__(self, data: bytes) -> None:
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            batch, about = reader.get_batch(0), reader.schema.metadata
        self._rows, self._count = int(about[_ROWS]), int(about[_COUNT])
        blocks = batch.column("block")
        _, offsets, self._packed = blocks.buffers()
        # The first and last byte of each block, packed, and how many it has unpacked.
        self._offsets = np.frombuffer(offsets, dtype=np.int64, count=len(blocks) + 1)
        self._bytes = batch.column("bytes").to_numpy()

    def take(self, rows: Sequence[int]) -> list[Text]:
        """The texts of these rows, in this order."""
        if len(rows) and not 0 <= min(rows) <= max(rows) < self._count:
            raise IndexError(f"rows {min(rows)} to {max(rows)} among {self._count}")
        held = list({row // self._rows for row in rows})
        blocks = {number: lines.split(b"\n") for number, lines in zip(held, self._unpacked(held), strict=True)}
        lines = [blocks[row // self._rows][row % self._rows] for row in rows]
        # No line has a tab but those between its three values, so that all of them are read as one.
        values = from_json(b"[%s]" % b",".join(b"[%s]" % line for line in lines).replace(b"\t", b","))
        return [
            Text(_content(content), metadata, tuple([Place(at["file"], at["line"]) for at in places]))
            for content, metadata, places in values
        ]

    def table(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        schema = pa.schema([SCHEMA.field(name) for name in names])
        options = csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, include_columns=list(names), check_utf8=False
        )
        found = [
            csv.read_csv(
                pa.py_buffer(lines),
                # A line must fit in one of the reader's blocks.
                csv.ReadOptions(use_threads=False, column_names=SCHEMA.names, block_size=len(lines) + 1),
                csv.ParseOptions(delimiter="\t", quote_char=False),
                options,
            )
            for lines in self._lines()
        ]
        tables = [_with_places(each) if "places" in names else each for each in found]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def _unpacked(self, blocks: Sequence[int]) -> list[bytes]:
        """The lines of these blocks."""
        at, lz4 = np.asarray(blocks, dtype=np.int64), pa.Codec(_CODEC)
        starts, stops, sizes = self._offsets[at].tolist(), self._offsets[at + 1].tolist(), self._bytes[at].tolist()
        return [
            lz4.decompress(self._packed.slice(start, stop - start), size, asbytes=True)
            for start, stop, size in zip(starts, stops, sizes, strict=True)
        ]

    def _lines(self) -> Iterator[bytes]:
        """All lines, so many together as are parsed at once."""
        together = np.cumsum(self._bytes) // _TOGETHER
        starts = np.flatnonzero(np.diff(together, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(together)]):
            yield b"".join(self._unpacked(range(start, stop)))


def _content(plain: dict[str, Any]) -> Content:
    """What ``codec.from_plain`` makes of it. The file's hash has been checked, so nothing is left to validate."""
    match plain:
        case {"text": text}:
            return PlainText(text)
        case {"prompt": prompt, "completion": completion}:
            return Completion(prompt, completion)
        case _:
            return Conversation(tuple([Message(**each) for each in plain["messages"]]))


def _with_places(table: pa.Table) -> pa.Table:
    """The column of JSON as lists."""
    at = table.column_names.index("places")
    lines = "\n".join(f'{{"places":{each}}}' for each in table.column(at).to_pylist())
    schema = pa.schema([("places", PLACES)])
    read = arrow_json.ReadOptions(use_threads=False, block_size=len(lines.encode()) + 1)
    parsed = arrow_json.read_json(
        pa.py_buffer(lines.encode()), read, arrow_json.ParseOptions(explicit_schema=schema)
    )
    return table.set_column(at, SCHEMA.field("places"), parsed.column("places"))
