"""JSONL in, examples with content-hash ids out: nothing lost, nothing twice, every reason named.

Every line of the source ends in exactly one place: an example, a duplicate of one (its line is added to
the example's places), or quarantine. A line that cannot be read at all refuses the whole file by default
(``refuse``), since it usually means that the wrong file was given; ``quarantine`` sets it aside instead.
"""

import codecs
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from service import codec, columns, example_ids, texts
from service.contracts import (
    Completion,
    Content,
    Conversation,
    DatasetRecord,
    Example,
    Message,
    Place,
    PlainText,
    Quarantined,
)
from service.errors import Conflict, Damaged, Invalid, NotFound, TooLarge
from service.storage import Storage, sha256_bytes

# Beside messages, these change what a template renders or a model sees; elsewhere they are metadata like any other.
_OF_TEMPLATES = frozenset(
    [
        "tools",
        "functions",
        "documents",
        "chat_template_kwargs",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
    ]
)
ROLES = ("system", "user", "assistant")
_SHOWN = 20  # malformed lines listed in an error
_DETAIL = 500  # characters; a line may be megabytes of one bad value
_DEEPEST = 100  # nesting of metadata; JSON encoders give up at a few hundred

QUARANTINE_SCHEMA = pa.schema(
    [("id", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("places", texts.PLACES)]
)


class Malformed(Exception):
    """A line that is no example at all: broken JSON, an unknown shape, a value of the wrong type."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]}…"
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class Parsed:
    """What a source holds. ``lines == len(examples) + duplicates + len(quarantined)``."""

    source: str
    lines: int = 0
    duplicates: int = 0
    examples: dict[str, Example] = field(default_factory=dict)
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(item.reason for item in self.quarantined).items()))


def example_id(content: Content) -> str:
    """sha256 (hex) of what is trained on; metadata and place do not enter it."""
    return codec.digest(codec.to_plain(content))


def parse(
    stream: BinaryIO, source: str, *, quarantine_malformed: bool, max_bytes: int, max_line_bytes: int
) -> Parsed:
    """Read JSONL (gzip is recognised by its first bytes) from a seekable stream into examples.

    Raises Invalid (``malformed_lines``) with the first offending line numbers unless
    ``quarantine_malformed``; Invalid (``empty_dataset``) when no example is left; TooLarge.
    """
    parsed = Parsed(source)
    places: dict[str, list[Place]] = {}
    malformed: list[dict[str, Any]] = []
    for number, raw in enumerate(_lines(stream, max_bytes, max_line_bytes), start=1):
        parsed.lines += 1
        place = Place(source, number)
        if not raw.removeprefix(codecs.BOM_UTF8).strip():
            parsed.quarantined.append(Quarantined(None, "blank_line", "The line is blank.", (place,)))
            continue
        try:
            content, metadata = parse_line(raw)
            identity = example_id(content)
        except Malformed as error:
            malformed.append({"line": number, "reason": error.reason, "detail": error.detail})
            parsed.quarantined.append(Quarantined(None, error.reason, error.detail, (place,)))
            continue
        if reason := untrainable(content):
            parsed.quarantined.append(Quarantined(identity, *reason, (place,)))
        elif identity in places:
            parsed.duplicates += 1
            places[identity].append(place)
        else:
            places[identity] = [place]
            parsed.examples[identity] = Example(identity, content, metadata, ())
    for identity, found in places.items():
        parsed.examples[identity] = replace(parsed.examples[identity], places=tuple(found))
    if malformed and not quarantine_malformed:
        first = malformed[0]
        raise Invalid(
            "malformed_lines",
            f"{len(malformed)} of {parsed.lines} lines of {source} cannot be read; the first is line "
            f"{first['line']}: {first['detail']} Nothing was stored. Mend the file, or send "
            "invalid_lines=quarantine to set such lines aside.",
            param=f"line {first['line']}",
            context={"line": first["line"], "lines": malformed[:_SHOWN], "malformed": len(malformed)},
        )
    if not parsed.examples:
        raise Invalid(
            "empty_dataset",
            f"{source} holds no example to train on: {parsed.lines} lines, {len(parsed.quarantined)} set aside"
            + (f" ({', '.join(parsed.reasons)})." if parsed.reasons else "."),
            param="file",
            context={"quarantine_reasons": parsed.reasons},
        )
    return parsed


def _lines(stream: BinaryIO, max_bytes: int, max_line_bytes: int) -> Iterator[bytes]:
    gzipped = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    reader: Any = gzip.GzipFile(fileobj=stream, mode="rb") if gzipped else stream
    total = 0
    try:
        while line := reader.readline(max_line_bytes + 1):
            total += len(line)
            if len(line) > max_line_bytes:
                raise TooLarge("line_too_long", f"A line is longer than {max_line_bytes} bytes.", param="file")
            if total > max_bytes:
                raise TooLarge(
                    "dataset_too_large", f"The data exceed {max_bytes} bytes uncompressed.", param="file"
                )
            yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Invalid("bad_gzip", f"The gzip data are damaged or cut off: {error}.", param="file") from error


def parse_line(raw: bytes) -> tuple[Content, Mapping[str, Any]]:
    """One line of JSONL → what is trained on, and everything else as metadata. Raises Malformed."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
        codec.canonical(row)  # refuses lone surrogates and floats beyond JSON here, not at some later write
    except UnicodeError as error:
        raise Malformed("not_utf8", f"Not valid UTF-8 text: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise Malformed("not_json", f"Not valid JSON: {error}.") from error
    if _too_deep(row):
        raise Malformed("too_deep", f"The line is nested more than {_DEEPEST} levels deep.")
    if not isinstance(row, dict):
        raise Malformed("not_an_object", f"Expected a JSON object, found {_kind(row)}.")
    forms = [name for name in ("messages", "text") if name in row]
    if "prompt" in row and "completion" in row:
        forms.append("prompt")
    if len(forms) != 1:
        found = "several of them" if forms else f"the keys {sorted(row)[:8]}"
        raise Malformed(
            "unknown_format",
            f"Expected exactly one of 'messages', 'prompt' with 'completion', or 'text'; found {found}.",
        )
    if forms[0] == "messages":
        if beside := sorted(key for key in _OF_TEMPLATES & row.keys() if row[key]):
            raise Malformed(
                "unsupported_message",
                f"Beside 'messages' stands {beside}, which the training text depends on; only texts are supported.",
            )
        content: Content = Conversation(_messages(row.pop("messages")))
    elif forms[0] == "prompt":
        content = Completion(_string(row.pop("prompt"), "prompt"), _string(row.pop("completion"), "completion"))
    else:
        content = PlainText(_string(row.pop("text"), "text"))
    return content, row


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of equal ones JSON keeps the last, and the others would vanish."""
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Malformed("repeated_key", f"The key {repeated!r} stands more than once in one object.")
    return found


def untrainable(content: Content) -> tuple[str, str] | None:
    """(reason, detail) when there is nothing to train on in a well-formed example, else None."""
    match content:
        case Conversation(messages):
            answers = [message.content for message in messages if message.role == "assistant"]
            if not answers:
                return "no_target", "The conversation has no assistant turn."
            if not any(answer.strip() for answer in answers):
                return "empty_target", "Every assistant turn is empty."
        case Completion(_, completion) if not completion.strip():
            return "empty_target", "The completion is empty."
        case PlainText(text) if not text.strip():
            return "empty_text", "The text is empty."
    return None


def render(content: Content) -> str:
    """The example as a person reads it."""
    match content:
        case Conversation(messages):
            return "\n".join(f"{message.role}: {message.content}" for message in messages)
        case Completion(prompt, completion):
            return prompt + completion
        case PlainText(text):
            return text


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Malformed("bad_messages", f"'messages' must be a non-empty list, found {_kind(value)}.")
    messages = []
    for position, item in enumerate(value):
        where = f"messages[{position}]"
        if not isinstance(item, dict):
            raise Malformed("bad_messages", f"{where} must be an object, found {_kind(item)}.")
        if extra := sorted(set(item) - {"role", "content"}):
            raise Malformed("unsupported_message", f"{where} has {extra}; only 'role' and 'content' are supported.")
        if item.get("role") not in ROLES:
            raise Malformed(
                "bad_role", f"{where}.role must be one of {', '.join(ROLES)}, found {item.get('role')!r}."
            )
        messages.append(Message(item["role"], _string(item.get("content"), f"{where}.content")))
    return tuple(messages)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Malformed("not_text", f"{name} must be a string, found {_kind(value)}.")
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for item in inner if isinstance(item, list) for child in item]
        if not level:
            return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# --- at rest ----------------------------------------------------------------------------------------


def publish(storage: Storage, dataset_id: str, parsed: Parsed) -> DatasetRecord:
    """Write a dataset's files; the record that makes it visible is registered by the caller."""
    files = {name: storage.write(f"datasets/{dataset_id}/{name}", data) for name, data in _files(parsed).items()}
    return DatasetRecord(
        id=dataset_id,
        fingerprint=codec.digest(list(parsed.examples)),
        source=parsed.source,
        lines=parsed.lines,
        examples=len(parsed.examples),
        duplicates=parsed.duplicates,
        quarantined=len(parsed.quarantined),
        quarantine_reasons=parsed.reasons,
        files=files,
        created_at=codec.now(),
    )


def same_content(record: DatasetRecord, parsed: Parsed) -> bool:
    """Whether a registered dataset is what has just been read: texts, metadata, places, what was set aside."""
    return record.files == {name: sha256_bytes(data) for name, data in _files(parsed).items()}


def mend(storage: Storage, record: DatasetRecord, parsed: Parsed) -> list[str]:
    """Put back what is missing or damaged of a registered dataset whose content has just been read again."""
    mended = []
    for name, data in _files(parsed).items():
        file = f"datasets/{record.id}/{name}"
        try:
            storage.read(file, sha256=record.files[name], cached=False)
        except (NotFound, Damaged):
            storage.write(file, data)
            mended.append(file)
    return mended


def adopt(storage: Storage, dataset_id: str, parsed: Parsed) -> DatasetRecord | None:
    """A record for files whose own cannot be read, if they are of what has just been read again: they are named by
    their content. None: they are not, or are gone as well.
    """
    examples = next(name for name in _files(parsed) if name.startswith("examples"))
    if not storage.exists(f"datasets/{dataset_id}/{examples}"):
        return None
    return publish(storage, dataset_id, parsed)


def _files(parsed: Parsed) -> dict[str, bytes]:
    """The files of a dataset by name; the same source gives the same bytes."""
    examples = list(parsed.examples.values())
    aside = pa.Table.from_pylist([codec.to_plain(item) for item in parsed.quarantined], QUARANTINE_SCHEMA)
    files = {
        "ids.npy": example_ids.pack([example.id for example in examples]),
        "examples.lines": texts.pack(examples),
        "metadata.parquet": columns.pack([example.metadata for example in examples]),
        "quarantine.parquet": to_parquet(aside),
    }
    # Named by content: of two uploads that race for one id, the loser must not overwrite the winner's files.
    parts = ((*name.split("."), data) for name, data in files.items())
    return {f"{stem}-{sha256_bytes(data)[:16]}.{suffix}": data for stem, suffix, data in parts}


def to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read(storage: Storage, record: DatasetRecord, stem: str) -> bytes:
    """A dataset's file ``ids``, ``examples``, ``metadata`` or ``quarantine``, checked against the record's sha256.

    Raises NotFound, Damaged, and Conflict for a dataset that another release has written.
    """
    name = next((name for name in record.files if name.startswith(f"{stem}-")), None)
    if name is None or (stem == "examples" and not name.endswith(".lines")):
        raise Conflict(
            "other_format",
            f"Dataset {record.id!r} was stored by another release, which kept its examples in other files. Add the "
            "source again under another id, and build again from that.",
            param=record.id,
        )
    return storage.read(f"datasets/{record.id}/{name}", sha256=record.files[name])


def read_table(storage: Storage, record: DatasetRecord, stem: str = "examples") -> pa.Table:
    """The table ``examples`` (id, content, metadata, places) or ``quarantine``, checked as by ``read``."""
    data = read(storage, record, stem)
    if stem == "quarantine":
        return pq.read_table(io.BytesIO(data))
    ids = example_ids.unpack(read(storage, record, "ids"))
    return texts.table(data).add_column(0, "id", [example_ids.to_arrow(ids)])


def to_examples(table: pa.Table) -> list[Example]:
    """Rows of the examples table as records."""
    return [
        Example(
            row["id"],
            codec.decode(Content, row["content"]),  # pyright: ignore[reportArgumentType]
            json.loads(row["metadata"]),
            tuple(Place(**place) for place in row["places"]),
        )
        for row in table.to_pylist()
    ]


def to_quarantined(table: pa.Table) -> list[Quarantined]:
    return [codec.from_plain(Quarantined, row) for row in table.to_pylist()]
