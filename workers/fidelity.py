"""How well the stored rows of an index rank examples: measured on each build, against wider coordinates.

References come from the same maths with more of it: twice the eigenvectors per side (all, where the index
has all), every coordinate, float32, for 32 random directions v on a few hundred examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from service import basis, shards, tombstones
from service.contracts import ArrayInfo, DatasetRecord, Fidelity
from service.rows import F32
from service.specs import CachedJacobian, IndexManifest
from service.tasks import ShardManifest
from service.terms import IndexKind
from service.work import (
    CurvatureSpec,
    Eigen,
    GradientSpec,
    Head,
    HeadWork,
    InfluenceSpec,
    LossRowsWork,
    MixWork,
    PassSpec,
)
from workers.directions import FILE, Directions
from workers.stages import Stages, sample_rows, shuffled

if TYPE_CHECKING:
    from workers.build import AtPoint, Question

EXAMPLES, QUERIES = 256, 32
_FEWEST = 64  # held-out examples; with fewer, those the curvature has seen are taken as well
_SEED = 20260214


def spearman(ours: F32, theirs: F32) -> np.ndarray:
    """Rank correlation of each column of (n, q) with its counterpart: (q,)."""
    a, b = (np.argsort(np.argsort(values, axis=0), axis=0).astype(np.float64) for values in (ours, theirs))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


@dataclass(frozen=True)
class Wide:
    """What references are computed with: twice as many eigenvectors per side as the index keeps."""

    whole: str | None
    p: int | None
    scouts: tuple[tuple[str, ...], ...] = ()

    def curvature(self, stages: Stages) -> str:
        assert self.whole is not None  # noqa: S101  (only asked where there is a curvature)
        return stages.narrowed(self.whole, 2 * self.p if self.p else None, self.scouts)


class Measured:
    """The examples on which one index is measured, and its own rows for them."""

    def __init__(self, stages: Stages, manifest: IndexManifest, dataset: DatasetRecord, fitted: set[int]) -> None:
        self._stages = stages
        self._manifest = manifest
        ids = stages.ids(dataset)
        self._place: dict[str, list[tuple[int, int]]] = {}
        for section in manifest.sections:
            for number, reference in enumerate(section.shards):
                held = shards.read_manifest(stages.storage, reference.key, sha256=reference.sha256).ids
                for row, item in enumerate(held):
                    self._place.setdefault(item, []).append((number, row))
        everywhere = {item for item, places in self._place.items() if len(places) == len(manifest.sections)}
        everywhere -= tombstones.read(stages.storage, manifest.deleted)
        order = [row for row in shuffled(ids, _SEED) if ids[row] in everywhere]
        unseen = [row for row in order if row not in fitted]
        self.held_out = len(unseen) >= _FEWEST
        order = unseen if self.held_out else order
        count = min(EXAMPLES, len(order) - QUERIES if len(order) >= 2 * QUERIES else len(order))
        self.rows = sorted(order[:count])
        self.queries = sorted(order[count : count + QUERIES] or order[:QUERIES])
        self.ids = [ids[row] for row in self.rows]
        self.query_ids = [ids[row] for row in self.queries]

    def stored(self, array: ArrayInfo, ids: Sequence[str]) -> F32:
        """The index's rows of ``array`` for ``ids``."""
        section = next(n for n, each in enumerate(self._manifest.sections) if array in each.arrays)
        found = np.zeros((len(ids), array.dims), dtype=np.float32)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, item in enumerate(ids):
            number, row = self._place[item][section]
            by_shard.setdefault(number, []).append((place, row))
        for number, places in by_shard.items():
            reference = self._manifest.sections[section].shards[number]
            manifest = shards.read_manifest(self._stages.storage, reference.key, sha256=reference.sha256)
            rows = self._stages.rows_of(manifest, array)
            for place, row in places:
                found[place] = rows[row]
        return found


def measure(
    stages: Stages,
    manifest: IndexManifest,
    made: Sequence["AtPoint"],
    dataset: DatasetRecord,
    r: Mapping[int, Directions],
    curvature: CurvatureSpec,
    *,
    size: int,
) -> tuple[Fidelity, ...]:
    """Fidelity of every array that curvature stands behind."""
    if all(point.wide.whole is None for point in made):
        return ()
    fitted = set(sample_rows(stages.ids(dataset), curvature.examples, curvature.seed))
    on = Measured(stages, manifest, dataset, fitted)
    if len(on.rows) < 2:  # nothing to rank
        return ()
    p = made[-1].wide.p
    against = "all coordinates of the kept eigenvectors" if p is None else f"{2 * p} eigenvectors per side"
    found: list[Fidelity] = []

    def add(array: ArrayInfo, asked: ArrayInfo | None, ours: F32, theirs: F32) -> None:
        """``asked``: the embedding whose question it was; None: loss queries."""
        rho = spearman(ours, theirs)
        about = asked.embedding if asked else None
        found.append(
            Fidelity(
                array,
                "concept" if about else "loss",
                float(rho.mean()),
                float(rho.min()),
                len(rho),
                len(ours),
                on.held_out,
                against,
                query_set=about.query_set if about else None,
                layer=asked.layer if asked else None,
                function=about.function if about else None,
                damping=about.damping if about else basis.STORED_DAMPING,
            )
        )

    influences = [array for array in manifest.arrays if array.kind == IndexKind.INFLUENCE]
    directions = _random_directions(stages, influences, r)
    references: dict[ArrayInfo, F32] = {}
    end: dict[ArrayInfo, F32] = {}
    for number, point in enumerate(made, start=1):
        stages.prefix = f"fidelity {number} of {len(made)}: "
        rows = _reference(stages, point, influences, directions, on, dataset, size=size)
        for array, values in rows.items():
            weighted = np.float32(point.weight) * values
            references[array] = references[array] + weighted if array in references else weighted
        end = rows
    stages.prefix = "fidelity: "
    for array in influences:
        assert array.layer is not None  # noqa: S101
        v = directions[array.layer].rows
        v = v @ r[array.layer].rows.T if array.layer in r else v
        add(array, array, on.stored(array, on.ids) @ v.T, references[array])
    gradient = manifest.spec.gradient
    if gradient is not None and isinstance(gradient.projection, Eigen):
        array = next(array for array in manifest.arrays if array.kind == IndexKind.GRADIENT)
        key, stored = gradient.projection.basis, on.stored(array, on.ids)
        for known in manifest.jacobians:
            J = stages.numbers(known.artifact, "jacobian")["rows"]
            for other in influences:
                if not _asks_the_same(other, known) or other.embedding is None:
                    continue
                v = directions[known.layer].rows
                v = v @ r[known.layer].rows.T if known.layer in r else v
                u = -basis.damped(stages.storage, key, v @ J, other.embedding.damping)
                add(array, other, stored @ u.T, end[other])
        theirs = _loss_reference(stages, made[-1], on, dataset, gradient, size=size)
        u = basis.damped(stages.storage, key, on.stored(array, on.query_ids), basis.STORED_DAMPING)
        add(array, None, stored @ u.T, theirs)
    stages.prefix = ""
    return tuple(found)


def _random_directions(
    stages: Stages, arrays: Sequence[ArrayInfo], r: Mapping[int, Directions]
) -> dict[int, Directions]:
    """Unit vectors (QUERIES, d) by layer, within the span of R."""
    found = {}
    for array in arrays:
        layer = array.layer
        if layer is None or layer in found:
            continue
        generator = np.random.Generator(np.random.Philox(key=_SEED + layer))
        v = generator.standard_normal((QUERIES, array.dims)).astype(np.float32)
        v = v @ r[layer].rows if layer in r else v
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        key = ["fidelity", _SEED, layer, array.dims, r[layer].artifact if layer in r else None]
        found[layer] = Directions(stages.store(key, FILE, {"rows": v}), v)
    return found


def _reference(
    stages: Stages,
    point: "AtPoint",
    arrays: Sequence[ArrayInfo],
    directions: Mapping[int, Directions],
    on: Measured,
    dataset: DatasetRecord,
    *,
    size: int,
) -> dict[ArrayInfo, F32]:
    """⟨v, J H⁻¹ ∇L(z)⟩ at one point of the run, for every array's question: (examples, QUERIES)."""
    if not arrays:
        return {}
    curvature = point.wide.curvature(stages)
    heads: dict[ArrayInfo, Head] = {}
    for question in point.jacobians:
        v = directions[question.layer]
        same = [array for array in arrays if asks(array, question)]
        embedding = same[0].embedding
        assert embedding is not None  # noqa: S101
        if curvature == point.curvature and embedding.directions is None:  # J itself is as wide as it gets
            (mixed,) = stages.artifacts("random directions", [MixWork(point.jacobians[question], v.artifact)])
            rows = (mixed.key,)
        else:
            rows = stages.jacobian(
                point.location,
                point.reading,
                question.query_set,
                curvature=curvature,
                layer=question.layer,
                pooling=embedding.pooling,
                function=question.function,
                directions=v.artifact,
                count=v.count,
            )
        dampings = [array.embedding.damping for array in same if array.embedding]
        works = [HeadWork(curvature, rows, damping, None) for damping in dampings]
        for array, artifact in zip(same, stages.artifacts("heads", works), strict=True):
            assert array.embedding is not None  # noqa: S101
            own = replace(array, dims=v.count, embedding=replace(array.embedding, directions=v.artifact))
            heads[array] = Head(own, artifact.key)
    spec = _with_heads(point, curvature, tuple(heads.values()))
    manifests = stages.rows("rows", point.location, spec, dataset, size=size, chosen=on.rows)
    return {array: _aligned(stages, manifests, head.array, on.ids) for array, head in heads.items()}


def _loss_reference(
    stages: Stages,
    end: "AtPoint",
    on: Measured,
    dataset: DatasetRecord,
    gradient: GradientSpec,
    *,
    size: int,
) -> F32:
    """∇L(q)ᵀ H⁻¹ ∇L(z) for the examples of ``on`` and its queries: (examples, queries)."""
    curvature = end.wide.curvature(stages)
    work = LossRowsWork(end.reading, curvature, gradient.loss_reduction)
    (rows,) = stages.artifacts("loss queries", [work], location=end.location, sources=[(dataset, on.queries)])
    (head,) = stages.artifacts("heads", [HeadWork(curvature, (rows.key,), basis.STORED_DAMPING, None, sign=1)])
    array = ArrayInfo(IndexKind.INFLUENCE, None, int(rows.facts["rows"]))
    spec = _with_heads(end, curvature, (Head(array, head.key),))
    manifests = stages.rows("rows", end.location, spec, dataset, size=size, chosen=on.rows)
    return _aligned(stages, manifests, array, on.ids)


def _with_heads(point: "AtPoint", curvature: str, heads: tuple[Head, ...]) -> PassSpec:
    work = point.shards[0].work
    assert isinstance(work, PassSpec)  # noqa: S101
    own = work.influence or work.gradient
    assert own is not None  # noqa: S101
    influence = InfluenceSpec(curvature, heads, own.loss_reduction)
    return PassSpec(**vars(point.reading), activation=None, gradient=None, objective=None, influence=influence)


def _aligned(stages: Stages, manifests: Sequence[ShardManifest], array: ArrayInfo, ids: Sequence[str]) -> F32:
    rows = np.concatenate([stages.rows_of(manifest, array) for manifest in manifests])
    place = {item: row for row, item in enumerate(item for manifest in manifests for item in manifest.ids)}
    return rows[[place[item] for item in ids]]


def asks(array: ArrayInfo, question: "Question") -> bool:
    """Whether the embedding is about the question, at whatever damping."""
    embedding = array.embedding
    return embedding is not None and (array.layer, embedding.query_set_fingerprint, embedding.function) == (
        question.layer,
        question.query_set.fingerprint,
        question.function,
    )


def _asks_the_same(array: ArrayInfo, known: CachedJacobian) -> bool:
    embedding = array.embedding
    return embedding is not None and (
        array.layer,
        embedding.query_set_fingerprint,
        embedding.function,
        embedding.pooling,
        embedding.directions,
    ) == (known.layer, known.query_set_fingerprint, known.function, known.pooling, known.directions)
