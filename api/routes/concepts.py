"""Concepts: directions in a model's residual stream, fitted by jobs."""

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas import ConceptIn, Items
from service.contracts import ConceptRecord, JobRecord
from service.planning import ConceptRequest, plan_concept
from service.registry import CONCEPTS
from service.terms import JobKind

router = APIRouter(prefix="/v1/concepts", tags=["concepts"])


@router.post("", status_code=202, summary="Fit a concept", responses=documented(404, 409, 422))
def fit_concept(body: ConceptIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue the fit of a direction as difference of means between two datasets."""
    spec = plan_concept(ConceptRequest(**body.model_dump()), services.registry, services.settings)
    return accepted(response, services.jobs.submit(JobKind.FIT_CONCEPT, spec))


@router.get("", summary="List concepts")
def list_concepts(services: ServicesDep) -> Items[ConceptRecord]:
    return Items(items=services.registry.all(CONCEPTS))


@router.get("/{concept_id}", summary="One concept, with its held-out AUROC", responses=documented(404))
def get_concept(concept_id: str, services: ServicesDep) -> ConceptRecord:
    return services.registry.get(CONCEPTS, concept_id)
