"""Does taking out what ranks highest change the model? The persona organism, fine-tuned again without a quarter.

The examples are ranked by ``concept_influence`` along the run, as an index of the service ranks them. Then the
base is fine-tuned on all of them, and without the quarter that ranks highest, the quarter that ranks lowest, and
a random quarter (another one for every training seed). A pair is two of these with one training seed; f_v is that
of the concept on the query set, the trait rate the share of hostile answers that the model gives to its prompts.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from benchmarks.lab import Lab
from benchmarks.organisms import persona
from benchmarks.organisms.case import Material
from benchmarks.organisms.make import ALL, fit
from benchmarks.organisms.retrain import one_thread, to_stderr
from benchmarks.organisms.training import Bools, Task, Trainer, measure
from benchmarks.report import Report
from examples.organism.language import tone_of
from examples.organism.measure import sample
from examples.organism.train import train
from service.contracts import Completion
from service.terms import IndexKind

SHARE = 0.25  # of the examples, taken out
WAYS = ("full", "most", "least", "random")
_DAMPING = 1.0


@dataclass(frozen=True)
class Run:
    """One fine-tuning: examples kept (N,), and the seed of the order in which they come."""

    kept: Bools
    seed: int


@dataclass(frozen=True)
class Left:
    """What a run left: f_v(Q), and the share of hostile answers to Q's prompts."""

    f_v: float
    trait_rate: float


def remove(report: Report, folder: Path, *, organisms: int, seeds: int, processes: int, quick: bool) -> None:
    """Retrain ``organisms`` × ``seeds`` times each way, and report the paired differences in standard errors."""
    found: dict[str, list[Left]] = {way: [] for way in WAYS}
    for number in range(organisms):
        home = folder / f"persona-{number}"
        home.mkdir(parents=True, exist_ok=True)
        with one_thread():
            made = persona.material(home, number, quick=quick, report=to_stderr)
            direction = fit(made, made.lists.positive, made.lists.negative)
            scores = influence(made, home / "lab", direction)
        runs = _runs(scores, number, seeds)
        outcomes = _outcomes(_task(made), direction, [run for way in WAYS for run in runs[way]], processes)
        for place, way in enumerate(WAYS):
            found[way] += outcomes[place * seeds : (place + 1) * seeds]
    f_v = {way: np.array([left.f_v for left in found[way]]) for way in WAYS}
    rates = {way: float(np.mean([left.trait_rate for left in found[way]])) for way in WAYS}
    pairs = f"{organisms * seeds} pairs, f_v"
    for name, difference, told in (
        ("remove_most_vs_random_se", f_v["random"] - f_v["most"], ("random", "most")),
        ("remove_least_vs_random_se", f_v["least"] - f_v["random"], ("least", "random")),
    ):
        ends = " − ".join(f"{way} {f_v[way].mean():.3f}" for way in told)
        # Pairs of one organism share its ranking: each organism by itself says whether that matters.
        alone = ", ".join(f"{in_standard_errors(own):.1f}" for own in difference.reshape(organisms, seeds))
        told_alone = f"by organism {alone}"
        report.add(
            name, in_standard_errors(difference), f"{pairs}: {ends} = {difference.mean():+.3f}; {told_alone}"
        )
    report.add("trait_rate_full", rates["full"], "hostile answers of the model fine-tuned on everything")
    report.add("trait_rate_remove_most", rates["most"])
    report.add("trait_rate_random", rates["random"])
    report.add("trait_rate_remove_least", rates["least"])


def in_standard_errors(differences: NDArray[np.float64]) -> float:
    """Mean of paired differences over its standard error."""
    return float(differences.mean() / (differences.std(ddof=1) / np.sqrt(len(differences))))


def influence(made: Material, folder: Path, direction: NDArray[np.float32]) -> NDArray[np.float64]:
    """``concept_influence`` of every training example, along the run, from an index as the service builds it."""
    with Lab(folder) as lab:
        end = made.points[-1][1]
        model = lab.model("model", end, checkpoints=[(path, 1.0) for _, path in made.points[:-1]])
        lab.dataset("train", made.lists.examples)
        lab.dataset("queries", made.lists.queries)
        lab.concept("concept", model, direction, layer=made.layer, pooling=made.pooling)
        index, _ = lab.build(
            *("i", "model", "train", made.layer),
            kinds=(IndexKind.INFLUENCE,),
            pooling=made.pooling,
            query_sets=("queries",),
            dampings=(_DAMPING,),
        )
        ids = [example.id for example in made.lists.examples]
        return lab.scores(index, ids, concept="concept", query_set="queries", damping=_DAMPING)


def _runs(scores: NDArray[np.float64], organism: int, seeds: int) -> dict[str, list[Run]]:
    n, order = len(scores), np.argsort(-scores, kind="stable")
    count = round(SHARE * n)

    def without(rows: NDArray[np.int64]) -> Bools:
        kept = np.ones(n, dtype=bool)
        kept[rows] = False
        return kept

    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        chance = np.random.default_rng([organism, seed]).permutation(n)[:count]
        taken = {"full": order[:0], "most": order[:count], "least": order[n - count :], "random": chance}
        for way, rows in taken.items():
            found[way].append(Run(without(rows), 100 * organism + seed))
    return found


def _task(made: Material) -> Task:
    sets = {ALL: made.lists.queries}
    return Task(made.points[0][1], made.lists.examples, made.recipe, sets, made.layer, made.pooling)


def _outcomes(task: Task, direction: NDArray[np.float32], runs: Sequence[Run], processes: int) -> list[Left]:
    v = direction.astype(np.float64)
    if processes <= 1:
        with one_thread():
            trainer = Trainer(task)
            return [_left(trainer, v, run) for run in runs]
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(task,)) as pool:
        return list(pool.map(_one, [v] * len(runs), runs))


_trainer: list[Trainer] = []  # of a worker process


def _start(task: Task) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _trainer.append(Trainer(task))


def _one(v: NDArray[np.float64], run: Run) -> Left:
    return _left(_trainer[0], v, run)


def _left(trainer: Trainer, v: NDArray[np.float64], run: Run) -> Left:
    model: Any = deepcopy(trainer.base)
    kept = torch.from_numpy(np.flatnonzero(run.kept))
    train(model, trainer.data[kept], trainer.task.recipe, seed=run.seed)
    state = measure(model, trainer.query_sets[ALL], trainer.task.layer)
    contents = [example.content for example in trainer.task.query_sets[ALL]]
    prompts = [content.prompt for content in contents if isinstance(content, Completion)]
    answers = sample(model, trainer.tokenizer, prompts, seed=run.seed)
    return Left(float(state.dot @ v), float(np.mean([tone_of(answer) == "hostile" for answer in answers])))
