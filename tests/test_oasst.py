"""Real conversations: the documented one-liner turns OpenAssistant trees into examples; all kinds index them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import oasst
from benchmarks.lab import Lab
from service import indexes
from service.registry import MODELS
from service.terms import Method

TREES = 12  # of 100: the benchmark of the same name does them all


@pytest.fixture(scope="module")
def trees(shared_data: Path) -> list[str]:
    return oasst.read_trees(shared_data)


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
    rows = [json.loads(line) for line in oasst.convert(trees, tmp_path).decode().splitlines()]
    assert [[message["content"] for message in row["messages"]] for row in rows] == expected
    assert len(rows) > 500
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_all_four_kinds_index_them_and_every_line_is_accounted_for(trees, tmp_path, shared_data):
    threads = torch.get_num_threads()
    data = oasst.convert(trees[:TREES], tmp_path)
    parsed = oasst.read_chat(tmp_path)
    assert parsed.lines == len(data.splitlines()) == len(parsed.examples) + parsed.duplicates
    lab = Lab(tmp_path / "lab", shard_size=32)
    try:
        index = oasst.index(lab, shared_data, parsed, max_length=192, new_tokens=12, sample=32)
        examples = list(parsed.examples.values())
        model = lab.registry.get(MODELS, "stories")
        v = np.random.default_rng(0).standard_normal(64).astype(np.float32)
        lab.concept("v", model, v, layer=oasst.LAYER)
        assert {array.kind for array in index.arrays} == set(oasst.KINDS)
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
