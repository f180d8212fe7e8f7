"""Which retrainings show whether scores predict anything, and how many of them a budget allows. Pure numpy.

Two designs. *Subsets*: groups of examples are dropped whole, at random, and the sum of the scores of what is kept
is the prediction. *Curves*: those that score most, least, or any are removed, at several fractions, under paired
seeds.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from service import codec
from service.errors import Invalid
from service.tasks import identity
from service.training import ReadAnswersWork, RetrainWork
from service.validation_records import Arm, Budget, Design, Plan
from service.work import FORMAT

Bools = NDArray[np.bool_]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GROUPS = 40  # random groups, where their size is not given
_TRIES = 100  # draws per subset that is wanted
_LARGEST = 1 << 30  # examples in all subsets and removals together, a byte each


@dataclass(frozen=True)
class Run:
    """One retraining. ``kept`` (n,): what it trains on; ``number`` tells the subsets apart."""

    arm: Arm
    seed: int
    fraction: float
    kept: Bools
    number: int = 0

    @property
    def share(self) -> float:
        return float(self.kept.mean())


Unit = tuple[Run, ...]  # runs that mean something only together


@dataclass(frozen=True)
class Units:
    """``first``: the runs that come before all others; one curve's unit per seed, one per subset."""

    first: Unit
    curves: tuple[Unit, ...]
    subsets: tuple[Unit, ...]


# --- which examples ---------------------------------------------------------------------------------------


def group_dropout(groups: Sequence[str], count: int, *, seed: int, keep: float = 0.5) -> Bools:
    """``count`` different subsets (M, n) of n examples; every group is in a subset with probability ``keep``.

    Dropping single examples at random would leave every subset with the same mixture, and what is left of the
    outcome would be the training seed's noise; whole groups move it. Each subset holds a share of ``keep`` ± half
    of what is smaller, ``keep`` or its rest (at .5 a quarter to three quarters), so that training lengths stay
    comparable. The first subsets are the same for every ``count``. Raises ValueError when there are too few groups
    for that many subsets.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(number, minlength=len(names))
    rng = np.random.default_rng([seed, 0x5B5E])
    most = min(keep / 2, (1 - keep) / 2)
    found: dict[bytes, Bools] = {}
    for _ in range(_TRIES * count if count <= 2 ** min(len(names), 30) else 0):
        if len(found) == count:
            break
        kept = rng.random(len(names)) < keep
        if keep - most <= sizes[kept].sum() / len(number) <= keep + most:
            found.setdefault(kept.tobytes(), kept)
    if len(found) < count:
        raise ValueError(f"{count} different subsets wanted, {len(names)} groups give fewer")
    return np.stack([kept[number] for kept in found.values()]) if found else np.zeros((0, len(number)), dtype=bool)


def random_groups(ids: Sequence[str], size: int | None, seed: int) -> I64:
    """(n,) the number of each example's group, of ``size`` examples, by an order that depends on the ids alone."""
    size = size or max(1, -(-len(ids) // GROUPS))
    place = np.empty(len(ids), dtype=np.int64)
    place[shuffled(ids, f"{seed}:groups")] = np.arange(len(ids))
    return place // size


def removal_order(scores: F64, ids: Sequence[str], arm: Arm, seed: int) -> I64:
    """(n,) in which examples are removed; of equal scores the lower id goes first."""
    match arm:
        case Arm.MOST:
            return np.lexsort((np.asarray(ids), -scores))
        case Arm.LEAST:
            return np.lexsort((np.asarray(ids), scores))
        case _:
            return shuffled(ids, f"{seed}:random")


def without(order: I64, fraction: float) -> Bools:
    """(n,) what is left when the first ``fraction`` of ``order`` is gone."""
    kept = np.ones(len(order), dtype=bool)
    kept[order[: round(fraction * len(order))]] = False
    return kept


def shuffled(ids: Sequence[str], salt: str) -> I64:
    """All positions in an order that depends on salt and ids alone, not on where they stand."""
    keys = [hashlib.sha256(f"{salt}:{each}".encode()).digest() for each in ids]
    return np.array(sorted(range(len(ids)), key=lambda row: keys[row]), dtype=np.int64)


def drawn(design: Design, ids: Sequence[str], groups: Sequence[int] | I64 | None) -> Bools:
    """(M, n) what the subsets hold; ``groups`` (n,) of the metadata field, None: random ones.

    Raises Invalid where there are too few groups or examples for the design, or too many, naming the field.
    """
    removals = design.seeds * len(design.fractions)
    if (design.subsets + 3 * removals) * len(ids) > _LARGEST:
        detail = (
            f"{design.subsets:,} subsets and {3 * removals:,} removals of {len(ids):,} examples are more than can "
            "be planned: ask for fewer subsets, seeds or fractions."
        )
        raise Invalid("design_too_large", detail, param="design")
    for number, fraction in enumerate(design.fractions if design.seeds else ()):
        if not 0 < round(fraction * len(ids)) < len(ids):
            detail = f"Of {len(ids)} examples a fraction of {fraction:g} removes none, or leaves none."
            raise Invalid("bad_fraction", detail, param=f"design.fractions[{number}]")
    chosen = random_groups(ids, design.group_size, design.seed) if groups is None else np.asarray(groups)
    try:
        return group_dropout(chosen.tolist(), design.subsets, seed=design.seed, keep=design.keep)
    except ValueError as error:
        field = "group_by" if groups is not None else "group_size"
        detail = f"{str(error).capitalize()}, of comparable size: ask for fewer subsets, or for smaller groups."
        raise Invalid("too_few_groups", detail, param=f"design.{field}") from error


def units(design: Design, ids: Sequence[str], scores: F64, groups: Sequence[int] | I64 | None) -> Units:
    """Every run of the design. Raises as ``drawn``."""
    whole, none = np.ones(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    subsets = drawn(design, ids, groups)
    fixed = {arm: removal_order(scores, ids, arm, 0) for arm in (Arm.MOST, Arm.LEAST)} if design.seeds else {}

    def removals(seed: int) -> Iterator[Run]:
        orders = fixed | {Arm.RANDOM: removal_order(scores, ids, Arm.RANDOM, seed)}
        for fraction in design.fractions:
            for arm, order in orders.items():
                yield Run(arm, seed, fraction, without(order, fraction))

    return Units(
        first=(Run(Arm.FULL, design.seed, 0.0, whole), Run(Arm.BASE, design.seed, 1.0, none)),
        curves=tuple(
            (
                *((Run(Arm.FULL, seed, 0.0, whole),) if seed != design.seed else ()),
                *removals(seed),
            )
            for seed in range(design.seed, design.seed + design.seeds)
        ),
        subsets=tuple(
            tuple(
                Run(Arm.SUBSET, design.seed + each, 1 - float(kept.mean()), kept, number)
                for each in range(design.subset_seeds)
            )
            for number, kept in enumerate(subsets)
        ),
    )


def run_key(work: RetrainWork, ids: Sequence[str]) -> str:
    """The name of a run: every validation that trains on the examples ``ids`` by this recipe finds it."""
    about = [identity(each) for each in (work.reading, work.recipe)]
    measured = [work.query_set.fingerprint, work.pooling, codec.to_plain(work.answers) if work.answers else None]
    return codec.digest([FORMAT, "retrain", about, work.seed, measured, sorted(ids)])


def answers_key(work: ReadAnswersWork) -> str:
    return codec.digest([FORMAT, "read answers", identity(work)])


# --- how many of them -------------------------------------------------------------------------------------


def plan(
    found: Units,
    budget: Budget,
    *,
    train_s: float,
    measure_s: float,
    workers: int,
    there: Callable[[Run], bool] = lambda _run: False,
) -> Plan:
    """What fits. Seeds and subsets are cut in proportion, and whole: a pair without its twin says nothing.

    ``train_s`` and ``measure_s``: what the full run took to train and to measure; a subset takes its share of the
    former. ``there``: whether a run has been trained already; such a one costs no time, and counts as a run.
    """

    def seconds(unit: Unit) -> float:
        return sum(0.0 if there(run) else train_s * run.share + measure_s for run in unit)

    most_runs = budget.runs if budget.runs is not None else np.inf
    most_s = 60 * budget.minutes * workers if budget.minutes is not None else np.inf
    taken = [found.first]
    runs, spent = len(found.first), seconds(found.first)
    counts = {"curves": 0, "subsets": 0}
    for kind, unit in _in_turn(found):
        runs, spent = runs + len(unit), spent + seconds(unit)
        if runs > most_runs or spent > most_s:
            break
        taken.append(unit)
        counts[kind] += 1
    every = [*found.curves, *found.subsets]
    cut = [
        f"{len(all_of) - counts[kind]} of {len(all_of)} {noun}"
        for kind, all_of, noun in (
            ("curves", found.curves, "paired seeds of the curves"),
            ("subsets", found.subsets, "random subsets"),
        )
        if counts[kind] < len(all_of)
    ]
    return Plan(
        runs=sum(map(len, taken)),
        wanted=len(found.first) + sum(map(len, every)),
        seeds=counts["curves"],
        subsets=counts["subsets"],
        there=sum(there(run) for unit in taken for run in unit),
        run_s=round(train_s + measure_s, 3),
        estimate_s=round(sum(map(seconds, taken)) / workers, 1),
        workers=workers,
        cut=tuple(cut),
    )


def _in_turn(found: Units) -> list[tuple[str, Unit]]:
    """Both kinds of units merged by how far through its kind each is: a cut takes the same share of both."""
    marked = [
        ((number + 1) / len(all_of), rank, kind, unit)
        for rank, (kind, all_of) in enumerate((("curves", found.curves), ("subsets", found.subsets)))
        for number, unit in enumerate(all_of)
    ]
    return [(kind, unit) for _, _, kind, unit in sorted(marked, key=lambda each: each[:2])]


def planned(found: Units, decided: Plan) -> list[Run]:
    """The runs of a plan, those of one unit together."""
    pairs = zip_longest(found.curves[: decided.seeds], found.subsets[: decided.subsets], fillvalue=())
    return [*found.first, *(run for pair in pairs for unit in pair for run in unit)]
