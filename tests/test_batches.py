"""The plan of batches against every other plan there is."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from workers.batches import plan


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to put the items into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for place in range(len(groups)):
            yield [*groups[:place], [first, *groups[place]], *groups[place + 1 :]]


def padded(lengths: Sequence[int], group: Sequence[int]) -> int:
    return max(lengths[i] for i in group) * len(group)


def cost(lengths: Sequence[int], groups: Sequence[Sequence[int]], batch_cost: int) -> int:
    return sum(padded(lengths, group) + batch_cost for group in groups)


def allowed(lengths: Sequence[int], groups: Sequence[Sequence[int]], budget: int) -> bool:
    return all(len(group) == 1 or padded(lengths, group) <= budget for group in groups)


@pytest.mark.parametrize("batch_cost", [0, 3, 10, 1000])
@pytest.mark.parametrize("budget", [1, 12, 30, 10_000])
def test_no_grouping_within_the_budget_is_cheaper(budget, batch_cost):
    rng = np.random.default_rng(budget + batch_cost)
    for _ in range(6):
        lengths = rng.integers(1, 15, 7).tolist()
        found = plan(lengths, budget, batch_cost)
        best = min(
            cost(lengths, groups, batch_cost)
            for groups in partitions(range(len(lengths)))
            if allowed(lengths, groups, budget)
        )
        assert sorted(i for group in found for i in group) == list(range(len(lengths)))
        assert allowed(lengths, found, budget)
        assert cost(lengths, found, batch_cost) == best


def test_the_longest_run_first_so_that_memory_peaks_at_the_start():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 300).tolist()
    longest = [max(lengths[i] for i in group) for group in plan(lengths, 2048)]
    assert longest == sorted(longest, reverse=True)


def test_an_example_beyond_the_budget_runs_alone():
    assert plan([5, 100, 4], 10) == [[1], [0, 2]]


def test_equal_lengths_fill_the_budget():
    assert [len(group) for group in plan([8] * 10, 32)] in ([4, 4, 2], [4, 2, 4], [2, 4, 4])


def test_nothing_to_plan():
    assert plan([], 10) == []


def test_realistic_lengths_lose_little_to_padding():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(128), 0.6, 1000), 8, 512).astype(int).tolist()
    spent = cost(lengths, plan(lengths, 4096), 0)
    assert sum(lengths) / spent > 0.97
