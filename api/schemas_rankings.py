"""Requests and answers about whole rankings: all scores, groups of examples, two rankings side by side."""

from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from api.schemas import ConceptUsed, Provenance, QuestionIn, Request
from service.contracts import Place
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
        if (self.group_by is None) == (self.clusters is None):
            raise ValueError("groups are made by a metadata field ('group_by') or by 'clusters': name one of them")
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
    """Examples that have the same value, or lie in one cluster."""

    value: Any = Field(description="Or the number of the cluster; null: there is none")
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
