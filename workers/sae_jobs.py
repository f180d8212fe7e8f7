"""Jobs about sparse autoencoders: train one on an index's activations, and encode an index with one."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from service import artifacts, codec, sae, sae_features, saelens, saes
from service.contracts import IndexRecord, JobContext, ModelRecord
from service.registry import MODELS, SAES, Registry
from service.row_blocks import RowBlocks
from service.sae_records import EncodeFeaturesSpec, SaeTraining, TrainSaeSpec, TrainSaeWork
from service.sae_tally import Tally, kept_per_example
from service.saelens import CONFIG, WEIGHTS, SaeConfig
from service.specs import IndexManifest
from service.tasks import Artifact
from workers.stages import Stages, key_of
from workers.works.sae import SAE

_PARTS = 10  # of a training


def train(stages: Stages, registry: Registry, spec: TrainSaeSpec, index: IndexRecord) -> dict[str, object]:
    """Train, and publish in SAELens' format under ``spec.id``. Raises Conflict, Invalid."""
    model = registry.get(MODELS, index.model)
    artifact = _trained(stages, spec, index)
    facts = artifact.facts
    training = SaeTraining(
        index=index.id,
        recipe=spec.recipe,
        rows=int(facts["rows"]),
        rows_held_out=int(facts["rows_held_out"]),
        scale=float(facts["scale"]),
        explained_variance=float(facts["explained_variance"]),
        l0=float(facts["l0"]),
        dead=float(facts["dead"]),
        seconds=float(facts["seconds"]),
    )
    files = _files(stages, artifact, spec, index, model, training)
    about: dict[str, Any] = {"source": f"index {index.id}", "centred": False, "pooling": index.pooling}
    record = saes.describe(spec.id, files, model, training=training, **about)
    stages.context.check()
    saes.publish(registry, record, files)
    told = ("explained_variance", "l0", "dead", "rows", "rows_held_out")
    return {
        "sae": spec.id,
        "features": record.features,
        "layer": record.layer,
        **{name: facts[name] for name in told},
    }


def _trained(stages: Stages, spec: TrainSaeSpec, index: IndexRecord) -> Artifact:
    """What the last part of the training leaves. Each part goes on from the state of the one before, which is then
    deleted; a job that comes back begins after the last that is there.
    """
    steps = spec.recipe.steps
    ends = sorted({steps * (part + 1) // _PARTS for part in range(_PARTS)} - {0})
    works: list[TrainSaeWork] = []
    for start, stop in pairwise([0, *ends]):
        state = key_of(works[-1]) if works else None
        works.append(TrainSaeWork(index.id, index.manifest_sha256, spec.array, spec.recipe, start, stop, state))
    there = [
        number for number, work in enumerate(works) if artifacts.made(stages.storage, key_of(work)) is not None
    ]
    silent = stages.telling(_Silent(stages.context))
    resumed = works[there[-1]].start if there else 0
    for work in works[there[-1] if there else 0 :]:
        stages.context.progress("training", work.start, steps, unit="steps", resumed=resumed)
        (found,) = silent.artifacts("training", [work])
        if work.state is not None:
            artifacts.remove(stages.storage, work.state)
    stages.context.progress("training", steps, steps, unit="steps", resumed=resumed)
    return found  # pyright: ignore[reportPossiblyUnboundVariable]  (there is a step at least)


def _files(
    stages: Stages,
    artifact: Artifact,
    spec: TrainSaeSpec,
    index: IndexRecord,
    model: ModelRecord,
    training: SaeTraining,
) -> dict[str, bytes]:
    """The folder that SAELens loads. The same training gives the same bytes, whatever it took."""
    assert spec.array.layer is not None  # noqa: S101  (activations have one)
    layer, recipe = spec.array.layer, spec.recipe
    hook = saelens.hook_of(layer)
    config = SaeConfig("topk", spec.array.dims, recipe.features, hook, layer, k=recipe.k, model_name=model.id)
    about = replace(training, seconds=0.0)
    metadata = {
        "hook_layer": layer - 1,
        "prepend_bos": False,
        "whence": {"pooling": index.pooling, "manifest_sha256": index.manifest_sha256, **codec.to_plain(about)},
    }
    weights = artifacts.read(stages.storage, artifact, SAE)
    return {CONFIG: saelens.write(config, metadata), WEIGHTS: saelens.weights(weights)}


def encode(
    stages: Stages, registry: Registry, spec: EncodeFeaturesSpec, manifest: IndexManifest
) -> dict[str, object]:
    """Publish what fires where under ``spec.key``, unless it is there. Raises Damaged."""
    if artifacts.find_answer(stages.storage, spec.key, sae_features.FILE) is not None:
        return {"features": spec.key}
    record = registry.get(SAES, spec.sae)
    held = saes.read(stages.storage, record)
    stored = RowBlocks(stages.storage, manifest, spec.array)
    tally = Tally(record.features, kept_per_example(manifest.counts.indexed))
    ids: list[str] = []
    for done, (names, rows) in enumerate(stored.with_ids()):
        stages.context.progress("encoding rows", done, stored.count, unit="shards")
        ids += names
        for block in sae.blocks_of(rows, record.features):
            tally.add(sae.firing(held, block))
    stages.context.progress("encoding rows", stored.count, stored.count, unit="shards")
    stages.context.check()
    artifacts.publish(stages.storage, spec.key, sae_features.pack(tally, ids), answer=True)
    return {"features": spec.key, "examples": len(ids)}


class _Silent:
    """A job's context for one part of a training, whose own progress is none: stops as the job does."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    def progress(self, stage: str, done: int, total: int, **_about: Any) -> None: ...

    def log(self, message: str, **data: Any) -> None: ...

    def check(self) -> None:
        self._context.check()
