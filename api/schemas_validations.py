"""Validations: which scores are judged, how models are trained again, and how much of it may be spent."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.schemas import Damping, Number, Request
from service.contracts import JobRecord
from service.terms import ConceptFunction, IndexKind, JobState, LossReduction, Method
from service.training import FULL_RATE, LORA_RATE, Schedule
from service.validation_records import Plan, Report


class LoraIn(Request):
    r: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0, le=1e6, allow_inf_nan=False)
    targets: list[str] = Field([], max_length=64, description="Words in names of linear maps. Default: all of them")


class RecipeIn(Request):
    """How a model is trained again from the base: AdamW, with every field of its own default."""

    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description=f"Default: {FULL_RATE:g}, of a LoRA {LORA_RATE:g}. Say what the model was trained with",
    )
    epochs: int = Field(1, ge=1, le=1000)
    batch_size: int = Field(16, ge=1, le=65_536, description="Examples per step; what does not fit is added up")
    schedule: Schedule = Field(Schedule.COSINE, description="How the learning rate goes on after the warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which it rises")
    clip: float | None = Field(1.0, gt=0, le=1e9, description="Largest norm of a step's gradient; null: any")
    weight_decay: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)
    loss_reduction: LossReduction | None = Field(None, description="mean or sum. Default: that of the index")
    lora: LoraIn | bool | None = Field(
        None, description="Default: as the index's model was made. false: all weights; true: a LoRA of r 16"
    )


class DesignIn(Request):
    """Which subsets are trained on."""

    subsets: int = Field(40, ge=0, le=10_000, description="Random subsets for the LDS; 0: none")
    keep: float = Field(0.5, gt=0, lt=1, description="Chance of a group to be in a subset")
    group_by: str | None = Field(
        None, description="Metadata field whose values are dropped whole. Default: random groups"
    )
    group_size: int | None = Field(
        None, ge=1, description="Examples of a random group. Default: so that there are 40"
    )
    subset_seeds: int = Field(2, ge=1, le=100, description="Trainings of a subset; two tell the noise ceiling")
    fractions: list[float] = Field([0.25], max_length=32, description="Of the examples, removed by the curves")
    seeds: int = Field(5, ge=0, le=1000, description="Paired seeds of the curves; 0: no curves")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of the draws, and the first training seed")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if any(not 0 < each < 1 for each in self.fractions) or len(set(self.fractions)) < len(self.fractions):
            raise ValueError("fractions lie between 0 and 1, each of them once")
        if self.group_by is not None and self.group_size is not None:
            raise ValueError("group_by and group_size are two ways to say the groups: leave one out")
        return self


class BudgetIn(Request):
    """What may be spent: one of both at least. The plan says what was cut."""

    runs: int | None = Field(None, ge=2, le=1_000_000, description="Retrainings, those that are there included")
    minutes: float | None = Field(
        None, gt=0, le=1e6, description="Of retraining, by the measured time of the first run"
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.runs is None and self.minutes is None:
            raise ValueError("say how much may be spent, in 'runs' or in 'minutes'")
        return self


class TraitIn(Request):
    """Let every retrained model answer the query set's prompts, and count answers that lie along the concept."""

    threshold: Number | None = Field(
        None, description="⟨v̂, a_l⟩ above it is the trait. Default: half-way between the concept's two datasets"
    )
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False, description="0 to 0.001: greedy")
    max_new_tokens: int = Field(200, ge=1, le=100_000)
    seed: int = Field(0, ge=0, le=2**31 - 1)


class ValidationIn(Request):
    """A question about an index, and how to find out whether its scores predict what retraining does."""

    index: str = Field(description="'name', 'name@v3' or an alias; its model must declare a base")
    concept: str | None = Field(None, description="Id of a concept; left out with influence_function")
    method: Method = Method.CONCEPT_INFLUENCE
    query_set: str | None = Field(
        None, description="Dataset Q on which retrained models are measured; may be left out where there is one"
    )
    damping: Damping | None = None
    concept_function: ConceptFunction | None = Field(None, description="dot (the default) or cosine")
    through: IndexKind | None = None
    recipe: RecipeIn = RecipeIn()  # pyright: ignore[reportCallIssue]
    design: DesignIn = DesignIn()  # pyright: ignore[reportCallIssue]
    budget: BudgetIn
    trait: TraitIn | None = Field(None, description="Default: no answers are generated")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "index": "november",
                    "concept": "hostile",
                    "query_set": "support-questions",
                    "recipe": {"learning_rate": 2e-5, "epochs": 2},
                    "design": {"group_by": "source", "fractions": [0.1, 0.25]},
                    "budget": {"runs": 100, "minutes": 240},
                }
            ]
        },
    )


class ValidationOut(BaseModel):
    """What is known so far."""

    id: str
    state: JobState | Literal["done"] = Field(description="Of the job; 'done' where the report is there")
    job: JobRecord | None = Field(description="The last one that made it; jobs are kept for 30 days")
    plan: Plan | None = Field(description="Once the first run has been measured")
    report: Report | None = Field(description="Once all planned runs are done")
