"""Whole rankings: every score as a file, groups of examples, two rankings side by side."""

import json
import re

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.routes.queries import provenance, question
from api.schemas import ConceptUsed
from api.schemas_rankings import (
    CompareIn,
    CompareOut,
    GroupOut,
    GroupsIn,
    GroupsOut,
    MoverOut,
    OverlapOut,
    RankingOut,
    ScoresIn,
    StandingOut,
    TermOut,
)
from service import codec, ranking_file
from service.contracts import Example, JobRecord
from service.datasets import render
from service.feature_groups import ByFeatures
from service.groups import GroupBy, Portrait, Shown
from service.whole import Moved, Scored

router = APIRouter(prefix="/v1", tags=["queries"])

PARQUET = "application/vnd.apache.parquet"
_FILE = {"content": {PARQUET: {}}, "description": "The whole ranking"}
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9@._-]+")
_LONGEST = 200  # characters of a file's name
_EXCERPT = 200  # of a mover's text
_JOB = {
    202: {"model": JobRecord, "description": "What the answer needs is being computed; ask again when it is done"}
}


@router.post(
    "/queries/scores",
    summary="The score of every example, as a Parquet file",
    response_class=Response,
    responses={200: _FILE, **_JOB, **documented(404, 422, 503)},
)
def scores(body: ScoresIn, services: ServicesDep) -> Response:
    """Stream the whole ranking, first rank first: rank, example_id, score, percentile, z_score, file and line of
    its first place, places (how many) and, on request, metadata as JSON. The schema's metadata tell what was ranked
    and what stands behind it.
    """
    found = services.whole.scores(question(body, 1))
    if isinstance(found, JobRecord):
        response = JSONResponse(codec.to_plain(found))
        accepted(response, found)
        return response
    told = _ranking(found)
    facts = {
        "index": told.index,
        "method": told.method,
        "order": told.order,
        "concept": "null" if told.concept is None else told.concept.model_dump_json(),
        "provenance": told.provenance.model_dump_json(),
        "warnings": json.dumps(told.warnings, ensure_ascii=False),
    }
    about = told.concept.id if told.concept else "loss"
    name = _NO_FILE_NAME.sub("_", f"{told.index}-{about}-{told.method}")[:_LONGEST] + ".parquet"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Whence-Rows": str(told.rows)}
    pieces = ranking_file.stream(found, facts, metadata=body.metadata)
    return StreamingResponse(pieces, media_type=PARQUET, headers=headers)


@router.post(
    "/queries/groups",
    summary="Which groups of training examples pushed the model toward this concept?",
    responses={**_JOB, **documented(404, 422, 503)},
)
def groups(body: GroupsIn, services: ServicesDep, response: Response) -> GroupsOut | JobRecord:
    """Group all examples by a metadata field, by what they do to the model, or by the features of an SAE that fire
    on them: sum and mean of scores with its interval, each group's share of the whole and of the first k, the
    examples that come first in it, and its words.
    """
    by = GroupBy(body.group_by, body.clusters, body.seed, _features(body))
    shown = Shown(body.sort, body.limit, body.examples, body.terms)
    found = services.groups.run(question(body, body.k), by, shown)
    if isinstance(found, JobRecord):
        return accepted(response, found)
    told, members = dict(_ranking(found.scored)), found.members
    if members is not None:
        told["warnings"] = [*told["warnings"], *members.warnings]
    return GroupsOut(
        **told,
        group_by=body.group_by,
        sae=body.sae,
        features=None if members is None else list(members.features),
        threshold=None if members is None else body.threshold,
        relative=body.relative,
        overlapping=members is not None,
        covered=None if members is None else members.covered,
        rest=None if found.rest is None else _portrait(found.rest),
        clusters=body.clusters,
        cohesion=found.cohesion,
        sort=body.sort,
        k=found.k,
        total=found.total,
        groups=list(map(_portrait, found.groups)),
    )


def _features(body: GroupsIn) -> ByFeatures | None:
    if body.sae is None:
        return None
    features = None if body.features is None else tuple(body.features)
    return ByFeatures(body.sae, features, body.threshold, body.relative)


def _portrait(found: Portrait) -> GroupOut:
    group = found.group
    width = group.error
    return GroupOut(
        value=group.value,
        label=found.label,
        count=group.count,
        sum=group.sum,
        mean=group.mean,
        low=None if width is None else group.mean - width,
        high=None if width is None else group.mean + width,
        share=group.share,
        share_of_top=group.share_of_top,
        lift=group.lift,
        examples=[
            StandingOut(
                score=each.score,
                example_id=each.example.id,
                text=_beginning(each.example),
                metadata=dict(each.example.metadata),
                places=list(each.example.places),
            )
            for each in found.examples
        ],
        terms=[TermOut(word=each.word, z=each.z, share=each.share) for each in found.terms],
    )


@router.post("/compare", summary="Where do two rankings differ?", responses={**_JOB, **documented(404, 422, 503)})
def compare(body: CompareIn, services: ServicesDep, response: Response) -> CompareOut | JobRecord:
    """Rank correlation, overlap of the first k, and the examples that moved most, over those that both rank."""
    a, b = question(body.a, body.k), question(body.b, body.k)
    found = services.whole.compare(a, b, k=body.k, movers=body.movers)
    if isinstance(found, JobRecord):
        return accepted(response, found)
    return CompareOut(
        a=_ranking(found.a),
        b=_ranking(found.b),
        common=found.found.n,
        only_a=found.only_a,
        only_b=found.only_b,
        spearman=found.found.spearman,
        overlaps=[OverlapOut.model_validate(each, from_attributes=True) for each in found.found.overlaps],
        up=list(map(_mover, found.up)),
        down=list(map(_mover, found.down)),
    )


def _ranking(scored: Scored) -> RankingOut:
    ready = scored.prepared
    concept = ready.asked.concept
    return RankingOut(
        index=ready.index.id,
        model=ready.index.model,
        dataset=ready.index.dataset,
        method=ready.asked.method,
        order=scored.order,
        concept=None if concept is None else ConceptUsed.model_validate(concept, from_attributes=True),
        provenance=provenance(ready.index, ready.matched, ready.fidelity),
        rows=len(scored.scores),
        warnings=list(ready.warnings),
    )


def _mover(moved: Moved) -> MoverOut:
    mover, example = moved.mover, moved.example
    return MoverOut(
        example_id=example.id,
        rank_a=mover.rank_a,
        rank_b=mover.rank_b,
        percentile_a=mover.percentile_a,
        percentile_b=mover.percentile_b,
        text=_beginning(example),
        metadata=dict(example.metadata),
        places=list(example.places),
    )


def _beginning(example: Example) -> str:
    text = render(example.content)
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"
