"""Sparse autoencoders: imported or trained, their features labelled, asked for and made concepts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.schemas import Items
from api.schemas_saes import (
    ExampleFeaturesOut,
    FeatureConceptIn,
    FeatureOut,
    FeaturesIn,
    FeaturesOut,
    FiresOut,
    LabelIn,
    LabelsIn,
    LabelsOut,
    PushedOut,
    SaeIn,
    SaeTrainIn,
    ScoredOut,
    ViewIn,
    ViewOut,
)
from service import concepts, filters, saes
from service.contracts import ConceptRecord, Example, JobRecord
from service.datasets import render
from service.errors import Invalid
from service.registry import MODELS, SAES, check_id
from service.sae_features import FeaturesRequest, OfFeature
from service.sae_planning import TrainSaeRequest, plan_training
from service.sae_records import SaeRecord
from service.sae_view import Pushed, ViewRequest
from service.saes import concept_id
from service.storage import inside_roots
from service.terms import JobKind

router = APIRouter(prefix="/v1/saes", tags=["saes"])
of_index = APIRouter(prefix="/v1/indexes", tags=["indexes"])


@router.post("", status_code=201, summary="Import a SAELens folder", responses=documented(403, 404, 409, 413, 422))
def import_sae(body: SaeIn, services: ServicesDep) -> SaeRecord:
    """Its weights are checked and copied into the storage; the same folder under the same id is no error."""
    check_id(body.id, param="id")
    model = services.registry.get(MODELS, body.model, param="model")
    roots = services.settings.allowed_roots
    folder = inside_roots(body.path, roots, param="path")
    for entry in folder.iterdir() if folder.is_dir() else ():
        inside_roots(str(entry), roots, param="path")
    files = saes.read_folder(Path(folder))
    record = saes.describe(body.id, files, model, source=str(folder), centred=body.centred)
    return saes.publish(services.registry, record, files)


@router.post(":train", status_code=202, summary="Train an SAE on an index", responses=documented(404, 409, 422))
def train_sae(body: SaeTrainIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue the training of a TopK SAE on stored activations; it is published in SAELens' format."""
    spec = plan_training(TrainSaeRequest(**body.model_dump()), services.registry)
    return accepted(response, services.jobs.submit(JobKind.TRAIN_SAE, spec))


@router.get("", summary="List SAEs")
def list_saes(services: ServicesDep) -> Items[SaeRecord]:
    return Items(items=services.registry.all(SAES))


@router.get("/{sae_id}", summary="One SAE", responses=documented(404))
def get_sae(sae_id: str, services: ServicesDep) -> SaeRecord:
    return services.registry.get(SAES, sae_id)


@router.get("/{sae_id}/labels", summary="What has been said of its features", responses=documented(404))
def get_labels(sae_id: str, services: ServicesDep) -> LabelsOut:
    record = services.registry.get(SAES, sae_id)
    return LabelsOut(sae=sae_id, labels=list(saes.labels(services.storage, record).labels))


@router.post("/{sae_id}/labels", summary="Label features", responses=documented(404, 422))
def add_labels(sae_id: str, body: LabelsIn, services: ServicesDep) -> LabelsOut:
    """Many at once, from wherever they come; earlier ones stay and are told by when they were said."""
    return _labelled(services, sae_id, body.labels, body.author)


@router.post("/{sae_id}/features/{feature}/labels", summary="Label a feature", responses=documented(404, 422))
def add_label(sae_id: str, feature: int, body: LabelIn, services: ServicesDep) -> LabelsOut:
    found = _labelled(services, sae_id, {feature: body.text}, body.author)
    return LabelsOut(sae=sae_id, labels=[each for each in found.labels if each.feature == feature])


@router.post(
    "/{sae_id}/features/{feature}:concept",
    status_code=201,
    summary="Make a feature a registered concept",
    responses=documented(404, 409, 422),
)
def feature_concept(sae_id: str, feature: int, body: FeatureConceptIn, services: ServicesDep) -> ConceptRecord:
    """`sae:ID/N` is a concept without this; a record of its own has a name, and stays in lists and comparisons."""
    return concepts.publish_feature(
        services.registry, body.id, sae_id, feature, pooling=body.pooling, param="feature"
    )


def _labelled(services: ServicesDep, sae_id: str, said: Mapping[int, str], author: str | None) -> LabelsOut:
    record = services.registry.get(SAES, sae_id)
    blank = next((feature for feature, text in said.items() if not text.strip()), None)
    if blank is not None:
        raise Invalid("empty_label", f"The label of feature {blank} is empty.", param="labels")
    held = saes.label(services.redis, services.storage, record, list(said.items()), author)
    return LabelsOut(sae=sae_id, labels=list(held.labels))


# --- features of an index -------------------------------------------------------------------------------


@of_index.post(
    "/{reference}/features",
    summary="Which features of an SAE fire on the examples?",
    responses={
        202: {"model": JobRecord, "description": "The index is being encoded; ask again when it is done"},
        **documented(404, 422, 500),
    },
)
def features(
    reference: str, body: FeaturesIn, services: ServicesDep, response: Response
) -> FeaturesOut | JobRecord:
    """Of examples their strongest features, of features their strongest examples: 202 with the job that encodes
    the index, 200 once that is kept.
    """
    about = {**body.model_dump(), "examples": tuple(body.examples), "features": tuple(body.features)}
    found = services.features.run(FeaturesRequest(index=reference, **about))
    if isinstance(found, JobRecord):
        return accepted(response, found)
    sae = found.sae.id
    return FeaturesOut(
        index=found.index.id,
        sae=sae,
        rows=found.rows,
        l0=found.l0,
        silent=found.silent,
        examples=[
            ExampleFeaturesOut(
                **_shown(each.example),
                l0=each.l0,
                features=[FiresOut(**vars(fires)) for fires in each.features],
            )
            for each in found.examples
        ],
        features=[_feature(sae, each) for each in found.features],
        most=[_feature(sae, each) for each in found.most],
        warnings=list(found.warnings),
    )


@of_index.post(
    "/{reference}/feature-view",
    summary="How far does this dataset push each feature?",
    responses=documented(404, 422, 500, 503),
)
def view(reference: str, body: ViewIn, services: ServicesDep) -> ViewOut:
    """Σ ⟨m_z, decoder row⟩ over the examples for every feature of an SAE, the largest on both sides with the
    examples behind them. No model runs.
    """
    about = {**body.model_dump(), "filter": None if body.filter is None else filters.parse(body.filter)}
    found = services.views.run(ViewRequest(index=reference, **about))
    embedding = found.array.embedding
    assert embedding is not None  # noqa: S101  (views are of embeddings)
    return ViewOut(
        index=found.index.id,
        model=found.index.model,
        sae=found.sae.id,
        query_set=embedding.query_set,
        layer=found.array.layer,
        concept_function=embedding.function,
        damping=embedding.damping,
        points=embedding.points,
        rows=found.rows,
        features=found.sae.features,
        norm=found.norm,
        up=[_pushed(found.sae.id, each) for each in found.up],
        down=[_pushed(found.sae.id, each) for each in found.down],
        warnings=list(found.warnings),
        total_ms=found.total_ms,
    )


def _feature(sae: str, each: OfFeature) -> FeatureOut:
    about = {**vars(each), "examples": _scored(each.examples)}
    return FeatureOut(concept=concept_id(sae, each.feature), **about)


def _pushed(sae: str, each: Pushed) -> PushedOut:
    about = {**vars(each), "examples": _scored(each.examples)}
    return PushedOut(concept=concept_id(sae, each.feature), **about)


def _scored(found: Sequence[tuple[float, Example]]) -> list[ScoredOut]:
    return [ScoredOut(score=score, **_shown(example)) for score, example in found]


def _shown(example: Example) -> dict[str, Any]:
    return {
        "example_id": example.id,
        "text": render(example.content),
        "metadata": dict(example.metadata),
        "places": list(example.places),
    }
