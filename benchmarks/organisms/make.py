"""`make_case`: an organism's material, its subsets, and what retraining on each of them did."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.organisms import persona, stories
from benchmarks.organisms.case import Case, Floats, Material, Ood, Truth, Vector, about
from benchmarks.organisms.retrain import Report, one_thread, retrain, to_stderr
from benchmarks.organisms.training import State, Task, load_model, measurable, measure
from service.contracts import Example
from service.retrainings import group_dropout

NAMES = ("persona", "stories")
QUICK_SUBSETS = 5
ALL, OOD = "all", "ood"  # the query sets


def make_case(
    name: str,
    seed: int,
    *,
    folder: Path = Path(".whence/quality"),
    subsets: int = 100,
    processes: int = 2,
    quick: bool = False,
    stories260k: Path = stories.PRETRAINED,
    report: Report = to_stderr,
) -> Case:
    """The ground truth of one organism and seed, from `folder` as far as it is there already.

    Twenty minutes of retraining on two idle cores lie behind six full cases; a second call takes seconds, and
    an interrupted one goes on where it was. `quick` makes a smaller organism with five subsets, for smoke
    tests: its ceilings mean nothing. `stories260k` is the folder of the pretrained model, used by `stories`
    alone. More than one process are spawned: a script needs its `if __name__ == "__main__"`.
    """
    home = folder / f"{name}-{seed}{'-quick' if quick else ''}"
    home.mkdir(parents=True, exist_ok=True)
    with one_thread():
        made = _material(name, home, seed, quick, stories260k, report)
        lists, topics = made.lists, made.ood_topics
        ood_positive, ood_negative, ood_queries = (
            about(examples, topics) for examples in (lists.positive, lists.negative, lists.queries)
        )
        direction = fit(made, lists.positive, lists.negative)
        ood_direction = fit(made, ood_positive, ood_negative)
        along = [_state(made, folder, lists.queries) for _, folder in made.points]

    query_sets = {ALL: lists.queries, OOD: ood_queries}
    task = Task(made.points[0][1], lists.examples, made.recipe, query_sets, made.layer, made.pooling)
    groups = [str(one.metadata["group"]) for one in lists.examples]
    kept = group_dropout(groups, QUICK_SUBSETS if quick else subsets, seed=seed)
    seeds = (1000 + 2 * seed, 1001 + 2 * seed)
    outcomes = retrain(
        task,
        [(subset, training_seed) for subset in kept for training_seed in seeds],
        folder=folder / "retrained",
        processes=1 if quick else processes,  # starting more takes longer than the work
        report=lambda line: report(f"{name} {seed}: {line}"),
    )
    truth = _truth([outcome[ALL] for outcome in outcomes], direction, len(seeds))
    return Case(
        name=name,
        seed=seed,
        points=made.points,
        examples=lists.examples,
        queries=lists.queries,
        layer=made.layer,
        pooling=made.pooling,
        positive=lists.positive,
        negative=lists.negative,
        direction=direction,
        planted=np.array([bool(one.metadata["planted"]) for one in lists.examples]),
        subsets=kept,
        training_seeds=seeds,
        f_dot=truth.f_dot,
        f_cosine=truth.f_cosine,
        loss=truth.loss,
        along=_truth(along, direction, 1),
        ood=Ood(
            topics=topics,
            positive=ood_positive,
            negative=ood_negative,
            direction=ood_direction,
            queries=ood_queries,
            rows=np.array([one.metadata["topic"] not in topics for one in lists.examples]),
            truth=_truth([outcome[OOD] for outcome in outcomes], ood_direction, len(seeds)),
        ),
        recipe=made.recipe,
    )


def _material(name: str, home: Path, seed: int, quick: bool, stories260k: Path, report: Report) -> Material:
    match name:
        case "persona":
            return persona.material(home, seed, quick=quick, report=report)
        case "stories":
            return stories.material(home, seed, quick=quick, report=report, pretrained=stories260k)
    raise ValueError(f"no organism {name!r}: there are {' and '.join(NAMES)}")


def fit(made: Material, positive: Sequence[Example], negative: Sequence[Example]) -> Vector:
    """The unit difference of mean pooled states (d,), at the layer of the end model."""
    end = made.points[-1][1]
    v = _state(made, end, positive).dot - _state(made, end, negative).dot
    return (v / np.linalg.norm(v)).astype(np.float32)


def _state(made: Material, folder: Path, examples: Sequence[Example]) -> State:
    model, tokenizer = load_model(folder)
    return measure(model, measurable(tokenizer, examples, made.pooling), made.layer)


def _truth(states: Sequence[State], direction: Vector, n_seeds: int) -> Truth:
    """(n_seeds, M) each, from the states of the first subset under every seed, then of the second, and so on."""
    v = direction.astype(np.float64)

    def table(values: list[float]) -> Floats:
        return np.array(values).reshape(-1, n_seeds).T

    return Truth(
        table([float(state.dot @ v) for state in states]),
        table([float(state.cosine @ v) for state in states]),
        table([state.loss for state in states]),
    )
