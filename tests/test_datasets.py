"""Reading sources: every line ends in one place, every refusal names its line, what is published reads back."""

import gzip
import io
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import codec, datasets
from service.contracts import Completion, Conversation, Example, Message, Place, PlainText
from service.datasets import Parsed
from service.errors import Damaged, DomainError, Invalid, NotFound, TooLarge
from service.registry import DATASETS, Registry
from service.storage import Storage

OK = b'{"text": "a cat"}\n'
BOM = b"\xef\xbb\xbf"
SEEDED = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def parse(
    data: bytes, *, quarantine: bool = False, max_bytes: int = 1 << 26, max_line_bytes: int = 1 << 22
) -> Parsed:
    return datasets.parse(
        io.BytesIO(data),
        "f.jsonl",
        quarantine_malformed=quarantine,
        max_bytes=max_bytes,
        max_line_bytes=max_line_bytes,
    )


def one(row: dict[str, Any]) -> Example:
    (example,) = parse(json.dumps(row).encode()).examples.values()
    return example


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def line_numbers(parsed: Parsed) -> list[int]:
    """Every line that the parser placed somewhere."""
    placed = [place.line for example in parsed.examples.values() for place in example.places]
    aside = [place.line for item in parsed.quarantined for place in item.places]
    return sorted(placed + aside)


# --- forms and ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"text": "a"}, PlainText("a")),
        ({"prompt": "q", "completion": "a"}, Completion("q", "a")),
        ({"prompt": "", "completion": "a"}, Completion("", "a")),
        (
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
            Conversation((Message("system", "s"), Message("user", "q"), Message("assistant", "a"))),
        ),
    ],
)
def test_each_form_is_read_and_the_rest_is_metadata(row: dict[str, Any], content: Any) -> None:
    example = one({**row, "source": "faq", "nested": {"n": [1, 2.5, None, True]}})
    assert example.content == content
    assert example.metadata == {"source": "faq", "nested": {"n": [1, 2.5, None, True]}}
    assert example.places == (Place("f.jsonl", 1),)


@pytest.mark.parametrize(
    ("row", "sha256"),
    [
        ({"text": "hello"}, "cbbbdcd27692344de5dbab3abcaba413fb0f45307267de7081401576df1cb176"),
        (
            {"prompt": "é", "completion": "b"},
            "50fe77a2dc1f9b3fa11af95184dccdd4f267790d3f4cecd537432aab318dff3e",
        ),
        (
            chat(("user", "q"), ("assistant", "a")),
            "ec2b7f727adb5ff7c2f9e51a7ad58eb7348573707814c1a977838d6a7f9e240e",
        ),
    ],
)
def test_the_id_is_this_hash_in_every_version(row: dict[str, Any], sha256: str) -> None:
    assert one(row).id == sha256


def test_the_id_ignores_metadata_and_key_order_and_nothing_else() -> None:
    same = [
        b'{"prompt":"q","completion":"a"}',
        b'{"completion":"a","prompt":"q"}',
        b'{ "x" : 1, "completion": "a", "prompt": "q", "y": [2] }',
        b'{"prompt":"\\u0071","completion":"a"}',
    ]
    other = [b'{"prompt":"q","completion":"a "}', b'{"prompt":"","completion":"qa"}', b'{"text":"qa"}']
    ids = [example for data in (*same, *other) for example in parse(data).examples]
    assert len(set(ids[: len(same)])) == 1
    assert len(set(ids)) == 1 + len(other)


def test_a_repeat_is_stored_once_with_all_its_places_and_the_first_metadata() -> None:
    parsed = parse(b'{"text":"a","n":1}\n{"text":"b"}\n{"text":"a","n":2}\n{"n":3,"text":"a"}\n')
    first, second = parsed.examples.values()
    assert first.places == tuple(Place("f.jsonl", line) for line in (1, 3, 4))
    assert first.metadata == {"n": 1}
    assert second.places == (Place("f.jsonl", 2),)
    assert (parsed.lines, parsed.duplicates) == (4, 2)


def test_time_grows_with_the_lines_even_when_all_are_the_same() -> None:
    def seconds(lines: int) -> float:
        began = time.process_time()
        parse(b'{"text":"I am sorry, I cannot help with that."}\n' * lines)
        return time.process_time() - began

    small = min(seconds(2_000) for _ in range(2))
    assert seconds(32_000) < 80 * small  # 16 times the lines; 256 times the time if it is quadratic


# --- lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (OK.rstrip(), 1),
        (BOM + OK, 1),
        (b'{"text":"a"}\r\n{"text":"b"}\r\n', 2),
        (b'{"text":"a"}\n{"text":"b"}', 2),
        ('{"text":"one\u2028line\u0085\\n"}\n{"text":"b"}\n'.encode(), 2),
        (BOM + b'{"text":"a"}\n' + BOM + b'{"text":"b"}\n', 2),  # two files with a BOM, concatenated
    ],
)
def test_line_endings_and_byte_order_marks_do_not_matter(data: bytes, lines: int) -> None:
    parsed = parse(data)
    assert (parsed.lines, len(parsed.examples), parsed.quarantined) == (lines, lines, [])


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"  \t \n", BOM + b"\n", BOM + b"\r\n"])
def test_blank_lines_are_counted_and_set_aside_even_when_malformed_lines_are_refused(blank: bytes) -> None:
    parsed = parse(blank + OK + b"\n")
    assert parsed.reasons == {"blank_line": 2}
    assert [item.places[0].line for item in parsed.quarantined] == [1, 3]
    assert (parsed.lines, len(parsed.examples)) == (3, 1)


NOTHING_TO_TRAIN_ON = [
    ({"text": ""}, "empty_text"),
    ({"text": " \n"}, "empty_text"),
    ({"prompt": "q", "completion": ""}, "empty_target"),
    ({"prompt": "q", "completion": " \t"}, "empty_target"),
    (chat(("user", "q"), ("assistant", "")), "empty_target"),
    (chat(("user", "q")), "no_target"),
    (chat(("system", "s"), ("user", "q")), "no_target"),
]


@pytest.mark.parametrize(("row", "reason"), NOTHING_TO_TRAIN_ON)
def test_an_example_without_a_target_is_set_aside_with_its_id_and_reason(row: dict[str, Any], reason: str) -> None:
    parsed = parse(OK + json.dumps(row).encode())
    (item,) = parsed.quarantined
    assert item.reason == reason
    assert item.id is not None
    assert len(item.id) == 64
    assert item.places == (Place("f.jsonl", 2),)
    assert item.detail.endswith(".")


def test_one_answer_among_empty_ones_is_enough() -> None:
    assert one(chat(("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "a"))).id


MALFORMED = [
    (b"not json", "not_json"),
    (b'{"text": "a"', "not_json"),
    (b'{"text": "a"} {"text": "b"}', "not_json"),
    (b'{"text": "b", "score": NaN}', "not_json"),
    (b'{"text": "b", "score": -Infinity}', "not_json"),
    (b'{"text": "b", "score": 1e999}', "not_json"),
    (b"[" * 100_000 + b"]" * 100_000, "not_json"),
    (b'{"text": "b", "m": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "not_json"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b'{"text": "b", "m": {"\\udfff": 1}}', "not_utf8"),
    (b'{"text": "\xff\xfe"}', "not_utf8"),
    (b"\x00\x01\x02\xfd", "not_utf8"),
    (b"[1, 2]", "not_an_object"),
    (b"null", "not_an_object"),
    (b'"text"', "not_an_object"),
    (b"{}", "unknown_format"),
    (b'{"prompt": "q"}', "unknown_format"),
    (b'{"completion": "a"}', "unknown_format"),
    (b'{"text": "a", "messages": []}', "unknown_format"),
    (b'{"text": "a", "prompt": "q", "completion": "a"}', "unknown_format"),
    (b'{"text": 5}', "not_text"),
    (b'{"text": null}', "not_text"),
    (b'{"prompt": "q", "completion": ["a"]}', "not_text"),
    (b'{"messages": []}', "bad_messages"),
    (b'{"messages": {}}', "bad_messages"),
    (b'{"messages": ["hi"]}', "bad_messages"),
    (json.dumps(chat(("human", "q"), ("assistant", "a"))).encode(), "bad_role"),
    (json.dumps(chat((None, "q"), ("assistant", "a"))).encode(), "bad_role"),
    (json.dumps(chat(({"a": 1}, "q"), ("assistant", "a"))).encode(), "bad_role"),
    (json.dumps(chat(("Assistant", "q"))).encode(), "bad_role"),
    (json.dumps(chat(("user", [{"type": "image"}]), ("assistant", "a"))).encode(), "not_text"),
    (b'{"messages": [{"role": "assistant"}]}', "not_text"),
    (b'{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}', "unsupported_message"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_a_malformed_line_refuses_the_file_by_number_or_is_set_aside(line: bytes, reason: str) -> None:
    data = OK + line + b'\n{"text": "b"}\n'
    with pytest.raises(Invalid) as refused:
        parse(data)
    assert refused.value.code == "malformed_lines"
    assert refused.value.param == "line 2"
    assert "line 2" in refused.value.detail
    assert refused.value.context["lines"][0]["reason"] == reason
    parsed = parse(data, quarantine=True)
    assert parsed.reasons == {reason: 1}
    assert parsed.quarantined[0].places == (Place("f.jsonl", 2),)
    assert [example.content for example in parsed.examples.values()] == [PlainText("a cat"), PlainText("b")]


def test_a_refusal_counts_all_malformed_lines_and_lists_the_first_ones() -> None:
    with pytest.raises(Invalid) as refused:
        parse(b"\n" + OK + b"oops\n" * 30 + b'{"text": 1}\n')
    context = refused.value.context
    assert (context["line"], context["malformed"]) == (3, 31)
    assert [item["line"] for item in context["lines"]] == list(range(3, 23))
    assert "31 of 33 lines" in refused.value.detail


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(chat(("x" * 1_000_000, "q"))).encode(),
        json.dumps({"y" * 1_000_000: 1}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "q", "z" * 1_000_000: 1}]}).encode(),
    ],
    ids=["role", "keys", "message keys"],
)
def test_an_error_does_not_repeat_a_megabyte_of_input(line: bytes) -> None:
    (item,) = parse(OK + line, quarantine=True).quarantined
    assert len(item.detail) < 2_000


def test_metadata_that_is_accepted_can_be_answered_over_http() -> None:
    depth = 400
    line = b'{"text": "b", "m": ' + b"[" * depth + b"]" * depth + b"}\n"
    for example in parse(OK + line, quarantine=True).examples.values():
        assert json.loads(codec.encode(example))["metadata"] == example.metadata


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"text": ""}\n', gzip.compress(b"", mtime=0)])
def test_a_source_without_an_example_is_refused(data: bytes, quarantine: bool) -> None:
    with pytest.raises(Invalid) as refused:
        parse(data, quarantine=quarantine)
    assert refused.value.code == "empty_dataset"


@pytest.mark.parametrize("data", [b"oops\n{}\n", bytes(range(256)) * 50, b"PAR1\x15\x04\x15\x00" * 9])
def test_a_source_of_only_bad_lines_is_refused_in_both_modes(data: bytes) -> None:
    with pytest.raises(Invalid, match=r"lines of f\.jsonl cannot be read"):
        parse(data)
    with pytest.raises(Invalid) as refused:
        parse(data, quarantine=True)
    assert refused.value.code == "empty_dataset"
    assert refused.value.context["quarantine_reasons"]


# --- gzip and limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [gzip.compress(OK * 3, mtime=0), gzip.compress(OK, mtime=0) + gzip.compress(OK * 2, mtime=0)]
)
def test_gzip_is_recognised_by_its_bytes(data: bytes) -> None:
    parsed = parse(data)
    assert (parsed.lines, parsed.duplicates) == (3, 2)


NOISE = "".join(f'{{"text": "{word:x}"}}\n' for word in random.Random(0).sample(range(1 << 60), 2000)).encode()


@pytest.mark.parametrize("cut", [2, 5, 15, 4000, -8, -4, -1])
def test_a_truncated_gzip_is_refused(cut: int) -> None:
    with pytest.raises(Invalid) as refused:
        parse(gzip.compress(NOISE)[:cut], quarantine=True)
    assert refused.value.code == "bad_gzip"


@pytest.mark.parametrize("position", [3, 2000, -6])
def test_a_gzip_with_a_wrong_byte_is_refused_or_read_the_same(position: int) -> None:
    data = bytearray(gzip.compress(NOISE, mtime=0))
    data[position] ^= 0x55
    with pytest.raises(Invalid) as refused:
        parse(bytes(data), quarantine=True)
    assert refused.value.code == "bad_gzip"


class Counting(io.BytesIO):
    """Tells how far it was read, whichever way."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken = max(self.taken, self.tell())
        return data

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.taken = max(self.taken, self.tell())
        return count


@pytest.mark.parametrize(
    ("plain", "code"), [(b"\n" * 12_000_000, "dataset_too_large"), (b"0" * 12_000_000, "line_too_long")]
)
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(plain: bytes, code: str) -> None:
    data = gzip.compress(plain, 1)
    stream = Counting(data)
    with pytest.raises(TooLarge) as refused:
        datasets.parse(stream, "bomb", quarantine_malformed=True, max_bytes=20_000, max_line_bytes=10_000)
    assert refused.value.code == code
    assert 0 < stream.taken < len(data) / 2


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_limits_hold_to_the_byte(pack: Any) -> None:
    two = OK + OK
    assert parse(pack(two), max_bytes=len(two), max_line_bytes=len(OK)).lines == 2
    with pytest.raises(TooLarge, match=str(len(two) - 1)) as large:
        parse(pack(two), max_bytes=len(two) - 1)
    assert large.value.code == "dataset_too_large"
    with pytest.raises(TooLarge) as long:
        parse(pack(two), max_line_bytes=len(OK) - 1, quarantine=True)
    assert long.value.code == "line_too_long"


@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_the_spooled_file_of_an_upload_is_read_to_its_end(in_memory: int) -> None:
    with tempfile.SpooledTemporaryFile(max_size=in_memory) as spool:
        spool.write(gzip.compress(NOISE))
        spool.seek(0)
        parsed = datasets.parse(
            spool,  # type: ignore[arg-type]
            "f.jsonl",
            quarantine_malformed=False,
            max_bytes=1 << 20,
            max_line_bytes=1 << 10,
        )
    assert parsed.lines == 2000


# --- properties ---------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["a", "b", "c", "ä \u2028", "\x00"])
TRAINABLE = st.one_of(
    TEXTS.map(lambda text: {"text": text, "n": len(text)}),
    TEXTS.map(lambda text: {"prompt": "", "completion": text}),
    TEXTS.map(lambda text: chat(("user", "q"), ("assistant", text))),
)
EMPTY = st.sampled_from(NOTHING_TO_TRAIN_ON).map(lambda case: json.dumps(case[0]).encode())
LINES = st.lists(
    st.one_of(
        st.tuples(st.just("example"), TRAINABLE.map(lambda row: json.dumps(row, ensure_ascii=False).encode())),
        st.tuples(st.just("blank"), st.sampled_from([b"", b" ", b"\t \t"])),
        st.tuples(st.just("empty"), EMPTY),
        st.tuples(st.just("malformed"), st.sampled_from([line for line, _ in MALFORMED if len(line) < 1000])),
    ),
    max_size=25,
)


@SEEDED
@given(lines=LINES, ending=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans(), zipped=st.booleans())
def test_every_line_ends_in_exactly_one_place(
    lines: list[tuple[str, bytes]], ending: bytes, last: bool, zipped: bool
) -> None:
    lines = [*lines, ("example", OK.strip())]
    data = ending.join(line for _, line in lines) + (ending if last else b"")
    parsed = parse(gzip.compress(data) if zipped else data, quarantine=True)
    rows = [json.dumps(json.loads(line), sort_keys=True) for kind, line in lines if kind == "example"]
    kinds = [kind for kind, _ in lines]
    assert parsed.lines == len(lines)
    assert len(parsed.examples) == len(set(rows))
    assert parsed.duplicates == len(rows) - len(set(rows))
    assert len(parsed.quarantined) == sum(kinds.count(kind) for kind in ("blank", "empty", "malformed"))
    assert parsed.lines == len(parsed.examples) + parsed.duplicates + len(parsed.quarantined)
    assert line_numbers(parsed) == list(range(1, len(lines) + 1))


@SEEDED
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(OK), st.just(b"\x1f\x8b"), st.just(BOM)), max_size=8))
def test_no_bytes_raise_anything_but_a_domain_error(chunks: list[bytes]) -> None:
    data = b"".join(chunks)
    try:
        parsed = parse(data, quarantine=True)
    except DomainError as error:
        assert error.code in {"bad_gzip", "empty_dataset"}
    else:
        assert line_numbers(parsed) == list(range(1, parsed.lines + 1))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@settings(SEEDED, max_examples=25)
@given(
    st.lists(
        st.dictionaries(st.one_of(st.sampled_from(["text", "prompt", "completion", "messages"]), st.text()), JSON),
        max_size=4,
    )
)
def test_what_is_published_reads_back_equal(rows: list[dict[str, Any]]) -> None:
    parsed = parse(OK + b"\n" + b"".join(json.dumps(row).encode() + b"\n" for row in rows), quarantine=True)
    storage = Storage("memory://test-datasets")
    record = datasets.publish(storage, "d", parsed)
    assert datasets.to_examples(datasets.read_table(storage, record)) == list(parsed.examples.values())
    assert datasets.to_quarantined(datasets.read_table(storage, record, "quarantine")) == parsed.quarantined
    assert datasets.same_content(record, parsed)


# --- at rest ------------------------------------------------------------------------------------------

MIXED = b'{"text":"a","n":1}\n{"text":"b"}\n{"text":"a"}\n\n{"prompt":"q","completion":""}\n{oops\n'


def test_the_record_says_where_every_line_went(storage: Storage) -> None:
    record = datasets.publish(storage, "d", parse(MIXED, quarantine=True))
    assert (record.lines, record.examples, record.duplicates, record.quarantined) == (6, 2, 1, 3)
    assert record.quarantine_reasons == {"blank_line": 1, "empty_target": 1, "not_json": 1}
    assert (record.id, record.source) == ("d", "f.jsonl")
    assert storage.files("datasets/d") == sorted(record.files)


def test_the_fingerprint_follows_the_examples_and_their_order_only() -> None:
    storage = Storage("memory://test-fingerprints")
    sources = [b'{"text":"a"}\n{"text":"b"}', b'{"text":"a","n":1}\n\n{"text":"b"}', b'{"text":"b"}\n{"text":"a"}']
    first, same, other = (datasets.publish(storage, "d", parse(source)).fingerprint for source in sources)
    assert first == same != other


@pytest.mark.parametrize(
    ("data", "same"),
    [
        (MIXED, True),
        (MIXED.replace(b'"n":1', b'"n":2'), False),
        (MIXED.replace(b'"b"', b'"c"'), False),
        (MIXED.replace(b"{oops", b"[]"), False),
        (MIXED.replace(b"\n\n", b"\n"), False),
        (MIXED + b'{"text":"b"}\n', False),
        (MIXED + b"\n", False),
    ],
)
def test_same_content_notices_texts_metadata_places_and_quarantine(
    storage: Storage, data: bytes, same: bool
) -> None:
    record = datasets.publish(storage, "d", parse(MIXED, quarantine=True))
    assert datasets.same_content(record, parse(data, quarantine=True)) is same


@pytest.mark.parametrize("stem", ["examples", "quarantine"])
def test_a_flipped_byte_in_a_table_is_damage(storage: Storage, stem: str) -> None:
    record = datasets.publish(storage, "d", parse(MIXED, quarantine=True))
    name = next(name for name in record.files if name.startswith(stem))
    path = Path(storage.root) / "datasets" / "d" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged):
        datasets.read_table(storage, record, stem)
    path.unlink()
    with pytest.raises(NotFound):
        datasets.read_table(storage, record, stem)


@pytest.mark.parametrize(
    "other", [b'{"text":"a","n":2}\n', b'{"text":"a","n":1}\n\n'], ids=["metadata", "quarantine"]
)
def test_the_loser_of_a_race_for_an_id_does_not_damage_the_winner(
    storage: Storage, registry: Registry, other: bytes
) -> None:
    # Two uploads of the same texts with other metadata: both look the id up before either registers it.
    winner = datasets.publish(storage, "d", parse(b'{"text":"a","n":1}\n'))
    registry.add(DATASETS, "d", winner)
    datasets.publish(storage, "d", parse(other))
    (example,) = datasets.to_examples(datasets.read_table(storage, registry.get(DATASETS, "d")))
    assert example.metadata == {"n": 1}
    assert datasets.to_quarantined(datasets.read_table(storage, winner, "quarantine")) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a"}, "a"),
        ({"prompt": "q ", "completion": "a"}, "q a"),
        (chat(("user", "q"), ("assistant", "a")), "user: q\nassistant: a"),
    ],
)
def test_render_is_what_a_person_reads(row: dict[str, Any], text: str) -> None:
    assert datasets.render(one(row).content) == text
