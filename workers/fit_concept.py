"""The job that fits a concept: one pass over the labelled examples, a probe at every layer, the best one
published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from service import codec, concepts, labelled, models
from service.contracts import ConceptRecord, DatasetRecord, ModelRecord
from service.errors import Invalid
from service.evidence import FEW, Evidence, LayerEvidence
from service.registry import CONCEPTS, DATASETS, Registry
from service.specs import FitConceptSpec
from service.storage import sha256_bytes
from service.tasks import ShardManifest
from workers import held_out, probes
from workers.probes import Probe
from workers.stages import Stages

_IMBALANCE = 3  # times as many on one side
_OPTIMISM = 0.05  # of AUROC


@dataclass(frozen=True)
class Side:
    """The shards that hold the activations of one side."""

    dataset: DatasetRecord
    rows: tuple[int, ...] | None  # positions in the dataset; None: all
    manifests: tuple[ShardManifest, ...]

    @property
    def count(self) -> int:
        return sum(len(each.ids) for each in self.manifests)

    @property
    def quarantined(self) -> int:
        return sum(len(each.quarantined) for each in self.manifests)


def compute(stages: Stages, registry: Registry, spec: FitConceptSpec, model: ModelRecord) -> Mapping[str, Any]:
    """Publish the concept; what a job says of it. Raises Invalid when no layer tells the sides apart at all."""
    assert spec.pass_spec.activation is not None  # noqa: S101  (the api builds it so)
    sides = _sides(stages, registry, spec, model)
    layers, fitted = spec.pass_spec.activation.layers, dict[int, Probe]()
    found: list[LayerEvidence] = []
    for number, layer in enumerate(layers):
        stages.context.progress("probes", number, len(layers), unit="layers")
        stages.context.check()
        positive, negative = (stages.stored(side.manifests, number) for side in sides)
        try:
            about = {"compare": spec.compare, "layer": layer, "nested": len(layers) > 1}
            fitted[layer] = probes.fit(positive, negative, spec.method, **about)
            found.append(fitted[layer].evidence)
        except Invalid as error:
            if error.code != "identical_sides" or len(layers) == 1:
                raise
            found.append(LayerEvidence(layer, None, None, None, None, None, {}))
    stages.context.progress("probes", len(layers), len(layers), unit="layers")
    layer = choose(found)
    evidence = _evidence(stages, spec, sides, found, fitted, layer)
    return _publish(stages, registry, spec, model, sides, fitted[layer], evidence)


def choose(found: list[LayerEvidence]) -> int:
    """The layer with the highest held-out AUROC; of equal ones that with the lowest Brier score, then the first.

    Raises Invalid when the sides coincide at all of them.
    """
    usable = [each for each in found if each.auroc is not None and each.brier is not None]
    if not usable:
        detail = "Both sides have the same mean activation at every layer: there is no direction."
        raise Invalid("identical_sides", detail)
    return max(usable, key=lambda each: (each.auroc, -(each.brier or 0.0), -each.layer)).layer


def _sides(stages: Stages, registry: Registry, spec: FitConceptSpec, model: ModelRecord) -> tuple[Side, Side]:
    datasets = [registry.get(DATASETS, name) for name in (spec.positive, spec.negative)]
    chosen: list[tuple[int, ...] | None] = [None, None]
    if spec.labels is not None:
        chosen = [tuple(rows.tolist()) for rows in labelled.split(stages.storage, datasets[0], spec.labels)]
    sides = []
    for name, dataset, rows in zip(("positive", "negative"), datasets, chosen, strict=True):
        where, size = models.location(model), spec.shard_size
        manifests = stages.rows(name, where, spec.pass_spec, dataset, size=size, chosen=rows)
        sides.append(Side(dataset, rows, tuple(manifests)))
    return sides[0], sides[1]


def _evidence(
    stages: Stages,
    spec: FitConceptSpec,
    sides: tuple[Side, Side],
    found: list[LayerEvidence],
    fitted: Mapping[int, Probe],
    layer: int,
) -> Evidence:
    probe = fitted[layer]
    of_choice = None
    if len(found) > 1:
        areas, nested = ([getattr(each, name) for each in fitted.values()] for name in ("by_fold", "nested"))
        of_choice = held_out.auroc_of_choice(np.array(areas), np.array(nested))
    evidence = Evidence(
        method=spec.method,
        n_positive=sides[0].count,
        n_negative=sides[1].count,
        quarantined=sides[0].quarantined + sides[1].quarantined,
        folds=probes.FOLDS,
        layer=layer,
        layers=tuple(found),
        auroc_of_choice=of_choice,
        slope=probe.slope,
        intercept=probe.intercept,
        warnings=(),
    )
    warnings = (*_about_examples(stages, spec, sides), *about_probes(evidence, len(probe.direction)))
    return replace(evidence, warnings=warnings)


# --- what a user should know ------------------------------------------------------------------------


def _about_examples(stages: Stages, spec: FitConceptSpec, sides: tuple[Side, Side]) -> list[str]:
    positive, negative = sides
    said = []
    if spec.labels is None:
        places = labelled.told_both_ways(stages.storage, positive.dataset, negative.dataset)
        if places:
            said.append(
                f"The same text is labelled both ways, and counts on both sides: {'; '.join(places)}. Take it out "
                "of one of them."
            )
    else:
        rows = np.array([*(positive.rows or ()), *(negative.rows or ())], dtype=np.int64)
        if count := labelled.repeated(stages.storage, positive.dataset, rows):
            said.append(
                f"{count} of the examples stand on several lines of {positive.dataset.id!r}: the label of the "
                "first line counts."
            )
        if rest := positive.dataset.examples - len(rows):
            said.append(
                f"{rest} of the {positive.dataset.examples} examples of {positive.dataset.id!r} have no "
                f"{spec.labels.field!r}, or a value that is on neither side."
            )
    if aside := positive.quarantined + negative.quarantined:
        said.append(f"{aside} examples could not be used; {positive.count} + {negative.count} were.")
    return said


def about_probes(evidence: Evidence, width: int) -> list[str]:
    """What the figures alone do not say, in words; ``width``: dimensions of an activation."""
    said = []
    n, m = evidence.n_positive, evidence.n_negative
    if min(n, m) < FEW:
        said.append(
            f"{n} positive and {m} negative examples: with fewer than {FEW} a side the direction and every figure "
            "about it are rough. 100 a side are good."
        )
    if max(n, m) > _IMBALANCE * min(n, m):
        said.append(
            f"The sides are unequal ({n} positive, {m} negative): the smaller one decides how sure the figures are."
        )
    if same := [each.layer for each in evidence.layers if each.auroc is None]:
        said.append(f"Both sides have the same mean activation at layer {', '.join(map(str, same))}: no direction.")
    chosen = evidence.chosen
    interval = chosen.auroc_interval
    if interval is not None and interval[0] <= 0.5:
        said.append(
            f"The held-out AUROC at layer {chosen.layer} may be chance: its 95 % interval, {interval[0]:.2f} to "
            f"{interval[1]:.2f}, includes .5."
        )
    of_choice = evidence.auroc_of_choice
    if of_choice is not None and chosen.auroc is not None and chosen.auroc - of_choice > _OPTIMISM:
        said.append(
            f"The best of {len(evidence.layers)} layers looks better than it is: with the choice held out too, its "
            f"AUROC is {of_choice:.2f}, not {chosen.auroc:.2f}."
        )
    if chosen.constant_dimensions:
        said.append(
            f"{chosen.constant_dimensions} of {width} dimensions have the same activation in every example: they "
            "cannot enter the direction."
        )
    if (
        chosen.shrinkage is not None
        and chosen.rank is not None
        and chosen.rank < width - chosen.constant_dimensions
    ):
        said.append(
            f"The examples span {chosen.rank} of {width} dimensions, so the covariance is rank-deficient; in the "
            f"others it is what shrinkage (s = {chosen.shrinkage:.2f}) assumes: no correlations."
        )
    if chosen.c == probes.C_GRID[0]:
        said.append(
            f"Cross-validation chose the strongest penalty there is (C = {chosen.c:g}): no weights that it tried "
            "held on other examples."
        )
    return said


# --- the concept ------------------------------------------------------------------------------------


def _publish(
    stages: Stages,
    registry: Registry,
    spec: FitConceptSpec,
    model: ModelRecord,
    sides: tuple[Side, Side],
    probe: Probe,
    evidence: Evidence,
) -> Mapping[str, Any]:
    assert spec.pass_spec.activation is not None  # noqa: S101
    tensor = concepts.to_safetensors(probe.direction)
    record = ConceptRecord(
        id=spec.id,
        model=model.id,
        model_fingerprint=model.fingerprint,
        lineage=model.lineage,
        layer=evidence.layer,
        pooling=spec.pass_spec.activation.pooling,
        width=model.width,
        method=spec.method,
        norm=probe.norm,
        auroc_held_out=probe.auroc_held_out,
        n_positive=evidence.n_positive,
        n_negative=evidence.n_negative,
        provenance=_provenance(spec, sides),
        sha256=sha256_bytes(tensor),
        created_at=codec.now(),
        evidence=evidence,
    )
    stages.context.check()
    known = registry.find(CONCEPTS, spec.id)
    if known is None or known.sha256 != record.sha256:  # equal: an earlier attempt died after publishing
        concepts.publish(stages.storage, registry, record, tensor)
    told = {"concept": spec.id, "layer": record.layer, "auroc_held_out": record.auroc_held_out, "norm": probe.norm}
    return told | {"warnings": list(evidence.warnings)}


def _provenance(spec: FitConceptSpec, sides: tuple[Side, Side]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"dataset": side.dataset.id, "fingerprint": side.dataset.fingerprint}
        for name, side in zip(("positive", "negative"), sides, strict=True)
    }
    if spec.labels is not None:
        found["labels"] = codec.to_plain(spec.labels)
    return found
