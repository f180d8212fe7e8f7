"""A query in, ranked examples out; or the job that must run first.

Every method is one inner product ⟨u, e_z⟩ (DESIGN section 1). Answers need no model: what does is a job, made
once and cached in storage.
"""

import time
from dataclasses import dataclass

import numpy as np

from service import artifacts, codec, concepts, indexes, token_shares
from service.contracts import ConceptRecord, Example, Fidelity, IndexRecord, JobRecord
from service.errors import Invalid, NotFound
from service.examples import Examples
from service.indexes import IndexLoader, Rows
from service.jobs import Jobs
from service.matching import DIRECT, Asked, Matched, Missing, match
from service.registry import CONCEPTS, DATASETS, MODELS, Registry
from service.rows import F32
from service.specs import TokenSharesSpec
from service.storage import Storage
from service.terms import ConceptFunction, IndexKind, JobKind, Method, Order
from service.token_shares import TokenShares

# What a method makes no use of: given all the same, the answer would not be the one that was asked for.
_NOT_USED = {
    Method.VECTOR_FILTER: ("query_set", "damping", "concept_function", "through"),
    Method.PROJECTION_DIFFERENCE: ("query_set", "damping", "concept_function", "through"),
    Method.CONCEPT_INFLUENCE: (),
    Method.INFLUENCE_FUNCTION: ("concept", "concept_function"),
}
_WHY_NOT = {
    Method.VECTOR_FILTER: "vector_filter compares activations with the concept's direction, and no gradient",
    Method.PROJECTION_DIFFERENCE: "projection_difference compares activations with the concept's direction, and no "
    "gradient",
    Method.INFLUENCE_FUNCTION: "influence_function asks about the loss on a query set, not about a concept",
}
_THROUGH = {
    Method.CONCEPT_INFLUENCE: (IndexKind.GRADIENT, IndexKind.INFLUENCE),
    Method.INFLUENCE_FUNCTION: (IndexKind.GRADIENT,),
}
_LOW_FIDELITY = 0.8
_LOW_SHARE = 0.9


@dataclass(frozen=True)
class Query:
    index: str
    concept: str | None
    method: Method
    order: Order
    k: int
    query_set: str | None = None
    damping: float | None = None
    concept_function: ConceptFunction | None = None  # None: dot
    through: IndexKind | None = None


@dataclass(frozen=True)
class Hit:
    rank: int
    score: float
    example: Example


@dataclass(frozen=True)
class Answer:
    """Ranked examples and where the ranking comes from. Times in milliseconds."""

    hits: tuple[Hit, ...]
    index: IndexRecord
    concept: ConceptRecord | None
    matched: Matched
    fidelity: Fidelity | None
    rows: int
    search_ms: float
    total_ms: float
    warnings: tuple[str, ...]


class QueryService:
    def __init__(
        self, registry: Registry, storage: Storage, jobs: Jobs, loader: IndexLoader, *, shard_size: int
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._shard_size = shard_size

    def run(self, query: Query) -> Answer | JobRecord:
        """The answer, or the job whose result the answer needs.

        Raises NotFound for unknown names, Invalid when concept, index and method do not fit together.
        """
        began = time.perf_counter()
        index = indexes.resolve(self._registry, query.index)
        asked = self._resolve(query, index)
        found = match(self._storage, index, self._loader.manifest(index), asked, shard_size=self._shard_size)
        if isinstance(found, Missing):
            return self._jobs.submit_once(found.key, JobKind.QUERY_GRADIENT, found.spec)
        rows = self._loader.rows(index, found.array)
        hits, search_ms = self._search(rows, found.u, query, index)
        fidelity = _fidelity(index, asked, found)
        return Answer(
            hits=hits,
            index=index,
            concept=asked.concept,
            matched=found,
            fidelity=fidelity,
            rows=rows.index.n,
            search_ms=search_ms,
            total_ms=1e3 * (time.perf_counter() - began),
            warnings=_warnings(asked, index, found, fidelity),
        )

    def tokens(self, query: Query, examples: tuple[str, ...]) -> list[TokenShares] | JobRecord:
        """What every token of these examples adds to their score, or the job that computes it.

        Raises as ``run``, and NotFound for an id that the index's dataset does not hold.
        """
        index = indexes.resolve(self._registry, query.index)
        asked = self._resolve(query, index)
        if asked.method == Method.PROJECTION_DIFFERENCE:
            detail = "A projection difference compares two texts: vector_filter has a share for every token of one."
            raise Invalid("no_token_shares", detail, param="method")
        match(self._storage, index, self._loader.manifest(index), asked, shard_size=self._shard_size)
        held = self._examples(index)
        for number, item in enumerate(examples):
            if item not in held:
                detail = f"No dataset of index {index.id} ({', '.join(index.datasets)}) holds an example {item!r}."
                raise NotFound("example_not_found", detail, param=f"examples[{number}]")
        concept = asked.concept.sha256 if asked.concept else None
        fingerprint = asked.query_set.fingerprint if asked.query_set else None
        about = [asked.method, concept, fingerprint, asked.function, asked.damping, asked.through]
        key = codec.digest(["token shares", index.id, index.manifest_sha256, *about, list(examples)])
        if artifacts.find(self._storage, key) is not None:
            return token_shares.read(self._storage, key)
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

    def _resolve(self, query: Query, index: IndexRecord) -> Asked:
        """Names to records; whether they belong together."""
        _check_used(query)
        query_set = None
        if query.query_set is not None:
            query_set = self._registry.get(DATASETS, query.query_set, param="query_set")
        concept, vector = None, None
        if query.method == Method.INFLUENCE_FUNCTION:
            pass  # about the loss
        elif query.concept is None:
            raise Invalid("concept_needed", f"{query.method} needs a concept: name it.", param="concept")
        else:
            concept = self._registry.get(CONCEPTS, query.concept, param="concept")
            model = self._registry.get(MODELS, index.model)
            kind = DIRECT.get(query.method, IndexKind.GRADIENT)
            concepts.check_fits(concept, index, model.width, kind)
            vector = concepts.direction(self._storage, concept)
        function = query.concept_function or ConceptFunction.DOT
        return Asked(query.method, concept, vector, query_set, function, query.damping, query.through)

    def _examples(self, index: IndexRecord) -> Examples:
        parts = [self._registry.get(DATASETS, name) for name in index.datasets]
        return Examples([self._loader.examples(part) for part in parts])

    def _search(self, rows: Rows, vector: F32, query: Query, index: IndexRecord) -> tuple[tuple[Hit, ...], float]:
        sign = 1.0 if query.order == Order.MOST else -1.0
        began = time.perf_counter()
        top = rows.index.search(np.float32(sign) * vector, query.k)
        search_ms = 1e3 * (time.perf_counter() - began)
        examples = self._examples(index).take([rows.ids[int(row)] for row in top.rows])
        hits = tuple(
            Hit(rank, sign * float(score), example)
            for rank, (score, example) in enumerate(zip(top.scores, examples, strict=True), start=1)
        )
        return hits, search_ms


def _check_used(query: Query) -> None:
    """Raises Invalid for a field that the method makes no use of, and for kinds that cannot answer it."""
    for name in _NOT_USED[query.method]:
        if getattr(query, name) is not None:
            detail = f"{_WHY_NOT[query.method]}: leave '{name}' out."
            raise Invalid(f"{name}_not_used", detail, param=name)
    if query.through is not None and query.through not in _THROUGH[query.method]:
        usable = " or ".join(f"'{kind}'" for kind in _THROUGH[query.method])
        detail = f"{query.method} is answered through {usable}, not through '{query.through}'."
        raise Invalid("bad_through", detail, param="through")


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
    said = []
    concept = asked.concept
    if concept is not None and concept.auroc_held_out < 0.7:
        said.append(
            f"Concept {concept.id!r} separates its own examples poorly (held-out AUROC "
            f"{concept.auroc_held_out:.2f}): the ranking may mean little."
        )
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
