"""The directions of a dataset as a job: rows are read shard by shard, as often as it takes, and none is kept."""

import time
from collections.abc import Iterator

from service import artifacts, directions
from service.errors import Invalid
from service.row_blocks import RowBlocks
from service.rows import F32
from service.specs import DirectionsSpec, IndexManifest
from service.spectrum import top_directions
from workers.stages import Stages


def compute(stages: Stages, spec: DirectionsSpec, manifest: IndexManifest) -> dict[str, object]:
    """Publish the directions under ``spec.key``, unless they are there. Raises Damaged, Invalid."""
    if (
        artifacts.find_answer(stages.storage, spec.key, directions.FILE) is not None
    ):  # an earlier attempt died after publishing
        return {"directions": spec.key}
    began = time.perf_counter()
    stored = RowBlocks(stages.storage, manifest, spec.array)
    passes = 0

    def blocks() -> Iterator[F32]:
        nonlocal passes
        passes += 1
        for done, block in enumerate(stored):
            stages.context.progress(f"reading rows, pass {passes}", done, stored.count, unit="shards")
            yield block
        stages.context.progress(f"reading rows, pass {passes}", stored.count, stored.count, unit="shards")

    found = top_directions(blocks, spec.array.dims, spec.count, seed=spec.seed)
    if not len(found.values):
        detail = f"Index {spec.index} holds no row that is not zero: there is no direction. Nothing was published."
        raise Invalid("no_rows", detail, param="index")
    tensors, facts = directions.pack(found, time.perf_counter() - began)
    stages.context.check()
    artifacts.publish(stages.storage, spec.key, tensors, facts=facts, answer=True)
    return {"directions": spec.key, "count": len(found.values), "share": float(found.shares.sum())}
