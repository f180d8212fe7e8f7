"""What speaks for a fitted concept, as its record keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.terms import ProbeMethod

FEW = 20  # examples of a side; below, every figure about a concept is rough


@dataclass(frozen=True)
class LayerEvidence:
    """A probe at one layer, measured on held-out folds; all None: both sides have the same mean there."""

    layer: int
    auroc: float | None  # share of held-out pairs in the right order
    auroc_interval: tuple[float, float] | None  # 95 %, bootstrap over the examples
    brier: float | None  # of the held-out probabilities
    calibration_error: float | None  # expected, over 10 bins of probability
    cosine_folds: float | None  # mean of all pairs of the folds' directions
    cosine_methods: Mapping[ProbeMethod, float]  # to what other methods find in the same examples
    constant_dimensions: int = 0  # in which all examples agree
    rank: int | None = None  # dimensions that the examples span about their mean
    shrinkage: float | None = (
        None  # of the covariance, where the method has one; 0: the covariance as it is, 1: nothing but variances
    )
    c: float | None = None  # inverse strength of the L2 penalty, chosen by cross-validation


@dataclass(frozen=True)
class Evidence:
    """Of a concept that was fitted on labelled examples.

    P(positive) of an example is σ(``slope`` · ⟨v̂, a⟩ + ``intercept``), at the layer of the concept.
    """

    method: ProbeMethod
    n_positive: int
    n_negative: int
    quarantined: int  # examples of both sides that could not be used
    folds: int
    layer: int  # the one that was chosen
    layers: tuple[LayerEvidence, ...]
    auroc_of_choice: float | None  # where there were several: with the choice of the layer held out too
    slope: float
    intercept: float
    warnings: tuple[str, ...]

    @property
    def chosen(self) -> LayerEvidence:
        return next(each for each in self.layers if each.layer == self.layer)
