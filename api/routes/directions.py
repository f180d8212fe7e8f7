"""What does this dataset do to the model, when nobody has named the concept?"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas_evidence import AlignedOut, DirectionOut, DirectionsIn, DirectionsOut, ExtremeOut, MeanOut
from service.contracts import JobRecord
from service.datasets import render
from service.directions import Aligned, Directions, DirectionsRequest, Extreme

router = APIRouter(prefix="/v1/indexes", tags=["indexes"])


@router.post(
    "/{reference}/directions",
    summary="What does this dataset do to the model?",
    responses={
        202: {"model": JobRecord, "description": "They are being computed; ask again when it is done"},
        **documented(404, 422, 500, 503),
    },
)
def directions(
    reference: str, body: DirectionsIn, services: ServicesDep, response: Response
) -> DirectionsOut | JobRecord:
    """The top singular directions of the influence embeddings, with the concepts along them and the examples at
    their ends: 202 with the job that finds them, 200 once they are kept.
    """
    request = DirectionsRequest(index=reference, **body.model_dump(exclude={"vectors"}))
    found = services.directions.run(request)
    return accepted(response, found) if isinstance(found, JobRecord) else _present(found, vectors=body.vectors)


def _present(found: Directions, *, vectors: bool) -> DirectionsOut:
    about: Any = found.array.embedding
    return DirectionsOut(
        index=found.index.id,
        model=found.index.model,
        dataset=found.index.dataset,
        query_set=about.query_set,
        layer=found.array.layer,
        concept_function=about.function,
        damping=about.damping,
        points=about.points,
        rows=found.rows,
        dims=found.array.dims,
        mean=MeanOut(norm=found.mean_norm, share=found.mean_share, concepts=_aligned(found.mean_concepts)),
        directions=[
            DirectionOut(
                number=each.number,
                singular_value=each.value,
                share=each.share,
                cumulative_share=each.cumulative,
                concepts=_aligned(each.concepts),
                most=_extremes(each.most),
                least=_extremes(each.least),
                vector=each.vector.tolist() if vectors else None,
            )
            for each in found.directions
        ],
        seconds=found.seconds,
        warnings=list(found.warnings),
    )


def _aligned(found: Sequence[Aligned]) -> list[AlignedOut]:
    return [AlignedOut(concept=each.concept.id, cosine=each.cosine) for each in found]


def _extremes(found: Sequence[Extreme]) -> list[ExtremeOut]:
    return [
        ExtremeOut(
            score=each.score,
            example_id=each.example.id,
            text=render(each.example.content),
            metadata=dict(each.example.metadata),
            places=list(each.example.places),
        )
        for each in found
    ]
