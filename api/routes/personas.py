"""Persona vectors: queued here, and the answers behind them shown."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from api.dependencies import Services, ServicesDep, accepted
from api.problems import documented
from api.schemas_personas import AnsweredPage, HttpJudgeIn, PersonaIn, ProbeJudgeIn
from service import persona_answers, traits
from service.contracts import JobRecord
from service.errors import Invalid
from service.persona_planning import AskHttp, AskProbe, PersonaRequest, plan_persona
from service.storage import inside_roots
from service.terms import JobKind
from service.traits import MOST_BYTES, TraitFile
from service.work import AnswersSpec

router = APIRouter(prefix="/v1", tags=["concepts"])


@router.post(
    "/personas",
    status_code=202,
    summary="A concept from a trait file: a persona vector",
    responses=documented(403, 404, 409, 422),
)
def fit_persona(body: PersonaIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue it: the model answers the trait's questions under its positive and negative system prompts, a judge
    keeps the pairs that show the trait, and the concept is the difference of their mean activations. The same
    request while its job runs answers that job; sent again after a failure it goes on with what is done.
    """
    judge = body.judge
    asked = None
    if isinstance(judge, HttpJudgeIn):
        asked = AskHttp(judge.model, judge.url, judge.positive_above, judge.negative_below)
    elif isinstance(judge, ProbeJudgeIn):
        asked = AskProbe(judge.concept, judge.threshold)
    request = PersonaRequest(
        id=body.id,
        model=body.model,
        file=_trait(body, services),
        layers=tuple(body.layers),
        each_layer=body.each_layer,
        samples=body.samples,
        answers=AnswersSpec(**body.answers.model_dump()),
        judge=asked,
        system_prompt=body.system_prompt,
        max_length=body.max_length,
    )
    spec = plan_persona(request, services.registry, services.settings)
    return accepted(response, services.jobs.submit_once(spec.key, JobKind.PERSONA_VECTOR, spec))


@router.get(
    "/concepts/{reference}/answers",
    summary="The answers behind a persona vector",
    responses=documented(404, 503),
)
def get_answers(
    reference: str,
    services: ServicesDep,
    side: Literal["positive", "negative"] | None = None,
    kept: bool | None = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> AnsweredPage:
    """What the model said on each side, the judge's score, and whether the pair was kept or why not. ``reference``
    is the concept, or the key that a job which found too few pairs names as 'answers'.
    """
    found = persona_answers.read(services.storage, services.registry, reference)
    some = [each for each in found if side in {None, each.side} and kept in {None, each.kept}]
    return AnsweredPage(total=len(some), items=some[offset : offset + limit])


def _trait(body: PersonaIn, services: Services) -> TraitFile:
    if body.path is None:
        if isinstance(body.trait, str):
            return traits.read(body.trait.encode(errors="surrogatepass"), param="trait")
        return traits.from_object(body.trait, param="trait")
    path = inside_roots(body.path, services.settings.allowed_roots, param="path")
    try:
        if not path.is_file():
            raise Invalid("file_not_readable", f"{body.path} is no file.", param="path")
        with path.open("rb") as file:
            return traits.read(file.read(MOST_BYTES + 1), param="path")
    except OSError as error:
        raise Invalid("file_not_readable", f"{body.path}: {error.strerror}.", param="path") from error
