"""Requests and answers about whole rankings: all scores, groups of examples, two rankings side by side."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from api.schemas import ConceptUsed, Provenance, QuestionIn, Request
from service.contracts import Place
from service.sae_records import MOST_FEATURES
from service.specs import MOST_CLUSTERS
from service.terms import GroupSort, Method, Order


class ScoresIn(QuestionIn):
    """A query for all examples."""

    metadata: bool = Field(False, description="Add a column with each example's metadata as JSON")


class GroupsIn(QuestionIn):
    """A query for groups of examples."""

    group_by: str | None = Field(
        None, description="Metadata field whose values make the groups", examples=["topic"]
    )
    clusters: int | None = Field(
        None,
        ge=2,
        le=MOST_CLUSTERS,
        description="Instead of 'group_by': so many clusters of examples that do the same to the model",
    )
    seed: int = Field(0, ge=0, le=1 << 30, description="Of the clusters")
    sae: str | None = Field(
        None,
        description="Instead of either: id of an SAE at a layer of the index's activations. The examples on "
        "which one of its features fires are a group; groups overlap",
    )
    features: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        max_length=MOST_FEATURES,
        description="Of the SAE. Default: as many as 'limit' that stand out, i.e. whose examples' scores sum to "
        "what is furthest from that of as many average examples",
    )
    threshold: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="A feature fires where its value exceeds this. Default: at all"
    )
    relative: bool = Field(
        False, description="'threshold' is a share, below 1, of the largest value of each feature in the index"
    )
    examples: int = Field(
        3, ge=0, le=100, description="Examples to show of each group, those that come first in it"
    )
    terms: int = Field(6, ge=0, le=100, description="Words to show that tell a group's texts from the others'")
    k: int = Field(100, ge=1, description="How many of the first examples a group's share is of")
    sort: GroupSort = Field(
        GroupSort.MEAN, description="Figure that groups are sorted by; 'order' says which end comes first"
    )
    limit: int = Field(50, ge=1, le=10_000, description="How many groups")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(each is not None for each in (self.group_by, self.clusters, self.sae)) != 1:
            raise ValueError(
                "groups are made by a metadata field ('group_by'), by 'clusters' or by the features of an SAE "
                "('sae'): name one of them"
            )
        if self.sae is None and (self.features is not None or self.threshold or self.relative):
            raise ValueError(
                "'features', 'threshold' and 'relative' are about the features of an SAE: name it in 'sae'"
            )
        return self


class CompareIn(Request):
    """Two queries: methods, concepts, versions, or whatever else they differ in."""

    a: QuestionIn
    b: QuestionIn
    k: int = Field(100, ge=1, description="Overlap of the first k; that at 10, 100 and 1000 comes with it")
    movers: int = Field(20, ge=0, le=1000, description="How many examples that moved most, each way")


class RankingOut(BaseModel):
    """Which ranking this is, and what stands behind it."""

    index: str
    model: str
    dataset: str
    method: Method
    order: Order
    concept: ConceptUsed | None
    provenance: Provenance
    rows: int = Field(description="Examples that were ranked")
    warnings: list[str]


class GroupOut(BaseModel):
    """Examples that have the same value, or lie in one cluster, or on which one feature fires."""

    value: Any = Field(description="Or the number of the cluster or of the feature; null: there is none")
    label: str | None = Field(None, description="What is said of the feature")
    count: int
    sum: float = Field(description="Of their scores")
    mean: float
    low: float | None = Field(description="The 95 % interval of the mean, by Student's t; null for one example")
    high: float | None
    share: float = Field(description="Sum of their scores over the sum of all examples' |scores|")
    share_of_top: float = Field(description="Share of the first k examples that are in this group")
    lift: float = Field(description="That share over the group's share of all examples; 1: no more than by chance")
    examples: list["StandingOut"]
    terms: list["TermOut"]


class StandingOut(BaseModel):
    """An example that comes first in its group."""

    score: float
    example_id: str
    text: str = Field(description="Its beginning")
    metadata: dict[str, Any]
    places: list[Place]


class TermOut(BaseModel):
    word: str
    z: float = Field(description="Standard errors by which its log-odds exceed those in the other texts")
    share: float = Field(description="Of the group's first 100 texts, how many hold it")


class GroupsOut(RankingOut):
    group_by: str | None
    clusters: int | None
    cohesion: float | None = Field(description="Mean cosine of an example's embedding with its cluster's centre")
    sae: str | None
    features: list[int] | None = Field(description="Of the SAE, that groups were made of; null: they are of no SAE")
    threshold: float | None
    relative: bool
    overlapping: bool = Field(
        description="An example may be in several groups: counts and shares of groups do not sum to the whole"
    )
    covered: int | None = Field(
        description="Examples on which one of 'features' fires at least: rows less the rest"
    )
    rest: GroupOut | None = Field(
        description="The examples on which none of 'features' fires; null: there are none"
    )
    sort: GroupSort
    k: int = Field(description="What shares are of: the k asked for, or all examples where there are fewer")
    total: int = Field(description="Groups there are; 'groups' holds the first of them")
    groups: list[GroupOut]


class OverlapOut(BaseModel):
    k: int
    share: float = Field(description="Of the first k of one ranking, how much is among those of the other")
    by_chance: float = Field(description="What two unrelated rankings would share: k over the examples compared")


class MoverOut(BaseModel):
    """An example with its place in both rankings, among the examples that both hold."""

    example_id: str
    rank_a: int
    rank_b: int
    percentile_a: float = Field(description="Share of the examples that rank lower, in percent")
    percentile_b: float
    text: str = Field(description="Its beginning")
    metadata: dict[str, Any]
    places: list[Place]


class CompareOut(BaseModel):
    """Two rankings of the examples that both hold."""

    a: RankingOut
    b: RankingOut
    common: int = Field(description="Examples that both rank; all figures are about these")
    only_a: int
    only_b: int
    spearman: float | None = Field(description="Rank correlation, -1 to 1; null where a ranking has only one score")
    overlaps: list[OverlapOut]
    up: list[MoverOut] = Field(description="Ranked higher by b, the largest difference of percentiles first")
    down: list[MoverOut] = Field(description="Ranked higher by a")
