"""Does an attribution predict what retraining does? The statistics of a validation, and its verdict in words.

Pure numpy. An *outcome* is what a positive score says it raises: f_v(Q), or −L(Q) for influence functions. Every
standard error comes with the number of things it was taken over.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from service.rankings import average_ranks, student_95
from service.validation_records import Arm, CurvePoint, Difference, Finding, Lds, Outcome, Part, Verdict

F64 = NDArray[np.float64]

DRAWS = 2000  # of the bootstrap
SURE = 2.0  # standard errors of an LDS; those of the curves are of few seeds, and Student's t says how many
FEWEST = {"subsets": 10, "seeds": 3}  # below them a standard error says nothing
NEGLIGIBLE_LDS = 0.2
NEGLIGIBLE_SHARE = 0.1  # of what training on everything moved, where a quarter and more is removed
_QUARTER = 0.25  # of a smaller part so much less: removing a hundredth cannot undo a tenth
LOW_CEILING = 0.3
BY_SIZE = 0.1  # of rank correlation: so near to it, the number of examples says as much as the scores
THRESHOLDS: Mapping[str, float] = {
    "standard_errors": SURE,
    "fewest_subsets": FEWEST["subsets"],
    "fewest_seeds": FEWEST["seeds"],
    "negligible_lds": NEGLIGIBLE_LDS,
    "negligible_share_of_movement": NEGLIGIBLE_SHARE,
    "low_ceiling": LOW_CEILING,
    "as_much_by_size": BY_SIZE,
}


# --- rank correlation and its error -------------------------------------------------------------------


def correlation(a: F64, b: F64) -> float:
    """Spearman of (n,) and (n,), equal values sharing their mean rank; 0 when one side does not vary."""
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0


def partial_correlation(a: F64, b: F64, given: F64) -> float:
    """Spearman of ``a`` and ``b`` with the ranks of ``given`` held fixed; 0 where they decide one of both."""
    ab, ag, bg = correlation(a, b), correlation(a, given), correlation(b, given)
    scale = np.sqrt(max(0.0, (1 - ag**2) * (1 - bg**2)))
    return float(np.clip((ab - ag * bg) / scale, -1, 1)) if scale > 1e-9 else 0.0


def resampled(predicted: F64, actual: F64, sizes: F64, *, draws: int = DRAWS, seed: int = 0) -> F64:
    """(2, draws) Spearman of ``predicted`` and ``actual`` (n,), and what is left of it given ``sizes`` (n,): the n
    retrainings redrawn with replacement.
    """
    chosen = np.random.default_rng(seed).integers(0, len(actual), (draws, len(actual)))
    drawn = [(predicted[rows], actual[rows], sizes[rows]) for rows in chosen]
    return np.array([(correlation(p, a), partial_correlation(p, a, s)) for p, a, s in drawn]).T


def ceiling(actual: F64) -> float | None:
    """Spearman between two training seeds over the same subsets, (seeds, M), averaged over pairs: what is left to
    chance no score can predict. None with one seed.
    """
    pairs = [correlation(actual[i], actual[j]) for i, j in combinations(range(len(actual)), 2)]
    return float(np.mean(pairs)) if pairs else None


def linear_datamodeling_score(predicted: F64, actual: F64, sizes: F64) -> Lds:
    """LDS (Park et al. 2023, section 3). ``predicted`` and ``sizes`` (M,), ``actual`` (seeds, M)."""
    mean = actual.mean(axis=0)
    se, given_size_se = resampled(predicted, mean, sizes).std(axis=1).tolist()
    return Lds(
        value=correlation(predicted, mean),
        se=se,
        ceiling=ceiling(actual),
        by_size=correlation(sizes, mean),
        given_size=partial_correlation(predicted, mean, sizes),
        subsets=len(mean),
        seeds=len(actual),
        given_size_se=given_size_se,
    )


def told_by_size(found: Lds) -> bool:
    """Whether the number of examples in a subset predicts the outcome about as well as the scores do."""
    return abs(found.by_size) > max(abs(found.value) - BY_SIZE, BY_SIZE)


def lds(outcomes: Sequence[Outcome]) -> Lds | None:
    """That of the random subsets among the outcomes; None where there are fewer than two."""
    subsets: dict[int, list[Outcome]] = {}
    for each in outcomes:
        if each.arm == Arm.SUBSET:
            subsets.setdefault(each.number, []).append(each)
    if len(subsets) < 2:
        return None
    first = [group[0] for group in subsets.values()]
    actual = np.array([[each.outcome for each in group] for group in subsets.values()]).T
    return linear_datamodeling_score(
        np.array([each.predicted for each in first]), actual, np.array([float(each.kept) for each in first])
    )


# --- curves --------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for fewer than two values."""
    exact = np.asarray(values, dtype=np.float64)
    return float(exact.mean()), float(exact.std(ddof=1) / np.sqrt(len(exact))) if len(exact) > 1 else None


def curves(outcomes: Sequence[Outcome]) -> tuple[CurvePoint, ...]:
    """Every measure of every arm at every fraction, 0 among them, over the seeds."""
    found = []
    for (arm, fraction), group in _by_place(outcomes).items():
        for measure in _measures(outcomes):
            mean, se = mean_and_error([getattr(each, measure) for each in group.values()])
            found.append(CurvePoint(arm, fraction, measure, mean, se, len(group)))
    return tuple(found)


def differences(outcomes: Sequence[Outcome]) -> tuple[Difference, ...]:
    """``most`` and ``least`` against ``random`` at the same fraction, and all against the full run, by seed."""
    places = _by_place(outcomes)
    found = []
    for (arm, fraction), group in places.items():
        if arm == Arm.FULL:
            continue
        against = [(Arm.RANDOM, fraction)] if arm != Arm.RANDOM else []
        for other in [*against, (Arm.FULL, 0.0)]:
            shared = [seed for seed in group if seed in places.get(other, {})]
            for measure in _measures(outcomes) if shared else ():
                pairs = [getattr(group[s], measure) - getattr(places[other][s], measure) for s in shared]
                mean, se = mean_and_error(pairs)
                in_se = None if not se else mean / se
                found.append(Difference(arm, other[0], fraction, measure, mean, se, in_se, len(shared)))
    return tuple(found)


def _by_place(outcomes: Sequence[Outcome]) -> dict[tuple[Arm, float], dict[int, Outcome]]:
    """Outcomes of the curves by arm, fraction and seed; the full run stands at fraction 0."""
    found: dict[tuple[Arm, float], dict[int, Outcome]] = {}
    for each in outcomes:
        if each.arm in {Arm.FULL, Arm.MOST, Arm.LEAST, Arm.RANDOM}:
            found.setdefault((each.arm, each.fraction), {})[each.seed] = each
    return found


def _measures(outcomes: Sequence[Outcome]) -> list[str]:
    names = ["outcome", "f_v", "loss", "trait_rate"]
    return [name for name in names if all(getattr(each, name) is not None for each in outcomes)]


# --- the verdict ------------------------------------------------------------------------------------------


def verdict(found: Lds | None, different: Sequence[Difference], moved: float) -> Verdict:
    """What all of it says. ``moved``: how far training on everything moved the outcome from the base.

    A finding is that of the whole where all parts that tell anything agree, and they are half of those that had
    the data to: of many comparisons one tells something by chance.
    """
    judged = [_of_lds(found)] if found is not None else []
    judged += [
        _of_difference(each, moved)
        for each in different
        if each.measure == "outcome" and each.b == Arm.RANDOM and each.a in {Arm.MOST, Arm.LEAST}
    ]
    parts = [part for part, _ in judged]
    telling = [part.finding for part in parts if part.finding != Finding.TOO_NOISY]
    told, most = set(telling), 2 * len(telling) >= sum(enough for _, enough in judged)
    if told and told <= {Finding.PREDICTS} and most:
        overall = Finding.PREDICTS
    elif told & {Finding.PREDICTS, Finding.IN_PART}:
        overall = Finding.IN_PART
    elif not told or not most:
        overall = Finding.TOO_NOISY
    else:
        overall = told.pop() if len(told) == 1 else Finding.DOES_NOT
    said = {
        Finding.PREDICTS: "The attribution predicts what retraining does.",
        Finding.IN_PART: "The attribution predicts part of what retraining does.",
        Finding.DOES_NOT: "The attribution does not predict what retraining does.",
        Finding.OPPOSITE: "The attribution predicts the opposite of what retraining does: its ranking is turned "
        "round. Sum over the checkpoints of the run rather than evaluating at its end.",
        Finding.TOO_NOISY: "The retrainings are too noisy, or too few, to say: raise the budget (more seeds, more "
        "subsets), or remove more.",
    }
    return Verdict(overall, " ".join([said[overall], *(each.words for each in parts)]), tuple(parts), THRESHOLDS)


def _of_lds(found: Lds) -> tuple[Part, bool]:
    """The part, and whether there were subsets enough. Where the number of examples predicts as much, what is
    judged is what the scores say beside it: any scores, were they all equal, add up to the size of a subset.
    """
    about, value, se = "lds", found.value, found.se
    shown = f"LDS {value:+.2f} ± {se:.2f} over {found.subsets} subsets"
    if found.ceiling is not None:
        shown += f" (two seeds of one subset agree at {found.ceiling:+.2f})"
    if told_by_size(found):
        about, value, se = "lds_given_size", found.given_size, found.given_size_se
        shown += (
            f", of which the number of examples alone says {found.by_size:+.2f}, and the scores beside it "
            f"{value:+.2f} ± {se:.2f}"
        )
    low, high = value - SURE * se, value + SURE * se
    still = not (found.se or found.value or found.by_size)  # the outcome does not vary: nothing to predict
    few = still or found.subsets < FEWEST["subsets"]
    noisy = few or (found.ceiling is not None and found.ceiling < LOW_CEILING)
    finding = _finding(low, high, NEGLIGIBLE_LDS, few=few, noisy=noisy)
    return Part(about, finding, value, low, high, f"{shown}: {_words(finding)}."), not few


def _of_difference(each: Difference, moved: float) -> tuple[Part, bool]:
    """In the direction that a right ranking has: removing what pushes most lowers the outcome more than random.
    And whether there were seeds enough.
    """
    sign = -1.0 if each.a == Arm.MOST else 1.0
    value, se = sign * each.mean, each.se or 0.0
    few = each.n < FEWEST["seeds"] or not se
    half = student_95(each.n - 1) * se if each.n > 1 else 0.0
    low, high = value - half, value + half
    negligible = NEGLIGIBLE_SHARE * min(1.0, each.fraction / _QUARTER) * abs(moved)
    finding = _finding(low, high, negligible, few=few, noisy=few)
    verb = "lowers" if each.a == Arm.MOST else "raises"
    errors = "" if each.in_se is None else f", {sign * each.in_se:+.1f} standard errors"
    about = f"remove_{each.a}_{each.fraction:g}"
    words = (
        f"Removing the {each.fraction:.0%} that push {each.a} {verb} the outcome by {value:+.3g} against removing "
        f"as many at random ({each.n} paired seeds{errors}): {_words(finding)}."
    )
    return Part(about, finding, value, low, high, words), not few


def _finding(low: float, high: float, negligible: float, *, few: bool, noisy: bool) -> Finding:
    """An interval away from 0 tells, but not much where it is within ``negligible``; one that holds 0 and is within
    ``negligible`` tells as well, unless noise explains it.
    """
    if few:
        return Finding.TOO_NOISY
    if low > 0:
        return Finding.PREDICTS if high >= negligible else Finding.IN_PART
    if high < 0:
        return Finding.OPPOSITE
    return Finding.DOES_NOT if high < negligible and not noisy else Finding.TOO_NOISY


def _words(finding: Finding) -> str:
    return finding.value.replace("_", " ")
