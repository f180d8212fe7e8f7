"""Token shares as a job: which passes a score comes from, at every point of the run, and the sum over them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service import artifacts, basis, members, models, shards, token_shares, tombstones
from service.contracts import ArrayInfo, DatasetRecord, ModelRecord, Point
from service.errors import Invalid
from service.matching import Matched
from service.rows import F32
from service.specs import IndexManifest
from service.terms import IndexKind
from service.token_shares import FILE, Share
from service.work import PassSpec, ReadOffSpec, ShardWork, SumSpec, TokenSharesWork
from workers.stages import Stages


def compute(
    stages: Stages,
    key: str,
    manifest: IndexManifest,
    model: ModelRecord,
    parts: Sequence[DatasetRecord],
    found: Matched,
    examples: Sequence[str],
) -> int:
    """Publish the shares under ``key``; the number of examples that have some: not those that the index has set
    aside or that were deleted. Raises Invalid when the rows of this score are no sum over tokens.
    """
    held = _held(stages, manifest, set(examples) - set(tombstones.read(stages.storage, manifest.deleted)))
    each: dict[str, Share] = {}
    for part in parts:
        place = {item: row for row, item in enumerate(stages.ids(part))}
        asked = [item for item in dict.fromkeys(examples) if item in place and item in held - each.keys()]
        if asked:
            rows = [place[item] for item in asked]
            each |= dict(zip(asked, _shares(stages, manifest, model, found, (part, rows)), strict=True))
    total = token_shares.join([each.get(item, token_shares.NOTHING) for item in examples])
    stages.context.check()
    artifacts.publish(stages.storage, key, {FILE: total}, answer=True)
    return int((total["lengths"] > 0).sum())


def _held(stages: Stages, manifest: IndexManifest, wanted: set[str]) -> set[str]:
    """Those of the examples that are indexed."""
    held: set[str] = set()
    for group in members.groups(stages.storage, manifest.sections):
        held |= members.in_all(group) & wanted
        if held == wanted:
            break
    return held


def _shares(
    stages: Stages,
    manifest: IndexManifest,
    model: ModelRecord,
    found: Matched,
    source: tuple[DatasetRecord, Sequence[int]],
) -> list[Share]:
    """Of some examples of one dataset, summed over the points of the run."""
    total: dict[str, np.ndarray] | None = None
    for point, work in _works(stages, manifest, found):
        stage = f"token shares at {point.name}"
        (made,) = stages.artifacts(stage, [work], location=models.location(model, point), sources=[source])
        held = artifacts.read(stages.storage, made, FILE)
        if total is None:
            total = dict(held)
        else:
            total["shares"] = total["shares"] + held["shares"]
    assert total is not None  # noqa: S101  (a run has a point)
    return token_shares.split(total)


def _works(stages: Stages, manifest: IndexManifest, found: Matched) -> list[tuple[Point, TokenSharesWork]]:
    """The passes that the scored rows were read off, and their weights."""
    array, end = found.array, manifest.points[-1]
    if array.kind == IndexKind.DIFFERENCE:  # the api says so before there is a job
        detail = (
            "A projection difference compares two texts: ask for vector_filter, which has a share for every token."
        )
        raise Invalid("no_token_shares", detail, param="method")
    if array.kind != IndexKind.INFLUENCE:
        return [(end, TokenSharesWork(manifest.spec, array, _vector(stages, found.u)))]
    work = _work_of(stages, manifest, array)
    if isinstance(work, ReadOffSpec):
        assert array.embedding is not None  # noqa: S101
        jacobian = artifacts.read(stages.storage, artifacts.get(stages.storage, work.jacobian), "jacobian")["rows"]
        head = -basis.damped(stages.storage, work.basis, jacobian, array.embedding.damping)
        own = next(info for info in manifest.arrays if info.kind == IndexKind.GRADIENT)
        return [(end, TokenSharesWork(manifest.spec, own, _vector(stages, found.u @ head)))]
    assert isinstance(work, SumSpec) and array.embedding is not None  # noqa: S101
    single = replace(array, embedding=replace(array.embedding, points=1))
    vector, works = _vector(stages, found.u), []
    for point, (key, weight) in zip(manifest.points, work.sources, strict=True):
        spec = shards.read_manifest(stages.storage, key).work
        assert isinstance(spec, PassSpec)  # noqa: S101
        works.append((point, TokenSharesWork(spec, single, vector, weight)))
    return works


def _work_of(stages: Stages, manifest: IndexManifest, array: ArrayInfo) -> ShardWork:
    section = next(section for section in manifest.sections if array in section.arrays)
    return members.origin(stages.storage, members.read(stages.storage, section.shards[0])).work


def _vector(stages: Stages, u: F32) -> str:
    values = np.ascontiguousarray(u, dtype=np.float32)
    return stages.store(["token shares", values.tobytes().hex()], "vector", {"u": values})
