"""What speaks for and against an attribution to a concept."""

from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas import ConceptUsed
from api.schemas_health import (
    AgreementOut,
    ChangeOut,
    DomainOut,
    DoubtOut,
    EstimateOut,
    HealthIn,
    HealthOut,
    MovementOut,
    PointOut,
    TurnOut,
)
from service import concepts
from service.concept_health import HealthRequest, Known, question
from service.contracts import JobRecord
from service.health_doubts import diverges, doubts, moved, out_of_domain, turned
from service.health_records import Agreement, Domain, Estimate, Movement
from service.questions import Weighted

router = APIRouter(prefix="/v1/queries", tags=["queries"])


@router.post(
    "/health",
    summary="What speaks for and against attributions to this concept?",
    responses={
        202: {"model": JobRecord, "description": "The report is being made; ask again when it is done"},
        **documented(404, 422, 503),
    },
)
def health(body: HealthIn, services: ServicesDep, response: Response) -> HealthOut | JobRecord:
    """Held-out AUROC; f_v(Q) along the run and whether it moved or turned; gradients against activations; whether Q
    and the concept's own examples lie in the index's domain: 202 with the job, 200 once the report is kept.
    """
    fields = body.model_dump(exclude={"concepts", "vector"})
    vector = None if body.vector is None else tuple(body.vector)
    terms = None if body.concepts is None else tuple(Weighted(each.id, each.weight) for each in body.concepts)
    found = services.health.run(question(HealthRequest(vector=vector, **fields), terms))
    return accepted(response, found) if isinstance(found, JobRecord) else _present(found)


def _present(found: Known) -> HealthOut:
    report, concept = found.report, found.concept
    own = [DoubtOut(code="concept_doubtful", said=said) for said in concepts.doubts(concept)]
    return HealthOut(
        index=report.index,
        model=found.index.model,
        concept=ConceptUsed.model_validate(concept, from_attributes=True),
        query_set=report.query_set,
        concept_function=report.function,
        points=report.points,
        movement=None if report.movement is None else _movement(report.movement),
        domain=None if report.domain is None else _domain(report.domain),
        concept_domain=None if report.concept_domain is None else _domain(report.concept_domain),
        agreement=None if report.agreement is None else _agreement(report.agreement),
        absent=dict(report.absent),
        doubts=[*own, *(DoubtOut(code=each.code, said=each.said) for each in doubts(report))],
        seconds=report.seconds,
    )


def _movement(found: Movement) -> MovementOut:
    change, turn = found.change, found.turn
    return MovementOut(
        examples=found.examples,
        quarantined=found.quarantined,
        points=[PointOut(name=each.name, f=_estimate(each.f)) for each in found.points],
        change=None if change is None else ChangeOut(**{**vars(change), "mean": _estimate(change.mean)}),
        moved=moved(found),
        turn=None if turn is None else TurnOut(**{**vars(turn), "point": found.points[turn.point].name}),
        turned=turned(found),
        left_out=dict(found.left_out),
    )


def _estimate(found: Estimate) -> EstimateOut:
    return EstimateOut(**vars(found))


def _domain(found: Domain) -> DomainOut:
    about: dict[str, Any] = vars(found)
    return DomainOut(**about, outside=out_of_domain(found))


def _agreement(found: Agreement) -> AgreementOut:
    about = {name: value for name, value in vars(found).items() if name != "array"}
    return AgreementOut(kind=found.array.kind, diverges=diverges(found), **about)
