"""Who says whether an answer shows a trait, and which pairs of answers are kept for it. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Why a pair is left out.
NO_ANSWER = "no_answer"  # one of the two is empty
TOO_LONG = "prompt_too_long"  # there is no room for an answer
NOT_FINITE = "not_finite"  # the model gives NaN or infinity
REFUSAL = "refusal"  # the judge says that one of the two refuses
UNREADABLE = "judge_unreadable"  # the judge's words are no score
POSITIVE = "positive_without_trait"
NEGATIVE = "negative_with_trait"


@dataclass(frozen=True)
class NoJudge:
    """Keeps every pair."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class HttpJudge:
    """A model behind ``url``/chat/completions as OpenAI has it, asked by the trait's eval_prompt for 0 to 100."""

    url: str
    model: str
    positive_above: float = 50.0
    negative_below: float = 50.0
    kind: Literal["http"] = "http"


@dataclass(frozen=True)
class ProbeJudge:
    """⟨v̂, a_l(answer)⟩ of a registered concept. ``threshold`` None: half-way between the means of both sides."""

    concept: str
    sha256: str  # of its direction
    layer: int
    threshold: float | None = None
    kind: Literal["probe"] = "probe"


Judge = NoJudge | HttpJudge | ProbeJudge


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of an answer: a score, or the reason why there is none."""

    score: float | None
    reason: str | None = None
    said: str | None = None  # in the judge's own words


def dropped(positive: Verdict, negative: Verdict, *, above: float, below: float) -> str | None:
    """Why a pair is left out; None: it shows the trait, as in the paper: one answer above, its twin below."""
    if reason := positive.reason or negative.reason:
        return reason
    if positive.score is None or negative.score is None:  # nobody was asked
        return None
    if not positive.score > above:
        return POSITIVE
    return None if negative.score < below else NEGATIVE


def thresholds(judge: Judge, positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float]:
    """``above`` and ``below`` for ``dropped``; the scores of both sides are for a probe without a threshold."""
    match judge:
        case HttpJudge():
            return judge.positive_above, judge.negative_below
        case ProbeJudge(threshold=float() as given):
            return given, given
        case ProbeJudge() if positive and negative:
            middle = (math.fsum(positive) / len(positive) + math.fsum(negative) / len(negative)) / 2
            return middle, middle
    return 0.0, 0.0
