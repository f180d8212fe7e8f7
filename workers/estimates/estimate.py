"""From the tasks of a rehearsed build and the costs of a few trials to time, memory and disk."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service import datasets, models
from service.contracts import DatasetRecord, JobContext, ModelRecord
from service.registry import DATASETS, Registry
from service.specs import BuildIndexSpec
from service.storage import Storage
from service.tasks import Task
from service.work import (
    AnswersWork,
    CovarianceWork,
    DifferenceSpec,
    EigenWork,
    JacobianWork,
    Location,
    LossRowsWork,
    MomentWork,
    PassSpec,
    Reading,
    ScoutWork,
    ShapesWork,
    Work,
)
from workers.build import Build
from workers.estimates.probe import STEPS, Cost, Source, Survey, Trial, cost_of
from workers.estimates.rehearsal import Rehearsal, Rehearsed
from workers.estimates.weights import Weights, file_bytes
from workers.pool import Crew, Pool
from workers.stages import shuffled
from workers.works.choice import AT_ONCE, SCOUTS

_SAMPLE = 256  # examples of each dataset whose lengths stand for all
_SEED = 20260214
_TRIAL_BUDGETS = 1.5  # token budgets of text per trial
_COPIES = 3  # of a result in a worker's memory: as computed, as numpy arrays, as the bytes of files
_TASK_S = 0.01  # handing out a task, and collecting its result

Reads = (
    PassSpec | DifferenceSpec | CovarianceWork | MomentWork | LossRowsWork | JacobianWork | ScoutWork | AnswersWork
)


class Silent:
    """A JobContext that says nothing and only stops when the job does."""

    def __init__(self, context: JobContext) -> None:
        self.job = getattr(context, "job", None)
        self.check = context.check

    def progress(self, *_said: Any, **_more: Any) -> None: ...

    def log(self, *_said: Any, **_more: Any) -> None: ...


@dataclass
class Priced:
    """One stage: seconds on the clock, bytes in the worker that needs most, bytes written."""

    name: str
    tasks: int
    seconds: float = 0.0
    worker_bytes: int = 0
    device_bytes: int = 0
    disk_bytes: int = 0


@dataclass
class Lengths:
    """Tokens of the sampled examples of each dataset, as samples for all of them."""

    device: str
    by_dataset: Mapping[str, tuple[Sequence[int], Sequence[tuple[int, ...]]]]  # rows, windows of each
    _costs: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def cost(self, dataset: DatasetRecord, count: int, budget: int) -> float:
        """Of ``count`` examples of the dataset in batches, in tokens; see probe.cost_of."""
        key = (dataset.fingerprint, count, budget)
        if key not in self._costs:
            _, lengths = self.by_dataset[dataset.fingerprint]
            generator = np.random.default_rng(_SEED)
            chosen = generator.permutation(len(lengths))[:count]
            if count > len(lengths):
                chosen = generator.integers(0, len(lengths), count)
            self._costs[key] = cost_of([each for row in chosen for each in lengths[row]], budget, self.device)
        return self._costs[key]

    def some(self, dataset: DatasetRecord, count: int) -> tuple[int, ...]:
        """Rows of the sample that can be read."""
        rows, lengths = self.by_dataset[dataset.fingerprint]
        return tuple(row for row, found in zip(rows, lengths, strict=True) if found)[:count] or tuple(rows[:1])

    def typical(self, dataset: DatasetRecord, count: int, budget: int) -> tuple[tuple[int, ...], float]:
        """Rows for a trial: the longest of ``count`` examples, up to a full batch, and some others; their cost."""
        rows, lengths = self.by_dataset[dataset.fingerprint]
        order = [row for row in np.random.default_rng(_SEED).permutation(len(rows))[:count] if lengths[row]]
        longest = sorted(order, key=lambda row: -max(lengths[row]))
        chosen: list[int] = []
        padded = 0
        for row in longest:
            padded = max(max(lengths[row]) * (len(chosen) + 1), padded)
            if chosen and padded > budget:
                break
            chosen.append(row)
        used = sum(sum(lengths[row]) for row in chosen)
        for row in order:
            if row not in chosen and used + sum(lengths[row]) <= _TRIAL_BUDGETS * budget:
                chosen.append(row)
                used += sum(lengths[row])
        chosen = chosen or [0]
        cost = cost_of([each for row in chosen for each in lengths[row]], budget, self.device)
        return tuple(rows[row] for row in chosen), cost


def estimate(
    storage: Storage,
    registry: Registry,
    pool: Pool,
    spec: BuildIndexSpec,
    model: ModelRecord,
    dataset: DatasetRecord,
    context: JobContext,
) -> dict[str, Any]:
    """Seconds, bytes of memory and of disk of the build, by stage and in all."""
    with pool.fresh(context.check) as crew:
        context.progress("survey", 0, 1, unit="surveys")
        surveys, lengths, load = _survey(crew, storage, registry, spec, model, dataset)
        known = surveys[0]
        context.progress("survey", 1, 1, unit="surveys")
        rehearsal = Rehearsal(storage, known.shapes, known.width, Silent(context))
        with np.errstate(all="ignore"):  # its results hold zeros
            Build(rehearsal, registry, spec, model, dataset).run()
        pricing = Pricing(surveys, lengths, rehearsal.weights, crew.size)
        trials = pricing.trials([task for stage in rehearsal.stages for task in stage.tasks])
        for number, trial in enumerate(trials):
            context.progress("trials", number, len(trials), unit="trials")
            pricing.learn(trial, crew.call("measure", trial))
        context.progress("trials", len(trials), len(trials), unit="trials")
    priced = [pricing.price(stage.name, stage.tasks) for stage in rehearsal.stages]
    priced.insert(0, Priced("starting the workers", crew.size, crew.start_s))
    priced.insert(1, Priced("loading the model", crew.size, load, known.load_bytes))
    return {
        "seconds": sum(stage.seconds for stage in priced),
        "worker_bytes": max(stage.worker_bytes for stage in priced),
        "device_bytes": max(stage.device_bytes for stage in priced),
        "disk_bytes": sum(stage.disk_bytes for stage in priced),
        "workers": crew.size,
        "examples": dataset.examples,
        "stages": [vars(stage) for stage in priced],
    }


def _survey(
    crew: Crew,
    storage: Storage,
    registry: Registry,
    spec: BuildIndexSpec,
    model: ModelRecord,
    dataset: DatasetRecord,
) -> tuple[list[Survey], Lengths, float]:
    names = spec.influence.query_sets if spec.influence else ()
    records = [dataset, *(registry.get(DATASETS, name) for name in names)]
    sources = []
    for record in records:
        ids = datasets.read_table(storage, record).column("id").to_pylist()
        sources.append(Source(record, tuple(shuffled(ids, _SEED)[:_SAMPLE])))
    pooling = spec.pooling if spec.activation else None
    location = models.location(model, spec.points[-1])
    surveys: list[Survey] = crew.call("survey", location, spec.reading, spec.tracked, pooling, tuple(sources))
    by_dataset = {
        source.dataset.fingerprint: (source.rows, found)
        for source, found in zip(sources, surveys[0].lengths, strict=True)
    }
    return surveys, Lengths(surveys[0].device, by_dataset), max(survey.load_s for survey in surveys)


class Pricing:
    """Seconds and bytes of tasks, from what workers have measured."""

    def __init__(self, surveys: Sequence[Survey], lengths: Lengths, weights: Weights, workers: int) -> None:
        self._survey = surveys[0]
        self._mean = {
            name: float(np.mean([getattr(survey, name) for survey in surveys]))
            for name in ("load_s", "write_s", "read_s", "touch_s", "file_s")
        }
        self._eigen = {
            size: float(np.mean([survey.eigen_s[size] for survey in surveys])) for size in surveys[0].eigen_s
        }
        self._lengths = lengths
        self._weights = weights
        self._workers = workers
        self._costs: dict[str, Cost] = {}
        self._held: Location | None = None  # the model that the workers hold

    # --- trials ---------------------------------------------------------------------------------------

    def trials(self, rehearsed: Sequence[Rehearsed]) -> list[Trial]:
        """One for every kind of work that reads texts."""
        found: dict[str, Trial] = {}
        for each in rehearsed:
            work, task = each.task.work, each.task
            if not isinstance(work, Reads):
                continue
            name = self._name(work)
            if name not in found:
                found[name] = self._trial(name, work, task)
        return list(found.values())

    def _trial(self, name: str, work: Reads, task: Task) -> Trial:
        assert task.dataset is not None and task.location is not None  # noqa: S101
        if isinstance(work, AnswersWork):  # a whole task: its prompts are answered together, token by token
            rows, units = self._lengths.some(task.dataset, len(task.rows)), min(STEPS, work.spec.max_new_tokens)
        else:
            rows, units = self._lengths.typical(task.dataset, len(task.rows), _reading(work).token_budget)
        trial = Trial(
            name,
            work,
            task.location,
            Source(task.dataset, rows),
            self._kept(work),
            self._heads(work),
            self._weights.coordinates(work.gradient) if isinstance(work, PassSpec) and work.gradient else 0,
            _rows_of(work),
        )
        self._costs[name] = Cost(0.0, units * trial.count, 0, 0)
        return trial

    def _heads(self, work: Reads) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
        influence = work.influence if isinstance(work, PassSpec) else None
        return tuple(map(self._weights.head, influence.heads)) if influence else ()

    def _kept(self, work: Reads) -> Any:
        shapes = self._survey.shapes
        match work:
            case PassSpec():
                return self._weights.sides(work)
            case MomentWork(bases=bases):
                return {name: shapes[name][:2] for name, _ in bases}
            case JacobianWork():
                return self._weights.kept(work.curvature, work.layer)
            case ScoutWork(modules=names):
                return {name: shapes[name][:2] for name in names}
            case LossRowsWork():
                return self._weights.kept(work.curvature)
            case _:
                return {}

    def _name(self, work: Reads) -> str:
        """Equal for works that cost the same on the same text."""
        kept = sorted(set(self._kept(work).items()))
        about: list[Any] = [type(work).__name__, len(kept), sum(p_out * p_in for _, (p_out, p_in) in kept)]
        match work:
            case PassSpec():
                about += [work.activation, work.gradient is not None]
                about += [head[:2] for head in self._heads(work)]
            case CovarianceWork():
                about.append(len(work.modules))
            case JacobianWork() | ScoutWork():
                about += [work.layer, _rows_of(work)]
            case DifferenceSpec():
                about.append(work.layers)
        return " ".join(map(str, about))

    def learn(self, trial: Trial, measured: Sequence[Cost]) -> None:
        units = self._costs[trial.name].units
        self._costs[trial.name] = Cost(
            float(np.mean([cost.seconds for cost in measured])),
            units,
            max(cost.peak_bytes for cost in measured),
            max(cost.device_bytes for cost in measured),
            float(np.mean([cost.tokens for cost in measured])),
            float(np.mean([cost.steps for cost in measured])),
        )

    # --- stages ---------------------------------------------------------------------------------------

    def price(self, name: str, rehearsed: Sequence[Rehearsed]) -> Priced:
        """The stage with its tasks handed to whichever worker is free."""
        priced = Priced(name, len(rehearsed))
        free = [0.0] * self._workers
        for each in rehearsed:
            seconds, held, device = self._task(each)
            heapq.heapreplace(free, free[0] + seconds)
            priced.worker_bytes = max(priced.worker_bytes, held)
            priced.device_bytes = max(priced.device_bytes, device)
            priced.disk_bytes += each.written + file_bytes(each.files)
        priced.seconds = max(free) + self._loading(rehearsed)
        return priced

    def _loading(self, rehearsed: Sequence[Rehearsed]) -> float:
        """Another point of the run, or another model, is loaded once by every worker."""
        seconds = 0.0
        for each in rehearsed:
            if each.task.location not in {None, self._held}:
                seconds += self._mean["load_s"] if self._held is not None else 0.0  # the first one is counted apart
                self._held = each.task.location
        return seconds

    def _task(self, each: Rehearsed) -> tuple[float, int, int]:
        """Seconds, bytes of the worker and of its GPU."""
        work, mean = each.task.work, self._mean
        seconds = (
            _TASK_S + each.read * mean["read_s"] + each.written * mean["write_s"] + each.files * mean["file_s"]
        )
        held, device = self._survey.held_bytes + _COPIES * each.written, 0
        if isinstance(work, Reads):
            cost = self._costs[self._name(work)]
            seconds += cost.seconds * self._units(each.task, work) / max(cost.units, 1e-9)
            held = cost.peak_bytes + (_COPIES - 1) * each.written
            device = cost.device_bytes
        elif isinstance(work, EigenWork):
            d_out, d_in, _ = self._survey.shapes[work.module]
            seconds += self._eigen[d_out] + self._eigen[d_in]
            held += 8 * 4 * max(d_out, d_in) ** 2
        elif not isinstance(work, ShapesWork):
            seconds += mean["touch_s"] * each.read
        return seconds, held, device

    def _units(self, task: Task, work: Reads) -> float:
        assert task.dataset is not None  # noqa: S101
        if isinstance(work, AnswersWork):
            return self._costs[self._name(work)].steps
        cost = self._lengths.cost(task.dataset, len(task.rows), _reading(work).token_budget)
        return cost * (SCOUTS if isinstance(work, ScoutWork) else _rows_of(work))


def _reading(work: Reads) -> Reading:
    return work if isinstance(work, Reading) else work.reading


def _rows_of(work: Work) -> int:
    """How many rows of J a trial of it has."""
    if isinstance(work, JacobianWork):
        return work.stop - work.start
    return AT_ONCE if isinstance(work, ScoutWork) else 1
