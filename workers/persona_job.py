"""A persona vector as a job: answers under both kinds of system prompts, a judge, and a difference of means.

As in the paper (arXiv 2507.21509): an answer's activations are those under the system prompt that it was given
under, averaged over its own tokens; a pair counts when its positive answer shows the trait and its negative none.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from service import artifacts, concepts, judging, models, persona_answers
from service.contracts import ModelRecord
from service.errors import Invalid
from service.judging import HttpJudge, ProbeJudge, Verdict
from service.personas import (
    FEWEST_PAIRS,
    FOLDS,
    Answered,
    PersonaSpec,
    Prompt,
    SystemPrompt,
    all_prompts,
    texts_of,
)
from service.registry import CONCEPTS, Registry
from service.settings import Settings
from service.tasks import Artifact
from service.traits import rendered
from service.work import ElicitWork, ResponsesWork
from workers import persona_concepts
from workers.judge import Asker
from workers.persona_vectors import Block, fit, folds_of
from workers.stages import Stages
from workers.works.personas import ROWS, TEXTS

ANSWERS = 32  # per task, both of a pair in one: generating is slow, and what is done is kept


def compute(
    stages: Stages, registry: Registry, spec: PersonaSpec, model: ModelRecord, settings: Settings | None
) -> dict[str, Any]:
    """Publish the concepts of ``spec``, and the answers behind them under its key. Raises Invalid, with the answers
    kept, when too few pairs show the trait.
    """
    return _Job(stages, registry, spec, model).run(settings)


class _Job:
    """The answers are numbered as by ``all_prompts``: 2k and 2k + 1 are a pair, the positive one first."""

    def __init__(self, stages: Stages, registry: Registry, spec: PersonaSpec, model: ModelRecord) -> None:
        self._stages, self._registry, self._spec, self._model = stages, registry, spec, model

    def run(self, settings: Settings | None) -> dict[str, Any]:
        spec, judge = self._spec, self._spec.judge
        asker = self._asker(settings)  # whether it may be asked is said before hours of generating
        works, made, answered = self._answers()
        verdicts = [Verdict(None, each.reason) for each in answered]
        if asker is not None:
            verdicts = self._asked(asker, answered)
            self._enough(self._decided(answered, verdicts)[0])  # or there is no need for activations
        layers = spec.layers
        if isinstance(judge, ProbeJudge):
            layers = tuple(sorted({*layers, judge.layer}))
        responses = [ResponsesWork(work, part.key, layers) for work, part in zip(works, made, strict=True)]
        rows = self._stages.artifacts(
            "activations of the answers", responses, location=models.location(self._model)
        )
        held = {number for number, _ in self._each(rows, 0)}
        verdicts = [
            each if number in held or each.reason else Verdict(each.score, judging.NOT_FINITE, each.said)
            for number, each in enumerate(verdicts)
        ]
        if isinstance(judge, ProbeJudge):
            concept = self._registry.get(CONCEPTS, judge.concept)
            direction = concepts.direction(self._stages.storage, concept)
            for number, row in self._each(rows, layers.index(judge.layer)):
                if verdicts[number].reason is None:
                    verdicts[number] = Verdict(float(row.astype(np.float64) @ direction))
        answered, bounds = self._decided(answered, verdicts)
        self._enough(answered)
        folds = folds_of((each.question for each in answered if each.kept), FOLDS)
        columns = [layers.index(layer) for layer in spec.layers]
        count = len(set(folds.values()))
        found = fit(lambda: self._blocks(rows, answered, folds, columns), count)
        self._keep(answered)
        return persona_concepts.publish(self._stages, self._registry, spec, self._model, answered, found, bounds)

    # --- answers ----------------------------------------------------------------------------------------

    def _answers(self) -> tuple[list[ElicitWork], list[Artifact], list[Answered]]:
        """``reason`` is set where there is no answer."""
        spec = self._spec
        wanted = all_prompts(spec)
        parts = [wanted[start : start + ANSWERS] for start in range(0, len(wanted), ANSWERS)]
        in_question = spec.system_prompt == SystemPrompt.IN_QUESTION
        works = [
            ElicitWork(
                reading=spec.reading,
                spec=spec.answers,
                prompts=tuple((*texts_of(spec, each), each.sample) for each in part),
                in_question=in_question,
            )
            for part in parts
        ]
        made = self._stages.artifacts("answers", works, location=models.location(self._model))
        answered: list[Answered] = []
        for part, artifact in zip(parts, made, strict=True):
            lengths = artifacts.read(self._stages.storage, artifact, "answers")["lengths"].tolist()
            held = artifacts.read(self._stages.storage, artifact, TEXTS)
            told, before = json.loads(held["json"].tobytes()), held["prompts"].tolist()
            answered += map(self._answered, part, told, lengths, before)
        return works, made, answered

    def _answered(self, prompt: Prompt, text: str, length: int, prompt_length: int) -> Answered:
        reason = None
        if not length:
            reason = judging.TOO_LONG if prompt_length >= self._spec.reading.max_length else judging.NOT_FINITE
        elif not text.strip():
            reason = judging.NO_ANSWER
        system, question = texts_of(self._spec, prompt)
        about = {"system": system, "prompt": question, "answer": text, "tokens": length}
        return Answered(**vars(prompt), **about, kept=False, reason=reason)

    def _each(self, rows: Sequence[Artifact], column: int) -> Iterator[tuple[int, np.ndarray]]:
        """Number of every answer that has activations, and its row (d,) of one layer."""
        for part, artifact in enumerate(rows):
            held = artifacts.read(self._stages.storage, artifact, ROWS)
            yield from zip((held["positions"] + part * ANSWERS).tolist(), held["rows"][:, column], strict=True)

    def _blocks(
        self, rows: Sequence[Artifact], answered: Sequence[Answered], folds: dict[int, int], columns: list[int]
    ) -> Iterator[Block]:
        """Activations of the answers that are kept, part by part."""
        for part, artifact in enumerate(rows):
            held = artifacts.read(self._stages.storage, artifact, ROWS)
            self._stages.context.check()
            numbers = (held["positions"] + part * ANSWERS).tolist()
            kept = [place for place, number in enumerate(numbers) if answered[number].kept]
            some = [answered[numbers[place]] for place in kept]
            yield Block(
                rows=held["rows"][kept][:, columns],
                positive=np.array([each.side == "positive" for each in some], dtype=bool),
                fold=np.array([folds[each.question] for each in some], dtype=np.int64),
            )

    # --- judgement --------------------------------------------------------------------------------------

    def _asker(self, settings: Settings | None) -> Asker | None:
        """The judge, allowed by this process's own settings, whatever the api's are. Raises Forbidden, Invalid."""
        judge = self._spec.judge
        if not isinstance(judge, HttpJudge):
            return None
        settings = settings or Settings(judges="")  # pyright: ignore[reportCallIssue]
        key = settings.judge_key(settings.judge_at(judge.url))
        return Asker(judge, self._stages.storage, key=key, parallel=settings.judge_parallel)

    def _asked(self, asker: Asker, answered: Sequence[Answered]) -> list[Verdict]:
        prompt = self._spec.file.trait.eval_prompt
        assert prompt is not None  # noqa: S101  (the planner refuses a judge without one)
        there = [number for number, each in enumerate(answered) if each.reason is None]
        questions = [rendered(prompt, answered[number].prompt, answered[number].answer) for number in there]
        said = dict(zip(there, asker.ask(questions, self._stages.context), strict=True))
        return [said.get(number, Verdict(None, each.reason)) for number, each in enumerate(answered)]

    def _decided(
        self, answered: Sequence[Answered], verdicts: Sequence[Verdict]
    ) -> tuple[list[Answered], tuple[float, float]]:
        """What is kept, and above and below which score."""
        scores = [[each.score for each in verdicts[side::2] if each.score is not None] for side in (0, 1)]
        above, below = judging.thresholds(self._spec.judge, *scores)
        found: list[Answered] = []
        for number in range(0, len(answered), 2):
            pair = verdicts[number : number + 2]
            reason = judging.dropped(*pair, above=above, below=below)
            for each, verdict in zip(answered[number : number + 2], pair, strict=True):
                made = {
                    "score": verdict.score,
                    "judge_said": verdict.said,
                    "kept": reason is None,
                    "reason": reason,
                }
                found.append(replace(each, **made))
        return found, (above, below)

    def _enough(self, answered: Sequence[Answered]) -> None:
        """Raise Invalid when there is too little to fit and to test a direction on; the answers are kept then."""
        kept = [each for each in answered if each.kept]
        pairs, questions = len(kept) // 2, len({each.question for each in kept})
        if pairs >= FEWEST_PAIRS and questions > 1:
            return
        self._keep(answered)
        reasons = persona_concepts.reasons(answered)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise Invalid(
            "too_few_pairs",
            f"Of {len(answered) // 2} pairs of answers {pairs} show the trait, on {questions} questions; at least "
            f"{FEWEST_PAIRS} on 2 are needed. Left out: {told or 'none'}. Read the answers (`whence concepts "
            f"answers {self._spec.key}`); then ask for more samples or longer answers, choose other thresholds, or "
            "make the instructions plainer.",
            param="trait",
            context={"answers": self._spec.key, "kept": pairs, "dropped": reasons},
        )

    def _keep(self, answered: Sequence[Answered]) -> None:
        sides = Counter(each.side for each in answered if each.kept)
        self._stages.context.check()
        persona_answers.publish(self._stages.storage, self._spec.key, answered, {"pairs_kept": sides["positive"]})
