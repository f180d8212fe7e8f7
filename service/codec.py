"""Records to JSON and back, and the hashes taken over that JSON.

pydantic validates stdlib dataclasses from the outside, so the records stay plain.
"""

import hashlib
import json
import re
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


# The record stands in the seal as it was written, so that checking needs no second way to write it.
_SEAL = re.compile(rb'\{"sha256":"([0-9a-f]{64})","record":(.*)\}', re.DOTALL)


def seal(record: str) -> str:
    """JSON text of a record with its own sha256 beside it: for files and Redis values that nothing else names."""
    return f'{{"sha256":"{hashlib.sha256(record.encode()).hexdigest()}","record":{record}}}'


def unseal(kind: type[T], data: bytes | str, *, sha256: str | None = None) -> T:
    """What ``seal`` wrapped, as a record of type ``kind``; with ``sha256`` it must be the one of that hash.

    Raises ValueError when a single byte is not as it was written.
    """
    return decode(kind, opened(data, sha256=sha256))


def opened(data: bytes | str, *, sha256: str | None = None) -> bytes:
    """The text that ``seal`` wrapped. Raises as ``unseal``."""
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    found = _SEAL.fullmatch(raw)
    if found is None:
        raise ValueError("it is cut off, or was not written by this release")
    said, record = found[1].decode(), found[2]
    if hashlib.sha256(record).hexdigest() != said:
        raise ValueError("its sha256 differs from what it says itself")
    if sha256 is not None and said != sha256:
        raise ValueError("it is not the one that is referred to (sha256 differs)")
    return record


def canonical(data: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8. What hashes are taken over."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: Any) -> str:
    """sha256 (hex) of the canonical JSON of plain data."""
    return hashlib.sha256(canonical(data)).hexdigest()


def now() -> str:
    """The current time as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
