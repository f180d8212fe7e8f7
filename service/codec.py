"""Records to JSON and back, and the hashes taken over that JSON.

pydantic validates stdlib dataclasses from the outside, so the records stay plain.
"""

import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def decode(kind: type[T], data: bytes | str) -> T:
    """JSON text → record of type ``kind``; a pydantic ValidationError names the field that does not fit."""
    return _adapter(kind).validate_json(data)


def from_plain(kind: type[T], data: Any) -> T:
    """Dicts and lists → record of type ``kind``."""
    return _adapter(kind).validate_python(data)


def to_plain(record: Any) -> Any:
    """Record → dicts, lists, strings and numbers."""
    return _adapter(type(record)).dump_python(record, mode="json")


def encode(record: Any) -> str:
    """Record → compact JSON text."""
    return _adapter(type(record)).dump_json(record).decode()


def canonical(data: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8. What hashes are taken over."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: Any) -> str:
    """sha256 (hex) of the canonical JSON of plain data."""
    return hashlib.sha256(canonical(data)).hexdigest()


def now() -> str:
    """The current time as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
