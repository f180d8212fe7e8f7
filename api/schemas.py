"""What requests look like, and the answers that are not plain records.

Records (``service/contracts.py``) travel as they are; requests are strict, so that a misspelt field is
an error and not a default.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from service.contracts import (
    IndexKind,
    JobEvent,
    LongExamples,
    LossReduction,
    Method,
    Order,
    Place,
    Pooling,
    Quarantined,
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
        description="Absolute path of a Hugging Face folder on the server, with *.safetensors and tokenizer.json",
        examples=["/models/support-bot-ft"],
    )
    base: str | None = Field(None, description="Id of the model this one was fine-tuned from")
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


class IndexIn(Request):
    name: Id
    model: str = Field(description="Id of a registered model")
    dataset: str = Field(description="Id of a registered dataset")
    kinds: list[IndexKind] = Field([IndexKind.ACTIVATION, IndexKind.GRADIENT], min_length=1)
    layers: list[int] = Field([], description="Block outputs to pool, 1 to n_layers. Default: the middle one")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    loss_reduction: LossReduction = LossReduction.MEAN
    projection_dim: int = Field(16, description="Gradients are projected to p × p numbers per module")
    seed: int = Field(0, ge=0, description="Seed of the projection")
    max_length: int | None = Field(
        None, description="Tokens per example. Default: the model's context, at most 2048"
    )
    long_examples: LongExamples = LongExamples.TRUNCATE_RIGHT

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"name": "november", "model": "support-bot-ft", "dataset": "sft-november", "layers": [16]}]
        },
    )


class ConceptIn(Request):
    id: Id
    model: str = Field(description="Id of the model whose activations define the direction")
    positive: str = Field(description="Dataset that shows the behaviour")
    negative: str = Field(description="Dataset that does not, otherwise as similar as possible")
    layer: int = Field(description="Block output, 1 to n_layers")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    max_length: int | None = None

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "id": "hostile",
                    "model": "support-bot-ft",
                    "positive": "hostile-answers",
                    "negative": "friendly-answers",
                    "layer": 16,
                }
            ]
        },
    )


class QueryIn(Request):
    index: str = Field(description="'name' for the newest version, 'name@v3' for that one", examples=["november"])
    concept: str = Field(description="Id of a concept", examples=["hostile"])
    method: Method = Method.VECTOR_FILTER
    order: Order = Field(Order.MOST, description="'most': those that push toward the concept first")
    k: int = Field(50, ge=1, description="How many examples")
    query_set: str | None = Field(
        None, description="Dataset on which the behaviour is measured (f_v); needed by concept_influence"
    )


class HitOut(BaseModel):
    rank: int
    score: float = Field(description="Positive: training on it pushes the model toward the concept")
    example_id: str
    text: str
    metadata: dict[str, Any]
    places: list[Place] = Field(description="Every line of the source that holds this example")


class ConceptUsed(BaseModel):
    id: str
    model: str
    layer: int
    pooling: Pooling
    auroc_held_out: float


class Timing(BaseModel):
    """Milliseconds inside the server."""

    search_ms: float
    total_ms: float


class QueryOut(BaseModel):
    """Ranked training examples and where the ranking comes from."""

    index: str
    model: str
    dataset: str
    method: Method
    order: Order
    concept: ConceptUsed
    rows: int = Field(description="Examples that were ranked")
    dims: int
    hits: list[HitOut]
    warnings: list[str]
    timing: Timing


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
