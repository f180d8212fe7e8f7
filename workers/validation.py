"""A validation as a job: the first run is measured, the plan decided and kept, then every run, then the report.

Each run is an artifact, named by what decides it, so that no subset is trained twice, by this job or another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from service import artifacts, models
from service.contracts import DatasetRecord, IndexRecord, ModelRecord
from service.errors import Invalid, NotFound
from service.registry import DATASETS, Registry
from service.retrainings import Run, Units, answers_key, plan, planned, run_key, units
from service.row_blocks import from_id_bytes
from service.rows import F32
from service.tasks import Artifact, Task
from service.training import ReadAnswersWork, RetrainWork, Source
from service.validating import PLAN, REPORT, as_tensor, find_plan, find_report, plan_key
from service.validation_records import Arm, Lds, Outcome, Plan, Report
from service.validation_spec import INPUTS, ValidateSpec
from service.validations import curves, differences, lds, told_by_size, verdict
from service.work import ActivationSpec, PassSpec
from workers.stages import Stages
from workers.works.retrain import ALONG, STATE


class Validating:
    """One validation. ``workers``: how many retrainings run beside each other."""

    def __init__(
        self,
        stages: Stages,
        registry: Registry,
        spec: ValidateSpec,
        index: IndexRecord,
        model: ModelRecord,
        workers: int,
    ) -> None:
        self._stages = stages
        self._registry = registry
        self._spec = spec
        self._index = index
        self._model = model
        self._workers = max(1, workers)
        held = stages.numbers(spec.inputs, INPUTS)
        self._ids = from_id_bytes(held["ids"])
        self._scores = held["scores"]
        self._groups = held.get("groups")
        self._query_set = registry.get(DATASETS, spec.query_set, param="query_set")
        self._location = models.location(model, spec.base)
        self._places = self._placed()
        self._keys: dict[int, str] = {}  # by Python's id of the run, whose hash takes milliseconds

    def run(self) -> Mapping[str, Any]:
        """Publish the report under the spec's key. Raises Invalid where a run cannot be trained or measured."""
        spec = self._spec
        known = find_report(self._stages.storage, spec.key)
        if known is None:  # or an earlier attempt died after publishing
            known = self._report()
            self._stages.context.check()
            artifacts.publish(self._stages.storage, spec.key, {REPORT: as_tensor(known)}, answer=True)
        told = {"validation": spec.key, "runs": known.plan.runs, "verdict": known.verdict.finding.value}
        if known.lds is not None:
            told |= {"lds": known.lds.value, "lds_se": known.lds.se}
        return told | {"words": known.verdict.words}

    def _report(self) -> Report:
        spec = self._spec
        found = units(spec.design, self._ids, self._scores, self._groups)
        decided = find_plan(self._stages.storage, spec.key)
        if decided is None:
            decided = self._decide(found)
        runs = planned(found, decided)
        made = self._stages.run("retraining", [self._task(run) for run in runs], unit="runs")
        threshold, rates = self._traits(made)
        outcomes = [
            self._outcome(run, artifact, rate) for run, artifact, rate in zip(runs, made, rates, strict=True)
        ]
        mean = {
            arm: float(np.mean([each.outcome for each in outcomes if each.arm == arm]))
            for arm in (Arm.BASE, Arm.FULL)
        }
        score, different = lds(outcomes), differences(outcomes)
        return Report(
            about=spec.about,
            examples=len(self._ids),
            left_out=spec.left_out,
            plan=decided,
            base=mean[Arm.BASE],
            full=mean[Arm.FULL],
            trait_threshold=threshold,
            lds=score,
            curves=curves(outcomes),
            differences=different,
            verdict=verdict(score, different, mean[Arm.FULL] - mean[Arm.BASE]),
            warnings=self._warnings(decided, made, score),
            runs=tuple(outcomes),
        )

    # --- the plan -------------------------------------------------------------------------------------

    def _decide(self, found: Units) -> Plan:
        """Measure the first run, and keep what fits: an attempt that goes on later does the same."""
        context = self._stages.context
        full, base = (self._task(run) for run in found.first)
        # Nothing is trained: a worker loads the model and is warm, so that what is measured next is a run alone.
        self._stages.run("base", [base], unit="runs")
        first: Artifact = self._stages.run("first run", [full], unit="runs")[0]
        there = {
            id(run): artifacts.made(self._stages.storage, self._key(run)) is not None
            for unit in (found.first, *found.curves, *found.subsets)
            for run in unit
        }
        decided = plan(
            found,
            self._spec.budget,
            train_s=float(first.facts["train_s"]),
            measure_s=float(first.facts["measure_s"]),
            workers=self._workers,
            there=lambda run: there[id(run)],
        )
        context.check()
        artifacts.publish(self._stages.storage, plan_key(self._spec.key), {PLAN: as_tensor(decided)}, answer=True)
        cut = f"; {' and '.join(decided.cut)} do not fit the budget" if decided.cut else ""
        context.log(
            f"The first run took {decided.run_s:.1f} s. {decided.runs} of {decided.wanted} runs are planned, "
            f"{decided.there} are there already, the others take about {decided.estimate_s:.0f} s on "
            f"{decided.workers} workers{cut}.",
            runs=decided.runs,
            wanted=decided.wanted,
            estimate_s=decided.estimate_s,
        )
        return decided

    def _task(self, run: Run) -> Task:
        title = f"retraining on {int(run.kept.sum())} examples ({run.arm}, seed {run.seed})"
        return Task(self._key(run), title, self._work(run, self._sources(run)), self._location)

    def _key(self, run: Run) -> str:
        if id(run) not in self._keys:
            ids = [self._ids[row] for row in np.flatnonzero(run.kept)]
            self._keys[id(run)] = run_key(self._work(run, ()), ids)
        return self._keys[id(run)]

    def _work(self, run: Run, data: tuple[Source, ...]) -> RetrainWork:
        spec = self._spec
        answers = spec.trait.answers if spec.trait is not None else None
        return RetrainWork(spec.reading, spec.recipe, run.seed, data, self._query_set, spec.pooling, answers)

    def _sources(self, run: Run) -> tuple[Source, ...]:
        kept = [(part, row) for (part, row), stays in zip(self._places, run.kept, strict=True) if stays]
        parts = [self._registry.get(DATASETS, name) for name in self._index.datasets]
        return tuple(
            Source(dataset, tuple(row for part, row in kept if part == number))
            for number, dataset in enumerate(parts)
        )

    def _placed(self) -> list[tuple[int, int]]:
        """Of every ranked example its place: the number of the index's dataset that holds it first, and the row."""
        found: dict[str, tuple[int, int]] = {}
        for number, name in enumerate(self._index.datasets):
            for row, item in enumerate(self._stages.ids(self._registry.get(DATASETS, name))):
                found.setdefault(item, (number, row))
        gone = [item for item in self._ids if item not in found]
        if gone:
            detail = f"{len(gone)} examples are in no dataset of index {self._index.id}, such as {gone[0]!r}."
            raise NotFound("example_not_found", detail, param="index")
        return [found[item] for item in self._ids]

    # --- what came of it ------------------------------------------------------------------------------

    def _outcome(self, run: Run, made: Artifact, trait_rate: float | None) -> Outcome:
        spec = self._spec
        state = artifacts.read(self._stages.storage, made, STATE)
        loss, f_v = float(state["loss"][0]), None
        if spec.direction is not None and spec.layer is not None:
            means = state[spec.function.value]
            f_v = float(means[spec.layer - 1].astype(np.float64) @ self._direction(spec.direction))
        return Outcome(
            arm=run.arm,
            seed=run.seed,
            fraction=run.fraction,
            number=run.number,
            kept=int(run.kept.sum()),
            predicted=float(self._scores[run.kept].sum()),
            outcome=-loss if f_v is None else f_v,
            f_v=f_v,
            loss=loss,
            trait_rate=trait_rate,
            run=made.key,
        )

    def _direction(self, key: str) -> F32:
        return self._stages.numbers(key, "directions")["rows"][0]

    def _traits(self, made: Sequence[Artifact]) -> tuple[float | None, list[float | None]]:
        """The threshold, and of every run the share of its answers above it; None where none was asked for."""
        spec = self._spec
        if spec.trait is None or spec.direction is None or spec.layer is None:
            return None, [None] * len(made)
        location = models.location(self._model)
        reading = replace(spec.reading, model_fingerprint=self._model.fingerprint)
        about = (spec.layer, spec.pooling, spec.direction)
        works = [ReadAnswersWork(reading, each.key, *about) for each in made]
        rows = tuple(range(self._query_set.examples))
        tasks = [
            Task(answers_key(work), "reading answers", work, location, self._query_set, rows) for work in works
        ]
        read = self._stages.run("reading answers", tasks, unit="runs")
        threshold = spec.trait.threshold
        if threshold is None:
            sides = [self._mean(str(name)) for name in (spec.trait.positive, spec.trait.negative)]
            threshold = float(np.mean(sides))
        rates: list[float | None] = []
        for each in read:
            values = artifacts.read(self._stages.storage, each, ALONG)["values"]
            told = values[np.isfinite(values)]
            if not len(told):
                detail = f"No model answered a prompt of {self._query_set.id!r}: a trait rate needs prompts."
                raise Invalid("no_answers", detail, param="query_set")
            rates.append(float((told > threshold).mean()))
        return threshold, rates

    def _mean(self, name: str) -> float:
        """⟨v̂, a_l⟩ averaged over a dataset, read by the index's model."""
        spec = self._spec
        assert spec.layer is not None and spec.direction is not None  # noqa: S101  (a trait needs a concept)
        reading = replace(spec.reading, model_fingerprint=self._model.fingerprint)
        activation = ActivationSpec((spec.layer,), spec.pooling)
        work = PassSpec(**vars(reading), activation=activation, gradient=None, objective=None)
        dataset: DatasetRecord = self._registry.get(DATASETS, name)
        manifests = self._stages.rows(
            f"threshold: {name}", models.location(self._model), work, dataset, size=spec.shard_size
        )
        rows = self._stages.stored(manifests)
        if not len(rows):
            raise Invalid("empty_dataset", f"No example of {name!r} can be read.", param="trait.threshold")
        return float((rows.astype(np.float64) @ self._direction(spec.direction)).mean())

    def _warnings(self, decided: Plan, made: Sequence[Artifact], score: Lds | None) -> tuple[str, ...]:
        said = [str(each) for each in self._spec.about.get("warnings", ())]
        if decided.cut:
            said.append(f"The budget cut {' and '.join(decided.cut)}.")
        if aside := int(made[0].facts["set_aside"]):
            said.append(f"{aside} of {len(self._ids)} examples have no token to train on; no run sees them.")
        if unused := self._query_set.examples - int(made[0].facts["queries"]):
            said.append(f"{unused} of {self._query_set.examples} examples of the query set could not be measured.")
        if self._spec.left_out:
            said.append(
                f"{self._spec.left_out} examples of the datasets are not in the index (set aside or deleted); no "
                "run trains on them."
            )
        if score is not None and told_by_size(score):
            said.append(
                f"The number of examples in a subset alone predicts the outcome at {score.by_size:+.2f}; among "
                f"subsets of one size the scores do so at {score.given_size:+.2f}, which is what the verdict is "
                "about. Say groups of similar size, or judge by the curves, which compare equal numbers."
            )
        return tuple(said)
