"""Does the attribution predict what retraining does?"""

from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas_validations import LoraIn, ValidationIn, ValidationOut
from service.contracts import JobRecord
from service.questions import Query
from service.terms import JobState, Order
from service.training import LoraRecipe
from service.validating import RecipeRequest, TraitRequest, Validation, ValidationRequest
from service.validation_records import Budget, Design

router = APIRouter(prefix="/v1/validations", tags=["validations"])

_QUESTION = {"index", "concept", "method", "query_set", "damping", "concept_function", "through"}


@router.post(
    "",
    summary="Does the attribution predict what retraining does?",
    responses={
        202: {"model": JobRecord, "description": "It is being found out; ask again when the job is done"},
        **documented(404, 422, 503),
    },
)
def validate(body: ValidationIn, services: ServicesDep, response: Response) -> ValidationOut | JobRecord:
    """Retrain the index's model from its base on subsets of its data and compare with the sums of scores: 202 with
    a job (first the query's own, where it needs one), 200 once the report is kept. The id of the validation is
    `key` in the job's spec.
    """
    found = services.validations.run(_request(body))
    return accepted(response, found) if isinstance(found, JobRecord) else _present(found)


@router.get("/{reference}", summary="A validation: plan, report and verdict", responses=documented(404, 503))
def validation(reference: str, services: ServicesDep) -> ValidationOut:
    """By its id or by its job's: the job as it stands, the plan once it is decided, the report at the end."""
    return _present(services.validations.get(reference))


def _request(body: ValidationIn) -> ValidationRequest:
    lora = body.recipe.lora
    if isinstance(lora, LoraIn):
        lora = LoraRecipe(lora.r, lora.alpha, tuple(lora.targets))
    design: dict[str, Any] = body.design.model_dump()
    design["fractions"] = tuple(sorted(body.design.fractions))
    return ValidationRequest(
        query=Query(**body.model_dump(include=_QUESTION), order=Order.MOST, k=1),
        recipe=RecipeRequest(**body.recipe.model_dump(exclude={"lora"}), lora=lora),
        design=Design(**design),
        budget=Budget(**body.budget.model_dump()),
        trait=TraitRequest(**body.trait.model_dump()) if body.trait is not None else None,
    )


def _present(found: Validation) -> ValidationOut:
    state = found.job.state if found.job is not None else JobState.QUEUED
    state = state if found.report is None else "done"
    return ValidationOut(id=found.id, state=state, job=found.job, plan=found.plan, report=found.report)
