"""How predictions are judged: linear datamodeling score, its error, retrieval of planted examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from service.validations import correlation

F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
_DRAWS = 2000


def predicted(scores: F64, subsets: Bools) -> F64:
    """What the scores (N,) say of training on each subset (M, N): their sum."""
    return subsets @ scores


@dataclass(frozen=True)
class Judged:
    """One method's predictions and the truth on one case, both (M,)."""

    predicted: F64
    actual: F64

    @property
    def lds(self) -> float:
        """Linear datamodeling score (Park et al. 2023): Spearman over retrainings."""
        return correlation(self.predicted, self.actual)


def mean_lds(cases: Sequence[Judged]) -> tuple[float, float]:
    """Mean over cases and its bootstrap standard error over retrainings."""
    draws = resampled([cases])[0]
    return float(np.mean([case.lds for case in cases])), float(draws.std())


def difference(ours: Sequence[Judged], theirs: Sequence[Judged]) -> tuple[float, float]:
    """Mean LDS of ours minus theirs, and the lower end of the 90 % interval of a bootstrap over retrainings,
    paired: both sides see the same draws.
    """
    a, b = resampled([ours, theirs])
    mean = np.mean([case.lds for case in ours]) - np.mean([case.lds for case in theirs])
    return float(mean), float(np.quantile(a - b, 0.05))


def resampled(methods: Sequence[Sequence[Judged]]) -> F64:
    """(methods, draws) mean LDS over cases, retrainings redrawn within each case."""
    generator = np.random.default_rng(0)
    found = np.zeros((len(methods), _DRAWS))
    for number in range(len(methods[0])):
        count = len(methods[0][number].actual)
        chosen = generator.integers(0, count, (_DRAWS, count))
        for row, cases in enumerate(methods):
            x, y = (_standardised(values[chosen]) for values in (cases[number].predicted, cases[number].actual))
            found[row] += (x * y).sum(axis=1)
    return found / len(methods[0])


def _standardised(values: F64) -> F64:
    """Ranks within each row, centred and of unit length; zero where a row does not vary."""
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, norm, out=np.zeros_like(ranks), where=norm > 0)


@dataclass(frozen=True)
class Retrieval:
    auc: float
    ap: float
    recall10: float


def retrieval(scores: F64, planted: Bools) -> Retrieval:
    """AUC, average precision, and the share of the ten highest that are planted."""
    return Retrieval(
        auc=float(roc_auc_score(planted, scores)),
        ap=float(average_precision_score(planted, scores)),
        recall10=float(planted[np.argsort(-scores, kind="stable")[:10]].sum() / min(10, planted.sum())),
    )
