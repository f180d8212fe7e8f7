"""Whole builds in a bucket: the same bytes as on a disk, and the whole stack with nothing stored beside it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from api.client import Client
from api.up import Stack, free_port
from benchmarks.lab import Lab
from service.contracts import Completion, Example, IndexRecord
from service.datasets import example_id
from service.loading import IndexLoader
from service.storage import Storage
from service.terms import IndexKind, JobState
from tests import s3, tiny
from tests.conftest import FAST

TOKENIZER = tiny.words(bos=True)
WORDS = ["the", "cat", "sat", "on", "mat.", "end", "of", "answer", *"abcdefghi"]
NOT_COMPARED = {"build.json", "record.json"}  # who and when


def texts(seed: int, count: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    draw = lambda most: " ".join(generator.choice(WORDS, generator.integers(2, most)))  # noqa: E731
    return [(draw(5) + " ", draw(9)) for _ in range(count)]


def examples(seed: int, count: int) -> list[Example]:
    contents = [Completion(*each) for each in texts(seed, count)]
    return [Example(example_id(content), content, {}, ()) for content in contents]


def stored(storage: Storage, key: str) -> Iterator[tuple[str, bytes]]:
    """Every file below ``key``."""
    for name in storage.files(key):
        if name not in NOT_COMPARED:
            yield f"{key}/{name}", storage.read(f"{key}/{name}")
    for name in storage.folders(key):
        yield from stored(storage, f"{key}/{name}")


def built(home: Path, model: Path, **settings: str) -> tuple[IndexRecord, dict[str, bytes], list[float]]:
    """An index of three kinds; its files and the scores of its rows against ones."""
    with Lab(home, **settings) as lab:
        lab.model("m", model)
        lab.dataset("d", examples(0, 24))
        lab.dataset("q", examples(1, 4))
        index, _ = lab.build(
            "i",
            "m",
            "d",
            2,
            kinds=(IndexKind.ACTIVATION, IndexKind.GRADIENT, IndexKind.INFLUENCE),
            query_sets=("q",),
            coordinates=64,
        )
        files = {
            key: data for part in ("shards", "artifacts", "indexes") for key, data in stored(lab.storage, part)
        }
        loader = IndexLoader(lab.registry, lab.storage, threads=1)
        rows = loader.rows(index, index.arrays[0])
        top = rows.index.search(np.ones(rows.index.d, np.float32), 24)
        return index, files, top.scores.tolist()


def test_a_build_in_a_bucket_has_the_bytes_of_one_on_a_disk(bucket: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    tiny.save(tmp_path / "model", "llama", TOKENIZER)
    _, on_disk, scores = built(tmp_path / "disk", tmp_path / "model")
    index, remote, same = built(tmp_path / "remote", tmp_path / "model", storage_url=bucket)
    torch.set_num_threads(threads)
    assert index.id == "i@v1"
    assert len(on_disk) > 10
    assert remote.keys() == on_disk.keys()
    assert [key for key in remote if remote[key] != on_disk[key]] == []
    assert same == scores
    assert not (tmp_path / "remote" / "storage").exists()


@pytest.mark.stack
def test_the_whole_stack_on_a_bucket(bucket: str, s3_server: s3.Moto, tmp_path: Path) -> None:
    """Api, dispatcher and Ray workers take credentials and endpoint from the environment that `whence up` has."""
    tiny.save(tmp_path / "model", "llama", TOKENIZER)
    for name, seed in (("train", 0), ("positive", 1), ("negative", 2)):
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in texts(seed, 24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    home = tmp_path / "home"
    settings = FAST | {"WHENCE_STORAGE_URL": bucket, "WHENCE_WORKERS": "1"}
    with Stack(home, host="127.0.0.1", port=free_port(), roots=[tmp_path], settings=settings) as stack:
        stack.wait_ready()
        with Client(stack.url) as client:
            client.add_model("m", str(tmp_path / "model"))
            for name in ("train", "positive", "negative"):
                client.upload_dataset(name, tmp_path / f"{name}.jsonl")
            kinds = ["activation"]
            build = client.wait(client.build_index("i", model="m", dataset="train", layers=[2], kinds=kinds).id)
            assert build.state == JobState.SUCCEEDED, build.error
            fit = client.fit_concept("c", model="m", positive="positive", negative="negative", layer=2)
            assert client.wait(fit.id).state == JobState.SUCCEEDED
            answer = client.ask(index="i", concept="c", k=5)
            assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5]
            assert answer.hits[0].text
    assert not (home / "storage").exists()
    listed = s3_server.boto().list_objects_v2(Bucket="whence-test", Prefix="some/prefix/indexes/i@v1/")
    assert {"manifest.json", "record.json"} <= {item["Key"].rsplit("/", 1)[1] for item in listed["Contents"]}
    kept = [path for path in (home / "cache").iterdir() if len(path.name) == 64]
    assert kept, "neither api nor workers keep what they have read"
    for log in (home / "logs").iterdir():
        assert s3.SECRET not in log.read_text()
