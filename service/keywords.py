"""Words that tell one set of texts from the rest: log-odds with a prior, so that rare words need evidence.

Monroe, Colaresi and Quinn, "Fightin' Words" (2008), equations 15, 16 and 22, with the whole as the prior.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt

_WORD = re.compile(r"[^\W_]{2,}(?:['’][^\W_]+)?")
_LONGEST = 2_000  # characters that are read of a text
_PRIOR = 100.0  # words that the prior weighs
LEAST_Z = 1.96  # below, a word is as frequent elsewhere


@dataclass(frozen=True)
class Term:
    """``z``: standard errors by which its log-odds exceed those in the rest; ``share`` of the texts hold it."""

    word: str
    z: float
    share: float


def counted(texts: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """(how often each word occurs, in how many texts), in lower case."""
    words: Counter[str] = Counter()
    holding: Counter[str] = Counter()
    for text in texts:
        found = _WORD.findall(text[:_LONGEST].lower())
        words.update(found)
        holding.update(set(found))
    return words, holding


def characteristic(texts: Sequence[str], rest: Counter[str], count: int) -> list[Term]:
    """The words of ``texts`` that the words of the ``rest`` lack, at most ``count``, the most telling first."""
    if not texts or not count:
        return []
    own, holding = counted(texts)
    everything = own + rest
    n_own, n_rest, n_all = own.total(), rest.total(), everything.total()

    def z(word: str) -> float:
        prior = _PRIOR * everything[word] / n_all
        a, b = own[word] + prior, rest[word] + prior
        if not min(n_own + _PRIOR - a, n_rest + _PRIOR - b) > 0:  # the only word there is
            return 0.0
        odds = log(a / (n_own + _PRIOR - a)) - log(b / (n_rest + _PRIOR - b))
        return odds / sqrt(1 / a + 1 / b)

    best = sorted(((z(word), word) for word in own), key=lambda each: (-each[0], each[1]))[:count]
    return [Term(word, value, holding[word] / len(texts)) for value, word in best if value >= LEAST_Z]
