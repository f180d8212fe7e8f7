"""Requests that make concepts out of other concepts, of numbers, and of files."""

from typing import Annotated, Any, Literal, Self

from pydantic import Base64Bytes, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from api.schemas import Id, Request
from service.specs import MOST_TERMS
from service.terms import Pooling

_MOST_SENT = 200  # examples of a side
_LARGEST = 4 << 20  # bytes of a safetensors file that holds one vector

Finite = Annotated[float, Field(allow_inf_nan=False)]


class TermIn(Request):
    concept: str = Field(description="Id of a concept")
    weight: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False)


class DeriveIn(Request):
    """Σ weight · direction over ``terms``, then without what lies in the span of ``project_out``."""

    id: Id
    terms: list[TermIn] = Field(min_length=1, max_length=MOST_TERMS)
    project_out: list[str] = Field([], max_length=MOST_TERMS, description="Concepts whose span is taken out")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "id": "hostile-not-blunt",
                    "terms": [{"concept": "hostile"}, {"concept": "friendly", "weight": -1}],
                    "project_out": ["blunt"],
                }
            ]
        },
    )


class GiveIn(Request):
    """A direction made elsewhere, as numbers."""

    id: Id
    model: str = Field(description="Id of the model whose residual stream it lies in")
    layer: int = Field(description="Block output, 1 to n_layers")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    vector: list[Finite] = Field(min_length=1, max_length=1 << 17, description="One number per hidden dimension")


Sent = list[str | dict[str, Any]]


class SuggestIn(Request):
    """A few labelled examples: which known directions tell them apart?"""

    model: str = Field(description="Id of the model whose activations are compared")
    positive: Sent = Field(max_length=_MOST_SENT, description="Each a text, or an object as in a line of a dataset")
    negative: Sent = Field(max_length=_MOST_SENT)
    layers: list[int] = Field([], description="Default: all at which a candidate lies")
    pooling: Pooling = Pooling.RESPONSE_MEAN
    index: str | None = Field(None, description="Index whose main directions are candidates as well")
    query_set: str | None = Field(None, description="What its embeddings are about, where it has several")
    k: int = Field(20, ge=1, le=1000, description="How many suggestions")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "support-bot-ft",
                    "positive": [{"prompt": "Where is my parcel?", "completion": "How should I know."}],
                    "negative": [{"prompt": "Where is my parcel?", "completion": "Let me look it up for you."}],
                    "index": "sft",
                }
            ]
        },
    )


class SuggestionOut(BaseModel):
    kind: Literal["concept", "sae_feature", "direction"]
    id: str = Field(description="A concept or SAE feature may be asked for by it")
    label: str | None
    layer: int
    auroc: float = Field(description="Of the better side: 1 tells all apart, 0.5 none")
    sign: int = Field(description="-1: the negative examples are higher")
    effect: float | None = Field(description="Difference in standard deviations within the sides; null: none")
    p: float = Field(description="Of chance alone (Mann-Whitney U, two-sided)")


class SuggestionsOut(BaseModel):
    """Candidates by how well they tell the examples apart."""

    suggestions: list[SuggestionOut]
    candidates: int = Field(description="How many were compared")
    by_chance: float = Field(description="How many would do as well as the first if the labels meant nothing")
    n_positive: int
    n_negative: int
    quarantined: int
    warnings: list[str]


def _short(value: Any) -> Any:
    if isinstance(value, str | bytes) and len(value) > _LARGEST * 4 // 3 + 4:
        raise ValueError(f"a concept is one vector: {_LARGEST >> 20} MiB at most")
    return value


class ImportIn(Request):
    """A safetensors file, and the sidecar that was exported with it; or, without one, where the vector lies."""

    id: Id | None = Field(None, description="Under another id than the sidecar's")
    safetensors: Annotated[Base64Bytes, BeforeValidator(_short)] = Field(description="The file, in base64")
    concept: dict[str, Any] | None = Field(None, description="The sidecar; None: model, layer and pooling say it")
    model: str | None = Field(None, description="Id of the model here; default: one of the concept's lineage")
    layer: int | None = None
    pooling: Pooling | None = None

    @model_validator(mode="after")
    def _told_once(self) -> Self:
        if self.concept is not None and (self.layer, self.pooling) != (None, None):
            raise ValueError("the sidecar says layer and pooling: leave them out")
        if self.concept is None:
            missing = [name for name in ("id", "model", "layer", "pooling") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"without the sidecar ('concept') these are needed: {', '.join(missing)}")
        return self
