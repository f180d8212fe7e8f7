"""The question that Whence exists for."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from pydantic_core import to_json

from api.dependencies import Services, ServicesDep, accepted
from api.problems import documented
from api.schemas import (
    ConceptUsed,
    FidelityOut,
    HealthHint,
    HitOut,
    Items,
    Provenance,
    QueryIn,
    QueryOut,
    QuestionIn,
    Timing,
    TokenOut,
    TokenQueryIn,
    TokenSharesOut,
)
from service import codec, filters
from service.contracts import Fidelity, IndexRecord, JobRecord
from service.datasets import render
from service.errors import DomainError, Invalid
from service.matching import Matched
from service.paging import Page
from service.queries import Answer, Hit
from service.questions import Query, Weighted
from service.terms import IndexKind, Order

_TOGETHER = 16  # concepts that are searched at the same time

router = APIRouter(prefix="/v1/queries", tags=["queries"])


@router.post(
    "",
    summary="Which training examples pushed the model toward this concept?",
    response_model=QueryOut,
    responses={
        202: {
            "model": JobRecord,
            "description": "What the answer needs is being computed; ask again when it is done",
        },
        **documented(404, 422, 503),
    },
)
def query(body: QueryIn, services: ServicesDep) -> Response:
    """Rank the examples of an index. No model runs: 200 with the answer, or 202 with the job it needs first."""
    _check_k(body, services)
    found = services.queries.run(question(body, body.k), Page(body.limit, body.cursor))
    if isinstance(found, JobRecord):
        headers = {"Location": f"/v1/jobs/{found.id}"}
        return Response(codec.encode(found), status_code=202, headers=headers, media_type="application/json")
    return _answer(body, found)


def _answer(body: QueryIn, answer: Answer) -> Response:
    """The JSON of ``_present``, without a model for every hit: of a hundred, that is most of the work."""
    about = _present(body, dataclasses.replace(answer, hits=())).model_dump(mode="json")
    wanted: set[str] = set(body.fields)
    about["hits"] = [_hit(hit, wanted) for hit in answer.hits]
    return Response(to_json(about, inf_nan_mode="null"), media_type="application/json")


@router.post(
    "/each",
    summary="One ranking for each of several concepts",
    responses=documented(404, 422, 503),
)
def each(body: QueryIn, services: ServicesDep) -> Items[QueryOut | JobRecord]:
    """The ranking of every concept in 'concepts' by itself, in order, searched together in one pass over the rows;
    where one needs a job first, the job stands in its place. Weights scale the scores.
    """
    if body.concepts is None:
        raise Invalid("concepts_needed", "Name the concepts to be ranked in 'concepts'.", param="concepts")
    if body.cursor is not None or body.limit is not None:
        detail = "Pages are of one ranking: ask POST /v1/queries for each concept to page through it."
        raise Invalid("cursor_not_used", detail, param="cursor" if body.cursor else "limit")
    _check_k(body, services)
    wanted = [body.model_copy(update={"concepts": [one]}) for one in body.concepts]
    with ThreadPoolExecutor(min(len(wanted), _TOGETHER)) as threads:
        found = list(threads.map(partial(_one_of_each, services), range(len(wanted)), wanted))
    return Items(
        items=[
            answer if isinstance(answer, JobRecord) else _present(one, answer)
            for one, answer in zip(wanted, found, strict=True)
        ]
    )


def _one_of_each(services: Services, number: int, body: QueryIn) -> Answer | JobRecord:
    """The ranking of the concept with this number, whose place in the request errors name."""
    try:
        return services.queries.run(question(body, body.k))
    except DomainError as error:
        if error.param in {"concepts", "concepts[0]"} and error.code != "concept_needed":
            error.param = f"concepts[{number}]"
        raise


@router.post(
    "/tokens",
    summary="Which tokens of these examples does their score come from?",
    responses={
        202: {"model": JobRecord, "description": "The shares are being computed; ask again when it is done"},
        **documented(404, 422, 503),
    },
)
def tokens(body: TokenQueryIn, services: ServicesDep, response: Response) -> Items[TokenSharesOut] | JobRecord:
    """Shares of tokens, which sum to the score: 202 with the job that computes them, 200 once they are kept."""
    fields = body.model_dump(exclude={"examples"})
    found = services.queries.tokens(Query(**fields, order=Order.MOST, k=1), tuple(body.examples))
    if isinstance(found, JobRecord):
        return accepted(response, found)
    return Items(
        items=[
            TokenSharesOut(
                example_id=item,
                score=one.score,
                tokens=[
                    TokenOut(text=text, share=share, predicted=predicted)
                    for text, share, predicted in zip(one.texts, one.shares, one.predicted, strict=True)
                ],
            )
            for item, one in zip(body.examples, found, strict=True)
        ]
    )


def _check_k(body: QueryIn, services: ServicesDep) -> None:
    if body.k > services.settings.max_k:
        raise Invalid("k_too_large", f"k may be {services.settings.max_k} at most.", param="k")


def question(body: QuestionIn, k: int) -> Query:
    """The domain's form of a question."""
    own = {each.name for each in dataclasses.fields(Query)}
    asked = {name: value for name, value in body if name in own}
    if body.concepts is not None:
        asked["concepts"] = tuple(Weighted(each.id, each.weight) for each in body.concepts)
    if body.vector is not None:
        asked["vector"] = tuple(body.vector)
    if body.filter is not None:
        asked["filter"] = filters.parse(body.filter)
    return Query(**{**asked, "k": k})


def _tracked(index: IndexRecord, kind: IndexKind) -> dict[str, Any]:
    """What of the build's settings bears on rows of this kind."""
    if kind == IndexKind.DIFFERENCE:
        return {"answerer": index.answerer}
    if kind == IndexKind.ACTIVATION:
        return {}
    return {name: getattr(index, name) for name in ("modules", "blocks", "stride", "lora")}


def provenance(index: IndexRecord, found: Matched, fidelity: Fidelity | None) -> Provenance:
    """What stands behind the scores."""
    measured: Any = fidelity
    return Provenance(
        kind=found.array.kind,
        layer=found.array.layer,
        query_set=found.query_set,
        damping=found.damping,
        points=found.points,
        captured=found.captured,
        **_tracked(index, found.array.kind),
        fidelity=None if measured is None else FidelityOut.model_validate(measured, from_attributes=True),
    )


def _present(body: QueryIn, answer: Answer) -> QueryOut:
    concept: Any = answer.concept
    found, health = answer.matched, answer.health
    return QueryOut(
        index=answer.index.id,
        model=answer.index.model,
        dataset=answer.index.dataset,
        method=body.method,
        order=body.order,
        concept=None if concept is None else ConceptUsed.model_validate(concept, from_attributes=True),
        provenance=provenance(answer.index, found, answer.fidelity),
        rows=answer.rows,
        dims=found.array.dims,
        hits=[HitOut.model_validate(_hit(hit, set(body.fields))) for hit in answer.hits],
        next=answer.page.following,
        warnings=list(answer.warnings),
        health=None if health is None else HealthHint(known=health.known, said=health.said),
        timing=Timing(
            search_ms=round(answer.search_ms, 3), total_ms=round(answer.total_ms, 3), cached=answer.cached
        ),
    )


_EXCERPT = 200  # characters


def _hit(hit: Hit, wanted: set[str]) -> dict[str, Any]:
    """The fields of HitOut."""
    text = render(hit.example.content) if wanted & {"text", "excerpt"} else ""
    if "text" not in wanted and len(text) > _EXCERPT:
        text = text[:_EXCERPT] + "…"
    return {
        "rank": hit.rank,
        "score": hit.score,
        "percentile": round(hit.percentile, 4),
        "z_score": round(hit.z_score, 4),
        "example_id": hit.example.id,
        "text": text,
        "metadata": dict(hit.example.metadata) if "metadata" in wanted else {},
        "places": hit.example.places if "places" in wanted else (),
    }
