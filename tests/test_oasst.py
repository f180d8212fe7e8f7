"""Real conversations: the documented one-liner turns OpenAssistant trees into examples; all kinds index them."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lab import DEFAULTS, Lab
from service import indexes
from service.datasets import parse
from service.terms import IndexKind, LongExamples, Method

REFERENCE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
TREES, LAYER = 12, 3
ANSWERS = {"temperature": 1.0, "max_new_tokens": 12, "seed": 0}


@pytest.fixture(scope="module")
def trees(shared_data: Path) -> list[str]:
    return (shared_data / "oasst" / "en_100_tree.jsonl").read_text().splitlines()


def convert(lines: list[str], folder: Path) -> bytes:
    (folder / "en_100_tree.jsonl").write_text("\n".join(lines) + "\n")
    found = re.search(r"```sh\n(python3 -c .*?en_100_tree\.jsonl > chat\.jsonl)\n```", REFERENCE, re.DOTALL)
    assert found is not None
    command = found[1].replace("python3", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)  # noqa: S602
    return (folder / "chat.jsonl").read_bytes()


def test_every_answer_of_the_trees_becomes_an_example_with_what_was_said_before(trees, tmp_path):
    expected: list[list[str]] = []

    def visit(message: dict, said: tuple[str, ...]) -> None:
        now = (*said, message["text"])
        if message["role"] == "assistant":
            expected.append(list(now))
        for reply in message["replies"]:
            visit(reply, now)

    for line in trees:
        visit(json.loads(line)["prompt"], ())
    rows = [json.loads(line) for line in convert(trees, tmp_path).decode().splitlines()]
    assert [[message["content"] for message in row["messages"]] for row in rows] == expected
    assert len(rows) > 500
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_all_four_kinds_index_them_and_every_line_is_accounted_for(trees, tmp_path, shared_data):
    threads = torch.get_num_threads()
    data = convert(trees[:TREES], tmp_path)
    with (tmp_path / "chat.jsonl").open("rb") as stream:
        parsed = parse(stream, "chat.jsonl", quarantine_malformed=False, max_bytes=1 << 26, max_line_bytes=1 << 22)
    assert parsed.lines == len(data.splitlines()) == len(parsed.examples) + parsed.duplicates
    lab = Lab(tmp_path / "lab", shard_size=32)
    try:
        model = lab.model("stories", shared_data / "stories260k")
        examples = list(parsed.examples.values())
        lab.dataset("chat", examples)
        lab.dataset("questions", examples[:4])
        lab.concept("v", model, np.random.default_rng(0).standard_normal(64).astype(np.float32), layer=LAYER)
        kinds = (IndexKind.ACTIVATION, IndexKind.DIFFERENCE, IndexKind.GRADIENT, IndexKind.INFLUENCE)
        index, _ = lab.build(
            "chat",
            "stories",
            "chat",
            LAYER,
            kinds=kinds,
            query_sets=("questions",),
            answers=ANSWERS,
            max_length=192,
            long_examples=LongExamples.TRUNCATE_RIGHT,
            curvature=DEFAULTS["curvature"] | {"examples": 32},
        )
        counts = index.counts
        assert counts.lines == counts.indexed + counts.duplicates + counts.quarantined
        assert 0 < counts.truncated <= counts.indexed
        assert counts.quarantined == sum(index.quarantine_reasons.values())
        told = Counter(item.reason for item in indexes.quarantined(lab.storage, lab.registry, index))
        assert told == Counter(dict(index.quarantine_reasons))
        ids = [example.id for example in examples]
        for about in (
            {"method": Method.VECTOR_FILTER, "concept": "v"},
            {"method": Method.PROJECTION_DIFFERENCE, "concept": "v"},
            {"method": Method.CONCEPT_INFLUENCE, "concept": "v", "query_set": "questions"},
            {"method": Method.INFLUENCE_FUNCTION, "query_set": "questions"},
        ):
            scores = lab.scores(index, ids, **about)
            assert np.isfinite(scores).sum() >= counts.indexed
            assert np.nanstd(scores) > 0
    finally:
        lab.close()
        torch.set_num_threads(threads)
