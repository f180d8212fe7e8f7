"""The best of an approximate ranking, scored again without approximation."""

from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.routes.queries import question
from api.schemas import ConceptUsed
from api.schemas_evidence import RerankedOut, RerankIn, RerankOut, UnscoredOut
from service.contracts import JobRecord
from service.datasets import render
from service.reranking import Reranked

router = APIRouter(prefix="/v1/queries", tags=["queries"])


@router.post(
    "/rerank",
    summary="Rescore the best candidates with untruncated EK-FAC",
    responses={
        202: {
            "model": JobRecord,
            "description": "What the answer needs is being computed; ask again when it is done",
        },
        **documented(404, 422, 500, 503),
    },
)
def rerank(body: RerankIn, services: ServicesDep, response: Response) -> RerankOut | JobRecord:
    """The first ``candidates`` of the query's own ranking in the order of their exact scores, and how far both
    agree: 202 with a job (first the query's own, where it needs one), 200 once the scores are kept.
    """
    found = services.reranking.run(question(body, body.k), body.candidates)
    return accepted(response, found) if isinstance(found, JobRecord) else _present(body, found)


def _present(body: RerankIn, found: Reranked) -> RerankOut:
    concept: Any = found.concept
    return RerankOut(
        index=found.index.id,
        model=found.index.model,
        method=body.method,
        order=body.order,
        concept=None if concept is None else ConceptUsed.model_validate(concept, from_attributes=True),
        kind=found.array.kind,
        query_set=found.query_set,
        damping=found.damping,
        points=found.points,
        candidates=found.candidates,
        spearman=found.spearman,
        seconds=found.seconds,
        hits=[
            RerankedOut(
                rank=hit.rank,
                approximate_rank=hit.approximate_rank,
                score=hit.score,
                approximate_score=hit.approximate_score,
                example_id=hit.example.id,
                text=render(hit.example.content),
                metadata=dict(hit.example.metadata),
                places=list(hit.example.places),
            )
            for hit in found.hits
        ],
        unscored=[
            UnscoredOut(example_id=one.example_id, approximate_rank=one.approximate_rank, reason=one.reason)
            for one in found.unscored
        ],
        warnings=list(found.warnings),
    )
