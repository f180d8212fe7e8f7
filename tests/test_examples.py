"""Examples of one and of several datasets: ids, texts, places, typed metadata, against plain Python."""

import dataclasses
import io
import json
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import columns, datasets, example_ids, texts
from service.columns import FieldKind
from service.contracts import Completion, Conversation, DatasetRecord, Example, Message, Place, PlainText
from service.errors import Conflict, Damaged, Invalid
from service.example_ids import Finder
from service.examples import Examples
from service.storage import Storage

SEEDED = settings(derandomize=True, deadline=None, database=None, max_examples=80)


def publish(storage: Storage, name: str, rows: Sequence[dict[str, Any]]) -> DatasetRecord:
    """Rows are metadata and ``text``."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    limits = {"max_bytes": 1 << 30, "max_line_bytes": 1 << 20}
    parsed = datasets.parse(io.BytesIO(lines), f"{name}.jsonl", quarantine_malformed=False, **limits)
    return datasets.publish(storage, name, parsed)


def opened(storage: Storage, *parts: Sequence[dict[str, Any]]) -> Examples:
    return Examples(storage, [publish(storage, f"d{number}", rows) for number, rows in enumerate(parts)])


def ids_of(examples: Examples) -> list[str]:
    return [item.decode() for item in examples.ids.tolist()]


def held(storage: Storage, records: Sequence[DatasetRecord]) -> list[Example]:
    """The oracle: what tables of all datasets say, read whole and joined one by one."""
    found: dict[str, Example] = {}
    for record in records:
        for example in datasets.to_examples(datasets.read_table(storage, record)):
            known = found.get(example.id)
            joined = example if known is None else dataclasses.replace(known, places=known.places + example.places)
            found[example.id] = joined
    return list(found.values())


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"memory://{request.node.name}")


# --- examples -----------------------------------------------------------------------------------------


def test_one_dataset_is_its_table(storage: Storage) -> None:
    rows = [{"text": f"t{n % 150}", "n": n, "deep": {"x": [n, None]}} for n in range(300)]  # each one twice
    record = publish(storage, "d", rows)
    examples = Examples(storage, [record])
    expected = held(storage, [record])
    assert len(examples) == len(expected) == 150
    assert ids_of(examples) == [example.id for example in expected]
    assert examples.take(range(150)) == expected
    assert [place.line for place in examples.take([7])[0].places] == [8, 158]
    order = random.Random(0).choices(range(150), k=400)
    assert examples.take(order) == [expected[at] for at in order]
    assert examples.take([]) == []


@SEEDED
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=4), st.randoms())
def test_several_datasets_are_their_rows_each_once_with_all_places(
    parts: list[list[int]], rng: random.Random
) -> None:
    storage = Storage("memory://examples-parts")
    records = [
        publish(storage, f"d{number}", [{"text": f"t{n}", "from": number, "n": at} for at, n in enumerate(part)])
        for number, part in enumerate(parts)
    ]
    examples, expected = Examples(storage, records), held(storage, records)
    assert len(examples) == len(expected)
    assert ids_of(examples) == [example.id for example in expected]
    order = [rng.randrange(len(expected)) for _ in range(20)]
    assert examples.take(order) == [expected[at] for at in order]
    assert examples.field("n").to_pylist() == [example.metadata["n"] for example in expected]
    asked = [*rng.sample([example.id for example in expected], len(expected)), "0" * 64, expected[0].id]
    where = {example.id: at for at, example in enumerate(expected)}
    assert examples.positions(example_ids.of(asked)).tolist() == [where.get(item, -1) for item in asked]


def test_positions_beyond_the_examples_are_refused(storage: Storage) -> None:
    examples = opened(storage, [{"text": "a"}, {"text": "b"}])
    for wrong in (2, -1):
        with pytest.raises(IndexError):
            examples.take([0, wrong])


def test_long_and_short_texts_lie_in_blocks_of_their_own_size(storage: Storage) -> None:
    rng = random.Random(0)
    for number, (length, blocks) in enumerate(((1, 9), (300, 9), (3_000, 26), (40_000, 130))):
        rows = [{"text": f"{n} " + "".join(rng.choices("abcdefgh ", k=length))} for n in range(130)]
        record = publish(storage, f"d{number}", rows)
        with pa.ipc.open_file(datasets.read(storage, record, "examples")) as file:
            assert file.get_batch(0).num_rows == blocks
        assert Examples(storage, [record]).take([129, 0, 64]) == [
            held(storage, [record])[at] for at in (129, 0, 64)
        ]


def test_nothing_is_read_before_it_is_asked_for_and_everything_is_checked(storage: Storage) -> None:
    record = publish(storage, "d", [{"text": f"t{n}", "n": n} for n in range(100)])
    folder = Path(storage.root) / "datasets" / "d"
    uses = {"ids": lambda x: x.ids, "examples": lambda x: x.take([3]), "metadata": lambda x: x.field("n")}
    for stem, use in uses.items():
        path = next(folder.glob(f"{stem}-*"))
        intact = path.read_bytes()
        for at in random.Random(1).sample(range(len(intact)), 20):
            damaged = bytearray(intact)
            damaged[at] ^= 1 << random.Random(at).randrange(8)
            path.write_bytes(damaged)
            examples = Examples(storage, [record])
            with pytest.raises(Damaged):
                use(examples)
            path.write_bytes(intact)
            use(examples)  # what could not be read is tried again
    examples = Examples(storage, [record])
    for use in uses.values():
        use(examples)
    for path in folder.iterdir():
        path.unlink()
    for use in uses.values():
        use(examples)  # and what has been read is kept
    assert len(examples) == 100


def test_a_dataset_of_another_release_is_refused_by_name(storage: Storage) -> None:
    record = publish(storage, "d", [{"text": "a"}])
    old = {"examples-0123456789abcdef.parquet": "0", "quarantine-0123456789abcdef.parquet": "0"}
    for use in (lambda x: x.ids, lambda x: x.take([0]), lambda x: x.fields()):
        with pytest.raises(Conflict, match="'d' was stored by another release") as refused:
            use(Examples(storage, [dataclasses.replace(record, files=old)]))
        assert refused.value.code == "other_format"


def test_many_threads_get_what_one_gets(storage: Storage) -> None:
    parts = [[{"text": f"t{n}", "n": n, "s": f"s{n % 7}"} for n in span] for span in (range(900), range(600, 1500))]
    records = [publish(storage, f"d{number}", rows) for number, rows in enumerate(parts)]
    alone, shared = Examples(storage, records), Examples(storage, records)
    start = threading.Barrier(8)

    def ask(seed: int) -> list[Any]:
        at = np.random.default_rng(seed).integers(0, 1500, 50)
        start.wait()
        return [shared.take(at), shared.positions(shared.ids[at]).tolist(), shared.field("s").take(at).to_pylist()]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for seed, (found, positions, values) in enumerate(answers):
        at = np.random.default_rng(seed).integers(0, 1500, 50)
        assert (found, positions) == (alone.take(at), at.tolist())
        assert values == [f"s{n % 7}" for n in at]


def test_the_same_source_gives_the_same_bytes_in_another_process_too(storage: Storage) -> None:
    rows = [{"text": f"t{n}", "n": n, "m": n if n % 2 else str(n), "o": {"k": f"{n % 3}"}} for n in range(200)]
    first, second = (publish(storage, name, rows) for name in ("d", "e"))
    assert {name.partition("-")[0] for name in first.files} == {"ids", "examples", "metadata", "quarantine"}
    names = [name.partition("-")[0] for name in first.files if not name.startswith("examples")]
    hashes = [{name.partition("-")[0]: sha for name, sha in record.files.items()} for record in (first, second)]
    assert [hashes[0][name] for name in names] == [hashes[1][name] for name in names]
    contents = [Example(f"{n:064x}", Completion("q", f"a{n}"), {}, (Place("f", n),)) for n in range(200)]
    assert texts.pack(contents) == texts.pack(contents)


# --- ids ----------------------------------------------------------------------------------------------


def some_ids(n: int, seed: int = 0) -> example_ids.Ids:
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    return digits[np.random.default_rng(seed).integers(0, 16, (n, 64))].view("S64").ravel()


IDS = some_ids(100_000)


@pytest.mark.parametrize(
    "at",
    [
        np.arange(100_000),
        np.arange(500, 90_000),
        np.delete(np.arange(100_000), np.arange(0, 100_000, 997)),  # some set aside
        np.delete(np.arange(100_000), slice(20_000, 80_000)),  # a long gap
        np.arange(100_000)[::-1],
        np.random.default_rng(0).permutation(100_000),
        np.random.default_rng(0).integers(0, 100_000, 3000),  # with repeats
        np.concatenate([np.arange(50_000, 100_000), np.arange(50_000)]),
        np.array([99_999]),
        np.arange(0),
    ],
    ids=["all", "slice", "few missing", "hole", "backwards", "shuffled", "repeats", "turned", "last", "none"],
)
def test_positions_are_found_whatever_the_order(at: np.ndarray) -> None:
    finder = Finder(IDS)
    assert np.array_equal(finder.positions(IDS[at]), at)
    asked = IDS[at].copy()
    asked[::3] = some_ids(len(asked[::3]), seed=1)  # which nobody has
    expected = at.copy()
    expected[::3] = -1
    assert np.array_equal(finder.positions(asked), expected)


def test_ids_that_share_a_key_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_ids, "_MIX", np.uint64(0))  # keys are the second word alone
    ids = some_ids(50)
    twins = ids.copy()
    twins.view("S8").reshape(-1, 8)[:, 1] = np.tile(twins.view("S8").reshape(-1, 8)[:5, 1], 10)
    finder = Finder(twins)
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(finder.positions(twins[order]), order)
    strangers = some_ids(5, seed=2)
    strangers.view("S8").reshape(-1, 8)[:, 1] = twins.view("S8").reshape(-1, 8)[:5, 1]
    assert finder.positions(strangers).tolist() == [-1] * 5


def test_text_that_is_no_id_is_unknown_and_not_cut_to_one() -> None:
    known = IDS[3].decode()
    asked = [known, known + "0", known[:-1], "", "é" * 32, known.upper(), "\0" * 64]
    assert Finder(IDS).positions(example_ids.of(asked)).tolist() == [3, -1, -1, -1, -1, -1, -1]
    assert Finder(IDS[:0]).positions(example_ids.of([known])).tolist() == [-1]


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_ids_are_read_back_without_a_copy(n: int) -> None:
    data = example_ids.pack([item.decode() for item in IDS[:n].tolist()])
    found = example_ids.unpack(data)
    assert np.array_equal(found, IDS[:n])
    assert np.array_equal(np.load(io.BytesIO(data)), IDS[:n])  # an ordinary .npy file
    assert not found.flags.owndata
    assert example_ids.to_arrow(found).to_pylist() == [item.decode() for item in IDS[:n].tolist()]


# --- fields -------------------------------------------------------------------------------------------

KINDS: list[tuple[list[Any], FieldKind]] = [
    ([True, None, False], FieldKind.BOOL),
    ([1, -(2**63), 2**63 - 1], FieldKind.INT),
    ([1, 2**63], FieldKind.MIXED),
    ([1.5, -0.0], FieldKind.FLOAT),
    ([1, 1.5], FieldKind.FLOAT),
    ([2**53, 1.5], FieldKind.FLOAT),
    ([2**60, 1.5], FieldKind.FLOAT),
    ([2**53 + 1, 1.5], FieldKind.MIXED),
    ([10**400, 1.5], FieldKind.MIXED),
    (["a", "", None], FieldKind.STRING),
    (["1", 1], FieldKind.MIXED),
    ([True, 1], FieldKind.MIXED),
    ([True, "true"], FieldKind.MIXED),
    ([None, None], FieldKind.NULL),
    ([[1], 1], FieldKind.LIST),
    ([[], None], FieldKind.LIST),
    ([{}, None], FieldKind.OBJECT),
    ([{"y": 1}, 1], FieldKind.OBJECT),
    ([{"y": 1}, {"y": 2}], FieldKind.OBJECT),
]


def kind_of(examples: Examples, name: str) -> FieldKind:
    try:
        examples.field(name)
    except Invalid as error:
        assert error.code == "field_kind"
        return FieldKind.LIST if "lists" in error.detail else FieldKind.OBJECT
    return examples.fields()[name]


@pytest.mark.parametrize(("values", "kind"), KINDS, ids=[json.dumps(values)[:40] for values, _ in KINDS])
def test_a_field_has_the_kind_that_holds_all_its_values(
    memory: Storage, values: list[Any], kind: FieldKind
) -> None:
    rows = [{"text": f"t{n}", "x": value} for n, value in enumerate(values)]
    for parts in ([rows], [rows[:1], rows[1:]], [[{"text": "other"}], rows], [rows[1:], rows]):
        examples = opened(memory, *parts)
        assert kind_of(examples, "x") == kind
        if kind in columns.FILTERABLE:
            found = dict(zip(ids_of(examples), examples.field("x").to_pylist(), strict=True))
            expected = {example.id: example.metadata.get("x") for example in examples.take(range(len(examples)))}
            plain = {
                item: None if value is None else json.loads(value) if kind == FieldKind.MIXED else value
                for item, value in found.items()
            }
            assert plain == expected
            for item, value in plain.items():
                if kind != FieldKind.FLOAT:
                    assert type(value) is type(expected[item])


def test_nested_values_and_odd_names_are_reached(memory: Storage) -> None:
    odd = {
        "a.b": 1,
        "a": {"b": 2, "c": {"d": 3, "e": {"too": "deep"}}},
        "": 4,
        "\\": 5,
        "id": 6,
        "any": 7,
        "a b": 8,
        "ä\0": 9,
        "x.": {"": 10},
        "not": 11,
        "0": 12,
    }
    examples = opened(memory, [{"text": "t", **odd}])
    names = {
        "a\\.b": 1,
        "a.b": 2,
        "a.c.d": 3,
        "": 4,
        "\\\\": 5,
        "\\id": 6,
        "\\any": 7,
        "a b": 8,
        "ä\0": 9,
        "x\\..": 10,
        "not": 11,
        "0": 12,
    }
    assert set(examples.fields()) == set(names)
    assert {name: examples.field(name).to_pylist() for name in names} == {
        name: [value] for name, value in names.items()
    }
    for name in names:
        assert columns.name_of(columns.path_of(name, param="x")) == name
    for name, code in (
        ("a", "field_kind"),
        ("a.c.e", "field_kind"),
        ("a.c.e.too", "unknown_field"),
        ("b", "unknown_field"),
    ):
        with pytest.raises(Invalid) as refused:
            examples.field(name, param="group_by")
        assert (refused.value.code, refused.value.param) == (code, "group_by")
        assert "a.c.d" in refused.value.detail
    with pytest.raises(Invalid) as refused:
        examples.field("x\\", param="group_by")
    assert refused.value.code == "bad_field_name"


@SEEDED
@given(st.lists(st.text(max_size=4), min_size=1, max_size=3))
def test_names_and_paths_are_one_to_one(path: list[str]) -> None:
    name = columns.name_of(tuple(path))
    assert columns.path_of(name, param="x") == tuple(path)
    assert name not in columns.RESERVED


def test_fields_beyond_the_limit_are_refused_and_not_taken_for_absent(memory: Storage) -> None:
    own = [{"text": f"t{n}", f"own{n}": n} | ({"common": n} if n >= 300 else {}) for n in range(400)]
    examples = opened(memory, own)
    assert len(examples.fields()) == columns.MOST
    assert "common" in examples.fields()  # what most examples have is kept
    for name in ("own399", "nowhere"):
        with pytest.raises(Invalid, match="145 keys beyond the 256") as refused:
            examples.field(name)
        assert refused.value.code == "unknown_field"
    both = opened(memory, [{"text": "new", "own399": 1}], own)  # here it is kept, there it is not
    with pytest.raises(Invalid, match="beyond the 256"):
        both.field("own399")
    assert both.field("common").null_count == 301


def test_many_different_strings_and_few_are_read_alike(memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "FEW", 100)
    rows = [{"text": f"t{n}", "many": f"m{n}", "few": f"f{n % 5}" if n % 3 else None} for n in range(5000)]
    examples = opened(memory, rows)
    assert not pa.types.is_dictionary(examples.field("many").type)
    assert pa.types.is_dictionary(examples.field("few").type)
    for name in ("many", "few"):
        assert examples.field(name).num_chunks == 1
        assert examples.field(name).to_pylist() == [row[name] for row in rows]
    parts = opened(memory, rows[:3000], rows[2000:])
    assert not pa.types.is_dictionary(parts.field("many").type)
    assert pa.types.is_dictionary(parts.field("few").type)
    assert parts.field("many").to_pylist() == examples.field("many").to_pylist()
    assert parts.field("few").to_pylist() == examples.field("few").to_pylist()


def test_fields_of_more_rows_than_one_row_group_holds(memory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_GROUP", 100)
    rows = [{"s": f"s{n // 90 % 9}" if n % 7 else None, "i": n, "b": n % 3 == 0, "f": n / 2} for n in range(1000)]
    examples = opened(memory, [{"text": f"t{n}", **row} for n, row in enumerate(rows)])
    for name in rows[0]:
        assert examples.field(name).to_pylist() == [row[name] for row in rows]


@pytest.mark.parametrize("together", [1, 1000, 1 << 24])
def test_all_rows_read_at_once_are_what_each_read_alone_is(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_TOGETHER", together)
    odd = ['"', "\t", "\n", "\r\n", "\\t", "\u2028\x85", "a,b;c", "é🎈", "", "NULL", "\x00\x7f", '[{"x": null}]']
    kinds = [
        PlainText,
        lambda text: Completion(text, text[::-1]),
        lambda text: Conversation((Message("user", text), Message("assistant", ""))),
        lambda text: Conversation(()),
    ]
    items = [
        Example(
            f"{n:064x}",
            kinds[n // len(odd) % 4](f"{text} {n}"),
            {text: [text, None, n / 3]},
            (Place(text, n),) * (n % 3),
        )
        for n, text in enumerate(odd * 21)
    ]
    packed = texts.pack(items)
    found = texts.table(packed)
    assert found.schema == texts.SCHEMA
    whole = datasets.to_examples(found.add_column(0, "id", [[item.id for item in items]]))
    alone = texts.Texts(packed).take(range(len(items)))
    assert whole == items
    assert [(text.content, text.metadata, text.places) for text in alone] == [
        (item.content, item.metadata, item.places) for item in items
    ]
    some = texts.Texts(packed).table(["places", "metadata"])
    assert some == found.select(["places", "metadata"])


def test_no_examples() -> None:
    packed = texts.pack([])
    assert texts.table(packed).num_rows == 0
    assert texts.table(packed).schema == texts.SCHEMA
    assert texts.Texts(packed).take([]) == []


@pytest.mark.parametrize("beyond", [-1, 5, 7, 8, 100])
def test_rows_that_the_file_does_not_hold_are_an_error(beyond: int) -> None:
    items = [Example(f"{n:064x}", PlainText("long " * 2000), {}, (Place("f", n),)) for n in range(5)]
    held = texts.Texts(texts.pack(items))
    assert [text.places[0].line for text in held.take([4, 0])] == [4, 0]
    with pytest.raises(IndexError):
        held.take([0, beyond])


def test_long_strings_of_few_kinds_survive_the_dictionary_of_the_file(memory: Storage) -> None:
    rows = [{"text": f"t{n}", "s": f"{n % 40} " * 20_000} for n in range(200)]  # more than a dictionary page holds
    assert opened(memory, rows).field("s").to_pylist() == [row["s"] for row in rows]


def test_metadata_without_fields(memory: Storage) -> None:
    examples = opened(memory, [{"text": "a"}, {"text": "b"}], [{"text": "c", "n": 1}])
    assert examples.fields() == {"n": FieldKind.INT}
    assert examples.field("n").to_pylist() == [None, None, 1]
    assert opened(memory, [{"text": "a"}]).fields() == {}
