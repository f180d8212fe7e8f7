"""A whole ranking as a Parquet file that is sent while it is made: row group after row group, first rank first."""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.rankings import percentiles, ranked, z_scores
from service.whole import Scored

ROW_GROUP = 1 << 16  # examples: as much of the file as is in memory at a time

SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int64(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("percentile", pa.float64(), nullable=False),
        pa.field("z_score", pa.float64(), nullable=False),
        pa.field("file", pa.string()),  # of the first place
        pa.field("line", pa.int64()),
        pa.field("places", pa.int32(), nullable=False),  # how many lines hold the example
    ]
)
METADATA = pa.field("metadata", pa.large_string(), nullable=False)  # JSON


def stream(
    scored: Scored, facts: Mapping[str, str], *, metadata: bool, row_group: int = ROW_GROUP
) -> Iterator[bytes]:
    """The file in pieces; the first is made before this returns, so that what can fail has failed by then.

    ``facts`` become metadata of the schema, under ``whence.<name>``.
    """
    schema = SCHEMA.append(METADATA) if metadata else SCHEMA
    schema = schema.with_metadata({f"whence.{name}": value for name, value in facts.items()})
    pieces = write(schema, _batches(scored, schema, row_group))
    first = next(pieces)
    return _after(first, pieces)


def write(schema: pa.Schema, batches: Iterable[pa.Table]) -> Iterator[bytes]:
    """Each batch is a row group, whose bytes come as soon as it is made; the footer comes last."""
    sink = _Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(batch, row_group_size=max(1, len(batch)))
            yield sink.drain()
    yield sink.drain()


class _Sink(io.RawIOBase):
    """A file that forgets what it has handed on."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any, /) -> int:
        self._parts.append(bytes(data))
        self._written += len(self._parts[-1])
        return len(self._parts[-1])

    def drain(self) -> bytes:
        """What was written since the last time."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _batches(scored: Scored, schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    order = ranked(scored.scores, None, scored.order)
    percents, deviations = percentiles(scored.scores), z_scores(scored.scores)
    told = _told(scored, with_metadata=METADATA.name in schema.names)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        positions = scored.positions[rows]
        columns = {
            "rank": np.arange(start + 1, start + 1 + len(rows)),
            "example_id": pa.array(scored.examples.ids[positions]).cast(pa.string()),
            "score": scored.scores[rows],
            "percentile": percents[rows],
            "z_score": deviations[rows],
        }
        columns |= {name: column.take(pa.array(positions)) for name, column in told.items()}
        yield pa.table(columns, schema=schema)


def _told(scored: Scored, *, with_metadata: bool) -> dict[str, pa.Array]:
    """What the file says of every example of the index beside its scores, by position."""
    table = scored.examples.stored(["places", "metadata"] if with_metadata else ["places"])
    places = pa.concat_arrays(table.column("places").chunks)
    offsets = places.offsets.to_numpy()
    lengths = np.diff(offsets)
    first = pa.array(offsets[:-1], mask=lengths == 0)
    told = {
        "file": places.values.field("file").take(first),
        "line": places.values.field("line").take(first),
        "places": pa.array(lengths),
    }
    if with_metadata:  # large: all of it may be more than 2 GiB
        told["metadata"] = pa.concat_arrays(table.column("metadata").cast(pa.large_string()).chunks)
    return told


def _after(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
