"""The job of a validation: what is retrained, on what, how often, and which scores are to be judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.contracts import Point
from service.terms import ConceptFunction, Pooling
from service.training import Recipe
from service.validation_records import Budget, Design
from service.work import AnswersSpec, Reading

INPUTS = "inputs"  # stem: ids (n, 64), scores (n,), groups (n,) where there are some


@dataclass(frozen=True)
class Trait:
    """Answers count as showing the trait when ⟨v̂, a_l⟩ is above ``threshold``, read by the index's model.

    None: half-way between the means of the datasets that the concept was fitted on.
    """

    answers: AnswersSpec
    threshold: float | None
    positive: str | None = None  # ids of those datasets
    negative: str | None = None


@dataclass(frozen=True)
class ValidateSpec:
    key: str
    index: str
    model: str
    base: Point  # where training starts
    reading: Reading  # of the base
    inputs: str  # artifact with what was ranked, and its scores
    left_out: int
    query_set: str
    pooling: Pooling
    direction: str | None  # artifact with v̂ as one row; None: the outcome is −L(Q)
    layer: int | None
    function: ConceptFunction
    recipe: Recipe
    design: Design
    budget: Budget
    trait: Trait | None
    shard_size: int
    about: Mapping[str, Any]  # the question as it was asked, for people
