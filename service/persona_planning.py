"""From a request for a persona vector to its job, checked before any answer is made."""

from dataclasses import dataclass, replace
from pathlib import Path

from service import codec
from service.contracts import ConceptRecord, ModelRecord
from service.errors import Conflict, Invalid
from service.judging import HttpJudge, Judge, NoJudge, ProbeJudge
from service.models import end_tokens
from service.personas import PersonaSpec, SystemPrompt
from service.planning import layers_of, reading_of
from service.registry import CONCEPTS, MODELS, Registry, check_id
from service.settings import Settings
from service.tasks import identity
from service.terms import LongExamples, Pooling
from service.traits import TraitFile
from service.work import FORMAT, AnswersSpec

MOST_ANSWERS = 100_000


@dataclass(frozen=True)
class AskHttp:
    """``url`` None: the only judge that the settings allow."""

    model: str
    url: str | None
    positive_above: float
    negative_below: float


@dataclass(frozen=True)
class AskProbe:
    concept: str
    threshold: float | None


@dataclass(frozen=True)
class PersonaRequest:
    """``layers`` empty: all; ``judge`` None: every pair is kept."""

    id: str
    model: str
    file: TraitFile
    layers: tuple[int, ...]
    each_layer: bool
    samples: int
    answers: AnswersSpec
    judge: AskHttp | AskProbe | None
    system_prompt: SystemPrompt
    max_length: int | None


def plan_persona(request: PersonaRequest, registry: Registry, settings: Settings) -> PersonaSpec:
    """The job. Raises NotFound, Forbidden, Invalid or Conflict naming the field."""
    check_id(request.id, param="id")
    model = registry.get(MODELS, request.model, param="model")
    trait = request.file.trait
    count = 2 * len(trait.instruction) * len(trait.questions) * request.samples
    if count > MOST_ANSWERS:
        detail = (
            f"{len(trait.instruction)} instruction pairs × {len(trait.questions)} questions × {request.samples} "
            f"samples on two sides are {count:,} answers; {MOST_ANSWERS:,} are most. Ask for fewer samples."
        )
        raise Invalid("too_many_answers", detail, param="samples")
    layers = layers_of(model, request.layers or tuple(range(1, model.n_layers + 1)), param="layers")
    spec = PersonaSpec(
        key="",
        id=request.id,
        model=model.id,
        file=request.file,
        reading=reading_of(model, settings, request.max_length, LongExamples.TRUNCATE_RIGHT),
        answers=replace(request.answers, ends=end_tokens(Path(model.path))),
        samples=request.samples,
        system_prompt=request.system_prompt,
        layers=layers,
        each_layer=request.each_layer,
        judge=_judge(request, model, registry, settings),
    )
    for name in dict.fromkeys(spec.concept_ids().values()):
        check_id(name, param="id")
        if registry.find(CONCEPTS, name) is not None:
            detail = f"There is a concept {name!r} already. Choose another id."
            raise Conflict("concept_exists", detail, param="id")
    return replace(spec, key=codec.digest([FORMAT, "persona", identity(spec)]))


def _judge(request: PersonaRequest, model: ModelRecord, registry: Registry, settings: Settings) -> Judge:
    asked = request.judge
    if asked is None:
        return NoJudge()
    if isinstance(asked, AskHttp):
        if request.file.trait.eval_prompt is None:
            detail = "The trait has no eval_prompt, which is what a judge is asked. Add it, or use another judge."
            raise Invalid("eval_prompt_needed", detail, param="trait.eval_prompt")
        if asked.negative_below > asked.positive_above:
            detail = "An answer would show the trait and lack it: negative_below must not exceed positive_above."
            raise Invalid("thresholds_cross", detail, param="judge.negative_below")
        url = settings.judge_at(asked.url)
        return HttpJudge(url, asked.model, asked.positive_above, asked.negative_below)
    concept = registry.get(CONCEPTS, asked.concept, param="judge.concept")
    _check_probe(concept, model)
    return ProbeJudge(concept.id, concept.sha256, concept.layer, asked.threshold)


def _check_probe(concept: ConceptRecord, model: ModelRecord) -> None:
    if (concept.lineage, concept.width) != (model.lineage, model.width):
        detail = f"Concept {concept.id!r} belongs to another model, {concept.model!r}, than {model.id!r}."
        raise Invalid("concept_of_other_lineage", detail, param="judge.concept")
    if concept.pooling != Pooling.RESPONSE_MEAN:
        detail = (
            f"Concept {concept.id!r} was fitted with pooling {concept.pooling}; answers are judged by the mean "
            "over their tokens (response_mean)."
        )
        raise Invalid("concept_of_other_pooling", detail, param="judge.concept")
