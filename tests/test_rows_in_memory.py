"""Rows in memory: versions share what they have in common, memory has a bound, and where a score lies among all."""

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from service import indexes, screening, spread
from service.contracts import IndexRecord
from service.errors import Damaged, Unavailable
from service.loading import IndexLoader, grouped
from service.registry import INDEXES, Registry
from service.specs import Section
from service.storage import Storage
from tests.test_indexes import ARRAYS, D, Shelf


@pytest.fixture
def shelf(registry: Registry, storage: Storage) -> Shelf:
    return Shelf(registry, storage)


def test_blocks_count_from_the_first_shard() -> None:
    """What is appended changes the last block only."""
    dims = (128 << 20) // 2 // 100  # 100 rows to a block
    assert grouped([40, 40, 40, 100, 1], dims) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert grouped([40, 40, 40, 100, 1, 60], dims)[:3] == [(0, 2), (2, 3), (3, 4)]
    assert grouped([1000], dims) == [(0, 1)]
    assert grouped([], dims) == []


def versions(shelf: Shelf) -> tuple[IndexRecord, IndexRecord]:
    """Two versions: the second has one more shard."""
    whole = shelf.section()
    first = shelf.publish("a", 1, sections=(Section(whole.arrays, whole.shards[:2]),))
    return first, shelf.publish("a", 2, sections=(whole,))


def test_a_version_loads_only_what_no_loaded_one_has(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.loading.BLOCK_BYTES", 4 * 2 * D)  # a block for every shard
    first, second = versions(shelf)
    loader = shelf.loader()
    old = loader.rows(first, ARRAYS[0])
    for path in [shelf.path(f"shards/*/{ref.key}/00.*.npy") for ref in shelf.section().shards[:2]]:
        path.unlink()  # nobody needs it now
    new = loader.rows(second, ARRAYS[0])
    assert [block is other for block, other in zip(new.index.blocks, old.index.blocks, strict=False)] == [
        True,
        True,
    ]
    assert (old.index.n, new.index.n) == (8, 9)
    query = np.ones(D, np.float32)
    assert new.index.search(query, 9).rows.tolist() == np.argsort(-new.index.scores(query)).tolist()


def test_an_index_beyond_the_memory_is_refused_with_what_it_needs(shelf: Shelf) -> None:
    record = shelf.publish("a", 1)
    big = replace(record, counts=replace(record.counts, indexed=10**9))
    loader = IndexLoader(shelf.registry, shelf.storage, threads=2, most_bytes=1 << 20)
    with pytest.raises(Unavailable, match=r"14\.9 GiB.*WHENCE_SEARCH_BYTES") as refused:
        loader.rows(big, ARRAYS[0])
    assert refused.value.code == "index_too_large"
    assert loader.rows(record, ARRAYS[0]).index.n == 9


def test_a_version_without_room_for_screens_holds_none_that_others_have_made(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not counted with them, and would keep them when those others are gone."""
    monkeypatch.setattr("service.loading.BLOCK_BYTES", 4 * 2 * D)
    monkeypatch.setattr("service.screening.worthwhile", lambda n, d: True)
    first, second = versions(shelf)
    enough = 8 * 2 * D + screening.bytes_of([4, 4], D)  # for the rows of the first and their screens
    loader = IndexLoader(shelf.registry, shelf.storage, threads=2, most_bytes=enough)
    old = loader.rows(first, ARRAYS[0]).index
    old.screen()
    assert all(block._screen is not None for block in old.blocks)
    assert old.bytes == enough
    new = loader.rows(second, ARRAYS[0]).index
    new.search(np.ones(D, np.float32), 3)
    assert new.blocks[:2] == old.blocks
    assert all(block._screen is None for block in new.blocks)
    assert new.bytes == sum(block.bytes for block in new.blocks)


def test_the_spread_of_scores_is_exact_where_rows_are_few(shelf: Shelf) -> None:
    rows = shelf.loader().rows(shelf.publish("a", 1), ARRAYS[0])
    query = np.random.default_rng(3).normal(size=D).astype(np.float32)
    scores = rows.index.scores(query)
    found = rows.sample.spread(query)
    np.testing.assert_allclose(found.z_score(scores), stats.zscore(scores.astype(np.float64)), rtol=1e-5)
    np.testing.assert_allclose(
        spread.percentile(rows.sample.scores(query), scores),
        [stats.percentileofscore(scores, score, kind="mean") for score in scores],
    )


def test_versions_share_nothing_with_those_of_other_shards(shelf: Shelf, registry: Registry) -> None:
    first, second = versions(shelf)
    loader = shelf.loader()
    assert loader.rows(first, ARRAYS[0]) is loader.rows(first, ARRAYS[0])
    assert loader.rows(first, ARRAYS[0]).index.blocks != loader.rows(first, ARRAYS[1]).index.blocks
    assert indexes.resolve(registry, "a") == registry.get(INDEXES, second.id)


def wait_for_what_is_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(timeout=60)


def test_what_answers_need_beside_rows_is_read_before_they_ask(shelf: Shelf) -> None:
    record, loader = shelf.publish("a", 1), shelf.loader()
    rows = loader.rows(record, ARRAYS[0])
    rows.ahead()
    wait_for_what_is_ahead()
    for path in Path(shelf.storage.root).glob("datasets/d/*"):
        path.unlink()
    found = loader.examples(record).take(rows.positions[:2])
    assert [example.id for example in found] == shelf.ids[:2]


def test_what_cannot_be_read_ahead_is_told_to_who_asks_and_tried_again(shelf: Shelf) -> None:
    record, loader = shelf.publish("a", 1), shelf.loader()
    rows = loader.rows(record, ARRAYS[0])
    texts = shelf.path("datasets/d/examples*")
    whole = texts.read_bytes()
    texts.write_bytes(whole[:-1] + b"?")
    rows.ahead()
    wait_for_what_is_ahead()
    assert rows.index.search(np.ones(D, np.float32), 3).rows.shape == (3,)
    with pytest.raises(Damaged, match="examples"):
        loader.examples(record).take([0])
    texts.write_bytes(whole)
    assert [example.id for example in loader.examples(record).take([0])] == shelf.ids[:1]


def test_answers_do_without_threads_that_are_not_to_be_had(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    record, loader = shelf.publish("a", 1), shelf.loader()
    rows = loader.rows(record, ARRAYS[0])

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as none_left:
        none_left.setattr(threading.Thread, "start", start)
        rows.ahead()
    assert [example.id for example in loader.examples(record).take(rows.positions[:2])] == shelf.ids[:2]


def test_rows_that_make_room_for_others_are_freed_at_once(shelf: Shelf) -> None:
    """They are gigabytes, and the cycle collector of a server looks rarely."""
    record = shelf.publish("a", 1)
    loader = IndexLoader(shelf.registry, shelf.storage, threads=2, most_bytes=2 * 9 * D + 9 * 64)
    gc.disable()
    try:
        rows = loader.rows(record, ARRAYS[0])
        rows.ahead()
        wait_for_what_is_ahead()
        rows.sample.spread(np.ones(D, np.float32))
        gone = [weakref.ref(each) for each in (rows, rows.index, rows.sample)]
        assert loader.rows(record, ARRAYS[1]).positions.tolist() == rows.positions.tolist()
        del rows
        assert [each() for each in gone] == [None, None, None]
    finally:
        gc.enable()
