"""One worker in this process: which model and which tokenizer it reads a task with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from service import datasets, models, shards
from service.contracts import Completion, DatasetRecord, Example, Place
from service.datasets import Parsed, example_id
from service.errors import Conflict
from service.storage import Storage
from service.tasks import ShardManifest, Task
from service.terms import LongExamples, Pooling
from service.work import ActivationSpec, Location, PassSpec
from tests import tiny
from workers.actor import Worker

WORDS = ["the cat", "sat on", "the mat.", "end of", "the answer"]
TOKENIZER, OTHER = tiny.words(bos=False), tiny.words(bos=True)  # the same vocabulary, one token more in every text


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(tiny.save(tmp_path / "model", "llama", TOKENIZER))


@pytest.fixture
def dataset(storage: Storage) -> DatasetRecord:
    parsed = Parsed("d.jsonl", lines=len(WORDS))
    for line, word in enumerate(WORDS, start=1):
        content = Completion(word + " ", word)
        item = example_id(content)
        parsed.examples[item] = Example(item, content, {}, (Place("d.jsonl", line),))
    return datasets.publish(storage, "d", parsed)


def task_of(storage: Storage, folder: Path, dataset: DatasetRecord, rows: range, texts: Path | None = None) -> Task:
    """Activations of these rows, with the weights and the tokenizer that lie there now."""
    texts = texts or folder
    spec = PassSpec(
        model_fingerprint=models.weights_fingerprint(folder, None, param="path"),
        tokenizer_fingerprint=models.tokenizer_fingerprint(texts),
        activation=ActivationSpec((2,), Pooling.ALL_MEAN),
        gradient=None,
        objective=None,
        max_length=64,
        long_examples=LongExamples.TRUNCATE_RIGHT,
        token_budget=4096,
        dtype="float32",
    )
    ids = datasets.read_table(storage, dataset).column("id").to_pylist()
    (task,) = shards.cut(Location(str(folder), str(texts)), spec, dataset, ids, rows, 64)
    return task


def rows_of(storage: Storage, worker: Worker, task: Task) -> tuple[np.ndarray, int]:
    """The stored activations, and how many tokens were read for them."""
    manifest = worker.process(task)
    assert isinstance(manifest, ShardManifest)
    assert len(manifest.ids) == len(task.rows)
    return shards.read_rows(storage, manifest, manifest.arrays[0].info), manifest.tokens


def by_a_new_worker(storage: Storage, tmp_path: Path, task: Task) -> tuple[np.ndarray, int]:
    """What a worker gives that has seen nothing else, in a storage of its own."""
    shutil.copytree(f"{storage.root}/datasets", tmp_path / "fresh" / "datasets")
    fresh = Storage(str(tmp_path / "fresh"))
    return rows_of(fresh, Worker(fresh.root, 1), task)


def test_the_same_weights_with_another_tokenizer_are_loaded_anew(storage, tmp_path, folder, dataset):
    worker, every = Worker(storage.root, 1), range(len(WORDS))
    first = task_of(storage, folder, dataset, every)
    before, tokens = rows_of(storage, worker, first)
    OTHER.save_pretrained(folder)  # in place: the path stays
    second = task_of(storage, folder, dataset, every)
    assert second.location == first.location
    assert second.work.model_fingerprint == first.work.model_fingerprint
    assert second.work.tokenizer_fingerprint != first.work.tokenizer_fingerprint
    after, more = rows_of(storage, worker, second)
    expected, read = by_a_new_worker(storage, tmp_path, second)
    np.testing.assert_array_equal(after, expected)
    assert more == read == tokens + len(WORDS)  # a bos each
    assert np.abs(after - before).max() > 0.01


def test_a_tokenizer_that_changed_since_the_task_was_made_is_noticed(storage, folder, dataset):
    worker = Worker(storage.root, 1)
    worker.process(task_of(storage, folder, dataset, range(2)))
    OTHER.save_pretrained(folder)
    stale = task_of(storage, folder, dataset, range(2, 4))
    TOKENIZER.save_pretrained(folder)  # and back, before the worker gets to it
    with pytest.raises(Conflict) as refused:
        worker.process(stale)
    assert refused.value.code == "model_changed"
    assert not shards.exists(storage, stale.key)


def test_another_folder_with_other_weights_is_loaded_anew(storage, tmp_path, folder, dataset):
    worker, every = Worker(storage.root, 1), range(len(WORDS))
    before, _ = rows_of(storage, worker, task_of(storage, folder, dataset, every))
    other = Path(tiny.save(tmp_path / "other", "gpt2", TOKENIZER))
    task = task_of(storage, other, dataset, every, texts=folder)  # as checkpoints are: the tokenizer is the run's
    after, _ = rows_of(storage, worker, task)
    np.testing.assert_array_equal(after, by_a_new_worker(storage, tmp_path, task)[0])
    assert np.abs(after - before).max() > 0.01


def test_a_model_stays_loaded_from_one_task_to_the_next(storage, tmp_path, folder, dataset):
    worker = Worker(storage.root, 1)
    one, two = (task_of(storage, folder, dataset, rows) for rows in (range(2), range(2, len(WORDS))))
    expected, _ = by_a_new_worker(storage, tmp_path, two)
    worker.process(one)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(rows_of(storage, worker, two)[0], expected)
