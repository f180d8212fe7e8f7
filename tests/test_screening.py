"""Bounds from 8-bit rows lose no row, and a search that uses them answers like one that does not."""

import time
from functools import cache

import numpy as np
import pytest

from service import blocks, int8, screening
from service.blocks import Mask
from service.rows import pack, unpack
from service.screening import Screen
from service.search import VectorIndex

NONE = np.zeros(0, dtype=np.int64)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def heavy(seed: int, n: int, d: int) -> np.ndarray:
    """Rows with a few numbers far above the others."""
    return np.random.default_rng(seed).standard_t(2.5, size=(n, d)).clip(-200, 200).astype(np.float32)


def massive(seed: int, n: int, d: int) -> np.ndarray:
    """As activations are: two dimensions a thousand times the size of the others."""
    rows = normal(seed, n, d)
    rows[:, :2] *= 1000
    return rows


def alike(seed: int, n: int, d: int) -> np.ndarray:
    """Rows that differ by less than 8 bits can tell."""
    return normal(seed, 1, d) + 1e-4 * normal(seed + 1, n, d)


def sparse(seed: int, n: int, d: int) -> np.ndarray:
    rows = normal(seed, n, d)
    rows[np.random.default_rng(seed).random((n, d)) < 0.95] = 0
    rows[:3] = 0
    return rows


KINDS = {made.__name__: made for made in (normal, heavy, massive, alike, sparse)}


def candidates(
    rows: np.ndarray, queries: np.ndarray, ks: list[int], masks: list[Mask | None], exponent: int = 0
) -> list[np.ndarray | None]:
    screen = Screen(rows.astype(np.float16), outliers=NONE, exponent=exponent)
    bars = np.full(len(queries), -np.inf, dtype=np.float32)
    return screen.candidates(queries, ks, masks, bars)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_is_rounded_as_told(kind: str) -> None:
    query, levels = KINDS[kind](3, 5, 200)[4], np.exp2(np.random.default_rng(4).integers(-9, 9, 200))
    planes = np.zeros((2, 256), dtype=np.int8)
    unit, total, size, missed = int8.round_query(query, levels.astype(np.float32), planes)
    exact, codes = query.astype(np.float64) * levels, 128 * planes[0].astype(int) + planes[1]
    assert (codes[200:] == 0).all()
    assert codes.sum() == total
    rest = exact - unit * codes[:200]
    assert (abs(rest) <= unit * 0.5000001).all()
    np.testing.assert_allclose([size, missed], [np.linalg.norm(exact), np.linalg.norm(rest)], rtol=1e-9)
    assert unit == pytest.approx(abs(exact).max() / int8.MOST)


def holds_the_best(
    found: np.ndarray | None, rows: np.ndarray, query: np.ndarray, k: int, mask: Mask | None
) -> None:
    exact = rows.astype(np.float16).astype(np.float64) @ query.astype(np.float64)
    if mask is not None:
        exact[~mask] = -np.inf
    best = np.argsort(-exact, kind="stable")[: min(k, len(rows) if mask is None else int(mask.sum()))]
    assert found is not None
    assert set(best.tolist()) <= set(found.tolist())
    assert mask is None or mask[found].all()
    assert len(set(found.tolist())) == len(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 52, 64, 300])
@pytest.mark.parametrize("n", [1, 3, 4, 1501])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_row_of_the_best_is_lost(kind: str, d: int, n: int, count: int) -> None:
    rows, queries = KINDS[kind](n, n, d), normal(7, count, d)
    queries[-1] = rows[0]
    ks = [1, 10, 100, 3, 2000][:count]
    masks: list[Mask | None] = [None, np.random.default_rng(3).random(n) < 0.3, None, np.zeros(n, bool), None]
    found = candidates(rows, queries, ks, masks[:count])
    for number, query in enumerate(queries):
        holds_the_best(found[number], rows, query, ks[number], masks[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [52, 300])
def test_bounds_hold_where_they_are_tight(kind: str, d: int) -> None:
    """A query along what a row misses: there Cauchy-Schwarz is an equality, and less slack would lose the row."""
    rows = KINDS[kind](1, 40, d).astype(np.float16)
    screen = Screen(rows, outliers=NONE, exponent=0)
    for number, row in enumerate(rows.astype(np.float64)):
        levelled = row / screen._levels
        codes = screen._codes[number // 4, :, number % 4].reshape(-1)[:d].astype(np.float64) - int8.OFFSET
        missed = levelled - screen._scale[number] * codes
        query = (missed / screen._levels).astype(np.float32)
        if not query.any():
            continue
        query /= np.abs(query).max()
        exact = rows.astype(np.float64) @ query.astype(np.float64)
        bars = np.nextafter(np.array([exact[number]], np.float32), np.float32(-np.inf))
        (found,) = screen.candidates(query[None], [len(rows)], [None], bars)
        assert found is not None
        assert number in found.tolist()
        bars = np.full(1, -np.inf, dtype=np.float32)
        screen.candidates(-query[None], [1], [None], bars)
        assert bars[0] <= (-exact).max()


@pytest.mark.parametrize("exponent", [-60, -8, 0, 8, 60])
def test_bounds_hold_whatever_the_scale(exponent: int) -> None:
    rows, query = normal(0, 3000, 64), normal(1, 64)
    (found,) = candidates(rows, query[None], [10], [None], exponent)
    holds_the_best(found, rows, query, 10, None)
    assert found is not None
    assert len(found) < 200


def test_bars_are_in_the_units_of_scores() -> None:
    """Else one block could not tell another what it has to beat."""
    rows, query = normal(0, 3000, 64), normal(1, 64)
    exact = rows.astype(np.float16).astype(np.float64) @ query
    for exponent in (-8, 0, 16):
        bars = np.full(1, -np.inf, dtype=np.float32)
        Screen(rows.astype(np.float16), outliers=NONE, exponent=exponent).candidates(
            query[None], [10], [None], bars
        )
        tenth = np.sort(exact)[-10] * 2.0**exponent
        assert 0.8 * tenth < bars[0] <= tenth


def test_most_rows_are_ruled_out() -> None:
    rows, queries = normal(0, 20_000, 256), normal(1, 4, 256)
    for found in candidates(rows, queries, [10] * 4, [None] * 4):
        assert found is not None
        assert len(found) < 400


def test_massive_columns_do_not_blunt_the_bounds() -> None:
    """A concept has nothing to do with them; with one scale for all columns nothing would be ruled out."""
    rows, query = massive(0, 20_000, 256), normal(1, 256)
    query[:2] = 0
    (found,) = candidates(rows, query[None], [10], [None])
    assert found is not None
    assert len(found) < 1000


def test_rows_that_look_alike_are_too_many() -> None:
    assert candidates(alike(0, 20_000, 64), normal(1, 1, 64), [10], [None]) == [None]


def test_a_zero_query_keeps_everything_or_says_that_it_cannot() -> None:
    assert candidates(normal(0, 20_000, 64), np.zeros((1, 64), np.float32), [10], [None]) == [None]
    (found,) = candidates(normal(0, 500, 64), np.zeros((1, 64), np.float32), [10], [None])
    assert found is not None
    assert len(found) == 500


@pytest.mark.parametrize("exponent", [-60, -56, 0, 60])
@pytest.mark.parametrize("query", [normal(1, 64), np.zeros(64, np.float32)], ids=["normal", "zero"])
def test_outliers_are_looked_at_always_and_set_no_bar(exponent: int, query: np.ndarray) -> None:
    rows = normal(0, 500, 64).astype(np.float16)
    outliers = np.arange(0, 40)
    rows[outliers] = 0
    screen = Screen(rows, outliers=outliers, exponent=exponent)
    bars = np.full(1, -np.inf, dtype=np.float32)
    (found,) = screen.candidates(query[None], [10], [None], bars)
    assert found is not None
    assert set(outliers.tolist()) <= set(found.tolist())
    exact = np.delete(rows.astype(np.float64) @ query, outliers) * 2.0**exponent
    assert bars[0] <= np.sort(exact)[-10]


def test_what_the_widest_rows_miss_is_not_underestimated() -> None:
    """A remainder that is the same everywhere: summed in float32 alone it came out 1.6e-5 too small."""
    row = np.full((4, int8.WIDEST), 0.4, dtype=np.float16)
    row[:, 0] = 127
    codes = np.zeros((1, int8.WIDEST // int8.LANES, int8.TILE, int8.LANES), np.uint8)
    _, slack, size = int8.encode(row, np.ones(int8.WIDEST, np.float32), codes)
    np.testing.assert_allclose(slack, np.sqrt((int8.WIDEST - 1) * float(row[0, 1]) ** 2), rtol=1e-6)
    np.testing.assert_allclose(size, 127, rtol=1e-6)


@pytest.mark.parametrize("one_instruction", sorted({False, int8.VNNI}))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_do_not_overflow_in_the_widest_rows(
    one_instruction: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    using(monkeypatch, one_instruction=one_instruction)
    d = int8.WIDEST
    rows = np.ones((4, d), dtype=np.float16)
    rows[1], rows[2, ::2], rows[3] = -1, -1, 0.5
    queries = np.stack([np.ones(d), -np.ones(d), normal(0, d)])[:count].astype(np.float32)
    for number, found in enumerate(candidates(rows, queries, [1] * count, [None] * count)):
        best = int(np.argmax(rows.astype(np.float64) @ queries[number]))
        assert found is not None
        assert best in found.tolist()
        assert number == 2 or found.tolist() == ([0] if number == 0 else [1])


def using(monkeypatch: pytest.MonkeyPatch, *, one_instruction: bool) -> None:
    chosen = int8.scan
    monkeypatch.setattr(int8, "scan", lambda count: chosen(count, one_instruction=one_instruction))


def test_any_processor_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = heavy(0, 2001, 100), normal(1, 3, 100)
    found = candidates(rows, queries, [5, 50, 20], [None] * 3)
    using(monkeypatch, one_instruction=False)
    for ours, theirs in zip(found, candidates(rows, queries, [5, 50, 20], [None] * 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- in a search ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens for blocks of 4,000 rows, which would not be worth it."""
    monkeypatch.setattr(screening, "_LEAST", 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000 * 2 * 64)


@cache
def uneven() -> np.ndarray:
    """Rows of two scales, outliers that no common scale holds, zeros."""
    rows = normal(0, 15_003, 64)
    rows[::7] *= 100
    rows[[5, 4003, 9999]] *= 1e6
    rows[[6, 14_000]] *= -1e7
    rows[[10, 11]] = 0
    return rows


def indexes(rows: np.ndarray, threads: int = 2) -> tuple[VectorIndex, VectorIndex]:
    plain = VectorIndex(*pack(rows), threads=threads)
    screened = VectorIndex(*pack(rows), threads=threads, screened=True)
    screened.screen()
    assert all(block._screen is not None for block in screened.blocks)
    return plain, screened


@pytest.mark.parametrize("kind", [*KINDS, "uneven"])
@pytest.mark.parametrize("threads", [1, 3])
def test_answers_are_those_of_a_search_without_screens(kind: str, threads: int) -> None:
    rows = uneven() if kind == "uneven" else KINDS[kind](5, 9_001, 64)
    plain, screened = indexes(rows, threads)
    queries, ks = [*normal(1, 4, 64), rows[7], -rows[6]], [1, 10, 100, 400, 5, 5]
    some = np.random.default_rng(1).random(len(rows)) < 0.02
    masks: list[Mask | None] = [None, some, None, ~some, None, None]
    expected = [plain.search(query, k, mask) for query, k, mask in zip(queries, ks, masks, strict=True)]
    alone = [screened.search(query, k, mask) for query, k, mask in zip(queries, ks, masks, strict=True)]
    for found in (alone, screened.search_many(queries, ks, masks)):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.rows, theirs.rows)
            np.testing.assert_array_equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("threads", [1, 3])
def test_of_equal_rows_the_first_are_found_by_every_way(threads: int) -> None:
    rows = normal(0, 9_000, 64)
    query = normal(1, 64)
    same = np.sort(np.random.default_rng(2).choice(9_000, 300, replace=False))
    rows[same] = 3 * query / np.linalg.norm(query) * 8
    plain, screened = indexes(rows, threads)
    for index in (plain, screened):
        for found in (index.search(query, 10), index.search_many([query, normal(3, 64)], [10, 10])[0]):
            np.testing.assert_array_equal(found.rows, same[:10])


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_float32_cannot_tell_apart_are_ranked_all_the_same(threads: int) -> None:
    """Two massive columns cancel: what is left of the sums is hardly more than what their rounding leaves."""
    rows = 1e-3 * normal(0, 9_000, 64)
    rows[:, :2] = 1000
    stored, queries = unpack(*pack(rows)).astype(np.float64), normal(1, 4, 64)
    queries[:, :2] = [5, -5]
    for index in indexes(rows, threads):
        for query in queries:
            best = np.argsort(-(stored @ query.astype(np.float64)), kind="stable")[:100]
            for found in (index.search(query, 100), index.search_many([query, -query], [100, 5])[0]):
                np.testing.assert_array_equal(found.rows, best)


def test_a_screen_that_cannot_be_made_is_told_and_searches_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ValueError("no such instruction")

    monkeypatch.setattr(screening, "warm", broken)
    index = VectorIndex(*pack(normal(0, 9_000, 64)), threads=1, screened=True)
    first = index.search(normal(1, 64), 10)
    until = time.monotonic() + 30
    while "no such instruction" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    assert "no such instruction" in caplog.text
    np.testing.assert_array_equal(index.search(normal(1, 64), 10).rows, first.rows)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_neither_tiny_nor_huge_numbers_lose_a_row(size: float, scale: float) -> None:
    rows = normal(2, 9_000, 64) * np.float32(scale)
    _, screened = indexes(rows)
    query = normal(3, 64)
    query /= np.abs(query).max()
    expected = screened.search(query, 10).rows
    scaled = (query * size).astype(np.float32)
    exact = unpack(*pack(rows)).astype(np.float64) @ (scaled.astype(np.float64) / size)
    for found in (screened.search(scaled, 10), screened.search_many([scaled, query], [10, 10])[0]):
        np.testing.assert_array_equal(np.sort(found.rows), np.sort(np.argsort(-exact)[:10]))
    if size > 1e-38:  # whose smallest numbers float32 rounds
        np.testing.assert_array_equal(np.sort(expected), np.sort(np.argsort(-exact)[:10]))


def test_screens_are_made_behind_the_first_search_and_once_for_all_versions() -> None:
    index = VectorIndex(*pack(normal(0, 9_000, 64)), threads=2, screened=True)
    again = VectorIndex.of(index.blocks, 64, threads=2, screened=True)
    query = normal(1, 64)
    first = index.search(query, 10)
    until = time.monotonic() + 30
    while not all(block._screen for block in index.blocks) and time.monotonic() < until:
        time.sleep(0.01)
    made = [block._screen for block in index.blocks]
    assert all(made)
    again.screen()
    assert [block._screen for block in again.blocks] == made
    np.testing.assert_array_equal(again.search(query, 10).rows, first.rows)
    assert index.bytes > VectorIndex.of(index.blocks, 64, threads=2).bytes


@pytest.mark.parametrize("threads", [1, 2])  # more rows than candidates may be, and fewer
def test_a_screen_that_rules_nothing_out_is_given_up(threads: int) -> None:
    rows = alike(0, 4_000, 64)
    plain, screened = indexes(rows, threads)
    for seed in range(blocks.PATIENCE + 1):
        query = normal(seed, 64)
        np.testing.assert_array_equal(screened.search(query, 10).rows, plain.search(query, 10).rows)
    assert all(block._screen is None for block in screened.blocks)
    screened.screen()
    assert all(block._screen is None for block in screened.blocks)


def test_a_screen_is_given_up_for_what_is_asked_lately() -> None:
    _, screened = indexes(normal(5, 4_000, 64), 1)
    for seed in range(4 * blocks.PATIENCE):
        screened.search(normal(seed, 64), 10)
    assert all(block._screen is not None for block in screened.blocks)
    for _ in range(blocks.PATIENCE):
        screened.search(np.zeros(64, np.float32), 10)  # of which no row can be ruled out
    assert all(block._screen is None for block in screened.blocks)


def test_many_hits_for_one_leave_the_others_of_a_batch_their_screen() -> None:
    _, screened = indexes(normal(5, 4_000, 64), 1)
    (block,) = screened.blocks
    bars = np.full(2, -np.inf, dtype=np.float32)
    queries = normal(1, 2, 64)
    few, many = block.narrowed(queries, [10, block.n], [None, None], bars, queries)
    assert few is not None
    assert len(few[0]) < block.n / 8
    assert many is None


def test_what_a_screen_is_not_for_does_not_stop_it_for_others() -> None:
    """Neither many hits nor a few questions that it cannot narrow down, also in one batch with those it can."""
    rows = normal(5, 9_001, 64)
    plain, screened = indexes(rows)
    for seed in range(2 * blocks.PATIENCE):
        queries = [normal(seed, 64), normal(seed + 1, 64), np.zeros(64, np.float32)]
        queries, ks = (queries, [10, 9_000, 10]) if seed % 8 == 0 else (queries[:2], [10, 9_000])
        found = screened.search_many(queries, ks)
        for ours, theirs in zip(found, plain.search_many(queries, ks), strict=True):
            np.testing.assert_array_equal(ours.rows, theirs.rows)
    assert all(block._screen is not None for block in screened.blocks)


def test_narrow_rows_have_no_screen() -> None:
    """Padding to 64 bytes and three numbers of their own would be read instead."""
    assert not screening.worthwhile(1 << 20, 16)
    assert screening.worthwhile(1 << 20, 52)
    assert not screening.worthwhile(1 << 20, int8.WIDEST + 1)
    assert screening.bytes_of([1000, 1000], 16) == 0
    assert screening.bytes_of([1000, 1000], 64) == 2000 * (64 + 12)
