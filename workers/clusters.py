"""Spherical k-means of influence embeddings as a job: trained on a sample of the rows, and none is kept."""

import faiss
import numpy as np

from service import artifacts, clusters
from service.errors import Invalid
from service.row_blocks import RowBlocks
from service.rows import F32
from service.specs import ClustersSpec, IndexManifest
from workers.stages import Stages

_PER_CENTRE = 512  # rows that are trained on, for each centre
_ROUNDS = 30
_TRIES = 3  # seeds; the one with the most cohesive clusters is kept


def compute(stages: Stages, spec: ClustersSpec, manifest: IndexManifest) -> dict[str, object]:
    """Publish the centres under ``spec.key``, unless they are there. Raises Damaged, Invalid."""
    known = clusters.find(stages.storage, spec)  # an earlier attempt may have died after publishing
    if known is None:
        rows = _sample(stages, RowBlocks(stages.storage, manifest, spec.array), spec)
        directions, cohesion = spherical(rows, spec.count, spec.seed)
        stages.context.check()
        facts: dict[str, float | int | str] = {"cohesion": cohesion, "rows": len(rows)}
        tensors = {clusters.FILE: {"directions": directions}}
        artifacts.publish(stages.storage, spec.key, tensors, facts=facts, answer=True)
        known = clusters.Centres(directions, cohesion)
    return {"clusters": spec.key, "count": len(known.directions), "cohesion": known.cohesion}


def spherical(rows: F32, count: int, seed: int) -> tuple[F32, float]:
    """Unit rows (n, r), n ≥ count → unit centres (count, r), largest cluster first, and the mean cosine with them.

    Pure: the same rows and seed give the same centres.
    """
    faiss.omp_set_num_threads(1)  # so that the same rows give the same centres everywhere
    found: list[tuple[float, F32, F32]] = []
    for attempt in range(_TRIES):
        means = faiss.Kmeans(
            rows.shape[1],
            count,
            niter=_ROUNDS,
            seed=(seed * _TRIES + attempt) % (1 << 31),
            spherical=True,
            max_points_per_centroid=len(rows),
            min_points_per_centroid=1,
        )
        means.train(rows)
        centres = np.array(means.centroids, dtype=np.float32)
        cosines = rows @ centres.T
        found.append((float(cosines.max(axis=1).mean(dtype=np.float64)), centres, cosines))
    cohesion, centres, cosines = max(found, key=lambda each: each[0])
    sizes = np.bincount(cosines.argmax(axis=1), minlength=count)
    return centres[np.argsort(-sizes, kind="stable")], cohesion


def _sample(stages: Stages, stored: RowBlocks, spec: ClustersSpec) -> F32:
    """Unit rows that are spread evenly over the index; rows of zeros have no direction and are left out."""
    kept: list[F32] = []
    most = _PER_CENTRE * spec.count
    every = max(1, stored.rows // most)
    seen = 0
    for done, block in enumerate(stored):
        stages.context.progress("reading rows", done, stored.count, unit="shards")
        wanted = block[-seen % every :: every]
        seen += len(block)
        norms = np.linalg.norm(wanted.astype(np.float64), axis=1)
        there = norms > 0
        kept.append((wanted[there] / norms[there, None]).astype(np.float32))
    stages.context.progress("reading rows", stored.count, stored.count, unit="shards")
    rows = np.concatenate(kept)
    if len(rows) < spec.count:
        detail = f"Index {spec.index} holds {len(rows)} rows that are not zero: too few for {spec.count} clusters."
        raise Invalid("too_few_rows", detail, param="clusters")
    return rows
