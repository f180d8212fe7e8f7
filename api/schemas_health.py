"""Concept health: what is asked, and what a report says."""

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import ConceptUsed, Damping, Number, Request, WeightedIn
from service.terms import ConceptFunction, IndexKind, Pooling


class HealthIn(Request):
    """A direction and what it is asked of. One report serves every method."""

    index: str = Field(description="'name' for the newest version, 'name@v3' for that one, or an alias")
    concept: str | None = Field(None, description="Id of a concept")
    concepts: list[WeightedIn] | None = Field(
        None, min_length=1, max_length=64, description="Instead of 'concept': a weighted sum"
    )
    vector: list[Number] | None = Field(
        None, min_length=1, max_length=1 << 17, description="Instead of 'concept': a direction, with its 'layer'"
    )
    layer: int | None = Field(None, ge=1, description="Of the vector")
    pooling: Pooling | None = Field(None, description="Of the vector. Default: as the index is pooled")
    query_set: str | None = Field(
        None, description="Dataset Q; may be left out where the index has embeddings for one only"
    )
    concept_function: ConceptFunction | None = Field(None, description="dot (the default) or cosine")
    damping: Damping | None = Field(None, description="Of the gradients whose ranking is compared. Default: 1")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"index": "november", "concept": "hostile", "query_set": "prompts"}]},
    )


class EstimateOut(BaseModel):
    value: float
    error: float | None = Field(description="Standard error over the examples of Q")
    low: float | None = Field(description="95 % interval")
    high: float | None


class PointOut(BaseModel):
    name: str
    f: EstimateOut = Field(description="f_v(Q) there")


class ChangeOut(BaseModel):
    """f_v(Q) at the end less at the base, differences of the same examples."""

    mean: EstimateOut
    p_value: float = Field(description="Of no change: share of random sign flips as far from zero")
    spread: float = Field(description="Standard deviation of f_v over Q at the base")
    effect: float | None = Field(description="The change in units of the spread")


class TurnOut(BaseModel):
    """The extreme of f_v inside the run, beyond both base and end."""

    point: str
    rise: float = Field(description="From the base to it; negative: a fall")
    back: float = Field(description="From it to the end")
    p_value: float


class MovementOut(BaseModel):
    """f_v(Q) along the declared run, base first."""

    examples: int
    quarantined: int
    points: list[PointOut]
    change: ChangeOut | None
    moved: bool | None = Field(description="null: nothing to compare with, or Q too small to say")
    turn: TurnOut | None = Field(description="null: no extreme inside the run")
    turned: bool = Field(description="Whether the turn is more than chance and more than a trifle")
    left_out: dict[str, str] = Field(description="Points that could not be read, and why")


class DomainOut(BaseModel):
    """Activations of some texts against the index's, the concept's direction removed, at equal lengths."""

    name: str
    examples: int
    against: int = Field(description="Examples of the index")
    auroc: float = Field(description="Of a linear classifier on held-out examples; .5: not told apart")
    p_value: float
    outside: bool
    alike: float = Field(description="Share of the texts for which the index has one of the same length")
    length: float = Field(description="Median, in characters of what is pooled")
    length_index: float


class AgreementOut(BaseModel):
    """Ranking by gradients against ranking by activations, over all examples."""

    kind: IndexKind
    examples: int
    spearman: float | None
    k: int
    overlap: float = Field(description="Share of the first k that both have")
    by_chance: float
    diverges: bool


class DoubtOut(BaseModel):
    code: str
    said: str


class HealthOut(BaseModel):
    """What speaks for and against attributions of an index to a concept."""

    index: str
    model: str
    concept: ConceptUsed
    query_set: str | None
    concept_function: ConceptFunction
    points: int = Field(
        description="Of the run that the index's embeddings add up; 0: it has none for this question"
    )
    movement: MovementOut | None
    domain: DomainOut | None = Field(description="Of the query set")
    concept_domain: DomainOut | None = Field(description="Of the examples that the concept was fitted on")
    agreement: AgreementOut | None
    absent: dict[str, str] = Field(description="Parts that could not be made, and why")
    doubts: list[DoubtOut] = Field(description="What a query on it warns of; empty: nothing was found")
    seconds: float
