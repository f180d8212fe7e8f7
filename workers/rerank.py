"""Exact scores of chosen examples as a job: EK-FAC with every eigenvector and every coordinate, in float32.

An index ranks by what it stores: some eigenvectors, some coordinates, eight or sixteen bits. For a few hundred
candidates nothing has to be left out: the query side H⁻¹∇f_v(Q) (or H⁻¹∇L(Q)) is one row over all coordinates, and
each candidate is read once more at every point of the run that the index sums over.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from service import artifacts, members, models, reranking
from service.contracts import ArrayInfo, DatasetRecord, ModelRecord, Point
from service.errors import Invalid, NotFound
from service.registry import DATASETS, Registry
from service.row_blocks import from_id_bytes
from service.specs import IndexManifest, RerankSpec
from service.terms import IndexKind, LossReduction
from service.work import (
    CurvatureSpec,
    Head,
    HeadWork,
    InfluenceSpec,
    Location,
    LossObjective,
    LossRowsWork,
    PassSpec,
    Reading,
    ReadOffSpec,
    Tracked,
)
from workers.stages import Stages

_SMALLEST, _PARTS = 16, 8  # candidates per shard, and shards per point, so that several workers have some


@dataclass(frozen=True)
class _At:
    """A point of the run, and what its scores count."""

    point: Point
    weight: float
    reading: Reading
    location: Location


@dataclass(frozen=True)
class _Chosen:
    """Candidates of one dataset of the index: positions, and the ids there."""

    dataset: DatasetRecord
    rows: list[int]


def compute(
    stages: Stages, registry: Registry, spec: RerankSpec, manifest: IndexManifest, model: ModelRecord
) -> dict[str, object]:
    """Publish the scores under ``spec.key``. Raises Invalid when no curvature stands behind the index."""
    if (
        artifacts.find_answer(stages.storage, spec.key, reranking.SCORES) is not None
    ):  # an earlier attempt died after publishing
        return {"rerank": spec.key}
    tracked, fitted = manifest.tracked, manifest.curvature
    if tracked is None or fitted is None:  # the api says so before there is a job
        detail = f"No curvature stands behind index {spec.index}: there are no exact EK-FAC scores."
        raise Invalid("no_curvature", detail, param="index")
    began = time.perf_counter()
    candidates = from_id_bytes(stages.numbers(spec.candidates, reranking.CANDIDATES)["ids"])
    chosen = _places(stages, registry, spec, manifest, candidates)
    points = _points(stages, manifest, model, spec.array)
    total = dict.fromkeys(candidates, 0.0)
    reasons: dict[str, str] = {}
    facts: dict[str, float | int | str] = {}
    for number, at in enumerate(points, start=1):
        stages.prefix = f"point {number} of {len(points)}: " if len(points) > 1 else ""
        work, facts = _pass(stages, registry, spec, manifest, at, tracked, fitted)
        for part in chosen:
            scores, aside = _scores(stages, at, work, part, spec.shard_size)
            reasons |= aside
            for item, score in scores.items():
                total[item] += at.weight * score
    stages.prefix = ""
    values = np.array([np.nan if item in reasons else total[item] for item in candidates], dtype=np.float64)
    told = np.frombuffer(json.dumps(reasons, sort_keys=True).encode(), dtype=np.uint8)
    seconds = round(time.perf_counter() - began, 3)
    stages.context.check()
    tensors = {reranking.SCORES: {"scores": values, "reasons": told}}
    artifacts.publish(stages.storage, spec.key, tensors, facts=facts | {"seconds": seconds}, answer=True)
    return {"rerank": spec.key, "candidates": len(candidates), "points": len(points), "seconds": seconds}


def _places(
    stages: Stages, registry: Registry, spec: RerankSpec, manifest: IndexManifest, candidates: Sequence[str]
) -> list[_Chosen]:
    """Where the candidates lie: each in the first of the index's datasets that holds it."""
    left, found = set(candidates), []
    for name in (manifest.dataset, *(part.dataset for part in manifest.appended)):
        if not left:
            break
        dataset = registry.get(DATASETS, name)
        ids = stages.ids(dataset)
        rows = [row for row, item in enumerate(ids) if item in left]
        if rows:
            found.append(_Chosen(dataset, rows))
            left.difference_update(ids[row] for row in rows)
    if left:
        detail = f"{len(left)} candidates are in no dataset of index {spec.index}, such as {min(left)!r}."
        raise NotFound("example_not_found", detail, param="index")
    return found


def _points(stages: Stages, manifest: IndexManifest, model: ModelRecord, array: ArrayInfo) -> list[_At]:
    """The points that rows of ``array`` add up, weighted as the build did; coordinates are of the end alone."""
    end = [(manifest.points[-1], 1.0)]
    weighted = end
    if array.kind == IndexKind.INFLUENCE:
        section = next(section for section in manifest.sections if array in section.arrays)
        work = members.origin(stages.storage, members.read(stages.storage, section.shards[0])).work
        # Read off stored coordinates (an extension), embeddings are of the end as well.
        weighted = end if isinstance(work, ReadOffSpec) else [(point, point.weight) for point in manifest.points]
    reading = manifest.spec.reading
    return [
        _At(point, weight, replace(reading, model_fingerprint=point.fingerprint), models.location(model, point))
        for point, weight in weighted
    ]


def _pass(
    stages: Stages,
    registry: Registry,
    spec: RerankSpec,
    manifest: IndexManifest,
    at: _At,
    tracked: Tracked,
    fitted: CurvatureSpec,
) -> tuple[PassSpec, dict[str, float | int | str]]:
    """The pass whose only number per example is its exact score at this point, and facts of the query set."""
    # The sample is drawn from the first dataset, also after appending. All eigenvectors, also where the index keeps
    # some: found again by the key under which the build has fitted them.
    first = registry.get(DATASETS, manifest.dataset)
    curvature = stages.curvature(at.location, at.reading, tracked, fitted, first, most_bytes=spec.curvature_bytes)
    query_set = registry.get(DATASETS, spec.query_set, param="query_set")
    reduction = _reduction(manifest)
    if spec.direction is not None:
        assert spec.layer is not None and spec.pooling is not None  # noqa: S101  (the planner sets them together)
        rows = stages.jacobian(
            at.location,
            at.reading,
            query_set,
            curvature=curvature,
            layer=spec.layer,
            pooling=spec.pooling,
            function=spec.function,
            directions=spec.direction,
            count=1,
        )
    else:
        work = LossRowsWork(at.reading, curvature, reduction, mean=True)
        whole = [(query_set, range(query_set.examples))]
        (mean,) = stages.artifacts("loss of the query set", [work], location=at.location, sources=whole)
        rows = (mean.key,)
    asked = artifacts.get(stages.storage, rows[0]).facts
    if not asked["examples"]:
        raise Invalid("empty_query_set", f"No example of {query_set.id!r} can be used.", param="query_set")
    # The sign rule of DESIGN section 1: −∇f_v(Q) for concepts, +∇L(Q) for losses.
    head = HeadWork(curvature, rows, spec.damping, None, sign=-1 if spec.direction is not None else 1)
    (made,) = stages.artifacts("query side", [head])
    one = Head(ArrayInfo(IndexKind.INFLUENCE, spec.layer, 1), made.key)
    exact = PassSpec(
        **vars(at.reading),
        activation=None,
        gradient=None,
        objective=LossObjective(),  # the loss, as ever; but rows stay float32, and a score may be zero
        influence=InfluenceSpec(curvature, (one,), reduction),
    )
    return exact, {name: asked[name] for name in ("examples", "quarantined")}


def _scores(
    stages: Stages, at: _At, work: PassSpec, chosen: _Chosen, shard_size: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Exact scores at one point by example id, and why some have none."""
    size = min(shard_size, max(_SMALLEST, -(-len(chosen.rows) // _PARTS)))
    found = stages.rows("exact scores", at.location, work, chosen.dataset, size=size, chosen=chosen.rows)
    scores: dict[str, float] = {}
    aside: dict[str, str] = {}
    for manifest in found:
        rows = stages.rows_of(manifest, manifest.arrays[0].info)
        scores |= dict(zip(manifest.ids, rows[:, 0].tolist(), strict=True))
        aside |= {item.id or "": f"{item.reason}: {item.detail}" for item in manifest.quarantined}
    return scores, aside


def _reduction(manifest: IndexManifest) -> LossReduction:
    own = manifest.spec.influence or manifest.spec.gradient
    assert own is not None  # noqa: S101  (a curvature stands behind one of them)
    return own.loss_reduction
