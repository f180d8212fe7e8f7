"""What a validation says of its retrainings, against brute force; what it plans, against its budget."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from service.errors import Invalid
from service.retrainings import group_dropout, plan, planned, random_groups, removal_order, units, without
from service.validation_records import Arm, Budget, Design, Difference, Finding, Lds, Outcome
from service.validations import curves, differences, lds, partial_correlation, verdict

IDS = [f"{number:064x}" for number in np.random.default_rng(0).permutation(60)]
SCORES = np.round(np.random.default_rng(1).standard_normal(60), 1)  # with ties
GROUPS = np.arange(60) % 15


def outcome(arm: Arm, seed: int, value: float, **about) -> Outcome:
    fields = {"fraction": 0.25, "number": 0, "kept": 45, "predicted": 0.0, "f_v": value, "trait_rate": None}
    return Outcome(arm=arm, seed=seed, outcome=value, loss=value / 2, run="", **fields | about)


# --- LDS --------------------------------------------------------------------------------------------------


def test_the_lds_is_spearman_of_predictions_and_mean_outcomes_with_a_bootstrap_over_subsets():
    rng = np.random.default_rng(3)
    predicted = np.round(rng.standard_normal(30), 1)
    actual = predicted + rng.standard_normal((3, 30))
    sizes = rng.integers(10, 40, 30)
    runs = [
        outcome(Arm.SUBSET, seed, actual[seed, n], number=n, predicted=predicted[n], kept=int(sizes[n]))
        for seed in range(3)
        for n in range(30)
    ]
    found = lds([*runs, outcome(Arm.FULL, 0, 9.0)])
    mean = actual.mean(axis=0)
    assert found.value == pytest.approx(spearmanr(predicted, mean).statistic)
    assert found.by_size == pytest.approx(spearmanr(sizes, mean).statistic)
    pairs = [spearmanr(actual[i], actual[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.ceiling == pytest.approx(np.mean(pairs))
    again = np.random.default_rng(99)
    rows = [again.integers(0, 30, 30) for _ in range(2000)]
    se = np.std([spearmanr(predicted[row], mean[row]).statistic for row in rows])
    assert found.se == pytest.approx(se, rel=0.1)  # two independent bootstraps
    assert (found.subsets, found.seeds) == (30, 3)
    left = [partial_correlation(predicted[row], mean[row], sizes[row].astype(float)) for row in rows]
    assert found.given_size_se == pytest.approx(np.std(left), rel=0.1)
    assert lds(runs[:1]) is None
    assert lds([run for run in runs if run.seed == 0]).ceiling is None


def test_what_is_left_among_subsets_of_one_size_is_the_partial_rank_correlation():
    rng = np.random.default_rng(4)
    size = rng.standard_normal(200)
    a, b = size + 0.3 * rng.standard_normal(200), size + 0.3 * rng.standard_normal(200)
    ranks = [np.argsort(np.argsort(each)).astype(float) for each in (a, b, size)]
    fits = [np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    left = np.corrcoef(ranks[0] - fits[0], ranks[1] - fits[1])[0, 1]
    assert partial_correlation(a, b, size) == pytest.approx(left, abs=1e-9)
    assert partial_correlation(a, size, size) == 0


# --- curves -----------------------------------------------------------------------------------------------


def test_curves_and_paired_differences_are_means_with_errors_over_seeds():
    rng = np.random.default_rng(5)
    full, most, random = rng.standard_normal((3, 6))
    runs = [outcome(Arm.FULL, s, full[s], fraction=0.0) for s in range(6)]
    runs += [outcome(Arm.MOST, s, most[s]) for s in range(6)]
    runs += [outcome(Arm.RANDOM, s, random[s]) for s in range(1, 6)]  # one has no twin
    by_place = {(each.arm, each.fraction, each.measure): each for each in curves(runs)}
    at = by_place[Arm.MOST, 0.25, "loss"]
    assert (at.mean, at.n) == (pytest.approx(most.mean() / 2), 6)
    assert at.se == pytest.approx(most.std(ddof=1) / 2 / np.sqrt(6))
    assert not any(each.measure == "trait_rate" for each in curves(runs))
    pairs = {(each.a, each.b, each.measure): each for each in differences(runs)}
    apart = (most - random)[1:]
    found = pairs[Arm.MOST, Arm.RANDOM, "f_v"]
    assert (found.mean, found.n) == (pytest.approx(apart.mean()), 5)
    assert found.in_se == pytest.approx(apart.mean() / (apart.std(ddof=1) / np.sqrt(5)))
    assert pairs[Arm.MOST, Arm.FULL, "outcome"].mean == pytest.approx((most - full).mean())
    assert (Arm.RANDOM, Arm.RANDOM, "f_v") not in pairs


# --- the verdict ------------------------------------------------------------------------------------------

GOOD = Lds(0.6, 0.1, 0.8, 0.1, 0.6, 40, 2)
SIZE = Lds(0.6, 0.1, 0.8, 0.6, 0.0, 40, 2, 0.05)
LOWER = Difference(Arm.MOST, Arm.RANDOM, 0.25, "outcome", -0.4, 0.1, -4.0, 5)


@pytest.mark.parametrize(
    ("found", "different", "finding"),
    [
        (GOOD, [LOWER], Finding.PREDICTS),
        (replace(GOOD, value=-0.6), [], Finding.OPPOSITE),
        (replace(GOOD, value=-0.05), [], Finding.DOES_NOT),
        (replace(GOOD, value=0.15), [], Finding.TOO_NOISY),  # .15 ± .2 holds both 0 and what is worth having
        (replace(GOOD, value=-0.05, ceiling=0.1), [], Finding.TOO_NOISY),  # nothing could have predicted this
        (replace(GOOD, subsets=9), [], Finding.TOO_NOISY),
        (replace(GOOD, value=0.1, se=0.03), [], Finding.IN_PART),  # surely something, and surely little
        (Lds(0, 0, None, 0, 0, 40, 1), [], Finding.TOO_NOISY),  # no outcome varies
        (SIZE, [], Finding.DOES_NOT),  # whatever is added up grows with the number of examples
        (replace(SIZE, given_size=0.5, given_size_se=0.1), [], Finding.PREDICTS),
        (None, [LOWER], Finding.PREDICTS),
        (None, [replace(LOWER, a=Arm.LEAST)], Finding.OPPOSITE),
        (None, [replace(LOWER, a=Arm.LEAST, mean=0.4)], Finding.PREDICTS),
        (None, [replace(LOWER, mean=0.0, se=0.01)], Finding.DOES_NOT),  # below a tenth of what training moved
        (None, [replace(LOWER, mean=0.0, se=0.1)], Finding.TOO_NOISY),
        (None, [replace(LOWER, mean=-0.25, in_se=-2.5)], Finding.TOO_NOISY),  # 2.8 errors of five seeds are sure
        (None, [replace(LOWER, fraction=0.01, mean=0.0, se=0.01)], Finding.TOO_NOISY),  # no hundredth can do it
        (GOOD, [replace(LOWER, mean=-0.1, se=0.1)] * 2, Finding.IN_PART),  # one of three
        (replace(GOOD, value=-0.6), [replace(LOWER, mean=-0.1, se=0.1)] * 2, Finding.TOO_NOISY),
        (None, [replace(LOWER, n=2)], Finding.TOO_NOISY),
        (None, [replace(LOWER, se=None, n=1)], Finding.TOO_NOISY),
        (None, [replace(LOWER, b=Arm.FULL)], Finding.TOO_NOISY),  # fewer examples: no comparison with random
        (GOOD, [replace(LOWER, mean=0.0, se=0.01)], Finding.IN_PART),
        (GOOD, [replace(LOWER, n=2)], Finding.PREDICTS),
        (replace(GOOD, value=-0.6), [replace(LOWER, mean=0.0, se=0.01)], Finding.DOES_NOT),
    ],
)
def test_the_verdict_names_what_is_told(found, different, finding):
    said = verdict(found, different, 1.0)
    assert said.finding == finding
    assert said.thresholds["standard_errors"] == 2
    for part in said.parts:
        assert part.words in said.words


# --- which examples ---------------------------------------------------------------------------------------


def test_the_highest_and_the_lowest_are_removed_and_random_ones_are_nested():
    count = 15
    order = sorted(range(60), key=lambda row: (-SCORES[row], IDS[row]))
    assert set(np.flatnonzero(~without(removal_order(SCORES, IDS, Arm.MOST, 0), 0.25))) == set(order[:count])
    order = sorted(range(60), key=lambda row: (SCORES[row], IDS[row]))
    assert set(np.flatnonzero(~without(removal_order(SCORES, IDS, Arm.LEAST, 0), 0.25))) == set(order[:count])
    few, more = (without(removal_order(SCORES, IDS, Arm.RANDOM, 7), share) for share in (0.25, 0.5))
    assert (few.sum(), more.sum()) == (45, 30)
    assert not (more & ~few).any()
    assert (few != without(removal_order(SCORES, IDS, Arm.RANDOM, 8), 0.25)).any()
    turned = np.arange(60)[::-1]
    same = without(removal_order(SCORES[turned], [IDS[row] for row in turned], Arm.RANDOM, 7), 0.25)
    assert (same[turned] == few).all()  # by the ids, wherever they stand


def test_groups_stay_whole_and_random_ones_have_their_size():
    design = Design(subsets=12, seeds=0)
    for unit in units(design, IDS, SCORES, GROUPS).subsets:
        kept = unit[0].kept
        assert all(len(set(kept[group == GROUPS])) == 1 for group in range(15))
        assert [run.seed for run in unit] == [0, 1]
        assert (unit[1].kept == kept).all()
    assert sorted(np.bincount(random_groups(IDS, 7, 0))) == [4, *[7] * 8]
    assert (np.bincount(random_groups(IDS, None, 0)) == 2).all()
    three = group_dropout(GROUPS.tolist(), 20, seed=1, keep=0.8).mean()
    assert 0.7 < three < 0.9


def test_a_design_that_cannot_be_drawn_is_refused_by_field():
    for design, param in (
        (Design(fractions=(0.25, 0.001)), "design.fractions[1]"),
        (Design(subsets=40, group_size=30), "design.group_size"),
        (Design(subsets=10**4), "design.group_by"),
        (Design(seeds=10**7), "design"),
    ):
        groups = GROUPS % 3 if param.endswith("group_by") else None
        with pytest.raises(Invalid) as caught:
            units(design, IDS, SCORES, groups)
        assert caught.value.param == param


# --- how many of them -------------------------------------------------------------------------------------

COSTS = {"train_s": 10.0, "measure_s": 1.0, "workers": 2}
ALL = units(Design(subsets=20, fractions=(0.25, 0.5), seeds=10), IDS, SCORES, GROUPS)


def test_without_a_tight_budget_everything_is_planned():
    decided = plan(ALL, Budget(runs=1000), **COSTS)
    assert decided.runs == decided.wanted == 2 + 9 * 7 + 6 + 40
    assert (decided.seeds, decided.subsets, decided.cut, decided.run_s) == (10, 20, (), 11.0)
    runs = planned(ALL, decided)
    assert len(runs) == decided.runs
    assert decided.estimate_s == pytest.approx(sum(10 * run.kept.mean() + 1 for run in runs) / 2, abs=0.1)


@settings(max_examples=60, deadline=None)
@given(runs=st.integers(2, 120), minutes=st.floats(0.1, 20), known=st.integers(0, 3))
def test_a_plan_keeps_to_its_budget_and_its_pairs(runs, minutes, known):
    def there(run):
        return known > 0 and run.seed % 4 < known

    decided = plan(ALL, Budget(runs, minutes), there=there, **COSTS)
    chosen = planned(ALL, decided)
    seconds = sum(0 if there(run) else 10 * run.kept.mean() + 1 for run in chosen[2:])
    assert len(chosen) == decided.runs <= runs
    first = sum(0 if there(run) else 10 * run.kept.mean() + 1 for run in chosen[:2])
    assert decided.runs == 2 or first + seconds <= 120 * minutes + 1e-6
    for arm in (Arm.MOST, Arm.LEAST, Arm.RANDOM):
        assert sum(run.arm == arm for run in chosen) == 2 * decided.seeds
    assert sum(run.arm == Arm.SUBSET for run in chosen) == 2 * decided.subsets
    assert abs(decided.seeds / 10 - decided.subsets / 20) <= 0.1 + 1e-9  # both kinds are cut alike
    assert len(decided.cut) == (decided.seeds < 10) + (decided.subsets < 20)
