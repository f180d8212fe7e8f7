"""Stored rows and the search over them, against float64 and a full sort."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from service import kernels
from service.batching import Batcher
from service.blocks import Block
from service.errors import Invalid
from service.rows import from_npy, pack, to_npy, unpack
from service.search import TopK, VectorIndex

THREADS = pytest.mark.parametrize("threads", [1, 2, 5])
property_test = settings(max_examples=200, deadline=None, derandomize=True)


def wide_rows(**limits) -> st.SearchStrategy[np.ndarray]:
    """Rows whose entries lie anywhere in float32, often with many zeros."""
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, **limits)
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8)
    return arrays(np.float32, shapes, elements=numbers, fill=st.just(np.float32(0)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- rows -------------------------------------------------------------------------------------------


@property_test
@given(rows=wide_rows(min_value=-(2.0**127), max_value=2.0**127))
def test_a_stored_row_is_right_to_float16_precision(rows):
    found = unpack(*pack(rows)).astype(np.float64)
    exact = rows.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    close = np.abs(exact) >= 2.0**-21 * largest
    error = np.abs(found - exact)
    assert np.isfinite(found).all()
    assert (error[close] <= 2.0**-11 * np.abs(exact[close])).all()
    assert (error <= 2.0**-32 * largest)[~close].all()  # tiny beside the row's largest: tiny errors
    assert (found * exact >= 0).all()  # no sign changes


@property_test
@given(rows=wide_rows())
def test_exponents_are_multiples_of_eight_and_leave_headroom(rows):
    packed, exponents = pack(rows)
    assert packed.dtype == np.float16
    assert exponents.dtype == np.int16
    assert not (exponents % 8).any()
    assert (np.abs(packed) <= 2.0**15).all()


@property_test
@given(rows=wide_rows(min_value=-(2.0**100), max_value=2.0**100), power=st.integers(-3, 3))
def test_a_power_of_two_moves_into_the_exponent(rows, power):
    rows[np.abs(rows) < 2.0**-80] = 0
    scaled, exponents = pack(np.ldexp(rows, 8 * power))
    packed, before = pack(rows)
    np.testing.assert_array_equal(scaled, packed)
    assert (exponents - before == 8 * power)[rows.any(axis=1)].all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e38])
def test_rows_of_any_size_keep_their_precision(size):
    rows = (normal(0, 50, 32) * np.float64(size) / 8).astype(np.float32)
    found = unpack(*pack(rows))
    assert (np.abs(found - rows) <= 2.0**-11 * np.abs(rows).max(axis=1, keepdims=True)).all()
    assert (found != 0).any()


def test_rows_of_all_sizes_lie_side_by_side():
    sizes = 10.0 ** np.arange(-40, 38, 2)
    rows = (normal(0, len(sizes), 16) * sizes[:, None] / 8).astype(np.float32)
    np.testing.assert_allclose(unpack(*pack(rows))[5:], rows[5:], rtol=2**-10, atol=0)


def test_the_largest_float32_stays_finite():
    rows = np.float32([[np.finfo(np.float32).max, 1]])
    assert np.isfinite(unpack(*pack(rows))).all()


def test_zero_rows_stay_zero():
    rows = np.float32([[0, 0], [1e30, 0], [-0.0, 0]])
    packed, exponents = pack(rows)
    assert exponents.tolist()[::2] == [0, 0]
    np.testing.assert_allclose(unpack(packed, exponents), rows, rtol=2**-11)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_rows_or_no_columns(shape):
    assert unpack(*pack(np.zeros(shape, np.float32))).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(Invalid) as refused:
        pack(np.float32([[1, 2], [3, bad]]))
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize("array", [normal(0, 3, 4), pack(normal(0, 3, 4))[0], normal(0, 6, 4)[::2].T])
def test_npy_bytes_hold_the_array(array):
    found = from_npy(to_npy(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_pickle_in_an_npy_file_is_not_opened(tmp_path):
    path = tmp_path / "objects.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        from_npy(path.read_bytes())


# --- search -----------------------------------------------------------------------------------------


def index_of(rows: np.ndarray, threads: int = 2) -> VectorIndex:
    return VectorIndex(*pack(rows), threads=threads)


def check(found: TopK, rows: np.ndarray, query: np.ndarray, k: int, precision: float = 2.0**-10) -> None:
    """``found`` is the top k of float64 scores, but for rows that rounding cannot tell apart."""
    exact = rows.astype(np.float64) @ query.astype(np.float64)
    # float16 rounding moves a score by at most this, float32 summation by less.
    slack = precision * (np.abs(rows.astype(np.float64)) @ np.abs(query.astype(np.float64)))
    k = min(k, len(rows))
    assert found.rows.shape == found.scores.shape == (k,)
    assert len(set(found.rows.tolist())) == k
    assert (np.abs(found.scores - exact[found.rows]) <= slack[found.rows]).all()
    assert (np.diff(found.scores) <= 0).all()
    left_out = np.setdiff1d(np.arange(len(rows)), found.rows)
    if k and len(left_out):
        worst = found.rows[np.argmin(exact[found.rows] + slack[found.rows])]
        assert (exact[worst] + slack[worst] >= exact[left_out] - slack[left_out]).all()


def recall(found: TopK, rows: np.ndarray, query: np.ndarray) -> float:
    best = np.argsort(-(rows.astype(np.float64) @ query), kind="stable")[: len(found.rows)]
    return len(set(best.tolist()) & set(found.rows.tolist())) / len(found.rows)


@THREADS
@pytest.mark.parametrize("k", [1, 10, 100])
def test_search_finds_the_true_best(threads, k):
    rows = normal(0, 3000, 48)
    stored = unpack(*pack(rows))
    index, found = index_of(rows, threads), []
    for seed in range(20):
        query = normal(100 + seed, 48)
        top = index.search(query, k)
        check(top, rows, query, k)
        found.append(recall(top, stored, query))
    assert np.mean(found) >= 0.999


@THREADS
def test_row_sizes_of_many_orders_of_magnitude(threads):
    """Gradients are lognormal: a score is right relative to the best, however small its row."""
    rows = (normal(0, 2000, 32) * np.exp(3 * normal(1, 2000, 1))).astype(np.float32)
    index = index_of(rows, threads)
    stored = unpack(*pack(rows))
    found = []
    for seed in range(10):
        query = normal(10 + seed, 32)
        check(index.search(query, 100), rows, query, 100)
        found.append(recall(index.search(query, 100), stored, query))
    assert np.mean(found) >= 0.999


@THREADS
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_few_rows_many_threads_and_k_beyond_the_rows(n, k, threads):
    rows, query = normal(n, n, 8), normal(9, 8)
    check(index_of(rows, threads).search(query, k), rows, query, k)


def test_the_number_of_threads_does_not_change_the_answer():
    rows, query = normal(0, 501, 16), normal(1, 16)
    one, two, five = (index_of(rows, threads).search(query, 40) for threads in (1, 2, 5))
    assert one.rows.tolist() == two.rows.tolist() == five.rows.tolist()
    np.testing.assert_array_equal(one.scores, two.scores)
    np.testing.assert_array_equal(one.scores, five.scores)


@THREADS
def test_the_negative_query_turns_the_ranking_round(threads):
    rows, query = normal(0, 300, 16), normal(1, 16)
    index = index_of(rows, threads)
    most, least = index.search(query, 300), index.search(-query, 300)
    check(least, rows, -query, 300)
    np.testing.assert_array_equal(most.scores, -least.scores[::-1])


@THREADS
@pytest.mark.parametrize("place", [0, 250, 499])
@pytest.mark.parametrize("size", [1e20, 1e6, 1e4])
def test_one_huge_row_does_not_crush_the_others(threads, place, size):
    rows, query = normal(0, 500, 16), normal(1, 16)
    rows[place] *= np.float32(size)
    index = index_of(rows, threads)
    for sign in (1, -1):
        for k in (1, 10, 500):
            check(index.search(sign * query, k), rows, sign * query, k)


@pytest.mark.parametrize("outliers", [1, 3])
def test_huge_rows_that_score_worst_take_no_place_among_the_best(outliers):
    """Set aside as zeros, they would beat rows whose scores are all negative."""
    rows, query = -np.abs(normal(0, 100, 16)), np.abs(normal(1, 16))
    rows[:outliers] *= np.float32(1e9)
    check(index_of(rows).search(query, 20), rows, query, 20)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_two_sizes_of_rows_in_any_mixture(share):
    rows, query = normal(0, 400, 16), normal(1, 16)
    rows[: int(400 * share)] *= np.float32(1e8)
    index = index_of(rows)
    for k in (5, 100):
        check(index.search(query, k), rows, query, k)


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("zeros", [1, 200, 390])
def test_zero_rows_do_not_set_the_scale(zeros, size):
    rows, query = normal(0, 400, 16) * np.float32(size), normal(1, 16)
    rows[400 - zeros :] = 0
    top = index_of(rows).search(query, 5)
    check(top, rows, query, 5)
    assert top.scores[0] > 0


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_the_size_of_the_query_only_scales_the_scores(size):
    rows, query = normal(0, 400, 16), normal(1, 16) * np.float32(size)
    check(index_of(rows).search(query, 20), rows, query, 20)


def test_a_zero_query_scores_zero_everywhere():
    top = index_of(normal(0, 50, 8)).search(np.zeros(8, np.float32), 10)
    assert top.scores.tolist() == [0] * 10
    assert len(set(top.rows.tolist())) == 10


def test_queries_of_another_dtype_are_taken_as_they_are():
    rows, query = normal(0, 50, 8), normal(1, 8).astype(np.float64)
    check(index_of(rows).search(query, 10), rows, query, 10)


@pytest.mark.parametrize("query", [np.full(8, np.nan), np.full(8, np.inf), np.ones(7), np.ones((1, 8)), np.ones(0)])
def test_a_bad_query_is_refused(query):
    with pytest.raises(Invalid) as refused:
        index_of(normal(0, 50, 8)).search(query.astype(np.float32), 10)
    assert refused.value.code == "bad_query_vector"


@THREADS
def test_an_index_without_rows_finds_nothing(threads):
    top = index_of(np.zeros((0, 8), np.float32), threads).search(normal(0, 8), 10)
    assert (top.rows.shape, top.scores.shape) == ((0,), (0,))


@pytest.mark.parametrize("size", [1.0, 1e20])
def test_the_arrays_an_index_is_built_from_are_left_alone(size):
    rows = normal(0, 60, 8)
    rows[:20] *= np.float32(size)
    packed, exponents = pack(rows)
    packed.flags.writeable = exponents.flags.writeable = False  # as a memory map is
    index = VectorIndex(packed, exponents, threads=2)
    check(index.search(normal(1, 8), 5), rows, normal(1, 8), 5)


def test_an_index_outlives_the_arrays_it_was_built_from():
    packed, exponents = pack(normal(0, 60, 8))
    index = VectorIndex(packed, exponents, threads=2)
    packed[:] = 0
    check(index.search(normal(1, 8), 5), normal(0, 60, 8), normal(1, 8), 5)


def test_many_searches_at_once_give_what_one_gives():
    rows = normal(0, 2000, 16)
    rows[7] *= 1e9
    index, queries = index_of(rows), normal(1, 40, 16)
    expected = [index.search(query, 20) for query in queries]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda query: index.search(query, 20), queries))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.scores, theirs.scores)


# --- several blocks, several queries, masks, all scores ------------------------------------------------


@pytest.fixture(params=[1, 3, 7])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a block: every answer must be the same however rows are spread."""
    monkeypatch.setattr("service.blocks.BLOCK_BYTES", request.param * 2 * 16 * 100)
    return request.param * 100


def uneven(n: int = 1000, d: int = 16) -> np.ndarray:
    """Rows of very different sizes, and two that are far above all others."""
    rows = normal(0, n, d) * np.exp(2 * normal(1, n, 1))
    rows[[5, n - 3]] *= np.float32(1e9)
    return rows.astype(np.float32)


def test_rows_in_blocks_are_ranked_as_in_one(blocks: int) -> None:
    rows, query = uneven(), normal(2, 16)
    index = index_of(rows)
    assert len(index.blocks) == -(-1000 // min(blocks, 500))
    check(index.search(query, 200), rows, query, 200)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_several_queries_at_once_give_what_each_gives_alone(blocks: int, count: int) -> None:
    index, queries = index_of(uneven()), normal(3, count, 16)
    ks = [1, 10, 999, 1000, 5000, 7, 3, 2, 50][:count]
    keep = np.random.default_rng(4).random((count, 1000)) < 0.3
    masks = [None if number % 2 else keep[number] for number in range(count)]
    for found, query, k, mask in zip(index.search_many(queries, ks, masks), queries, ks, masks, strict=True):
        alone = index.search(query, k, mask)
        np.testing.assert_array_equal(found.rows, alone.rows)
        np.testing.assert_array_equal(found.scores, alone.scores)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_a_mask_leaves_the_best_of_what_it_allows(blocks: int, share: float, k: int) -> None:
    rows, query = uneven(), normal(2, 16)
    mask = np.random.default_rng(5).random(1000) < share
    mask[5] = share == 0.5  # one of the huge rows
    found = index_of(rows).search(query, k, mask)
    assert mask[found.rows].all()
    assert len(found.rows) == min(k, mask.sum())
    if mask.any():
        place = np.flatnonzero(mask)
        check(TopK(np.searchsorted(place, found.rows), found.scores), rows[place], query, k)


def test_the_scores_of_all_rows_are_those_of_float64(blocks: int) -> None:
    rows, query = uneven(), normal(2, 16)
    stored = unpack(*pack(rows)).astype(np.float64)
    exact = stored @ query
    slack = 1e-6 * (np.abs(stored) @ np.abs(query)) + 2.0**-10 * np.abs(rows).max(axis=1) * np.abs(query).sum()
    assert (np.abs(index_of(rows).scores(query) - exact) <= slack).all()


def test_rows_come_back_as_they_were_stored(blocks: int) -> None:
    rows = uneven()
    index = index_of(rows)
    wanted = np.array([999, 5, 0, 5, 997, 300])
    np.testing.assert_allclose(index.take(wanted), unpack(*pack(rows))[wanted], rtol=2.0**-9, atol=1e-5)


def test_an_excerpt_scores_its_rows_as_the_whole_does(blocks: int) -> None:
    index, query = index_of(uneven()), normal(2, 16)
    some = np.array([0, 5, 6, 250, 700, 997])
    np.testing.assert_allclose(index.excerpt(some).scores(query), index.scores(query)[some], rtol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 255, 256, 257, 1023])
@pytest.mark.parametrize("count", [1, 3, 4, 8])
@pytest.mark.parametrize("d", [1, 15, 64])
def test_kernels_multiply_like_float64(n: int, count: int, d: int) -> None:
    rows, queries = normal(n, n, d).astype(np.float16), normal(9, count, d)
    exact = queries.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(kernels.many_dots(rows, queries), exact, atol=1e-5 * d)
    np.testing.assert_allclose(kernels.dots(rows, queries[0]), exact[0], atol=1e-5 * d)
    some = np.arange(n)[::-2]
    found = kernels.some_dots(rows, some, queries[0].astype(np.float64))
    np.testing.assert_allclose(found, exact[0][some], rtol=0, atol=1e-13 * d)


def test_an_error_in_any_block_reaches_who_asks_and_harms_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever thread takes the block: the one that asks, or one that helps it."""
    monkeypatch.setattr("service.blocks.BLOCK_BYTES", 2 * 8 * 100)
    index = VectorIndex(*pack(normal(1, 1_000, 8)), threads=3)
    query = normal(2, 8)
    alone = index.search(query, 5)
    scores = Block.scores

    for bad in index.blocks:

        def fail(block: Block, query: np.ndarray, bad: Block = bad) -> np.ndarray:
            if block is bad:
                raise OSError("this block")
            return scores(block, query)

        with monkeypatch.context() as patched:
            patched.setattr(Block, "scores", fail)
            with pytest.raises(OSError, match="this block"):
                index.scores(query)
        np.testing.assert_array_equal(index.search(query, 5).rows, alone.rows)


def test_kernels_know_every_float16() -> None:
    """Subnormal numbers, zeros of both signs, the largest and infinity."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)]
    found = kernels.dots(every[:, None].copy(), np.ones(1, np.float32))
    np.testing.assert_array_equal(found, every.astype(np.float32))


# --- batches ------------------------------------------------------------------------------------------


def test_queries_that_come_together_are_answered_as_alone() -> None:
    index, queries = index_of(uneven()), normal(3, 200, 16)
    expected = [index.search(query, 20) for query in queries]
    batcher = Batcher(index)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda query: batcher.search(query, 20), queries))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_one_bad_query_fails_alone() -> None:
    index = index_of(normal(0, 500, 16))
    batcher, bad = Batcher(index), np.full(16, np.nan, np.float32)

    def ask(number: int) -> str:
        try:
            return str(len(batcher.search(bad if number % 5 == 0 else normal(number, 16), 3).rows))
        except Invalid as error:
            return error.code

    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(ask, range(100)))
    assert found == ["bad_query_vector" if number % 5 == 0 else "3" for number in range(100)]


def test_queries_that_wait_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(normal(0, 500, 16))
    batcher, began, go, passes = Batcher(index), threading.Event(), threading.Event(), []
    search = index.search_many

    def slowly(queries, ks, masks):
        passes.append(len(queries))
        began.set()
        assert go.wait(10)
        return search(queries, ks, masks)

    monkeypatch.setattr(index, "search_many", slowly)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(batcher.search, normal(0, 16), 3)
        assert began.wait(10)
        others = [threads.submit(batcher.search, normal(number, 16), 3) for number in range(1, 9)]
        while len(batcher._waiting) < 8:
            time.sleep(0.001)
        go.set()
        for future in (first, *others):
            assert len(future.result(10).rows) == 3
    assert passes == [1, 8]
