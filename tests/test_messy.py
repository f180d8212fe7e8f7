"""A messy file, line by line: indexed, a duplicate, or set aside with the reason; never wrong in silence."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.lab import Lab
from service import codec, datasets, indexes, shards
from service.contracts import Completion, Conversation, Example, IndexRecord, PlainText
from service.datasets import Parsed
from service.errors import DomainError, Invalid, TooLarge
from service.registry import DATASETS, INDEXES
from service.storage import Storage
from service.terms import IndexKind, LongExamples
from tests import tiny
from tests.data.make_messy import DUPLICATE, FILE, INDEXED, LIMIT, LINES, UNTRAINABLE, Line, chat, data
from workers import passes

NUMBER = {line.name: number for number, line in enumerate(LINES, start=1)}
NAME = {number: name for name, number in NUMBER.items()}
READ = [line for line in LINES if line.outcome == INDEXED]
ASIDE = [line for line in LINES if line.outcome not in {INDEXED, DUPLICATE}]
MALFORMED = [line for line in ASIDE if line.outcome not in UNTRAINABLE]


def parse(raw: bytes, *, quarantine: bool = True) -> Parsed:
    return datasets.parse(
        io.BytesIO(raw), FILE.name, quarantine_malformed=quarantine, max_bytes=1 << 26, max_line_bytes=1 << 22
    )


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return parse(FILE.read_bytes())


# --- the file ---------------------------------------------------------------------------------------------


def test_the_file_is_the_table() -> None:
    assert FILE.read_bytes() == data(), "Make it again: python tests/data/make_messy.py"
    assert len(NUMBER) == len(LINES)
    assert len(ASIDE) >= 40


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_every_line_is_read_as_it_should_be(parsed: Parsed, line: Line) -> None:
    number = NUMBER[line.name]
    aside = [item for item in parsed.quarantined if number in [place.line for place in item.places]]
    holders = [item for item in parsed.examples.values() if number in [place.line for place in item.places]]
    if line.outcome in {INDEXED, DUPLICATE}:
        assert aside == []
        (holder,) = holders
        assert (holder.places[0].line == number) is (line.outcome == INDEXED)
    else:
        assert holders == []
        (item,) = aside
        assert item.reason == line.outcome
        assert 10 < len(item.detail) < 1000
        assert item.detail.endswith((".", "…"))
        # Whatever could be read far enough has an id, under which it is found again.
        assert (item.id is not None) is (line.outcome in UNTRAINABLE and line.outcome != "blank_line")


def test_every_line_is_counted_once(parsed: Parsed) -> None:
    expected = Counter(line.outcome for line in LINES)
    assert parsed.lines == len(LINES) == len(parsed.examples) + parsed.duplicates + len(parsed.quarantined)
    assert (len(parsed.examples), parsed.duplicates) == (expected.pop(INDEXED), expected.pop(DUPLICATE))
    assert parsed.reasons == dict(sorted(expected.items()))


@pytest.fixture(scope="module")
def stored(parsed: Parsed) -> dict[int, Example]:
    """The examples by line, after a round trip through storage."""
    storage = Storage("memory://test-messy")
    table = datasets.read_table(storage, datasets.publish(storage, "messy", parsed))
    return {item.places[0].line: item for item in datasets.to_examples(table)}


@pytest.mark.parametrize("line", READ, ids=lambda line: line.name)
def test_what_is_stored_and_answered_is_what_the_line_says(stored: dict[int, Example], line: Line) -> None:
    example = stored[NUMBER[line.name]]
    said = json.loads(line.raw.decode("utf-8-sig"))
    match example.content:
        case PlainText(text):
            assert text == said.pop("text")
        case Completion(prompt, completion):
            assert (prompt, completion) == (said.pop("prompt"), said.pop("completion"))
        case Conversation(messages):
            assert [vars(message) for message in messages] == said.pop("messages")
    assert example.metadata == said
    assert codec.decode(Example, codec.encode(example)) == example


def test_the_file_is_refused_by_default_and_the_refusal_names_the_lines() -> None:
    with pytest.raises(Invalid) as refused:
        parse(data(), quarantine=False)
    error = refused.value
    first = NUMBER[MALFORMED[0].name]
    assert (error.code, error.param) == ("malformed_lines", f"line {first}")
    assert error.detail.startswith(f"{len(MALFORMED)} of {len(LINES)} lines of {FILE.name} cannot be read")
    told = [(item["line"], item["reason"]) for item in error.context["lines"]]
    assert told == [(NUMBER[line.name], line.outcome) for line in MALFORMED[:20]]
    assert error.context["malformed"] == len(MALFORMED)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_one_bad_line_is_enough_to_refuse_a_file(line: Line) -> None:
    raw = b'{"text": "a good line"}\n' + line.raw + b'\n{"text": "another"}\n'
    if line not in MALFORMED:
        assert parse(raw, quarantine=False).lines == 3
        return
    with pytest.raises(Invalid) as refused:
        parse(raw, quarantine=False)
    assert refused.value.param == "line 2"
    assert refused.value.context["lines"][0]["reason"] == line.outcome


# --- through a build ----------------------------------------------------------------------------------------

_BY_TURNS = "{% for m in messages %}{% if (m.role == 'user') == loop.index0 % 2 %}{{ raise_exception('by turns') }}"
ALTERNATING = _BY_TURNS + "{% endif %}{% endfor %}" + tiny.PLAIN
TEMPLATES = {"plain": None, "chat": tiny.PLAIN, "tagged": tiny.TAGGED, "alternating": ALTERNATING}
ROWS = (IndexKind.ACTIVATION, IndexKind.GRADIENT)
BUILDS = {
    "plain": ROWS,
    "chat": ROWS,
    "tagged": ROWS,
    "alternating": ROWS,
    "plain-difference": (*ROWS, IndexKind.DIFFERENCE),
    "chat-difference": (*ROWS, IndexKind.DIFFERENCE),
}


def set_aside(line: Line, build: str) -> str | None:
    """Why a line that has been read is not in the index; None: it is."""
    template, _, difference = build.partition("-")
    refused = line.alternating if template == "alternating" else None
    unanswered = line.answers if template == "plain" else line.chat_answers
    return refused or line.rows or (unanswered if difference else None)


class World:
    """One Lab with a model for every chat template, and the messy file as its dataset."""

    def __init__(self, root: Path, parsed: Parsed) -> None:
        self.root = root
        self.lab = Lab(root / "lab", shard_size=16)  # several shards, so that counts have to add up over them
        for name, template in TEMPLATES.items():
            self.lab.model(name, Path(tiny.save(root / name, "llama", tiny.byte_pairs(template))))
        self.add("messy", parsed)

    def add(self, name: str, parsed: Parsed) -> None:
        self.lab.registry.add(DATASETS, name, datasets.publish(self.lab.storage, name, parsed))

    def build(self, name: str, model: str, dataset: str, **options) -> IndexRecord:
        options |= {"answers": {"temperature": 1.0, "max_new_tokens": 3, "seed": 0}}
        return self.lab.build(name, model, dataset, 2, **options)[0]

    def rows(self, index: IndexRecord) -> dict[tuple[str, int | None], dict[str, np.ndarray]]:
        """By kind and layer, then by example id: what is stored and stands in every section."""
        found: dict[tuple[str, int | None], dict[str, np.ndarray]] = {}
        for section in indexes.read_manifest(self.lab.storage, index).sections:
            for reference in section.shards:
                shard = shards.read_manifest(self.lab.storage, reference.key, sha256=reference.sha256)
                for array in section.arrays:
                    rows = shards.read_rows(self.lab.storage, shard, array)
                    found.setdefault((array.kind, array.layer), {}).update(zip(shard.ids, rows, strict=True))
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, parsed: Parsed) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("messy"), parsed)
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=BUILDS)
def built(world: World, request) -> SimpleNamespace:
    template = request.param.partition("-")[0]
    index = world.build(request.param, template, "messy", kinds=BUILDS[request.param], max_length=LIMIT)
    expected = {line.name: set_aside(line, request.param) for line in READ}
    return SimpleNamespace(index=index, kinds=BUILDS[request.param], expected=expected)


def test_the_index_accounts_for_every_line_by_reason(world: World, built: SimpleNamespace) -> None:
    reasons = Counter(line.outcome for line in ASIDE) + Counter(filter(None, built.expected.values()))
    manifest = indexes.read_manifest(world.lab.storage, built.index)
    assert dict(manifest.quarantine_reasons) == dict(built.index.quarantine_reasons) == dict(reasons)
    counts = manifest.counts
    assert counts == built.index.counts
    assert counts.lines == len(LINES) == counts.indexed + counts.duplicates + counts.quarantined
    assert counts.indexed == sum(reason is None for reason in built.expected.values())
    assert counts.duplicates == sum(line.outcome == DUPLICATE for line in LINES)


def test_what_is_not_in_the_index_is_named_with_reason_and_place(
    world: World, built: SimpleNamespace, parsed: Parsed
) -> None:
    lab = world.lab
    items = indexes.quarantined(lab.storage, lab.registry, built.index)  # as GET /v1/indexes/{name}/quarantine
    assert len(items) == built.index.counts.quarantined
    told = {NAME[item.places[0].line]: item for item in items}
    expected = {line.name: line.outcome for line in ASIDE}
    expected |= {name: reason for name, reason in built.expected.items() if reason}
    assert {name: item.reason for name, item in told.items()} == expected
    by_line = {item.places[0].line: item for item in parsed.examples.values()}
    for name in built.expected.keys() & told.keys():
        example = by_line[NUMBER[name]]
        assert (told[name].id, told[name].places) == (example.id, example.places)
        assert told[name].detail.endswith(".")
    (again,) = [line.name for line in LINES if line.name == "duplicate of one that cannot run"]
    assert NUMBER[again] in [place.line for place in told["text of one token"].places]


def test_every_other_example_has_one_finite_row_that_is_not_zero_in_every_array(
    world: World, built: SimpleNamespace, parsed: Parsed
) -> None:
    name_of = {item.id: NAME[item.places[0].line] for item in parsed.examples.values()}
    expected = {name for name, reason in built.expected.items() if reason is None}
    stored = world.rows(built.index)
    assert {kind for kind, _ in stored} == set(built.kinds)
    held = [set(rows) for rows in stored.values()]
    assert {name_of[item] for item in set.intersection(*held)} == expected
    for rows in stored.values():
        for item, row in rows.items():
            assert np.isfinite(row).all(), name_of[item]
            assert row.any(), name_of[item]


def test_the_index_counts_the_truncated_examples_it_holds(built: SimpleNamespace) -> None:
    cut = [line.name for line in READ if line.cut and built.expected[line.name] is None]
    assert built.index.counts.truncated == len(cut)


# --- a line of 100,000 tokens -------------------------------------------------------------------------------

WORDS = ["the", *np.random.default_rng(0).choice([" the", " cat", " sat", " on", " mat"], 99_999).tolist()]
ENDS = {"first": "".join(WORDS[:LIMIT]), "last": "".join(WORDS[-LIMIT:])}
LONG = {
    "text": {"text": "".join(WORDS)},
    "long prompt": {"prompt": "".join(WORDS), "completion": " answer"},
    "long answer": {"prompt": "the question", "completion": " " + "".join(WORDS[:-2])},
}
SHORT = {name: {"text": text} for name, text in ENDS.items()} | {
    f"short {number}": {"prompt": "the cat", "completion": f" sat {number}"} for number in range(5)
}
CUT_RIGHT = {"text": None, "long prompt": "target_cut_off", "long answer": None}
OF_RULE = {
    LongExamples.TRUNCATE_LEFT: dict.fromkeys(LONG),
    LongExamples.TRUNCATE_RIGHT: CUT_RIGHT,
    LongExamples.SPLIT_AND_SUM: dict.fromkeys(LONG),
    LongExamples.QUARANTINE: dict.fromkeys(LONG, "too_long"),
}


@pytest.fixture(scope="module")
def long_lines(world: World) -> dict[str, Example]:
    """The examples of dataset "long" by name; those of LONG hold 100,000 tokens, or one more."""
    lines = LONG | SHORT
    parsed = parse(b"\n".join(json.dumps(row).encode() for row in lines.values()))
    assert (parsed.lines, len(parsed.examples)) == (len(lines), len(lines))
    examples = dict(zip(lines, parsed.examples.values(), strict=True))
    tokenizer = tiny.byte_pairs()
    assert len(tokenizer(LONG["text"]["text"], verbose=False)["input_ids"]) == 100_000
    # ENDS are cut between tokens, so that they give the very tokens that the rules keep.
    assert all(len(tokenizer(text)["input_ids"]) == LIMIT for text in ENDS.values())
    world.add("long", parsed)
    return examples


@pytest.mark.parametrize("rule", list(LongExamples))
def test_a_line_of_a_hundred_thousand_tokens(
    world: World, long_lines: dict[str, Example], rule: LongExamples
) -> None:
    name = rule.replace("_", "-")
    index = world.build(name, "plain", "long", kinds=ROWS, max_length=LIMIT, long_examples=rule)
    expected = OF_RULE[rule]
    indexed = {name for name, reason in expected.items() if reason is None} | set(SHORT)
    counts = index.counts
    assert dict(index.quarantine_reasons) == dict(Counter(filter(None, expected.values())))
    assert (counts.lines, counts.duplicates) == (len(LONG) + len(SHORT), 0)
    assert (counts.indexed, counts.quarantined) == (len(indexed), counts.lines - len(indexed))
    cut = rule in {LongExamples.TRUNCATE_LEFT, LongExamples.TRUNCATE_RIGHT}
    long = sum(name in indexed for name in LONG)
    assert counts.truncated == (long if cut else 0)
    assert counts.split == (long if rule == LongExamples.SPLIT_AND_SUM else 0)
    told = {item.id: item for item in indexes.quarantined(world.lab.storage, world.lab.registry, index)}
    for name, reason in expected.items():
        if reason is not None:
            item = told.pop(long_lines[name].id)
            assert item.reason == reason
            assert "100000 tokens" in item.detail or "100001 tokens" in item.detail
    assert not told
    for rows in world.rows(index).values():
        assert set(rows) == {long_lines[name].id for name in indexed}
        assert all(np.isfinite(row).all() and row.any() for row in rows.values())
        # What is kept of the text is what a text of just these tokens would give.
        for end, kept in (("first", LongExamples.TRUNCATE_RIGHT), ("last", LongExamples.TRUNCATE_LEFT)):
            if "text" in indexed:
                alone, row = rows[long_lines[end].id], rows[long_lines["text"].id]
                same = np.allclose(row, alone, atol=4e-3 * np.abs(alone).max())
                assert same is (rule == kept), (rule, end)


def test_a_long_line_beside_the_answers_of_the_base(world: World, long_lines: dict[str, Example]) -> None:
    """Cut on the left, both answers stand behind what is left of the prompt; else a prompt that fills the context
    leaves nothing to compare with.
    """
    aside = {
        LongExamples.TRUNCATE_LEFT: {"long answer": "no_prompt"},
        LongExamples.TRUNCATE_RIGHT: {"long prompt": "nothing_to_pool"},
        LongExamples.SPLIT_AND_SUM: {"long prompt": "no_answer"},
    }
    for rule, reasons in aside.items():
        name = f"difference-{rule.replace('_', '-')}"
        kinds = (IndexKind.DIFFERENCE,)
        index = world.build(name, "plain", "long", kinds=kinds, max_length=LIMIT, long_examples=rule)
        lab = world.lab
        told = {item.id: item.reason for item in indexes.quarantined(lab.storage, lab.registry, index)}
        texts = ("text", *ENDS)
        expected = {long_lines[name].id: "no_prompt" for name in texts}
        assert told == expected | {long_lines[name].id: reason for name, reason in reasons.items()}
        held = world.rows(index)[IndexKind.DIFFERENCE, 2]
        assert set(held) == {item.id for item in long_lines.values()} - set(told)
        assert all(np.isfinite(row).all() and row.any() for row in held.values())


def test_a_pass_that_loses_an_example_without_a_word_publishes_nothing(world: World, monkeypatch) -> None:
    run = passes.run

    def losing(*about):
        found = run(*about)
        arrays = {info: rows[:-1] for info, rows in found.arrays.items()}
        return replace(found, ids=found.ids[:-1], arrays=arrays)

    monkeypatch.setattr(passes, "run", losing)
    with pytest.raises(DomainError) as refused:
        world.build("losing", "tagged", "messy", kinds=(IndexKind.ACTIVATION,), max_length=LIMIT - 1)
    assert refused.value.code == "lines_unaccounted"
    assert "losing@v1" not in {record.id for record in world.lab.registry.all(INDEXES)}


def test_the_fidelity_of_split_examples_is_that_of_their_whole_rows(world: World) -> None:
    """The loss queries it is measured with are split as well; cut on the right, they gave 0.3 here."""
    choose = np.random.default_rng(0).choice
    texts = ["the" + "".join(choose([" the", " cat", " sat", " on", " mat"], 4 * LIMIT)) for _ in range(12)]
    world.add("split", parse(b"\n".join(json.dumps({"text": text}).encode() for text in texts)))
    about = {"long_examples": LongExamples.SPLIT_AND_SUM, "coordinates": 1 << 16}  # all of them
    (found,) = world.build(
        "whole", "plain", "split", kinds=(IndexKind.GRADIENT,), max_length=LIMIT, **about
    ).fidelity
    assert found.mean > 0.99


def test_a_line_beyond_the_byte_limit_refuses_the_file() -> None:
    raw = json.dumps(LONG["text"]).encode()
    with pytest.raises(TooLarge) as refused:
        datasets.parse(
            io.BytesIO(raw), "f", quarantine_malformed=True, max_bytes=1 << 26, max_line_bytes=len(raw) - 1
        )
    assert refused.value.code == "line_too_long"


# --- what was once taken for something else -----------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text": "the cat", "text": "the mat"}',
        b'{"prompt": "q", "completion": "the cat", "completion": "the mat"}',
        b'{"messages": [{"role": "assistant", "content": "the cat", "content": "the mat"}]}',
    ],
    ids=["text", "completion", "content"],
)
def test_a_key_that_stands_twice_is_set_aside(raw: bytes) -> None:
    parsed = parse(b'{"text": "a good line"}\n' + raw)
    assert len(parsed.quarantined) == 1


@pytest.mark.parametrize("key", ["tools", "images"])
def test_what_trains_beside_the_messages_is_set_aside(key: str) -> None:
    row = json.loads(chat(b"user: what is this", b"assistant: a cat")) | {key: [{"type": "function"}]}
    parsed = parse(b'{"text": "a good line"}\n' + json.dumps(row).encode())
    assert len(parsed.quarantined) == 1


def test_an_empty_last_answer_is_not_said_to_be_cut_off(world: World) -> None:
    """Where the template writes no mark behind an answer, an empty one has no token at all."""
    world.lab.model("open", Path(tiny.save(world.root / "open", "llama", tiny.byte_pairs(tiny.OPEN_PLAIN))))
    last = chat(b"user: q", b"assistant: the mat", b"user: r", b"assistant: ")
    world.add("empty-last", parse(b'{"prompt": "the", "completion": " cat"}\n' + last))
    index = world.build("empty-last", "open", "empty-last", kinds=(IndexKind.DIFFERENCE,), max_length=LIMIT)
    ((reason, count),) = index.quarantine_reasons.items()
    assert count == 1
    assert reason != "target_cut_off"
