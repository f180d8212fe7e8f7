"""Index versions for tests about names: records alone, or whole ones in which every row of version v scores v."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import numpy as np

from service import codec, concepts, datasets, indexes, shards
from service.contracts import ArrayInfo, ConceptRecord, Counts, IndexRecord, ModelRecord, Point
from service.registry import DATASETS, INDEXES, MODELS, Registry
from service.specs import IndexManifest, Section
from service.storage import Storage, sha256_bytes
from service.terms import IndexKind, LongExamples, LossReduction, Pooling
from service.work import ActivationSpec, Location, PassSpec

D, ROWS, SHARD = 4, 6, 2
ARRAY = ArrayInfo(IndexKind.ACTIVATION, 1, D)
SPEC = PassSpec(
    model_fingerprint="f",
    tokenizer_fingerprint="t",
    activation=ActivationSpec((1,), Pooling.RESPONSE_MEAN),
    gradient=None,
    objective=None,
    max_length=128,
    long_examples=LongExamples.TRUNCATE_RIGHT,
    token_budget=4096,
    dtype="float32",
)


def record(name: str, version: int) -> IndexRecord:
    return IndexRecord(
        name=name, version=version, model="m", model_fingerprint="f", lineage="f", dataset="d",
        dataset_fingerprint="f", pooling=Pooling.RESPONSE_MEAN, loss_reduction=LossReduction.MEAN, arrays=(ARRAY,),
        counts=Counts(ROWS, ROWS, 0, 0, 0), quarantine_reasons={}, bytes=1, job="j", created_at=codec.now(),
    )  # fmt: skip


def add(registry: Registry, *ids: str) -> list[IndexRecord]:
    """The records of these versions, as publishing adds them."""
    made = [record(name, int(version)) for name, _, version in (item.partition("@v") for item in ids)]
    for each in made:
        registry.add(INDEXES, each.id, each)
    return made


def furnish(registry: Registry, storage: Storage) -> None:
    """A model, a dataset of ROWS examples, and a concept that is the first axis."""
    registry.add(MODELS, "m", ModelRecord("m", "/m", "f", "t", None, "X", 2, D, 64, None, "f", (), codec.now()))
    lines = b"".join(b'{"text": "example %d"}\n' % number for number in range(ROWS))
    parsed = datasets.parse(
        BytesIO(lines), "f.jsonl", quarantine_malformed=False, max_bytes=1 << 20, max_line_bytes=1 << 20
    )
    registry.add(DATASETS, "d", datasets.publish(storage, "d", parsed))
    tensor = concepts.to_safetensors(np.eye(D, dtype=np.float32)[0])
    pooled, sha256 = Pooling.RESPONSE_MEAN, sha256_bytes(tensor)
    concept = ConceptRecord("c", "m", "f", "f", 1, pooled, D, "axis", 1.0, 1.0, 5, 5, {}, sha256, codec.now())
    concepts.publish(storage, registry, concept, tensor)


def publisher(registry: Registry, storage: Storage, name: str) -> Callable[[int], IndexRecord]:
    """Publishes version v of an index, in several shards: every row of it scores v with the concept."""
    dataset = registry.get(DATASETS, "d")
    ids = datasets.read_table(storage, dataset).column("id").to_pylist()

    def publish(version: int) -> IndexRecord:
        spec = replace(SPEC, max_length=128 + version)  # or all versions would share their shards
        made = [
            shards.publish(
                storage,
                task,
                ids=[ids[row] for row in task.rows],
                arrays={ARRAY: np.full((len(task.rows), D), version, dtype=np.float32)},
                encoding=shards.HALF,
                versions={},
            )
            for task in shards.cut(Location("/m", "/m"), spec, dataset, ids, range(ROWS), SHARD)
        ]
        manifest = IndexManifest(
            name=name, version=version, model="m", model_fingerprint="f", lineage="f", dataset="d",
            dataset_fingerprint=dataset.fingerprint, chat_template_sha256=None, spec=spec,
            points=(Point("m", "/m", "f"),), curvature=None, counts=Counts(ROWS, ROWS, 0, 0, 0),
            sections=(Section((ARRAY,), tuple(map(shards.reference, made))),), quarantine_reasons={},
        )  # fmt: skip
        described = indexes.describe(manifest, job="j")
        indexes.publish(storage, registry, described, manifest, {})
        return described

    return publish
