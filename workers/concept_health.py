"""A concept health report as a job: f_v along the run, both families side by side, and where the texts lie.

Every pass leaves an artifact, so that a second concept on the same query set runs no model along the run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec, datasets, labelled, models, tombstones
from service import concept_health as reports
from service.contracts import (
    ArrayInfo,
    Completion,
    Content,
    DatasetRecord,
    IndexRecord,
    ModelRecord,
    PlainText,
    Point,
)
from service.errors import Conflict, Invalid
from service.health_doubts import doubts
from service.health_records import Agreement, AtPoint, Domain, HealthSpec, Movement, Report
from service.matching import Asked, Matched, Missing, match
from service.movement import change, estimate, turn
from service.rankings import compared
from service.registry import DATASETS, Registry
from service.row_blocks import RowBlocks
from service.rows import F32
from service.specs import IndexManifest, Labels, QueryGradientSpec
from service.terms import IndexKind, Lora, Method, Pooling
from service.two_samples import FOLDS, matched, told_apart, without
from service.work import Location, PooledWork, Reading
from workers.stages import Stages, shuffled

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

SEED = 0
MOST = 512  # examples of either side of the two-sample test
CANDIDATES = 4096  # of the index, from which those of like lengths are taken
FEWEST = 2 * FOLDS  # of a side
TOP = 100  # of the rankings that are compared


@dataclass(frozen=True)
class _Texts:
    """Some examples of one dataset, by their positions."""

    dataset: DatasetRecord
    rows: tuple[int, ...]


class Health:
    """``missing``: runs the job behind coordinates that a gradient index lacks."""

    def __init__(
        self,
        stages: Stages,
        registry: Registry,
        spec: HealthSpec,
        index: IndexRecord,
        manifest: IndexManifest,
        model: ModelRecord,
        missing: Callable[[QueryGradientSpec], object],
    ) -> None:
        self._stages = stages
        self._registry = registry
        self._spec = spec
        self._index = index
        self._manifest = manifest
        self._model = model
        self._missing = missing
        self._vector: F32 = stages.numbers(spec.direction, "directions")["rows"][0]
        self._absent: dict[str, str] = {}

    def run(self) -> Mapping[str, Any]:
        """Publish the report under ``spec.key``, unless it is there."""
        storage, key = self._stages.storage, self._spec.key
        known = artifacts.find_answer(storage, key, reports.FILE)
        if known is None:  # else an earlier attempt died after publishing
            report = self._report()
            self._stages.context.check()
            data = np.frombuffer(codec.encode(report).encode(), dtype=np.uint8)
            artifacts.publish(storage, key, {reports.FILE: {"json": data}}, answer=True)
        else:
            report = codec.decode(Report, known[1]["json"].tobytes())
        return {"report": key, "warnings": [each.said for each in doubts(report)]}

    def _report(self) -> Report:
        began, spec = time.perf_counter(), self._spec
        query_set = self._registry.get(DATASETS, spec.query_set, param="query_set") if spec.query_set else None
        if query_set is None:
            self._absent["query_set"] = (
                "The index has embeddings for no query set at this layer and pooling: name a dataset in "
                "'query_set' to see f_v along the run, both families side by side, and whether Q is in the domain."
            )
        found = self._answering(query_set) if query_set is not None else None
        movement = self._movement(query_set) if query_set is not None else None
        domain = self._domain_of(query_set) if query_set is not None else None
        return Report(
            index=self._index.id,
            concept=spec.concept.id,
            concept_sha256=spec.concept.sha256,
            layer=spec.concept.layer,
            pooling=spec.concept.pooling,
            query_set=spec.query_set,
            function=spec.function,
            points=found.points if found is not None and found.array.kind == IndexKind.INFLUENCE else 0,
            movement=movement,
            domain=domain,
            concept_domain=self._domain_of_concept(),
            agreement=self._agreement(found) if found is not None else None,
            absent=self._absent,
            seconds=round(time.perf_counter() - began, 3),
        )

    # --- f_v along the run ------------------------------------------------------------------------------------

    def _movement(self, query_set: DatasetRecord) -> Movement:
        """Of the examples that can be used at every point. Raises Invalid when there is none."""
        if not query_set.examples:
            raise Invalid("empty_query_set", f"{query_set.id!r} holds no example.", param="query_set")
        texts = _Texts(query_set, tuple(range(query_set.examples)))
        left_out: dict[str, str] = {}
        names, found = [], []
        for number, point in enumerate(self._spec.points, start=1):
            self._stages.prefix = f"point {number} of {len(self._spec.points)}: "
            try:
                rows, places = self._rows(texts, point)
            except (Invalid, Conflict) as error:
                if number == len(self._spec.points):
                    raise
                left_out[point.name] = error.detail
                continue
            names.append(point.name)
            found.append((rows, places))
        self._stages.prefix = ""
        common = found[0][1]
        for _, places in found[1:]:
            common = np.intersect1d(common, places)
        if not len(common):
            detail = f"No example of {query_set.id!r} can be used."
            raise Invalid("empty_query_set", detail, param="query_set")
        vector = self._vector.astype(np.float64)
        values = np.stack(
            [rows[np.searchsorted(places, common)].astype(np.float64) @ vector for rows, places in found]
        )
        if len(values) < 2:
            self._absent["change"] = (
                f"{self._model.id!r} declares neither a base nor checkpoints: f_v is known at its end only. "
                "Register it with both to see whether training moved it, and whether it turned."
            )
        return Movement(
            examples=len(common),
            quarantined=query_set.examples - len(common),
            points=tuple(AtPoint(name, estimate(each)) for name, each in zip(names, values, strict=True)),
            change=change(values, seed=SEED),
            turn=turn(values, seed=SEED),
            left_out=left_out,
        )

    def _rows(self, texts: _Texts, point: Point | None = None) -> tuple[F32, I64]:
        """Pooled activations (n, d) and the places of their examples among ``texts.rows``, ascending."""
        reading, location = self._at(point)
        concept, size = self._spec.concept, self._spec.shard_size
        work = PooledWork(reading, concept.layer, concept.pooling, self._spec.function)
        parts = [texts.rows[start : start + size] for start in range(0, len(texts.rows), size)]
        stage = f"activations of {texts.dataset.id}, layer {concept.layer}"
        sources = [(texts.dataset, part) for part in parts]
        made = self._stages.artifacts(stage, [work] * len(parts), location=location, sources=sources)
        rows, places = [], []
        for number, artifact in enumerate(made):
            held = self._stages.numbers(artifact.key, "pooled")
            rows.append(held["rows"])
            places.append(held["places"] + number * size)
        return np.concatenate(rows), np.concatenate(places)

    def _at(self, point: Point | None) -> tuple[Reading, Location]:
        # Merged, also where the index tracks a LoRA's own maps: f_v is the same, and the base has none.
        reading = replace(self._manifest.spec.reading, lora=Lora.MERGED)
        if point is None:
            return reading, models.location(self._model)
        return replace(reading, model_fingerprint=point.fingerprint), models.location(self._model, point)

    # --- two families -----------------------------------------------------------------------------------------

    def _answering(self, query_set: DatasetRecord) -> Matched | None:
        """The array that ranks by gradients; None where the index has none for this question."""
        about = (self._spec.concept, self._vector, query_set, self._spec.function)
        for damping in (self._spec.damping, None):
            asked = Asked(Method.CONCEPT_INFLUENCE, *about, damping, None)
            try:
                found = self._match(asked)
            except Invalid as error:
                if error.code == "no_damping":  # random projections
                    continue
                self._absent["agreement"] = error.detail
                return None
            return found
        return None

    def _match(self, asked: Asked) -> Matched:
        size = self._spec.shard_size
        found = match(self._stages.storage, self._index, self._manifest, asked, shard_size=size)
        if isinstance(found, Missing):
            self._missing(found.spec)
            found = match(self._stages.storage, self._index, self._manifest, asked, shard_size=size)
        assert isinstance(found, Matched)  # noqa: S101  (it has just been made)
        return found

    def _agreement(self, found: Matched) -> Agreement | None:
        concept = self._spec.concept
        array = next(
            (
                each
                for each in self._index.arrays
                if (each.kind, each.layer) == (IndexKind.ACTIVATION, concept.layer)
            ),
            None,
        )
        if array is None or self._index.pooling != concept.pooling:
            self._absent["agreement"] = (
                f"Index {self._index.id} holds no activations of layer {concept.layer} pooled by "
                f"{concept.pooling}: build it with kind 'activation' as well to see whether both families agree."
            )
            return None
        gradients, activations = self._scores(found.array, found.u), self._scores(array, self._vector)
        result = compared(gradients, activations, TOP, 0)
        overlap = next((each for each in result.overlaps if each.k == min(TOP, result.n)), None)
        if overlap is None:
            self._absent["agreement"] = f"Index {self._index.id} holds no example that can be ranked."
            return None
        return Agreement(found.array, result.n, result.spearman, overlap.k, overlap.share, overlap.by_chance)

    def _scores(self, array: ArrayInfo, u: F32) -> F64:
        stored, found = RowBlocks(self._stages.storage, self._manifest, array), []
        stage = f"scores by {array.kind}"
        for done, block in enumerate(stored):
            self._stages.context.progress(stage, done, stored.count, unit="shards")
            found.append(block.astype(np.float64) @ u.astype(np.float64))
        self._stages.context.progress(stage, stored.count, stored.count, unit="shards")
        return np.concatenate(found)

    # --- where the texts lie ----------------------------------------------------------------------------------

    def _domain_of(self, query_set: DatasetRecord) -> Domain | None:
        chosen = shuffled(self._stages.ids(query_set), SEED)[:MOST]
        return self._domain("domain", query_set.id, [_Texts(query_set, tuple(sorted(chosen)))])

    def _domain_of_concept(self) -> Domain | None:
        sides = self._sides()
        if not sides:
            self._absent["concept_domain"] = "The examples that the concept was fitted on are not at hand."
            return None
        name = " and ".join(dict.fromkeys(side.dataset.id for side in sides))
        return self._domain("concept_domain", name, sides)

    def _sides(self) -> list[_Texts]:
        """As many examples of either side, half of what a test reads."""
        concept = self._spec.concept
        records = [self._registry.get(DATASETS, name) for name in self._spec.sides]
        if not records:
            return []
        if (said := concept.provenance.get("labels")) is not None:
            (record,) = records
            both = labelled.split(self._stages.storage, record, codec.from_plain(Labels, said))
            sides = [(record, rows.tolist()) for rows in both]
        else:
            sides = [(record, range(record.examples)) for record in records]
        found = []
        for record, rows in sides:
            ids = self._stages.ids(record)
            chosen = shuffled([ids[row] for row in rows], SEED)[: MOST // 2]
            found.append(_Texts(record, tuple(sorted(rows[place] for place in chosen))))
        return found

    def _domain(self, part: str, name: str, ours: Sequence[_Texts]) -> Domain | None:
        """The two-sample test of some texts against those of the index that have like lengths."""
        own_ids = {self._stages.ids(each.dataset)[row] for each in ours for row in each.rows}
        lengths = np.concatenate([self._lengths(each) for each in ours])
        pool = self._candidates(own_ids)
        theirs = np.concatenate([self._lengths(each) for each in pool])
        if min(len(lengths), len(theirs)) < FEWEST:
            self._absent[part] = (
                f"{name!r} has {len(lengths)} examples, and the index {len(theirs)} that are not among them: fewer "
                f"than {FEWEST} say nothing about its domain."
            )
            return None
        chosen, alike, paired = matched(lengths, theirs, MOST, SEED)
        rows, start = [], 0
        for each in ours:
            found, places = self._rows(each)
            rows.append(found[paired[start + places]])
            start += len(each.rows)
        others = [self._rows(each)[0] for each in _subset(pool, chosen)]
        a, b = (without(np.concatenate(side), self._vector) for side in (rows, others))
        if min(len(a), len(b)) < FEWEST:
            self._absent[part] = (
                f"Fewer than {FEWEST} examples of {name!r} and of the index can be compared: pooled, and of like "
                "lengths."
            )
            return None
        self._stages.context.progress("comparing activations", 0, 1, unit="tests")
        told = told_apart(a, b, seed=SEED)
        self._stages.context.progress("comparing activations", 1, 1, unit="tests")
        return Domain(
            name=name,
            examples=len(a),
            against=len(b),
            auroc=told.auroc,
            p_value=told.p_value,
            alike=float(alike.mean()),
            length=float(np.median(lengths)),
            length_index=float(np.median(theirs)),
        )

    def _candidates(self, without_ids: set[str]) -> list[_Texts]:
        """A seeded sample of the index's examples, by dataset, without some and without what was deleted."""
        gone = tombstones.read(self._stages.storage, self._manifest.deleted) | without_ids
        records = [self._registry.get(DATASETS, name) for name in self._index.datasets]
        where: dict[str, tuple[int, int]] = {}
        for number, record in enumerate(records):
            for row, item in enumerate(self._stages.ids(record)):
                if item not in gone:
                    where.setdefault(item, (number, row))
        ids = list(where)
        chosen = [where[ids[place]] for place in shuffled(ids, SEED)[:CANDIDATES]]
        return [
            _Texts(record, tuple(sorted(row for number, row in chosen if number == part)))
            for part, record in enumerate(records)
        ]

    def _lengths(self, texts: _Texts) -> I64:
        """Characters of what is pooled, for every example."""
        table = datasets.read_table(self._stages.storage, texts.dataset).take(list(texts.rows))
        pooling = self._spec.concept.pooling
        return np.array([characters(each.content, pooling) for each in datasets.to_examples(table)], dtype=np.int64)


def _subset(pool: Sequence[_Texts], chosen: I64) -> list[_Texts]:
    """The ``chosen`` of all rows of ``pool``, one after the other."""
    found, start = [], 0
    for each in pool:
        stop = start + len(each.rows)
        own = chosen[(chosen >= start) & (chosen < stop)] - start
        if len(own):
            found.append(_Texts(each.dataset, tuple(each.rows[place] for place in own.tolist())))
        start = stop
    return found


def characters(content: Content, pooling: Pooling) -> int:
    """How much text a pooled activation is a mean over; of a single token, how much stands before it."""
    answers = pooling == Pooling.RESPONSE_MEAN
    if isinstance(content, PlainText):
        return len(content.text)
    if isinstance(content, Completion):
        return len(content.completion) + (0 if answers else len(content.prompt))
    return sum(len(each.content) for each in content.messages if not answers or each.role == "assistant")
