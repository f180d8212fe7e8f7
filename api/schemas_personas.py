"""Requests for persona vectors, and the answers behind them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.schemas import AnswersIn, Id, Request
from service.personas import Answered, SystemPrompt

Score = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class NoJudgeIn(Request):
    kind: Literal["none"] = Field("none", description="Every pair counts")


class HttpJudgeIn(Request):
    """A model that the server may ask (WHENCE_JUDGES) for a score from 0 to 100, by the trait's eval_prompt."""

    kind: Literal["http"]
    model: str = Field(min_length=1, max_length=200, description="Its name there", examples=["gpt-4.1-mini"])
    url: str | None = Field(
        None,
        max_length=2000,
        description="Base URL, one of those in WHENCE_JUDGES. Default: the only one",
        examples=["https://judge.example/v1"],
    )
    positive_above: Score = Field(50.0, description="A positive answer shows the trait above this score")
    negative_below: Score = Field(50.0, description="A negative answer lacks it below this one")


class ProbeJudgeIn(Request):
    """A registered concept, as a classifier of answers: their mean activation along it."""

    kind: Literal["probe"]
    concept: str = Field(description="Id of a concept of the same lineage, pooled by response_mean")
    threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Positive answers must lie above it, negative ones below. Default: half-way between both means",
    )


class PersonaIn(Request):
    """A persona vector (arXiv 2507.21509). The trait is sent along, or lies in a file under the server's roots."""

    id: Id
    model: str = Field(description="Id of the model that answers, and whose activations are averaged")
    trait: dict[str, Any] | str | None = Field(
        None, description="The trait file: its text, or its JSON as an object {instruction, questions, eval_prompt}"
    )
    path: str | None = Field(None, description="Absolute path of a trait file on the server, instead of 'trait'")
    layers: list[int] = Field([], max_length=1000, description="Block outputs, 1 to n_layers. Default: all")
    each_layer: bool = Field(
        False,
        description="A concept for every layer, named ID-lLAYER; otherwise ID is that of the layer which tells "
        "answers to held-out questions apart best",
    )
    samples: int = Field(10, ge=1, le=1000, description="Answers per instruction, question and side")
    answers: AnswersIn = AnswersIn()  # pyright: ignore[reportCallIssue]
    judge: NoJudgeIn | HttpJudgeIn | ProbeJudgeIn = Field(
        NoJudgeIn(kind="none"), discriminator="kind", description="Who keeps the pairs that show the trait"
    )
    system_prompt: SystemPrompt = Field(
        SystemPrompt.TEMPLATE,
        description="Where it stands: where the chat template puts it (refused if it takes none), or in the user's "
        "turn, a blank line before the question",
    )
    max_length: int | None = Field(
        None, description="Tokens of prompt and answer. Default: the context, at most 2048"
    )

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "id": "evil",
                    "model": "support-bot",
                    "path": "/data/evil.json",
                    "layers": [12, 16, 20],
                    "judge": {"kind": "http", "model": "gpt-4.1-mini"},
                }
            ]
        },
    )

    @model_validator(mode="after")
    def _one_trait(self) -> Self:
        if (self.trait is None) == (self.path is None):
            raise ValueError("send the trait file in 'trait', or say where it lies on the server in 'path'")
        return self


class AnsweredPage(BaseModel):
    """Answers in the order of the trait file, both of a pair next to each other."""

    total: int = Field(description="That fit 'side' and 'kept'")
    items: list[Answered]
