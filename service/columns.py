"""Metadata as typed columns: one value per example for every key, so that filters and groups read no JSON.

A field is a path of keys into the metadata, at most three deep, and its name joins them by dots: ``topic``,
``source.url``. In a name a backslash takes the next character as it is: ``a\\.b`` is the one key "a.b", and
``\\id`` the key "id" rather than the example's own. The file knows no example: row i is that of the i-th.
"""

import io
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.errors import Invalid

Path = tuple[str, ...]

DEEPEST = 3  # keys from the top of the metadata to a value
MOST = 256  # fields of a dataset, and again as many that are named with why they are none
RESERVED = frozenset(["id", "any"])  # names that mean something else in a filter
FEW = 1 << 16  # distinct strings up to which a column is kept as numbers into a dictionary
_GROUP = 1 << 20  # rows
_FIELDS = b"whence.fields"
_SHOWN = 20  # fields listed in an error
_INT64 = range(-(2**63), 2**63)


class FieldKind(StrEnum):
    """What the values of a field are, in every example that has it."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"  # integers among them stand for the same number
    STRING = "string"
    MIXED = "mixed"  # several of these: kept as JSON text, told apart exactly ("1" is not 1), never ordered
    NULL = "null"  # in no example
    LIST = "list"  # not filterable
    OBJECT = "object"  # not filterable: objects beside plain values, empty, or more than three keys deep


FILTERABLE = frozenset(FieldKind) - {FieldKind.LIST, FieldKind.OBJECT}


@dataclass(frozen=True)
class FieldInfo:
    path: Path
    kind: FieldKind
    exact: bool = True  # every number of it is one that float64 has
    distinct: int = 0  # different values, of kinds that are kept as text


@dataclass(frozen=True)
class Fields:
    """What a dataset's metadata holds. ``left_out``: further keys, which are neither filterable nor named."""

    known: Mapping[Path, FieldInfo]
    left_out: int = 0


# --- names ------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """The name by which a path is written; ``path_of`` reads it back."""
    name = ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in path)
    return f"\\{name}" if name in RESERVED else name


def path_of(name: str, *, param: str) -> Path:
    """A name → the path it means. Raises Invalid (``bad_field_name``) for a backslash at the end."""
    keys, letters = [""], iter(name)
    for letter in letters:
        if letter == ".":
            keys.append("")
        elif letter != "\\":
            keys[-1] += letter
        elif (escaped := next(letters, None)) is not None:
            keys[-1] += escaped
        else:
            detail = f"The field name {name[:200]!r} ends with a backslash: write two for one that is meant."
            raise Invalid("bad_field_name", detail, param=param)
    return tuple(keys)


def scalar_text(value: bool | int | float | str) -> str:
    """JSON text that is equal for equal values and different for all others: 1 and 1.0 are one, "1" is not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


# --- gathering --------------------------------------------------------------------------------------

_BOOL, _INT, _FLOAT, _STRING, _LIST, _OBJECT, _BIG, _INEXACT = (1 << bit for bit in range(8))
_OF_TYPE = {bool: _BOOL, int: _INT, float: _FLOAT, str: _STRING, type(None): 0, list: _LIST, dict: _OBJECT}
_SCALARS = _BOOL | _INT | _FLOAT | _STRING
_ALONE = {
    0: FieldKind.NULL,
    _BOOL: FieldKind.BOOL,
    _FLOAT: FieldKind.FLOAT,
    _STRING: FieldKind.STRING,
}
_ARROW = {FieldKind.BOOL: pa.bool_(), FieldKind.INT: pa.int64(), FieldKind.FLOAT: pa.float64()}


@dataclass
class _Seen:
    present: int = 0  # examples that have a value
    flags: int = 0


@dataclass
class _Held:
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    values: list[Any] = field(default_factory=list)


def pack(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The metadata of all examples, in their order, as a Parquet file; equal metadata give equal bytes."""
    seen: dict[Path, _Seen] = {}
    for row in rows:
        for path, value in _walk(row):
            found = seen.get(path) or seen.setdefault(path, _Seen())
            found.present += value is not None
            found.flags |= _flags(value)
    # Keys that most examples have come first: where every line has keys of its own, those are what is left out.
    order = sorted(seen, key=lambda path: -seen[path].present)
    kinds = {path: _kind(seen[path].flags) for path in order}
    kept = [path for path in order if kinds[path] in FILTERABLE][:MOST]
    told = [path for path in order if kinds[path] not in FILTERABLE][:MOST]
    held = {path: _Held() for path in kept}
    for number, row in enumerate(rows):
        for path, value in _walk(row):
            if value is not None and (one := held.get(path)) is not None:
                one.rows.append(number)
                one.values.append(value)
    infos, columns = [], []
    for path in kept:
        one = held.pop(path)
        column, distinct = _column(kinds[path], one, len(rows))
        infos.append(FieldInfo(path, kinds[path], not seen[path].flags & _INEXACT, distinct))
        columns.append(column)
    infos += [FieldInfo(path, kinds[path]) for path in told]
    return _write(columns, infos, len(seen) - len(infos))


def _walk(row: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every path that ends in this row, with its value, and those of the objects on the way."""
    for key, value in row.items():
        path = (*above, key)
        yield path, value
        if type(value) is dict and len(path) < DEEPEST:
            yield from _walk(value, path)


def _flags(value: Any) -> int:
    flags = _OF_TYPE[type(value)]
    if flags == _INT and not -(2**53) <= value <= 2**53:
        flags |= 0 if value in _INT64 else _BIG
        try:
            flags |= 0 if int(float(value)) == value else _INEXACT
        except OverflowError:
            flags |= _INEXACT
    return flags


def _kind(flags: int) -> FieldKind:
    if flags & _LIST:
        return FieldKind.LIST
    if flags & _OBJECT:
        return FieldKind.OBJECT
    scalars = flags & _SCALARS
    if scalars == _INT:
        return FieldKind.MIXED if flags & _BIG else FieldKind.INT
    if scalars == _INT | _FLOAT and not flags & _INEXACT:
        return FieldKind.FLOAT
    return _ALONE.get(scalars, FieldKind.MIXED)


def _column(kind: FieldKind, held: _Held, n: int) -> tuple[pa.Array, int]:
    """(n,) with null where the field is absent, and how many different texts it has."""
    if kind in _ARROW:
        values: list[Any] = [float(v) for v in held.values] if kind == FieldKind.FLOAT else held.values
        distinct = 0
    else:
        values = [scalar_text(v) for v in held.values] if kind == FieldKind.MIXED else held.values
        distinct = len(set(values))
    there = np.frombuffer(held.rows, dtype=np.int64)
    index = np.zeros(n, dtype=np.int64)
    index[there] = np.arange(len(there))
    absent = np.ones(n, dtype=bool)
    absent[there] = False
    return pa.array(values, _ARROW.get(kind, pa.string())).take(pa.array(index, mask=absent)), distinct


def _write(columns: list[pa.Array], infos: list[FieldInfo], left_out: int) -> bytes:
    about = {
        "fields": [[list(info.path), info.kind, info.exact, info.distinct] for info in infos],
        "left_out": left_out,
    }
    names = [str(number) for number in range(len(columns))]  # the fields' own may be anything, and have dots
    table = pa.Table.from_arrays(columns, names).replace_schema_metadata({_FIELDS: json.dumps(about)})
    few = [name for name, info in zip(names, infos, strict=False) if 0 < info.distinct <= FEW]
    sink = io.BytesIO()
    options: Any = {"use_dictionary": few, "write_statistics": False, "row_group_size": _GROUP}
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


# --- reading ----------------------------------------------------------------------------------------


class Columns:
    """The typed metadata of one dataset of ``n`` examples; a column is decoded when asked for. Thread-safe."""

    def __init__(self, data: bytes, n: int) -> None:
        self._buffer = pa.py_buffer(data)
        self._n = n
        about = json.loads(pq.read_schema(pa.BufferReader(self._buffer)).metadata[_FIELDS])
        infos = [FieldInfo(tuple(path), FieldKind(kind), *rest) for path, kind, *rest in about["fields"]]
        self.fields = Fields({info.path: info for info in infos}, about["left_out"])
        self._names = {info.path: str(number) for number, info in enumerate(infos) if info.kind in FILTERABLE}

    def array(self, path: Path, kind: FieldKind) -> pa.Array:
        """(n,) as values of ``kind``, which must be one that those of the field fit into; null: absent.

        Few different strings come as a dictionary and numbers into it.
        """
        info = self.fields.known.get(path)
        if info is None or info.kind == FieldKind.NULL:
            return pa.nulls(self._n, _ARROW.get(kind, pa.string()))
        name = self._names[path]
        coded = [name] if 0 < info.distinct <= FEW else None
        file = pq.ParquetFile(pa.BufferReader(self._buffer), read_dictionary=coded)
        found = file.read(columns=[name]).column(0).combine_chunks()
        found = found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)
        return found if kind == info.kind else _converted(found, kind)


def merge(parts: Sequence[Fields]) -> dict[Path, FieldInfo]:
    """The fields of several datasets together, each of the kind that holds all its values exactly."""
    paths = dict.fromkeys(path for part in parts for path in part.known)
    return {path: _merged(path, [part.known[path] for part in parts if path in part.known]) for path in paths}


def _merged(path: Path, infos: Sequence[FieldInfo]) -> FieldInfo:
    kinds = {info.kind for info in infos}
    exact = all(info.exact for info in infos)
    for refused in (FieldKind.LIST, FieldKind.OBJECT):
        if refused in kinds:
            return FieldInfo(path, refused)
    if len(kinds) > 1:
        kinds.discard(FieldKind.NULL)
    if len(kinds) == 1:
        return FieldInfo(path, kinds.pop(), exact)
    numbers = kinds == {FieldKind.INT, FieldKind.FLOAT} and exact
    return FieldInfo(path, FieldKind.FLOAT if numbers else FieldKind.MIXED, exact)


def _converted(found: pa.Array, kind: FieldKind) -> pa.Array:
    """Values of one dataset as the kind that they have beside those of others."""
    if kind == FieldKind.FLOAT:
        return found.cast(pa.float64(), safe=False)  # integers that float64 has: FieldInfo.exact
    plain = found.cast(found.type.value_type) if isinstance(found, pa.DictionaryArray) else found
    coded = plain.dictionary_encode()
    texts = pa.array([scalar_text(value) for value in coded.dictionary.to_pylist()], pa.string())
    return pa.DictionaryArray.from_arrays(coded.indices, texts)


def usable(
    found: FieldInfo | None,
    path: Path,
    names: Mapping[str, FieldKind],
    left_out: int,
    *,
    codes: tuple[str, str],
    param: str,
) -> FieldInfo:
    """``found``, if something can be asked of it.

    Raises Invalid with the first of ``codes`` for a field that is not there, or perhaps is one of the ``left_out``
    further ones; with the second for one whose values are lists or objects.
    """
    name = name_of(path)
    known = f"Fields: {', '.join(f'{each} ({kind})' for each, kind in list(names.items())[:_SHOWN])}"
    known += f" and {len(names) - _SHOWN} more." if len(names) > _SHOWN else "." if names else "none; the id alone."
    context = {"field": name[:200], "fields": dict(list(names.items())[:MOST])}
    if left_out or found is None:
        detail = f"The metadata have no field {name[:200]!r}. {known}"
        if left_out:
            detail = (
                f"Field {name[:200]!r} cannot be used: the metadata have {left_out} keys beyond the {MOST} of a "
                f"dataset that can, and it may be one of them. {known}"
            )
        raise Invalid(codes[0], detail, param=param, context=context)
    if found.kind == FieldKind.LIST:
        detail = f"Field {name!r} holds lists, and only single values can be used. {known}"
        raise Invalid(codes[1], detail, param=param, context=context)
    if found.kind == FieldKind.OBJECT:
        inner = [each for each in names if each.startswith(f"{name}.")]
        further = f"use what is in them: {', '.join(inner[:_SHOWN])}." if inner else known
        detail = f"Field {name!r} holds objects, and only values up to {DEEPEST} keys deep can be used; {further}"
        raise Invalid(codes[1], detail, param=param, context=context)
    return found
