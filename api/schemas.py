"""What requests look like, and the answers that are not plain records.

Records (``service/contracts.py``) travel as they are; requests are strict, so that a misspelt field is
an error and not a default.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.contracts import JobEvent, Place, Quarantined
from service.specs import MOST_IDS, ROWS_PER_SHARD
from service.terms import (
    Checkpoints,
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    LongExamples,
    Lora,
    LossReduction,
    Method,
    Order,
    Pooling,
    Projection,
)

Id = Annotated[
    str,
    Field(
        min_length=1, max_length=128, description="Letters, digits, '.', '_' and '-'", examples=["support-bot-ft"]
    ),
]
T = TypeVar("T")


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CheckpointIn(Request):
    """One point of the fine-tuning run, as a folder of its own."""

    path: str = Field(description="Absolute path of the checkpoint's folder on the server")
    weight: float = Field(
        1.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Its share of the learning rate, for trajectory attribution",
    )


class ModelIn(Request):
    id: Id
    path: str = Field(
        description="Absolute path on the server of a Hugging Face folder (safetensors, tokenizer.json) or a LoRA",
        examples=["/models/support-bot-ft"],
    )
    base: str | None = Field(None, description="Id of the model this one was fine-tuned from; a LoRA needs it")
    checkpoints: list[CheckpointIn] = Field([], description="Checkpoints of the same run, base first")


class DatasetIn(Request):
    id: Id
    path: str = Field(
        description="Absolute path of a JSONL or JSONL.gz file under one of the server's roots",
        examples=["/data/sft-november.jsonl"],
    )
    invalid_lines: Literal["refuse", "quarantine"] = Field(
        "refuse", description="What a line that cannot be read does: refuse the file, or be set aside and counted"
    )


class CurvatureIn(Request):
    """How EK-FAC is fitted."""

    examples: int = Field(4096, ge=1, le=1_000_000, description="Training examples drawn for the factors")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Decides which, and the sampled labels")
    labels: FactorLabels = Field(FactorLabels.SAMPLED, description="'sampled' from the model, or the data's own")
    positions: FactorPositions = Field(
        FactorPositions.TARGETS, description="Where the factors' loss is: at every token, or at the targets"
    )


Damping = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class AnswersIn(Request):
    """How the base model answers the prompts itself, for kind 'difference'."""

    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False, description="0 to 0.001: greedy")
    max_new_tokens: int = Field(1000, ge=1, le=100_000)
    seed: int = Field(0, ge=0, le=2**63 - 1)


class IndexIn(Request):
    name: Id
    model: str = Field(description="Id of a registered model")
    dataset: str = Field(description="Id of a registered dataset")
    kinds: list[IndexKind] = Field([IndexKind.ACTIVATION, IndexKind.GRADIENT], min_length=1)
    layers: list[int] = Field([], description="Block outputs, 1 to n_layers. Default: the middle one")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    loss_reduction: LossReduction = LossReduction.MEAN
    projection: Projection = Field(Projection.EIGEN, description="'rademacher' is a baseline without curvature")
    projection_dim: int | None = Field(
        None,
        description="p per side of a module. Default: all eigenvectors up to width 128, then 64; rademacher: 16",
    )
    coordinates: int = Field(4096, ge=1, le=1 << 20, description="k of kind 'gradient': numbers per example")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the rademacher projection")
    query_sets: list[str] = Field([], description="Datasets Q that kind 'influence' embeds for", max_length=64)
    concept_functions: list[ConceptFunction] = Field([ConceptFunction.DOT], min_length=1)
    dampings: list[Damping] = Field([1.0], min_length=1, max_length=16, description="δ in units of the mean λ")
    embedding_coordinates: int | None = Field(
        None, ge=1, description="K: coordinates behind each embedding. Default: as many as WHENCE_HEAD_BYTES allows"
    )
    rank: int | None = Field(None, ge=1, description="Directions per embedding. Default: all hidden dimensions")
    directions: list[str] = Field([], max_length=4096, description="Concepts that a lower rank must contain")
    checkpoints: Checkpoints = Field(Checkpoints.ALL, description="What embeddings are summed over")
    modules: str = Field(
        "all",
        max_length=200,
        description="Linear maps to track: all, or words in their names joined by commas: attn, mlp, q_proj, …",
    )
    lora: Lora = Field(Lora.MERGED, description="Of a LoRA: track the weights it is merged into, or its own maps")
    answers: AnswersIn = AnswersIn()  # pyright: ignore[reportCallIssue]
    stride: int = Field(1, ge=1, description="Track every stride-th block, counted back from the deepest layer")
    curvature: CurvatureIn = CurvatureIn()  # pyright: ignore[reportCallIssue]
    max_length: int | None = Field(
        None, description="Tokens per example. Default: the model's context, at most 2048"
    )
    long_examples: LongExamples = LongExamples.TRUNCATE_RIGHT

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "november",
                    "model": "support-bot-ft",
                    "dataset": "sft-november",
                    "kinds": ["activation", "gradient", "influence"],
                    "layers": [16],
                    "query_sets": ["support-questions"],
                }
            ]
        },
    )


class QuerySetsIn(Request):
    """More questions for an index that has gradient coordinates."""

    query_sets: list[str] = Field(min_length=1, max_length=64)
    layers: list[int] = Field([], description="Default: the deepest block that the index tracks")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    concept_functions: list[ConceptFunction] = Field([ConceptFunction.DOT], min_length=1)
    dampings: list[Damping] = Field([1.0], min_length=1, max_length=16)


class AliasIn(Request):
    index: str = Field(
        description="A published version; a name or another alias stands for what it is now",
        examples=["november@v7"],
    )


class AppendIn(Request):
    dataset: str = Field(
        description="Id of a registered dataset; of its examples those are added that the index does not hold",
        examples=["sft-december"],
    )


class DeleteIn(Request):
    """Which examples a new version never ranks: by id or by metadata, one of both."""

    ids: list[str] | None = Field(
        None, min_length=1, max_length=MOST_IDS, description="Example ids, as hits name them"
    )
    filter: dict[str, Any] | None = Field(None, description="All examples with such metadata")


class CompactIn(Request):
    rows_per_shard: int = Field(
        ROWS_PER_SHARD,
        ge=1,
        le=1 << 20,
        description="Most rows of a new shard: a worker needs about three times the bytes of its widest array",
    )


class WeightedIn(Request):
    id: str = Field(description="Id of a concept")
    weight: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False)


Number = Annotated[float, Field(allow_inf_nan=False)]
HitField = Literal["text", "excerpt", "metadata", "places"]


class QuestionIn(Request):
    """What every question about an index has: the direction, the method, and which examples are ranked."""

    index: str = Field(
        description="'name' for the newest version, 'name@v3' for that one, or an alias", examples=["november"]
    )
    concept: str | None = Field(
        None, description="Id of a concept; left out with influence_function", examples=["hostile"]
    )
    concepts: list[WeightedIn] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Instead of 'concept': a weighted sum of several at one layer",
    )
    vector: list[Number] | None = Field(
        None, min_length=1, max_length=1 << 17, description="Instead of 'concept': a direction, with its 'layer'"
    )
    layer: int | None = Field(None, ge=1, description="Of the vector: which block's output it lies in")
    pooling: Pooling | None = Field(None, description="Of the vector. Default: as the index is pooled")
    method: Method = Method.VECTOR_FILTER
    order: Order = Field(
        Order.MOST, description="'most': those that push toward the concept first; 'absolute': either way"
    )
    query_set: str | None = Field(
        None, description="Dataset Q on which f_v or the loss is measured; may be left out where there is only one"
    )
    damping: Damping | None = Field(
        None, description="δ in units of the mean λ. Default 1.0; embeddings have those they were built with"
    )
    concept_function: ConceptFunction | None = Field(
        None, description="f_v of concept_influence: dot (the default) or cosine"
    )
    through: IndexKind | None = Field(
        None, description="'gradient' or 'influence'. Default: embeddings where the index has them"
    )
    filter: dict[str, Any] | None = Field(
        None,
        description="Which examples are ranked, by their metadata: a value is equality (null: absent), an object "
        "has `in`, `prefix`, `gt`, `gte`, `lt`, `lte`, `not`; several fields must all hold, of a list under `any` "
        "at least one filter; dots lead into nested metadata, and `id` is the example's own",
        examples=[
            {"topic": {"in": ["harbor", "market"]}, "score": {"gte": 1}, "source.url": {"prefix": "https://"}}
        ],
    )


class QueryIn(QuestionIn):
    k: int = Field(50, ge=1, description="How many examples are ranked")
    limit: int | None = Field(None, ge=1, description="Hits of one page. Default: all k")
    cursor: str | None = Field(None, max_length=2000, description="'next' of the page before, with the same body")
    fields: list[HitField] = Field(
        ["text", "metadata", "places"], description="What hits carry; 'excerpt': the first 200 characters"
    )


class TokenQueryIn(Request):
    """A query about single tokens of some examples."""

    index: str = Field(description="'name' for the newest version, 'name@v3' for that one", examples=["november"])
    examples: list[str] = Field(min_length=1, max_length=100, description="Example ids, as hits name them")
    concept: str | None = Field(None, description="Id of a concept; left out with influence_function")
    method: Method = Method.VECTOR_FILTER
    query_set: str | None = None
    damping: Damping | None = None
    concept_function: ConceptFunction | None = None
    through: IndexKind | None = None


class TokenOut(BaseModel):
    text: str
    share: float = Field(description="What this position adds to the score")
    predicted: bool = Field(description="Whether training predicts this token")


class TokenSharesOut(BaseModel):
    example_id: str
    score: float = Field(description="The sum of the shares: the score before the index rounded it")
    tokens: list[TokenOut] = Field(description="Empty when the example could not be indexed")


class HitOut(BaseModel):
    rank: int
    score: float = Field(description="Positive: training on it pushes the model toward the concept")
    percentile: float = Field(description="Share of the index that scores lower, in percent")
    z_score: float = Field(description="Standard deviations above the mean score of the index")
    example_id: str
    text: str = Field("", description="Where 'fields' asks for text or excerpt")
    metadata: dict[str, Any] = {}
    places: list[Place] = Field([], description="Every line of the source that holds this example")


class ConceptUsed(BaseModel):
    id: str
    model: str
    layer: int
    pooling: Pooling
    auroc_held_out: float | None = Field(description="None: the direction was given, not fitted")


class FidelityOut(BaseModel):
    """Spearman of the stored rows against wider coordinates, measured when the index was built."""

    mean: float
    least: float
    queries: int
    examples: int
    held_out: bool = Field(description="Whether the curvature was fitted without these examples")
    against: str


class Provenance(BaseModel):
    """What stands behind the scores."""

    kind: IndexKind
    layer: int | None
    query_set: str | None
    damping: float | None = Field(description="None: no curvature is involved")
    points: int = Field(description="Points of the training run that are summed; 1: the end alone")
    captured: float = Field(description="Share of the concept that the index's directions contain")
    modules: str | None = Field(None, description="Linear maps whose gradients are taken; None: no gradient")
    blocks: int | None = Field(None, description="Deepest block with such maps")
    stride: int = Field(1, description="Every so many blocks back from there")
    lora: Lora = Field(Lora.MERGED, description="Of an adapter: merged, or its own maps tracked")
    answerer: str | None = Field(None, description="Kind difference: the model that answered the prompts itself")
    fidelity: FidelityOut | None


class Timing(BaseModel):
    """Milliseconds inside the server."""

    search_ms: float
    total_ms: float
    cached: bool = Field(False, description="The same question had been answered before")


class HealthHint(BaseModel):
    """The concept health report on this question; its warnings stand among the answer's."""

    known: bool = Field(description="Whether there is one; no query waits for a model")
    said: str = Field(description="What it found, or how to get one")


class QueryOut(BaseModel):
    """Ranked training examples and where the ranking comes from."""

    index: str
    model: str
    dataset: str
    method: Method
    order: Order
    concept: ConceptUsed | None
    provenance: Provenance
    rows: int = Field(description="Examples that were ranked")
    dims: int
    hits: list[HitOut]
    next: str | None = Field(None, description="Cursor of the next page; null on the last one")
    warnings: list[str]
    timing: Timing
    health: HealthHint | None = Field(None, description="null for influence_function: no concept, no report")


class Items(BaseModel, Generic[T]):
    items: list[T]


class EventPage(BaseModel):
    events: list[JobEvent]
    cursor: str = Field(description="Pass it as 'after' to get what comes next")


class QuarantinePage(BaseModel):
    total: int
    items: list[Quarantined]


class Health(BaseModel):
    status: Literal["ok", "degraded"]
    redis: bool
    dispatcher: bool = Field(description="Whether a dispatcher is alive: jobs run only then, queries always")
    version: str
