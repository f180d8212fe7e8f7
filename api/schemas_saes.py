"""Requests and answers about sparse autoencoders and their features."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from api.schemas import Damping, Id, Request
from service.contracts import Place
from service.sae_records import Label
from service.terms import ConceptFunction, Pooling

Feature = Annotated[int, Field(ge=0)]


class SaeIn(Request):
    """A SAELens folder on the server."""

    id: Id
    path: str = Field(description="Absolute path of a folder with cfg.json and sae_weights.safetensors")
    model: str = Field(description="Id of the registered model whose residual stream it reads")
    centred: bool | None = Field(
        None,
        description="Whether rows lose their mean over the hidden dimensions first, as with TransformerLens' "
        "center_writing_weights. Default: as cfg.json says, where the model's norms make a difference",
    )


class SaeTrainIn(Request):
    """A TopK SAE on the stored activations of an index; what is left out follows from their number and width."""

    id: Id
    index: str = Field(description="'name' for the newest version, 'name@v3' for that one, or an alias")
    layer: int | None = Field(None, description="Of its activations. May be left out where there is one only")
    features: int | None = Field(None, ge=2, le=1 << 20, description="Default: one for every 20 rows, at most 8 d")
    k: int | None = Field(None, ge=1, description="Features on a row. Default: a third of them, at most 32")
    steps: int | None = Field(None, ge=1, le=10_000_000, description="Default: 20 passes, 2,000 steps at least")
    batch: int | None = Field(
        None, ge=1, le=1 << 20, description="Rows of a step. Default: a quarter, at most 1,024"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Of Adam. Default: 2e-4 · √(16,384 / features), at most 0.01",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1)
    auxiliary: float = Field(
        1 / 32, ge=0, le=10, allow_inf_nan=False, description="Weight of the dead features' loss"
    )
    held_out: float = Field(0.1, gt=0, le=0.5, description="Share of the rows that figures are measured on")
    most_rows: int = Field(1 << 18, ge=32, le=1 << 24, description="More are sampled by the seed")


class LabelIn(Request):
    text: str = Field(min_length=1, max_length=1000)
    author: str | None = Field(None, max_length=200)


class LabelsIn(Request):
    """Labels of many features at once."""

    labels: dict[Feature, Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        min_length=1, max_length=200_000, description="Feature → what it means", examples=[{"7": "rude answers"}]
    )
    author: str | None = Field(None, max_length=200)


class LabelsOut(BaseModel):
    sae: str
    labels: list[Label] = Field(description="Oldest first; of several about one feature the last is shown")


class FeatureConceptIn(Request):
    """The feature as a registered concept, under a name of its own."""

    id: Id
    pooling: Pooling | None = Field(None, description="Default: that of the SAE's rows, else response_mean")


class FeaturesIn(Request):
    """Which features fire where: of some examples, of some features, or of the whole index."""

    sae: str = Field(description="Id of an SAE at a layer of the index's activations")
    examples: list[str] = Field([], max_length=100, description="Example ids whose features are told")
    features: list[Feature] = Field([], max_length=100, description="Features whose examples are told")
    count: int = Field(10, ge=1, le=100, description="Features of an example, and examples of a feature, at most")
    top: int = Field(20, ge=0, le=1000, description="Features that fire on most examples, told as well")


class FiresOut(BaseModel):
    feature: int
    value: float
    label: str | None


class ExampleFeaturesOut(BaseModel):
    example_id: str
    text: str
    metadata: dict[str, Any]
    places: list[Place]
    l0: int = Field(description="How many features fire on it; the strongest are told")
    features: list[FiresOut]


class ScoredOut(BaseModel):
    score: float
    example_id: str
    text: str
    metadata: dict[str, Any]
    places: list[Place]


class FeatureOut(BaseModel):
    feature: int
    concept: str = Field(description="Its id where a concept is asked for")
    label: str | None
    share: float = Field(description="Of the index's examples on which it fires")
    mean: float = Field(description="Its value where it fires")
    largest: float
    training_share: float | None = Field(description="On the data of its maker, from sparsity.safetensors")
    examples: list[ScoredOut] = Field(description="Those on which it is strongest")


class FeaturesOut(BaseModel):
    index: str
    sae: str
    rows: int
    l0: float = Field(description="Features that fire on an example, on average")
    silent: float = Field(description="Share of the features that fire on no example")
    examples: list[ExampleFeaturesOut]
    features: list[FeatureOut]
    most: list[FeatureOut] = Field(description="Those that fire on most examples, without the examples")
    warnings: list[str]


class ViewIn(Request):
    """How far the dataset pushes each feature. What there is one of may be left out."""

    sae: str = Field(description="Id of an SAE at the layer of an influence embedding")
    query_set: str | None = Field(None, description="Dataset Q that the embedding is about")
    concept_function: ConceptFunction | None = Field(None, description="Default: dot, where there are several")
    damping: Damping | None = Field(None, description="Default: 1.0, where there are several")
    count: int = Field(10, ge=1, le=100, description="Features on each side")
    examples: int = Field(3, ge=0, le=100, description="Examples that push each feature furthest")
    filter: dict[str, Any] | None = Field(None, description="Which examples are summed, as in queries")


class PushedOut(BaseModel):
    feature: int
    concept: str = Field(description="Its id where a concept is asked for")
    label: str | None
    push: float = Field(description="The sum of its scores by concept_influence over the examples")
    mean: float = Field(description="That of one example")
    error: float = Field(description="Standard error of the mean, over the examples")
    share: float = Field(description="|push| over its sum for all features")
    cosine: float = Field(description="Of the dataset's whole push with the feature's direction")
    upward: float = Field(description="Share of the examples that push it up")
    captured: float = Field(description="Share of the direction that the index's directions contain")
    examples: list[ScoredOut] = Field(description="Those that push it furthest that way")


class ViewOut(BaseModel):
    index: str
    model: str
    sae: str
    query_set: str
    layer: int | None
    concept_function: ConceptFunction
    damping: float
    points: int
    rows: int = Field(description="Examples that were summed")
    features: int
    norm: float = Field(description="Of the mean embedding: what one example does on average")
    up: list[PushedOut]
    down: list[PushedOut]
    warnings: list[str]
    total_ms: float
