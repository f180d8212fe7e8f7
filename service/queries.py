"""A query in, ranked examples out; or the job that must run first.

Every method is one inner product ⟨u, e_z⟩ (DESIGN section 1): this module finds u and says where e_z is
stored. Answers need no model: what does is a job, made once and cached in storage.
"""

import time
from dataclasses import dataclass

import numpy as np

from service import codec, concepts, coordinates, indexes
from service.contracts import (
    ConceptGradientSpec,
    ConceptObjective,
    ConceptRecord,
    Example,
    IndexKind,
    IndexRecord,
    JobKind,
    JobRecord,
    Method,
    ModelRecord,
    Order,
    PassSpec,
)
from service.coordinates import Sidecar
from service.errors import Invalid
from service.indexes import IndexLoader, Rows
from service.jobs import Jobs
from service.registry import CONCEPTS, DATASETS, MODELS, Registry
from service.rows import F32
from service.storage import Storage


@dataclass(frozen=True)
class Query:
    index: str
    concept: str
    method: Method
    order: Order
    k: int
    query_set: str | None = None


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
    concept: ConceptRecord
    rows: int
    dims: int
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
        concept = self._registry.get(CONCEPTS, query.concept, param="concept")
        model = self._registry.get(MODELS, index.model)
        kind = IndexKind.ACTIVATION if query.method == Method.VECTOR_FILTER else IndexKind.GRADIENT
        concepts.check_fits(concept, index, model.width, kind)
        vector = concepts.direction(self._storage, concept)
        warnings = _warnings(concept, index)
        rows = self._loader.rows(index, kind, concept.layer if kind == IndexKind.ACTIVATION else None)
        if kind == IndexKind.GRADIENT:
            made = self._query_coordinates(query, index, concept, vector)
            if isinstance(made, JobRecord):
                return made
            vector, sidecar = made
            warnings += _gradient_warnings(model, sidecar)
        hits, search_ms = self._search(rows, vector, query, index)
        return Answer(
            hits=hits,
            index=index,
            concept=concept,
            rows=rows.index.n,
            dims=rows.index.d,
            search_ms=search_ms,
            total_ms=1e3 * (time.perf_counter() - began),
            warnings=warnings,
        )

    def _search(self, rows: Rows, vector: F32, query: Query, index: IndexRecord) -> tuple[tuple[Hit, ...], float]:
        sign = 1.0 if query.order == Order.MOST else -1.0
        began = time.perf_counter()
        top = rows.index.search(np.float32(sign) * vector, query.k)
        search_ms = 1e3 * (time.perf_counter() - began)
        dataset = self._registry.get(DATASETS, index.dataset)
        examples = self._loader.examples(dataset).take([rows.ids[int(row)] for row in top.rows])
        hits = tuple(
            Hit(rank, sign * float(score), example)
            for rank, (score, example) in enumerate(zip(top.scores, examples, strict=True), start=1)
        )
        return hits, search_ms

    def _query_coordinates(
        self, query: Query, index: IndexRecord, concept: ConceptRecord, vector: F32
    ) -> tuple[F32, Sidecar] | JobRecord:
        """Coordinates of −∇f_v(Q), from storage or as the job that computes them."""
        if query.query_set is None:
            raise Invalid(
                "query_set_needed",
                f"{query.method} scores ∇f_v(Q): name the dataset Q in 'query_set' "
                "(prompts with answers on which the behaviour shows).",
                param="query_set",
            )
        query_set = self._registry.get(DATASETS, query.query_set, param="query_set")
        built = indexes.read_manifest(self._storage, index).spec
        if built.gradient is not None and concept.layer > built.gradient.blocks:
            raise Invalid(
                "layer_not_indexed",
                f"Concept {concept.id!r} lies at layer {concept.layer}, but index {index.id} tracks blocks "
                f"1 to {built.gradient.blocks} only: part of its gradient would be missing. Build the index with "
                f"layer {concept.layer}.",
                param="concept",
            )
        spec = _objective_pass(built, concept, vector)
        key = codec.digest([codec.to_plain(spec), query_set.fingerprint])
        if (stored := coordinates.find(self._storage, key)) is not None:
            return stored
        return self._jobs.submit_once(
            key,
            JobKind.CONCEPT_GRADIENT,
            ConceptGradientSpec(
                key, index.id, index.model, concept.id, query_set.id, spec, shard_size=self._shard_size
            ),
        )


def _objective_pass(built: PassSpec, concept: ConceptRecord, vector: F32) -> PassSpec:
    """The index's own pass with f_v in place of the loss: same modules, same projection."""
    return PassSpec(
        model_fingerprint=built.model_fingerprint,
        tokenizer_fingerprint=built.tokenizer_fingerprint,
        activation=None,
        gradient=built.gradient,
        objective=ConceptObjective(concept.sha256, concept.layer, concept.pooling, tuple(map(float, vector))),
        max_length=built.max_length,
        long_examples=built.long_examples,
        token_budget=built.token_budget,
        dtype=built.dtype,
    )


def _warnings(concept: ConceptRecord, index: IndexRecord) -> tuple[str, ...]:
    found = []
    if concept.auroc_held_out < 0.7:
        found.append(
            f"Concept {concept.id!r} separates its own examples poorly (held-out AUROC "
            f"{concept.auroc_held_out:.2f}): the ranking may mean little."
        )
    if concept.model_fingerprint != index.model_fingerprint:
        found.append(f"Concept {concept.id!r} was fitted on {concept.model!r}, the index on {index.model!r}.")
    return tuple(found)


def _gradient_warnings(model: ModelRecord, sidecar: Sidecar) -> tuple[str, ...]:
    """What a ranking by gradients does not say by itself."""
    found = [
        f"Evaluated at {model.id!r} only"
        + (f", not along its {len(model.checkpoints)} declared checkpoints" if model.checkpoints else "")
        + ": where fine-tuning has overshot, the end point can turn the ranking round."
    ]
    if sidecar.quarantined:
        found.append(
            f"{sidecar.quarantined} examples of the query set were set aside; {sidecar.examples} were used."
        )
    return tuple(found)
