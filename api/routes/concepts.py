"""Concepts: directions in a model's residual stream, fitted by jobs, put together from others, or brought along."""

import math
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas import Items
from api.schemas_concepts import DeriveIn, GiveIn, ImportIn, SuggestIn, SuggestionOut, SuggestionsOut
from api.schemas_probes import ConceptIn
from service import concept_files, concepts, derived
from service.concept_planning import ConceptRequest, plan_concept
from service.contracts import ConceptRecord, JobRecord
from service.derived import Recipe
from service.questions import Weighted
from service.registry import CONCEPTS, MODELS
from service.suggestions import Suggestion, SuggestRequest
from service.terms import JobKind

router = APIRouter(prefix="/v1/concepts", tags=["concepts"])


@router.post("", status_code=202, summary="Fit a concept", responses=documented(404, 409, 422))
def fit_concept(body: ConceptIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue the fit of a direction between labelled examples: two datasets, two lists in the request, or one
    dataset with a label in its metadata. Several layers are one pass; the concept is published at the layer with
    the highest held-out AUROC, with what was measured at every layer in its `evidence`.
    """
    request = ConceptRequest(**body.asked())
    spec = plan_concept(request, services.registry, services.storage, services.settings)
    return accepted(response, services.jobs.submit(JobKind.FIT_CONCEPT, spec))


@router.post(":derive", status_code=201, summary="A concept out of others", responses=documented(404, 409, 422))
def derive_concept(body: DeriveIn, services: ServicesDep) -> ConceptRecord:
    """A difference (weights 1 and −1), an average (equal weights), any weighted sum of unit directions, and what is
    left of it outside the span of others. They must be of one lineage, width, layer and pooling.
    """
    recipe = Recipe(tuple(Weighted(each.concept, each.weight) for each in body.terms), tuple(body.project_out))
    return derived.derive(services.storage, services.registry, body.id, recipe)


@router.post(":give", status_code=201, summary="A concept from numbers", responses=documented(404, 409, 422))
def give_concept(body: GiveIn, services: ServicesDep) -> ConceptRecord:
    """Register a direction that was made elsewhere; its length is kept as 'norm', queries use the direction."""
    model = services.registry.get(MODELS, body.model, param="model")
    vector = np.array(body.vector, dtype=np.float64)
    return derived.give(services.storage, services.registry, body.id, model, body.layer, body.pooling, vector)


@router.post(
    ":import", status_code=201, summary="A concept from a safetensors file", responses=documented(404, 409, 422)
)
def import_concept(body: ImportIn, services: ServicesDep) -> ConceptRecord:
    """Register what another server exported, or one vector of any safetensors file. A concept of another lineage,
    width or layer than the model's is refused with the reason.
    """
    at = (services.storage, services.registry)
    if body.concept is not None:
        return concept_files.bring(*at, body.id, body.safetensors, body.concept, model=body.model)
    assert body.id and body.model and body.layer is not None and body.pooling is not None  # noqa: S101
    where = {"model": body.model, "layer": body.layer, "pooling": body.pooling}
    return concept_files.bring_foreign(*at, body.id, body.safetensors, **where)


@router.post(
    ":suggest",
    summary="Which known directions tell these examples apart?",
    responses={
        202: {"model": JobRecord, "description": "What the answer needs is being computed; ask again then"},
        **documented(404, 422),
    },
)
def suggest_concepts(body: SuggestIn, services: ServicesDep, response: Response) -> SuggestionsOut | JobRecord:
    """Rank registered concepts, SAE features and the main directions of an index by how well they separate a few
    labelled examples, ten a side, say.
    """
    request = SuggestRequest(
        model=body.model,
        positive=tuple(body.positive),
        negative=tuple(body.negative),
        layers=tuple(body.layers),
        pooling=body.pooling,
        index=body.index,
        query_set=body.query_set,
        count=body.k,
    )
    found = services.suggestions.run(request)
    if isinstance(found, JobRecord):
        return accepted(response, found)
    about = {name: getattr(found, name) for name in ("candidates", "by_chance", "n_positive", "n_negative")}
    return SuggestionsOut(
        suggestions=[_suggestion(each) for each in found.found],
        quarantined=found.quarantined,
        warnings=list(found.warnings),
        **about,
    )


def _suggestion(found: Suggestion) -> SuggestionOut:
    effect = found.effect if math.isfinite(found.effect) else None
    return SuggestionOut.model_validate({**vars(found), "effect": effect})


@router.get("", summary="List concepts")
def list_concepts(services: ServicesDep) -> Items[ConceptRecord]:
    return Items(items=services.registry.all(CONCEPTS))


@router.get("/{concept_id}", summary="One concept, with its held-out AUROC", responses=documented(404))
def get_concept(concept_id: str, services: ServicesDep) -> ConceptRecord:
    return services.registry.get(CONCEPTS, concept_id)


@router.get("/sae:{sae_id}/{feature}", summary="A feature of an SAE as a concept", responses=documented(404, 422))
def get_feature(sae_id: str, feature: str, services: ServicesDep) -> ConceptRecord:
    """What queries take `sae:ID/N` for. It is registered nowhere; `POST /v1/saes/ID/features/N:concept` does it."""
    return concepts.get(services.registry, f"sae:{sae_id}/{feature}")


@router.get("/{concept_id}/sidecar", summary="What stands beside its safetensors file", responses=documented(404))
def get_sidecar(concept_id: str, services: ServicesDep) -> dict[str, Any]:
    """The JSON that :import reads, together with the file."""
    return concept_files.sidecar(services.registry.get(CONCEPTS, concept_id))


@router.get(
    "/{concept_id}/safetensors",
    summary="Its direction as a file",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, **documented(404, 503)},
)
def get_safetensors(concept_id: str, services: ServicesDep) -> Response:
    """One tensor 'direction', (width,) float32 of unit norm."""
    record = services.registry.get(CONCEPTS, concept_id)
    name = f'attachment; filename="{concept_id}.safetensors"'
    return Response(
        concepts.tensor_file(services.storage, record),
        media_type="application/octet-stream",
        headers={"Content-Disposition": name, "ETag": f'"{record.sha256}"'},
    )
