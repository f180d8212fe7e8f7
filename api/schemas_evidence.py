"""Requests and answers that look behind a ranking: the main directions of a dataset, and exact re-ranks."""

from typing import Any

from pydantic import BaseModel, Field

from api.schemas import ConceptUsed, Damping, QuestionIn, Request
from service.contracts import Place
from service.terms import ConceptFunction, IndexKind, Method, Order


class DirectionsIn(Request):
    """Which embedding of an index, and how much of it. What there is one of may be left out."""

    query_set: str | None = Field(None, description="Dataset Q that the embedding is about")
    layer: int | None = Field(None, description="Block output, from 1")
    concept_function: ConceptFunction | None = Field(None, description="Default: dot, where there are several")
    damping: Damping | None = Field(None, description="Default: 1.0, where there are several")
    count: int = Field(10, ge=1, le=100, description="How many directions")
    examples: int = Field(5, ge=0, le=100, description="Extreme examples on each side of a direction")
    concepts: int = Field(3, ge=0, le=100, description="Registered concepts to name for a direction")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Of the randomised method; wide embeddings use it")
    vectors: bool = Field(False, description="Whether to send the directions' numbers as well")


class AlignedOut(BaseModel):
    concept: str
    cosine: float = Field(description="With the concept's direction; negative: the opposite of it")


class ExtremeOut(BaseModel):
    score: float = Field(description="How far training on it pushes along the direction")
    example_id: str
    text: str
    metadata: dict[str, Any]
    places: list[Place]


class DirectionOut(BaseModel):
    number: int
    singular_value: float
    share: float = Field(description="Of the energy of all embeddings: singular_value² over its sum")
    cumulative_share: float
    concepts: list[AlignedOut] = Field(
        description="Registered concepts of the lineage and layer, most aligned first"
    )
    most: list[ExtremeOut] = Field(description="Examples that push furthest along it")
    least: list[ExtremeOut] = Field(description="Examples that push furthest the other way")
    vector: list[float] | None = Field(None, description="In the residual stream, unit norm; with 'vectors' only")


class MeanOut(BaseModel):
    """What training on an average example does; the directions contain it, as embeddings are not centred."""

    norm: float
    share: float = Field(description="Of the energy: what all examples have in common")
    concepts: list[AlignedOut]


class DirectionsOut(BaseModel):
    """What this dataset does to the model, when nobody has named the concept."""

    index: str
    model: str
    dataset: str
    query_set: str
    layer: int | None
    concept_function: ConceptFunction
    damping: float
    points: int = Field(description="Points of the training run that are summed; 1: the end alone")
    rows: int
    dims: int
    mean: MeanOut
    directions: list[DirectionOut]
    seconds: float = Field(description="What finding them took")
    warnings: list[str] = Field(description="Concepts that are left out, as they cannot be read")


class RerankIn(QuestionIn):
    """A query whose best candidates are scored again, exactly."""

    k: int = Field(50, ge=1, description="How many of the candidates are answered, best first")
    candidates: int = Field(200, ge=1, le=10_000, description="How many of the approximate ranking are rescored")


class RerankedOut(BaseModel):
    rank: int
    approximate_rank: int
    score: float = Field(description="Exact EK-FAC, nothing truncated or rounded to fewer bits")
    approximate_score: float = Field(description="As the index has it")
    example_id: str
    text: str
    metadata: dict[str, Any]
    places: list[Place]


class UnscoredOut(BaseModel):
    example_id: str
    approximate_rank: int
    reason: str


class RerankOut(BaseModel):
    """Candidates in the order of their exact scores."""

    index: str
    model: str
    method: Method
    order: Order
    concept: ConceptUsed | None
    kind: IndexKind = Field(description="Whose rows chose the candidates")
    query_set: str
    damping: float
    points: int = Field(description="Points of the training run that are summed; 1: the end alone")
    candidates: int = Field(description="Examples that were scored again")
    spearman: float | None = Field(
        description="Of exact and approximate scores over the candidates; None: below two"
    )
    seconds: float = Field(description="What scoring them took")
    hits: list[RerankedOut]
    unscored: list[UnscoredOut] = Field(description="Candidates that have no finite exact score")
    warnings: list[str]
