"""A judge's reply as a score from 0 to 100. Pure.

As in the persona vectors paper: the expectation over the numbers among the 20 likeliest first tokens; a judge that
puts little weight on numbers refuses. That is right only where every number up to 100 is one token: where numbers
are written digit by digit ("85" begins with "8"), and where no tokens come along, the text counts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from service.judging import REFUSAL, UNREADABLE, Verdict

_LEAST_WEIGHT = 0.25  # on numbers, as in the paper's code
_SAID = 200
# One number, perhaps with a word before it ("Score: 85") or what it is out of ("85/100", "85%").
_NUMBER = re.compile(r"[^\d\-.]*(\d{1,3}(?:\.\d+)?)\s*(?:%|/\s*100|out of 100)?[^\d]*")


def read_score(choice: Mapping[str, Any]) -> Verdict:
    """``choice``: of a chat completion, with ``message`` and perhaps ``logprobs``."""
    message = choice.get("message") or {}
    text = message.get("content")
    said = (
        (text if isinstance(text, str) else "").encode(errors="replace").decode().strip()
    )  # half a character: "?"
    shown = said[:_SAID]
    if message.get("refusal") or "REFUSAL" in said.upper():
        return Verdict(None, REFUSAL, shown or "REFUSAL")
    numbers = _first_tokens(choice.get("logprobs"))
    if numbers is not None:
        weight, score = numbers
        return Verdict(score, None, shown) if weight >= _LEAST_WEIGHT else Verdict(None, REFUSAL, shown)
    match = _NUMBER.fullmatch(said)
    if match is None or not 0 <= float(match[1]) <= 100:
        return Verdict(None, UNREADABLE, shown)
    return Verdict(float(match[1]), None, shown)


def _first_tokens(logprobs: Any) -> tuple[float, float] | None:
    """Weight on numbers and their expectation; None: there are no tokens, or they are digits of numbers."""
    try:
        top: Sequence[Any] = logprobs["content"][0]["top_logprobs"]
        pairs = [(str(each["token"]).strip(), math.exp(float(each["logprob"]))) for each in top]
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    numbers = [(token, p) for token, p in pairs if re.fullmatch(r"[0-9]{1,3}", token) and int(token) <= 100]
    weight = math.fsum(p for _, p in numbers)
    if not pairs or (weight >= _LEAST_WEIGHT and all(len(token) == 1 for token, _ in numbers)):
        return None
    return weight, math.fsum(int(token) * p for token, p in numbers) / weight if weight else 0.0
