"""Every method's scores on one case: ours through the service's own builds, peers through their own code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from benchmarks.exact import Exact, random_scores
from benchmarks.lab import Lab
from benchmarks.oracle import Oracle
from benchmarks.organisms import Case
from benchmarks.peers import run as peers
from service import indexes
from service.contracts import Example, IndexRecord
from service.datasets import render
from service.shards import bytes_per_row, read_manifest, read_rows
from service.terms import ConceptFunction, IndexKind, Method, Projection
from service.validations import correlation
from workers.masks import tokenise
from workers.models import load

F64 = NDArray[np.float64]
DAMPING = 1.0
OTHER_DAMPINGS = (0.1, 10.0, 1e6)  # the last is H = I for all purposes
K = 4096
RANDOM_DIRECTIONS = 32


@dataclass
class Scores:
    """By method: scores (N,) for the concept, for the loss on Q, for the concept out of its domain; bytes."""

    concept: dict[str, F64] = field(default_factory=dict)
    loss: dict[str, F64] = field(default_factory=dict)
    ood: dict[str, F64] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


def measure(case: Case, folder: Path, *, threads: int = 1, report: Any = print) -> Scores:
    """All methods on one case. ``folder`` is scratch space."""
    found = Scores()
    with Lab(folder / "lab", threads=threads) as lab:
        ours = Ours(lab, case, found)
        ours.run(report)
    simple(case, found)
    theirs(case, folder / "peers", found, threads=threads, report=report)
    return found


class Ours:
    """Whence's methods, built as a user would build them."""

    def __init__(self, lab: Lab, case: Case, found: Scores) -> None:
        self._lab, self._case, self._found = lab, case, found
        self._ids = [example.id for example in case.examples]
        end = case.points[-1][1]
        self._model = lab.model("model", end, checkpoints=[(path, 1.0) for _, path in case.points[:-1]])
        lab.dataset("train", case.examples)
        lab.dataset("queries", case.queries)
        lab.dataset("ood-queries", case.ood.queries)
        for name, direction in (("concept", case.direction), ("ood", case.ood.direction)):
            lab.concept(name, self._model, direction, layer=case.layer, pooling=case.pooling)

    def run(self, report: Any) -> None:
        case, lab = self._case, self._lab
        both = (ConceptFunction.DOT, ConceptFunction.COSINE)
        report("building: influence along the run, gradient and activation at its end")
        whole, _ = lab.build(
            "whole",
            "model",
            "train",
            case.layer,
            kinds=(IndexKind.ACTIVATION, IndexKind.GRADIENT, IndexKind.INFLUENCE),
            pooling=case.pooling,
            query_sets=("queries", "ood-queries"),
            concept_functions=both,
            dampings=(DAMPING, *OTHER_DAMPINGS),
            coordinates=K,
        )
        end, _ = lab.build(
            "end",
            "model",
            "train",
            case.layer,
            kinds=(IndexKind.INFLUENCE,),
            pooling=case.pooling,
            query_sets=("queries", "ood-queries"),
            concept_functions=both,
            dampings=(DAMPING,),
            checkpoints="end",
        )
        for function, suffix in zip(both, ("", "_cosine"), strict=True):
            about = {"function": function}
            self._add(f"influence_trajectory{suffix}", whole, damping=DAMPING, **about)
            self._add(f"influence{suffix}", end, damping=DAMPING, **about)
            for damping in OTHER_DAMPINGS:
                self._add(f"influence_trajectory{suffix}_damping_{damping:g}", whole, damping=damping, **about)
        self._add("gradient", whole, damping=DAMPING, through=IndexKind.GRADIENT)
        self._add("vector_filter", whole, method=Method.VECTOR_FILTER)
        self._loss("influence_function", whole)
        report("building: the random baseline")
        random, _ = lab.build(
            "random", "model", "train", case.layer, projection=Projection.RADEMACHER, projection_dim=16
        )
        self._projected_fisher("rademacher_p16", random)
        report("exact EK-FAC at every point of the run")
        self._exact(whole, end)

    def _add(self, name: str, index: IndexRecord, **query: Any) -> None:
        lab, found = self._lab, self._found
        sets = {} if query.get("method") == Method.VECTOR_FILTER else {"query_set": "queries"}
        ood_sets = {} if not sets else {"query_set": "ood-queries"}
        found.concept[name] = lab.scores(index, self._ids, concept="concept", **sets, **query)
        found.ood[name] = lab.scores(index, self._ids, concept="ood", **ood_sets, **query)
        kind = {"vector_filter": IndexKind.ACTIVATION, "gradient": IndexKind.GRADIENT}
        wanted = kind.get(name.removesuffix("_cosine"), IndexKind.INFLUENCE)
        found.bytes[name] = next(bytes_per_row(array) for array in index.arrays if array.kind == wanted)

    def _loss(self, name: str, index: IndexRecord) -> None:
        """The loss query; as a prediction of f_v as well, since that is what its users hope for."""
        scores = self._lab.scores(
            index, self._ids, query_set="queries", method=Method.INFLUENCE_FUNCTION, damping=DAMPING
        )
        self._found.loss[name] = self._found.concept[name] = scores
        self._found.ood[name] = self._lab.scores(
            index, self._ids, query_set="ood-queries", method=Method.INFLUENCE_FUNCTION, damping=DAMPING
        )
        self._found.bytes[name] = self._found.bytes["gradient"]

    def _projected_fisher(self, name: str, index: IndexRecord) -> None:
        """(F + δ)⁻¹ between random projections, F = Σ c cᵀ/N by module: TRAK's and bergson's preconditioner."""
        rows = self._rows(index).astype(np.float64)
        for of, into in (("concept", self._found.concept), ("ood", self._found.ood)):
            query_set = "queries" if of == "concept" else "ood-queries"
            self._lab.scores(index, self._ids, concept=of, query_set=query_set)
            q = self._query(index, of, query_set)
            scores = np.zeros(len(rows))
            size = 16 * 16
            for start in range(0, rows.shape[1], size):
                c = rows[:, start : start + size]
                fisher = c.T @ c / len(c)
                damped = fisher + DAMPING * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
                scores += c @ np.linalg.solve(damped, q[start : start + size])
            into[name] = scores
        self._found.bytes[name] = float(bytes_per_row(index.arrays[0]))

    def _query(self, index: IndexRecord, concept: str, query_set: str) -> F64:
        return self._lab.query_vector(index, concept=concept, query_set=query_set).astype(np.float64)

    def _rows(self, index: IndexRecord) -> NDArray[np.float32]:
        (section,) = indexes.read_manifest(self._lab.storage, index).sections
        manifests = [read_manifest(self._lab.storage, reference.key) for reference in section.shards]
        by_id = {}
        for manifest in manifests:
            rows = read_rows(self._lab.storage, manifest, section.arrays[0])
            by_id |= dict(zip(manifest.ids, rows, strict=True))
        return np.stack([by_id[item] for item in self._ids])

    def _exact(self, whole: IndexRecord, end: IndexRecord) -> None:
        case, found, lab = self._case, self._found, self._lab
        manifest = indexes.read_manifest(lab.storage, whole)
        assert manifest.spec.influence is not None
        reading = manifest.spec.reading
        total: dict[str, F64] = {}
        for number, (_, path) in enumerate(case.points):
            last = number == len(case.points) - 1
            curvature = lab.curvatures(whole)[number]
            exact = Exact(lab.storage, curvature, path, case.points[-1][1], reading, case.layer)
            rows = exact.rows(case.examples)
            damped = exact.damped(DAMPING)
            for function, suffix in ((ConceptFunction.DOT, ""), (ConceptFunction.COSINE, "_cosine")):
                q = exact.concept(case.queries, case.direction, case.pooling, function)
                scores = rows @ (q / damped)
                total[suffix] = total.get(suffix, 0) + scores
                if last:
                    found.concept[f"exact{suffix}"] = scores
                    found.concept[f"exact_trajectory{suffix}"] = total[suffix]
            if last:
                self._fidelities(exact, rows, end)
        found.bytes["exact"] = found.bytes["exact_trajectory"] = 4.0 * exact.weights  # pyright: ignore

    def _fidelities(self, exact: Exact, rows: NDArray[np.float32], end: IndexRecord) -> None:
        """Rank correlation with exact scores: k = 4096, random at the same k, and truncated embeddings."""
        case, found, lab = self._case, self._found, self._lab
        damped = exact.damped(DAMPING)
        q = exact.concept(case.queries, case.direction, case.pooling, ConceptFunction.DOT)
        loss_q = exact.loss(case.queries)
        concept, loss = rows @ (q / damped), rows @ (loss_q / damped)
        found.loss["exact"] = loss
        found.ood["exact"] = rows @ (
            exact.concept(case.ood.queries, case.ood.direction, case.pooling, ConceptFunction.DOT) / damped
        )
        norms = np.linalg.norm(rows, axis=1)
        found.concept["gradient_cosine"] = rows @ q / norms
        found.loss["gradient_cosine"] = rows @ loss_q / norms
        facts = found.facts
        facts["rho_gradient_concept"] = correlation(found.concept["gradient"], concept)
        facts["rho_gradient_loss"] = correlation(found.loss["influence_function"], loss)
        blind, _ = lab.build("blind", "model", "train", case.layer, coordinates=K)
        scores = lab.scores(blind, self._ids, concept="concept", query_set="queries", damping=DAMPING)
        facts["rho_gradient_blind_concept"] = correlation(scores, concept)
        scores = lab.scores(
            blind, self._ids, query_set="queries", method=Method.INFLUENCE_FUNCTION, damping=DAMPING
        )
        facts["rho_gradient_blind_loss"] = correlation(scores, loss)
        random = random_scores(rows, [q, loss_q], damped, K, case.seed)
        facts["rho_random_concept"] = correlation(random[0], concept)
        facts["rho_random_loss"] = correlation(random[1], loss)
        half, _ = lab.build(
            "truncated",
            "model",
            "train",
            case.layer,
            kinds=(IndexKind.INFLUENCE,),
            pooling=case.pooling,
            query_sets=("queries",),
            checkpoints="end",
            projection_dim=self._model.width // 2,
            embedding_coordinates=exact.weights // 6,
        )
        v = np.random.default_rng(case.seed).standard_normal((RANDOM_DIRECTIONS, self._model.width))
        truncated, full = [], []
        end_rows, half_rows = (embedding(lab, index, self._ids) for index in (end, half))
        for one in (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32):
            q = exact.concept(case.queries, one, case.pooling, ConceptFunction.DOT)
            truth = rows @ (q / damped)
            truncated.append(correlation(half_rows @ one, truth))
            full.append(correlation(end_rows @ one, truth))
        facts["rho_influence_trunc"] = float(np.mean(truncated))
        facts["rho_influence_full_float32"] = float(np.mean(full))
        facts["fidelity_trunc"] = half.fidelity[0].mean
        facts["weights"] = exact.weights


def embedding(lab: Lab, index: IndexRecord, ids: Sequence[str]) -> F64:
    """The stored rows for "queries", dot, in the order of ``ids``."""
    section = indexes.read_manifest(lab.storage, index).sections[-1]
    array = next(a for a in section.arrays if a.embedding and a.embedding.query_set == "queries")
    by_id = {}
    for reference in section.shards:
        shard = read_manifest(lab.storage, reference.key)
        by_id |= dict(zip(shard.ids, read_rows(lab.storage, shard, array), strict=True))
    return np.stack([by_id[item] for item in ids]).astype(np.float64)


# --- methods without gradients --------------------------------------------------------------------------


def simple(case: Case, found: Scores) -> None:
    """Lexical search, chance, and the answer key."""
    found.concept["bm25"] = found.loss["bm25"] = lexical(case.examples, case.queries)
    found.ood["bm25"] = lexical(case.examples, case.ood.queries)
    chance = np.random.default_rng(case.seed).standard_normal(len(case.examples))
    found.concept["random"] = found.loss["random"] = found.ood["random"] = chance
    found.concept["labels"] = found.loss["labels"] = case.planted.astype(np.float64)
    found.bytes |= {"bm25": 0.0, "random": 0.0, "labels": 1 / 8}


def lexical(examples: Sequence[Example], queries: Sequence[Example]) -> F64:
    """Mean BM25 score of each example over the queries' texts."""

    def words(some: Sequence[Example]) -> list[list[str]]:
        return [re.findall(r"\w+", render(example.content).lower()) for example in some]

    engine = bm25s.BM25()
    engine.index(words(examples), show_progress=False)
    return np.mean([engine.get_scores(query) for query in words(queries)], axis=0).astype(np.float64)


# --- peers ----------------------------------------------------------------------------------------------

BERGSON_FORMS = tuple(f"{mix}_{form}" for mix in ("mixed", "train") for form in ("cosine_each", "cosine", "dot"))


def theirs(case: Case, folder: Path, found: Scores, *, threads: int, report: Any) -> None:
    """bergson and kronfluence in environments of their own, at the end of the run, on the same tokens."""
    end = case.points[-1][1]
    tokenizer = load(str(end), "float32").tokenizer
    texts = [[tokenise(example.content, tokenizer) for example in some] for some in (case.examples, case.queries)]
    ids, target, query_ids, query_target = (
        [getattr(tokens, name) for tokens in some] for some in texts for name in ("ids", "predicted")
    )
    peers.prepare(
        folder, end, ids, target, query_ids=query_ids, query_target=query_target, direction=case.direction
    )
    if peers.available("bergson"):
        report("bergson TrackStar")
        result = peers.call(
            "bergson", "bergson_scores", folder, layer=case.layer, threads=threads, loss_reduction="mean"
        )
        for form in BERGSON_FORMS:
            # Its recipe (unit norm, mixed autocorrelation, one column per query) is what carries the name.
            suffix = "" if form == BERGSON_FORMS[0] else f"_{form}"
            for kind, into in (("concept", found.concept), ("loss", found.loss)):
                into[f"bergson_trackstar_p16{suffix}"] = np.load(folder / f"scores_{kind}_{form}.npy").astype(
                    np.float64
                )
            found.bytes[f"bergson_trackstar_p16{suffix}"] = float(result["bytes_per_example"])
    else:
        report(peers.missing("bergson"))
    if peers.available("kronfluence"):
        report("kronfluence EK-FAC")
        peers.call(
            "kronfluence",
            "kronfluence_scores",
            folder,
            layer=case.layer,
            threads=threads,
            labels="sampled",
            relative=[DAMPING],
            per_query=False,
            dtype="float32",
        )
        for kind, into in (("concept", found.concept), ("loss", found.loss)):
            into["kronfluence_ekfac"] = np.load(folder / f"scores_{kind}.npy")[-1, -1].astype(np.float64)
    else:
        report(peers.missing("kronfluence"))


def oracle_agreement(case: Case, folder: Path, *, queries: int = 32) -> float:
    """Mean Spearman over random directions of stored embeddings (K = P, int8) with the dense float64 oracle."""
    rng = np.random.default_rng(case.seed)
    some = case.queries[:queries]
    with Lab(folder / "lab") as lab:
        model = lab.model("model", case.points[-1][1])
        lab.dataset("train", case.examples)
        lab.dataset("queries", some)
        index, _ = lab.build(
            "full", "model", "train", case.layer, kinds=(IndexKind.INFLUENCE,), query_sets=("queries",)
        )
        rows = embedding(lab, index, [example.id for example in case.examples])
        v = rng.standard_normal((RANDOM_DIRECTIONS, model.width))
    unique = list({example.id: example for example in some}.values())
    truth = Oracle(case.points[-1][1], case.layer).scores(case.examples, unique, v, DAMPING)
    return float(np.mean([correlation(rows @ one, truth[:, n]) for n, one in enumerate(v)]))
