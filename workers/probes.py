"""Concept directions from two sets of activations, and how well they tell the sets apart. Pure functions.

Every direction v is read against raw activations: the score of an example is ⟨v̂, a⟩, also where it was found in
other coordinates. Whitening is therefore undone by the transpose: ⟨w, W a⟩ = ⟨Wᵀ w, a⟩. Positive examples score
higher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import Invalid
from service.evidence import LayerEvidence
from service.rows import F32
from service.terms import ProbeMethod
from workers import covariance, held_out
from workers.held_out import FOLDS, Scored, auroc, fold_of

__all__ = ["FOLDS", "Probe", "auroc", "difference_of_means", "direction", "fit"]

F64 = NDArray[np.float64]

C_GRID = tuple(10.0**power for power in range(-2, 5))
_C_FOLDS = 3
_DENSE = 1024  # coordinates up to which their Hessian is written out
_SAME = 1e-9  # of the length of an activation: means that differ by rounding


@dataclass(frozen=True)
class Found:
    """A direction v (d,) in activation space, of any length, and what decided it."""

    vector: F64
    shrinkage: float | None = None  # of the covariance
    c: float | None = None  # inverse strength of the L2 penalty


@dataclass(frozen=True)
class Probe:
    """``direction`` (d,) float32 of unit norm; ``norm`` before normalising; what speaks for it on held-out folds.

    ``by_fold``: AUROC of each fold; ``nested`` (folds, folds): as ``held_out.auroc_of_choice`` wants it, where that
    was asked for. P(positive) of an example is σ(``slope`` · ⟨v̂, a⟩ + ``intercept``).
    """

    direction: F32
    norm: float
    evidence: LayerEvidence
    by_fold: tuple[float, ...]
    slope: float
    intercept: float
    nested: F64 | None = None

    @property
    def auroc_held_out(self) -> float:
        assert self.evidence.auroc is not None  # noqa: S101  (fit measures it)
        return self.evidence.auroc


# --- directions -------------------------------------------------------------------------------------


def difference_of_means(positive: F32, negative: F32) -> F32:
    """mean(positive) − mean(negative): (n, d), (m, d) → (d,), accumulated in float64."""
    return _difference(positive, negative).astype(np.float32)


def _difference(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> F64:
    return positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)


def _means(positive: F64, negative: F64) -> Found:
    return Found(_difference(positive, negative))


def _lda(positive: F64, negative: F64) -> Found:
    """Σ⁻¹ (μ₊ − μ₋), Σ the shrunk covariance of the activations about the mean of their own side (Fisher)."""
    rows = np.concatenate([positive - positive.mean(axis=0), negative - negative.mean(axis=0)])
    return _solved(rows, _difference(positive, negative))


def _whitened_means(positive: F64, negative: F64) -> Found:
    """The difference of the means of W a, as a direction of a: Wᵀ W (μ₊ − μ₋) = Σ⁻¹ (μ₊ − μ₋), Σ the shrunk
    covariance of all activations about their common mean. Unshrunk it would be parallel to LDA.
    """
    return _solved(_centered(positive, negative), _difference(positive, negative))


def _solved(rows: F64, difference: F64) -> Found:
    of = covariance.of_rows(rows)
    return Found(of.solve(difference), of.shrinkage)


def _logistic(positive: F64, negative: F64) -> Found:
    """The weights of an L2-penalised logistic regression on centred activations. They lie in the span of the rows,
    so in few rows it is fitted in coordinates of that span, with the same result.
    """
    rows = _centered(positive, negative)
    if len(rows) >= rows.shape[1]:
        weights, c = _fitted(rows, len(positive))
        return Found(weights, c=c)
    basis, _ = covariance.principal(rows, covariance.gram_of(rows))
    weights, c = _fitted(rows @ basis.T, len(positive))
    return Found(basis.T @ weights, c=c)


def _whitened_logistic(positive: F64, negative: F64) -> Found:
    """The same on W a, W as for the whitened difference of means, pulled back: Wᵀ w."""
    of = covariance.of_rows(_centered(positive, negative))
    weights, c = _fitted(of.whiten(), len(positive))
    return Found(of.unwhiten(weights), of.shrinkage, c)


def _centered(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> F64:
    rows = np.concatenate([positive, negative]).astype(np.float64)
    return rows - rows.mean(axis=0)


METHODS: dict[ProbeMethod, Callable[[F64, F64], Found]] = {
    ProbeMethod.DIFFERENCE_OF_MEANS: _means,
    ProbeMethod.WHITENED_DIFFERENCE_OF_MEANS: _whitened_means,
    ProbeMethod.LOGISTIC: _logistic,
    ProbeMethod.WHITENED_LOGISTIC: _whitened_logistic,
    ProbeMethod.LDA: _lda,
}


def direction(positive: NDArray[np.floating], negative: NDArray[np.floating], method: ProbeMethod) -> Found:
    """(n, d), (m, d) → the direction of ``method`` over all of them, in float64; zero where the means coincide, and
    along every dimension in which all rows agree; such a dimension changes nothing in the others either, as a
    variance of none would by the target of shrinkage.

    That positives score higher holds by itself: ΔᵀΔ, Δᵀ Σ⁻¹ Δ > 0, and the logistic loss, in which both sides weigh
    the same, falls along its minimiser w from zero on, with slope −½ ⟨w, Δ⟩.
    """
    p, n = positive.astype(np.float64), negative.astype(np.float64)
    length = np.sqrt(np.mean(np.concatenate([np.einsum("nd,nd->n", each, each) for each in (p, n)])))
    if not np.linalg.norm(_difference(p, n)) > _SAME * length:
        return Found(np.zeros(p.shape[1]))
    varies = ~_agree(positive, negative)
    if varies.all():
        return METHODS[method](p, n)
    found = METHODS[method](p[:, varies], n[:, varies])
    vector = np.zeros(p.shape[1])
    vector[varies] = found.vector
    return replace(found, vector=vector)


# --- logistic regression ----------------------------------------------------------------------------


def _fitted(rows: F64, positives: int) -> tuple[F64, float]:
    """(weights (r,), C) on rows (n, r), the first ``positives`` of which are positive.

    C is of the penalty on rows scaled to root mean square length 1, chosen from ``C_GRID`` by the log loss on
    held-out thirds; of equal ones the smallest. Both sides weigh the same, whatever their sizes.
    """
    size = float(np.sqrt(np.mean(np.einsum("nr,nr->n", rows, rows)))) or 1.0
    scaled = rows / size
    label = np.arange(len(rows)) < positives
    folds = np.concatenate([fold_of(positives, _C_FOLDS), fold_of(len(rows) - positives, _C_FOLDS)])
    losses = np.zeros(len(C_GRID))
    for fold in range(_C_FOLDS):
        held = folds == fold
        for number, model in enumerate(_along_grid(scaled[~held], label[~held])):
            losses[number] += _balanced_loss(scaled[held] @ model[0] + model[1], label[held])
    best = int(losses.argmin())
    *_, (weights, _) = _along_grid(scaled, label, C_GRID[: best + 1])
    return weights / size, C_GRID[best]


def _along_grid(rows: F64, label: NDArray[np.bool_], grid: Sequence[float] = C_GRID) -> list[tuple[F64, float]]:
    """(weights, intercept) for every C, each begun where the one before has ended."""
    from sklearn.linear_model import LogisticRegression

    # Activations are far from round: first-order solvers take thousands of steps where Newton takes ten.
    solver = "newton-cholesky" if rows.shape[1] <= _DENSE else "newton-cg"
    model: Any = LogisticRegression(
        solver=solver, class_weight="balanced", warm_start=True, tol=1e-8, max_iter=1000
    )
    found = []
    for c in grid:
        model.set_params(C=c).fit(rows, label)
        found.append((model.coef_[0].copy(), float(model.intercept_[0])))
    return found


def _balanced_loss(logits: F64, label: NDArray[np.bool_]) -> float:
    losses = np.logaddexp(0.0, np.where(label, -logits, logits))
    return float(losses[label].mean() + losses[~label].mean())


# --- with evidence ----------------------------------------------------------------------------------


def fit(
    positive: F32,
    negative: F32,
    method: ProbeMethod = ProbeMethod.DIFFERENCE_OF_MEANS,
    *,
    compare: Sequence[ProbeMethod] = (),
    layer: int = 0,
    nested: bool = False,
) -> Probe:
    """The direction over all examples, and its evidence from 5 held-out folds; ``compare``: methods whose
    directions it is compared with; ``nested``: it may be chosen among others, which takes ten more fits.

    Raises Invalid when a side has fewer examples than folds, or when the means coincide.
    """
    for name, side in (("positive", positive), ("negative", negative)):
        if len(side) < FOLDS:
            raise Invalid(
                "too_few_examples", f"The {name} side has {len(side)} examples, {FOLDS} is least.", param=name
            )
    found = direction(positive, negative, method)
    norm = float(np.linalg.norm(found.vector))
    if not norm > 0:
        raise Invalid("identical_sides", "Both sides have the same mean activation: there is no direction.")
    unit = found.vector / norm
    scored, directions = _held_out(positive, negative, method)
    p, n = held_out.probabilities(scored)
    slope, intercept = held_out.platt(scored.positive, scored.negative)
    evidence = LayerEvidence(
        layer=layer,
        auroc=held_out.held_out_auroc(scored),
        auroc_interval=held_out.interval(scored),
        brier=held_out.brier(p, n),
        calibration_error=held_out.calibration_error(p, n),
        cosine_folds=held_out.mean_cosine(directions),
        cosine_methods={other: _cosine(unit, positive, negative, other) for other in compare if other != method},
        constant_dimensions=int(_agree(positive, negative).sum()),
        rank=covariance.rank_of(covariance.gram_of(_centered(positive, negative))),
        shrinkage=found.shrinkage,
        c=found.c,
    )
    return Probe(
        direction=unit.astype(np.float32),
        norm=norm,
        evidence=evidence,
        by_fold=tuple(held_out.auroc_by_fold(scored)),
        slope=slope,
        intercept=intercept - slope * float(unit @ _middle(positive, negative)),
        nested=_nested(positive, negative, method) if nested else None,
    )


def _held_out(positive: F32, negative: F32, method: ProbeMethod) -> tuple[Scored, F64]:
    """The scores of every example by the direction of the folds without it, from the middle of both means, and
    those directions (folds, d).
    """
    folds = fold_of(len(positive)), fold_of(len(negative))
    scores = np.empty(len(positive)), np.empty(len(negative))
    directions = np.zeros((FOLDS, positive.shape[1]))
    for fold in range(FOLDS):
        held = [each == fold for each in folds]
        seen = positive[~held[0]], negative[~held[1]]
        vector = direction(*seen, method).vector
        directions[fold] = vector / (np.linalg.norm(vector) or 1.0)
        middle = _middle(*seen)
        for side, rows in enumerate((positive, negative)):
            scores[side][held[side]] = (rows[held[side]].astype(np.float64) - middle) @ directions[fold]
    return Scored(scores[0], scores[1], folds[0], folds[1]), directions


def _nested(positive: F32, negative: F32, method: ProbeMethod) -> F64:
    """(folds, folds) the AUROC on fold g of the direction without f and g, at [f, g]; 0 where f = g."""
    folds = fold_of(len(positive)), fold_of(len(negative))
    areas = np.zeros((FOLDS, FOLDS))
    for f, g in combinations(range(FOLDS), 2):
        seen = [rows[~np.isin(of, (f, g))] for rows, of in zip((positive, negative), folds, strict=True)]
        vector = direction(seen[0], seen[1], method).vector
        for out, held in ((f, g), (g, f)):
            areas[out, held] = auroc(positive[folds[0] == held] @ vector, negative[folds[1] == held] @ vector)
    return areas


def _middle(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> F64:
    return (positive.mean(axis=0, dtype=np.float64) + negative.mean(axis=0, dtype=np.float64)) / 2


def _cosine(unit: F64, positive: F32, negative: F32, method: ProbeMethod) -> float:
    other = direction(positive, negative, method).vector
    return float(unit @ other / np.linalg.norm(other))


def _agree(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(d,) in which dimensions every example has the same activation."""
    low = np.minimum(positive.min(axis=0), negative.min(axis=0))
    return low == np.maximum(positive.max(axis=0), negative.max(axis=0))
