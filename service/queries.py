"""A query in, ranked examples out; or the job that must run first.

Every method is one inner product ⟨u, e_z⟩ (DESIGN section 1). Answers need no model: what does is a job, made
once and cached in storage.
"""

import hashlib
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service import codec, concepts, damage, example_ids, indexes, token_shares
from service.blocks import Mask
from service.cache import LoadingCache
from service.concept_health import Hint, Reports
from service.contracts import ConceptRecord, Example, Fidelity, IndexRecord, JobRecord
from service.errors import Invalid, NotFound
from service.jobs import Jobs
from service.loading import IndexLoader, Rows
from service.matching import DIRECT, Asked, Matched, Missing, match
from service.paging import Page
from service.questions import Query, resolve
from service.registry import Registry
from service.rows import F32
from service.search import TopK
from service.specs import TokenSharesSpec
from service.spread import Spread, percentile
from service.storage import Storage
from service.terms import JobKind, Method, Order
from service.token_shares import TokenShares

_LOW_FIDELITY = 0.8
_LOW_SHARE = 0.9
_DIRECTIONS = 1024  # of concepts, kept
_KEPT_BYTES = 64 << 20  # of rankings and filter masks that may be asked for again
_ENTRY_BYTES = 1 << 10  # that each of these takes beside its arrays, with its key


class Hit(NamedTuple):
    """``percentile``: share of the index that scores lower; ``z_score``: standard deviations above its mean."""

    rank: int
    score: float
    percentile: float
    z_score: float
    example: Example


@dataclass(frozen=True)
class Prepared:
    """A question with every name resolved and the rows that answer it in memory."""

    index: IndexRecord
    asked: Asked
    matched: Matched
    rows: Rows
    mask: Mask | None  # rows that may be ranked; None: all
    health: Hint | None = None  # None: of a loss query

    @property
    def fidelity(self) -> Fidelity | None:
        return _fidelity(self.index, self.asked, self.matched)

    @property
    def warnings(self) -> tuple[str, ...]:
        found = _warnings(self.asked, self.index, self.matched, self.fidelity)
        return found + (self.health.warnings if self.health else ())


@dataclass(frozen=True)
class Ranking:
    """The best rows of a question, best first, with the scores of the question's own sign."""

    top: TopK
    spread: Spread
    sample: F32 | None  # scores, ascending; None: ranks tell the percentiles
    candidates: int  # rows that were ranked


@dataclass(frozen=True)
class Answer:
    """Ranked examples and where the ranking comes from. Times in milliseconds."""

    hits: tuple[Hit, ...]
    index: IndexRecord
    concept: ConceptRecord | None
    matched: Matched
    fidelity: Fidelity | None
    rows: int  # that were ranked: those that the filter keeps
    page: Page
    cached: bool
    search_ms: float
    total_ms: float
    warnings: tuple[str, ...]
    health: Hint | None


class QueryService:
    def __init__(
        self, registry: Registry, storage: Storage, jobs: Jobs, loader: IndexLoader, *, shard_size: int
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._shard_size = shard_size
        self.reports = Reports(storage)
        self._rankings: LoadingCache[Ranking] = LoadingCache(_KEPT_BYTES, _bytes_of)
        self._masks: LoadingCache[Mask] = LoadingCache(_KEPT_BYTES, lambda mask: _ENTRY_BYTES + mask.nbytes)
        self._directions: LoadingCache[F32] = LoadingCache(_DIRECTIONS)

    @damage.told
    def prepare(self, query: Query) -> Prepared | JobRecord:
        """What answers the question, or the job that must run first.

        Raises NotFound for unknown names, Invalid when concept, index and method do not fit together.
        """
        index = indexes.resolve(self._registry, query.index)
        asked = resolve(query, index, self._registry, self._direction)
        found = match(self._storage, index, self._loader.manifest(index), asked, shard_size=self._shard_size)
        if isinstance(found, Missing):
            return self._jobs.submit_once(found.key, JobKind.QUERY_GRADIENT, found.spec)
        rows = self._loader.rows(index, found.array)
        rows.ahead()
        mask = self._mask(query, index, found, rows)
        return Prepared(index, asked, found, rows, mask, self.reports.hint(index, asked))

    @damage.told
    def run(self, query: Query, page: Page | None = None) -> Answer | JobRecord:
        """The answer, or the job whose result the answer needs. Raises as ``prepare``."""
        began = time.perf_counter()
        page = page or Page()
        prepared = self.prepare(page.pinned(query))
        if isinstance(prepared, JobRecord):
            return prepared
        searched = time.perf_counter()
        ranking, cached = self._ranking(prepared, query)
        search_ms = 1e3 * (time.perf_counter() - searched)
        page = page.of(query, prepared.index, len(ranking.top.rows))
        hits = self._hits(prepared, ranking, query, page)
        return Answer(
            hits=hits,
            index=prepared.index,
            concept=prepared.asked.concept,
            matched=prepared.matched,
            fidelity=prepared.fidelity,
            rows=ranking.candidates,
            page=page,
            cached=cached,
            search_ms=search_ms,
            total_ms=1e3 * (time.perf_counter() - began),
            warnings=prepared.warnings,
            health=prepared.health,
        )

    @damage.told
    def tokens(self, query: Query, examples: tuple[str, ...]) -> list[TokenShares] | JobRecord:
        """What every token of these examples adds to their score, or the job that computes it.

        Raises as ``run``, and NotFound for an id that the index's dataset does not hold.
        """
        index = indexes.resolve(self._registry, query.index)
        asked = resolve(query, index, self._registry, self._direction)
        if asked.method == Method.PROJECTION_DIFFERENCE:
            detail = "A projection difference compares two texts: vector_filter has a share for every token of one."
            raise Invalid("no_token_shares", detail, param="method")
        match(self._storage, index, self._loader.manifest(index), asked, shard_size=self._shard_size)
        places = self._loader.examples(index).positions(example_ids.of(examples))
        for number in np.flatnonzero(places < 0):
            detail = f"Index {index.id} of {', '.join(index.datasets)} holds no example {examples[number]!r}."
            raise NotFound("example_not_found", detail, param=f"examples[{number}]")
        concept = asked.concept.sha256 if asked.concept else None
        fingerprint = asked.query_set.fingerprint if asked.query_set else None
        about = [asked.method, concept, fingerprint, asked.function, asked.damping, asked.through]
        key = codec.digest(["token shares", index.id, index.manifest_sha256, *about, list(examples)])
        if (known := token_shares.find(self._storage, key)) is not None:
            return known
        spec = TokenSharesSpec(
            key=key,
            index=index.id,
            method=asked.method,
            concept=query.concept,
            query_set=query.query_set,
            function=asked.function,
            damping=asked.damping,
            through=asked.through,
            examples=examples,
            shard_size=self._shard_size,
        )
        return self._jobs.submit_once(key, JobKind.TOKEN_SHARES, spec)

    def _direction(self, concept: ConceptRecord) -> F32:
        """v̂, read and checked once: what a hash names does not change."""
        return self._directions.get(concept.sha256, lambda: concepts.direction(self._storage, concept))

    def _mask(self, query: Query, index: IndexRecord, found: Matched, rows: Rows) -> Mask | None:
        """Rows that the filter keeps and that were not deleted."""
        if query.filter is None:
            return rows.allowed(None)
        wanted = query.filter

        def keep() -> Mask:
            mask = rows.allowed(self._loader.examples(index).mask(wanted)[rows.positions])
            assert mask is not None  # noqa: S101  (it was none before)
            return mask

        return self._masks.get((index.id, index.manifest_sha256, found.array, query.filter_key), keep)

    def _ranking(self, prepared: Prepared, query: Query) -> tuple[Ranking, bool]:
        """The best rows; the same question asked again, or by two at once, is searched once."""
        made = False

        def search() -> Ranking:
            nonlocal made
            made = True
            return _search(prepared, query)

        index, u = prepared.index, prepared.matched.u
        # Hashes of what may be large: keys are in memory as long as what they name.
        vector = hashlib.sha256(u.tobytes()).digest()
        about = (prepared.matched.array, vector, query.order, query.k, query.filter_key)
        key = (index.id, index.manifest_sha256, about)
        return self._rankings.get(key, search), not made

    def _hits(self, prepared: Prepared, ranking: Ranking, query: Query, page: Page) -> tuple[Hit, ...]:
        """One page of the ranking, with texts and where each score lies in the index."""
        shown = slice(page.start, page.stop)
        rows, scores = ranking.top.rows[shown], ranking.top.scores[shown]
        examples = self._loader.examples(prepared.index).take(prepared.rows.positions[rows])
        z_scores = ranking.spread.z_score(scores)
        ranks = range(page.start + 1, page.start + 1 + len(rows))
        percentiles = _percentiles(query, ranking, scores)
        return tuple(map(Hit, ranks, scores.tolist(), percentiles.tolist(), z_scores.tolist(), examples))


def _search(prepared: Prepared, query: Query) -> Ranking:
    rows, u = prepared.rows, prepared.matched.u
    ask, mask = rows.batcher.search, prepared.mask
    match query.order:
        case Order.MOST:
            top = ask(u, query.k, mask)
        case Order.LEAST:
            top = _negative(ask(-u, query.k, mask))
        case Order.ABSOLUTE:
            top = _either(ask(u, query.k, mask), _negative(ask(-u, query.k, mask)), query.k)
    check_finite(top.scores)
    candidates = rows.index.n if mask is None else int(np.count_nonzero(mask))
    sample = None if _ranks_tell(query) else rows.sample.scores(u)
    return Ranking(top, rows.sample.spread(u), sample, candidates)


def check_finite(scores: F32) -> None:
    """Raises Invalid where rows of the largest numbers that there are score beyond float32."""
    if beyond := int(np.count_nonzero(~np.isfinite(scores))):
        detail = (
            f"{beyond} of {len(scores)} scores are too large for float32: give smaller weights to 'concepts', or, "
            "where there are none, see what the model makes of these examples."
        )
        raise Invalid("scores_overflow", detail)


def _negative(top: TopK) -> TopK:
    return TopK(top.rows, np.float32(0) - top.scores)  # and no −0


def _either(most: TopK, least: TopK, k: int) -> TopK:
    """The k scores that are furthest from zero: they are among the k most and the k least."""
    rows = np.concatenate([most.rows, least.rows])
    scores = np.concatenate([most.scores, least.scores])
    rows, first = np.unique(rows, return_index=True)
    scores = scores[first]
    order = np.lexsort((rows, -np.abs(scores)))[:k]
    return TopK(rows[order], scores[order])


def _ranks_tell(query: Query) -> bool:
    """Is a hit's rank its place by score in the whole index?"""
    return query.filter is None and query.order != Order.ABSOLUTE


def _percentiles(query: Query, ranking: Ranking, scores: F32) -> NDArray[np.float64]:
    """Share of the index that scores lower, in percent; equal scores among the k best share the mean of theirs."""
    if ranking.sample is not None:
        return percentile(ranking.sample, scores)
    sign = np.float32(1 if query.order == Order.LEAST else -1)
    places, wanted = sign * ranking.top.scores, sign * scores  # ascending
    better = np.searchsorted(places, wanted, side="left")
    before = (better + np.searchsorted(places, wanted, side="right") - 1) / 2
    n = ranking.candidates
    return 100.0 * (before if query.order == Order.LEAST else n - 1 - before) / max(1, n)


def _bytes_of(ranking: Ranking) -> int:
    sample = 0 if ranking.sample is None else ranking.sample.nbytes
    return _ENTRY_BYTES + ranking.top.rows.nbytes + ranking.top.scores.nbytes + sample


def _fidelity(index: IndexRecord, asked: Asked, found: Matched) -> Fidelity | None:
    """What the build measured of the array that answers, for this very question; None: it was not asked then."""
    if asked.concept is None:
        wanted = ("loss", None, None, None, found.damping)
    else:
        wanted = ("concept", found.query_set, asked.concept.layer, asked.function, found.damping)
    for each in index.fidelity:
        told = (each.query, each.query_set, each.layer, each.function, each.damping)
        if each.array == found.array and told == wanted:
            return each
    return None


def _warnings(asked: Asked, index: IndexRecord, found: Matched, fidelity: Fidelity | None) -> tuple[str, ...]:
    """What a ranking does not say by itself."""
    concept = asked.concept
    said = [] if concept is None else concepts.doubts(concept)
    if concept is not None and concept.model_fingerprint != index.model_fingerprint:
        said.append(f"Concept {concept.id!r} was fitted on {concept.model!r}, the index on {index.model!r}.")
    if asked.method == Method.PROJECTION_DIFFERENCE and index.answerer == index.model:
        said.append(
            f"{index.model!r} declares no base, so examples are compared with its own answers: what fine-tuning "
            "has taught it already does not show. Register it with its base and build again."
        )
    if asked.method in DIRECT:
        return tuple(said)
    if found.points == 1 and concept is not None:
        said.append(
            f"Evaluated at {index.model!r} only, not along its training run: where fine-tuning has overshot, the "
            "end point can turn the ranking round. Declare the run's base or checkpoints and build kind "
            "'influence'."
        )
    if found.captured < _LOW_SHARE:
        said.append(
            f"The index's directions capture {found.captured:.0%} of this concept: register it before building, "
            "or build with a higher rank."
        )
    if fidelity is not None and fidelity.mean < _LOW_FIDELITY:
        said.append(
            f"The stored rows rank like wider coordinates at Spearman {fidelity.mean:.2f} only: build with more "
            "coordinates."
        )
    if found.damping is None:
        said.append("No curvature stands behind random projections: H is the identity.")
    if found.quarantined:
        said.append(f"{found.quarantined} examples of the query set were set aside; {found.examples} were used.")
    return tuple(said)
