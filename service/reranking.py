"""The best of an approximate ranking by their exact scores: which examples a job must score, and how both rankings
compare.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec, damage, indexes
from service.contracts import ArrayInfo, ConceptRecord, Example, IndexRecord, JobRecord
from service.errors import Invalid
from service.jobs import Jobs
from service.loading import IndexLoader
from service.matching import DIRECT
from service.queries import Answer, Prepared, QueryService
from service.questions import Query
from service.registry import DATASETS, Registry
from service.row_blocks import id_bytes
from service.rows import F32
from service.settings import Settings
from service.specs import RerankSpec
from service.storage import Storage
from service.terms import JobKind, Order
from service.work import FORMAT, Eigen

CANDIDATES, SCORES = "candidates", "scores"  # stems: the ids that are to be scored, and what came of it
_DEEP = 0.8  # of the candidates: when the best of them come from so far down, others have been missed

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class RerankedHit:
    rank: int
    approximate_rank: int
    score: float
    approximate_score: float
    example: Example


@dataclass(frozen=True)
class Unscored:
    example_id: str
    approximate_rank: int
    reason: str


@dataclass(frozen=True)
class Reranked:
    """``hits``: the k best by exact score. ``spearman``: over all candidates; None for fewer than two."""

    index: IndexRecord
    concept: ConceptRecord | None
    array: ArrayInfo
    query_set: str
    damping: float
    points: int
    candidates: int
    spearman: float | None
    seconds: float
    hits: tuple[RerankedHit, ...]
    unscored: tuple[Unscored, ...]
    warnings: tuple[str, ...]


class RerankService:
    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        jobs: Jobs,
        loader: IndexLoader,
        queries: QueryService,
        settings: Settings,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._queries = queries
        self._settings = settings

    @damage.told
    def run(self, query: Query, candidates: int) -> Reranked | JobRecord:
        """The first ``candidates`` of the query's ranking by exact score, cut to its k; or the job that must run
        first: the query's own, then the one that scores. Raises as ``QueryService.run``, and Invalid where nothing
        is approximate or nothing exact can be had.
        """
        if candidates > self._settings.max_k:
            detail = f"candidates may be {self._settings.max_k} at most."
            raise Invalid("candidates_too_large", detail, param="candidates")
        index = indexes.resolve(self._registry, query.index)
        self._check(query, index)
        wide = replace(query, k=candidates, index=index.id)  # of that version, whatever is published meanwhile
        prepared = self._queries.prepare(wide)
        if isinstance(prepared, JobRecord):
            return prepared
        answer = self._queries.run(wide)
        if isinstance(answer, JobRecord):
            return answer
        if not answer.hits:  # a filter that keeps nothing
            return _compared(query, answer, {}, {}, 0.0)
        spec = self._plan(prepared, answer)
        known = artifacts.find_answer(self._storage, spec.key, SCORES)
        if known is None:
            return self._jobs.submit_once(spec.key, JobKind.RERANK, spec)
        stored, held = known
        exact = dict(zip(_sorted_ids(answer), held["scores"].tolist(), strict=True))
        reasons: dict[str, str] = json.loads(held["reasons"].tobytes())
        return _compared(query, answer, exact, reasons, float(stored.facts["seconds"]))

    def _check(self, query: Query, index: IndexRecord) -> None:
        if query.method in DIRECT:
            detail = (
                f"{query.method} leaves nothing out that a model could add: its scores are exact but for rounding. "
                "Re-rank concept_influence or influence_function."
            )
            raise Invalid("nothing_to_rerank", detail, param="method")
        gradient = self._loader.manifest(index).spec.gradient
        if gradient is not None and not isinstance(gradient.projection, Eigen):
            detail = (
                f"Index {index.id} holds random projections: no curvature was fitted, so there are no exact EK-FAC "
                "scores to rank by. Build it with projection 'eigen'."
            )
            raise Invalid("no_curvature", detail, param="index")

    def _plan(self, prepared: Prepared, answer: Answer) -> RerankSpec:
        """The job, whose inputs are stored first. Its key covers index, question, damping and candidates."""
        found, index, asked = prepared.matched, prepared.index, prepared.asked
        assert found.query_set is not None and found.damping is not None  # noqa: S101  (what ``_check`` lets pass)
        query_set = self._registry.get(DATASETS, found.query_set, param="query_set")
        direction, layer, pooling = None, None, None
        if asked.concept is not None and asked.vector is not None:
            direction = self._store("directions", {"rows": np.ascontiguousarray(asked.vector[None])})
            layer, pooling = asked.concept.layer, asked.concept.pooling
        ids = self._store(CANDIDATES, {"ids": id_bytes(tuple(_sorted_ids(answer)))})
        question = [direction, layer, pooling, asked.function, query_set.fingerprint, found.damping]
        array = codec.to_plain(found.array)
        return RerankSpec(
            key=codec.digest([FORMAT, "rerank", index.manifest_sha256, array, question, ids]),
            index=index.id,
            array=found.array,
            candidates=ids,
            query_set=query_set.id,
            damping=found.damping,
            direction=direction,
            layer=layer,
            pooling=pooling,
            function=asked.function,
            curvature_bytes=self._settings.curvature_bytes,
            shard_size=self._settings.shard_size,
        )

    def _store(self, stem: str, tensors: dict[str, F32] | dict[str, NDArray[np.uint8]]) -> str:
        """An input of the job, named by its content; too large to travel in the job's record."""
        (name, tensor) = next(iter(tensors.items()))
        key = codec.digest([FORMAT, "rerank", stem, name, list(tensor.shape), tensor.tobytes().hex()])
        if artifacts.find_answer(self._storage, key, stem) is None:
            artifacts.publish(self._storage, key, {stem: tensors})
        return key


def _sorted_ids(answer: Answer) -> list[str]:
    """The candidates in an order of their own: 'most' and 'least' of a small index are one job."""
    return sorted(hit.example.id for hit in answer.hits)


def _compared(
    query: Query, answer: Answer, exact: dict[str, float], reasons: dict[str, str], seconds: float
) -> Reranked:
    found = answer.matched
    assert found.query_set is not None and found.damping is not None  # noqa: S101  (what ``_check`` lets pass)
    scored = [hit for hit in answer.hits if hit.example.id not in reasons]
    ours = _key(np.array([exact[hit.example.id] for hit in scored]), query.order)
    theirs = _key(np.array([hit.score for hit in scored]), query.order)
    order = np.argsort(ours, kind="stable")  # equal scores stay in the approximate order
    hits = tuple(
        RerankedHit(
            rank, scored[place].rank, exact[scored[place].example.id], scored[place].score, scored[place].example
        )
        for rank, place in enumerate(order[: query.k].tolist(), start=1)
    )
    aside = [hit for hit in answer.hits if hit.example.id in reasons]
    return Reranked(
        index=answer.index,
        concept=answer.concept,
        array=found.array,
        query_set=found.query_set,
        damping=found.damping,
        points=found.points,
        candidates=len(answer.hits),
        spearman=spearman(ours, theirs),
        seconds=seconds,
        hits=hits,
        unscored=tuple(Unscored(hit.example.id, hit.rank, reasons[hit.example.id]) for hit in aside),
        warnings=(*answer.warnings, *_deep(answer, hits)),
    )


def _deep(answer: Answer, hits: tuple[RerankedHit, ...]) -> list[str]:
    """Exact ranks are those among the candidates; the rest of the index may hold better ones."""
    candidates = len(answer.hits)
    deepest = max((hit.approximate_rank for hit in hits), default=0)
    if candidates >= answer.rows or len(hits) > candidates / 2 or deepest <= _DEEP * candidates:
        return []
    return [
        f"The exact top {len(hits)} reaches down to approximate rank {deepest} of {candidates} candidates: better "
        "ones may stand below them. Ask for more candidates."
    ]


def _key(scores: F64, order: Order) -> F64:
    """What is sorted by, smallest first."""
    return {Order.MOST: -scores, Order.LEAST: scores, Order.ABSOLUTE: -np.abs(scores)}[order]


def spearman(ours: F64, theirs: F64) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None where one of both has one value only."""
    a, b = (_mean_ranks(values) for values in (ours, theirs))
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else None


def _mean_ranks(values: F64) -> F64:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
