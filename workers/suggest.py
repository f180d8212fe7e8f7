"""The activations of a few labelled examples, as a job: what candidates are compared on."""

from collections.abc import Mapping
from typing import Any

from service import artifacts, models
from service.contracts import ModelRecord
from service.registry import DATASETS, Registry
from service.specs import SuggestSpec
from service.suggestions import FILE
from workers.stages import Stages


def compute(stages: Stages, registry: Registry, spec: SuggestSpec, model: ModelRecord) -> Mapping[str, Any]:
    """Publish them under ``spec.key``, a tensor for each side and layer."""
    assert spec.pass_spec.activation is not None  # noqa: S101  (the api builds it so)
    tensors, quarantined, counts = {}, 0, []
    for side, name in (("positive", spec.positive), ("negative", spec.negative)):
        dataset = registry.get(DATASETS, name)
        manifests = stages.rows(side, models.location(model), spec.pass_spec, dataset, size=spec.shard_size)
        quarantined += sum(len(manifest.quarantined) for manifest in manifests)
        counts.append(sum(len(manifest.ids) for manifest in manifests))
        for number, layer in enumerate(spec.pass_spec.activation.layers):
            tensors[f"{side}_{layer}"] = stages.stored(manifests, number)
    stages.context.check()
    facts: dict[str, float | int | str] = {"quarantined": quarantined}
    artifacts.publish(stages.storage, spec.key, {FILE: tensors}, facts=facts, answer=True)
    return {"activations": spec.key, "positive": counts[0], "negative": counts[1], "quarantined": quarantined}
