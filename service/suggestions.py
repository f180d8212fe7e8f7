"""Which known directions tell a few examples apart: registered concepts, SAE features, what a dataset does.

A job reads the activations of the examples once; ranking the candidates needs no model, so that what is registered
later is among them when the same question is asked again.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec, concepts, damage, indexes, labelled, sae, saes
from service.contracts import ConceptRecord, DatasetRecord, JobRecord, ModelRecord
from service.directions import Directions, DirectionsRequest, DirectionsService, embeddings
from service.errors import Damaged, Invalid, NotFound
from service.jobs import Jobs
from service.planning import layers_of, reading_of
from service.rankings import average_ranks
from service.registry import CONCEPTS, MODELS, SAES, Registry
from service.rows import F32
from service.sae_records import Labels
from service.settings import Settings
from service.specs import SuggestSpec
from service.storage import Storage
from service.terms import JobKind, LongExamples, Pooling
from service.work import ActivationSpec, PassSpec

FILE = "activations"
FEWEST = 3  # examples of a side: below, every second direction tells them apart
_DIRECTIONS = 20  # of the index, asked for

F64 = NDArray[np.float64]
Named = tuple[str, str, str | None, int]  # kind, id, label and layer of a candidate


@dataclass(frozen=True)
class SuggestRequest:
    """``layers`` empty: all that a candidate lies at. ``index``: whose main directions are candidates too, those of
    its embeddings about ``query_set`` where it has several.
    """

    model: str
    positive: tuple[object, ...]
    negative: tuple[object, ...]
    layers: tuple[int, ...]
    pooling: Pooling
    index: str | None
    query_set: str | None
    count: int


@dataclass(frozen=True)
class Separation:
    """How well values tell two sides apart, each (c,) for c candidates.

    ``auroc`` of the better side, ``sign`` −1 where the negative examples are higher; ``effect``: difference of the
    means in standard deviations within the sides (Cohen's d); ``p``: of chance alone, two-sided (Mann-Whitney U).
    """

    auroc: F64
    sign: F64
    effect: F64
    p: F64


@dataclass(frozen=True)
class Suggestion:
    """A candidate: a concept id, ``sae:ID/N``, or the number of a main direction of the index."""

    kind: str  # concept, sae_feature or direction
    id: str
    label: str | None
    layer: int
    auroc: float
    sign: int
    effect: float
    p: float


@dataclass(frozen=True)
class Suggestions:
    """``candidates``: how many were compared. ``by_chance``: how many of them would do as well as the first one if
    the labels meant nothing.
    """

    found: tuple[Suggestion, ...]
    candidates: int
    by_chance: float
    n_positive: int
    n_negative: int
    quarantined: int
    warnings: tuple[str, ...]


def separation(positive: F64, negative: F64) -> Separation:
    """Columns of (n, c) and (m, c)."""
    n, m = len(positive), len(negative)
    both = np.concatenate([positive, negative])
    ranks = np.stack([average_ranks(column) for column in both.T], axis=1) if both.shape[1] else both
    u = ranks[:n].sum(axis=0) - n * (n + 1) / 2
    auroc = u / (n * m)
    squares = ((positive - positive.mean(0)) ** 2).sum(0) + ((negative - negative.mean(0)) ** 2).sum(0)
    deviation = np.sqrt(squares / max(1, n + m - 2))
    difference = positive.mean(0) - negative.mean(0)
    flat = deviation <= 1e-12 * np.abs(both).max(axis=0, initial=0.0)
    effect = np.divide(difference, deviation, out=np.where(difference, np.inf, 0.0), where=~flat)
    # The variance of ranks as they are, which allows for ties.
    spread = np.sqrt(n * m * ranks.var(axis=0, ddof=1) / (n + m)) if n + m > 1 else np.zeros_like(u)
    z = np.divide(np.maximum(np.abs(u - n * m / 2) - 0.5, 0.0), spread, out=np.zeros_like(u), where=spread > 0)
    p = np.array([math.erfc(each / math.sqrt(2)) for each in z])
    return Separation(np.maximum(auroc, 1 - auroc), np.where(auroc >= 0.5, 1.0, -1.0), np.abs(effect), p)


class SuggestService:
    def __init__(
        self, registry: Registry, storage: Storage, jobs: Jobs, directions: DirectionsService, settings: Settings
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._directions = directions
        self._settings = settings

    def run(self, request: SuggestRequest) -> Suggestions | JobRecord:
        """The candidates that tell the sides apart best, or the job that must end first.

        Raises NotFound, and Invalid naming the field.
        """
        model = self._registry.get(MODELS, request.model, param="model")
        sides = [self._side(request, name) for name in ("positive", "negative")]
        if sides[0].fingerprint == sides[1].fingerprint:
            raise Invalid("identical_sides", "Both sides are the same examples.", param="negative")
        directions = self._of_index(request, model)
        if isinstance(directions, JobRecord):
            return directions
        lie = self._layers(request, model, directions)
        spec = self._plan(request, model, sides, lie)
        known = artifacts.find_answer(self._storage, spec.key, FILE)
        if known is None:
            return self._jobs.submit_once(spec.key, JobKind.SUGGEST_CONCEPTS, spec)
        stored, tensors = known
        quarantined = int(stored.facts["quarantined"])
        for name in ("positive", "negative"):
            if len(tensors[f"{name}_{lie[0]}"]) < FEWEST:
                detail = f"Fewer than {FEWEST} {name} examples can be used; {quarantined} were set aside."
                raise Invalid("too_few_examples", detail, param=name)
        found: list[Suggestion] = []
        left_out: list[str] = []
        for layer in lie:
            both = [tensors[f"{name}_{layer}"].astype(np.float64) for name in ("positive", "negative")]
            for about, ours, theirs in self._candidates(request, model, layer, directions, left_out, *both):
                found += _suggested(about, separation(ours, theirs))
        found.sort(key=lambda each: (-each.auroc, -each.effect, each.id))
        first = f"positive_{lie[0]}"
        n, m = len(tensors[first]), len(tensors[first.replace("positive", "negative")])
        expected = len(found) * found[0].p if found else 0.0
        both_ways = len(labelled.shared(self._storage, *sides)[0])
        warnings = (*_warnings(found, expected, n, m, quarantined, both_ways), *left_out)
        return Suggestions(tuple(found[: request.count]), len(found), expected, n, m, quarantined, warnings)

    def _side(self, request: SuggestRequest, name: str) -> DatasetRecord:
        sent = getattr(request, name)
        if len(sent) < FEWEST:
            detail = f"{len(sent)} {name} examples; {FEWEST} are least, 10 are good."
            raise Invalid("too_few_examples", detail, param=name)
        most = self._settings.max_line_bytes
        return labelled.keep(self._storage, self._registry, sent, side=name, max_bytes=most)

    def _of_index(self, request: SuggestRequest, model: ModelRecord) -> list[Directions] | JobRecord:
        """The main directions of the index, at every layer at which it has any and that is asked for."""
        if request.index is None:
            return []
        index = indexes.resolve(self._registry, request.index)
        if index.lineage != model.lineage:
            detail = f"Index {index.id} is of {index.model!r}, which is no relation of {model.id!r}."
            raise Invalid("index_of_other_lineage", detail, param="index")
        held = {array.layer for array in embeddings(index) if array.layer is not None}
        found: list[Directions] = []
        for layer in sorted(held & set(request.layers) if request.layers else held):
            asked = DirectionsRequest(index.id, request.query_set, layer, None, None, _DIRECTIONS, 0, 1, 0)
            made = self._directions.run(asked)
            if isinstance(made, JobRecord):
                return made
            found.append(made)
        return found

    def _fit(self, request: SuggestRequest, model: ModelRecord) -> Iterator[ConceptRecord]:
        """Registered concepts that live where the model's activations do."""
        for record in self._registry.all(CONCEPTS):
            alike = (record.lineage, record.width, record.pooling) == (model.lineage, model.width, request.pooling)
            if alike and record.layer <= model.n_layers:
                yield record

    def _layers(self, request: SuggestRequest, model: ModelRecord, directions: Sequence[Directions]) -> list[int]:
        """Where candidates lie, among those that are asked for."""
        found = {record.layer for record in self._fit(request, model)}
        found |= {record.layer for record in self._saes(request, model)}
        found |= {each.array.layer for each in directions if each.array.layer is not None}
        if request.layers:
            found &= set(layers_of(model, request.layers, param="layers"))
        if not found:
            detail = (
                f"There is nothing to choose from: no concept, SAE or influence direction of the lineage of "
                f"{model.id!r} with pooling {request.pooling}"
                + (f" at layers {list(request.layers)}" if request.layers else "")
                + ". Train an SAE on an index (whence saes train), or name an index with influence embeddings."
            )
            raise Invalid("no_candidates", detail, param="layers" if request.layers else "model")
        return sorted(found)

    def _saes(self, request: SuggestRequest, model: ModelRecord) -> list[saes.SaeRecord]:
        return [
            record
            for record in self._registry.all(SAES)
            if (record.lineage, record.width) == (model.lineage, model.width)
            and record.pooling in {None, request.pooling}
        ]

    def _plan(
        self, request: SuggestRequest, model: ModelRecord, sides: Sequence[DatasetRecord], layers: Sequence[int]
    ) -> SuggestSpec:
        reading = reading_of(model, self._settings, None, LongExamples.TRUNCATE_RIGHT)
        activation = ActivationSpec(tuple(layers), request.pooling)
        spec = PassSpec(**vars(reading), activation=activation, gradient=None, objective=None)
        about = [codec.to_plain(replace(spec, token_budget=0)), [side.fingerprint for side in sides]]
        key = codec.digest(["activations to suggest by", about])
        positive, negative = (side.id for side in sides)
        return SuggestSpec(key, model.id, positive, negative, spec, self._settings.shard_size)

    def _candidates(
        self,
        request: SuggestRequest,
        model: ModelRecord,
        layer: int,
        directions: Sequence[Directions],
        left_out: list[str],
        positive: F64,
        negative: F64,
    ) -> Iterator[tuple[list[Named], F64, F64]]:
        """Of every family at a layer: (kind, id, label, layer) of each, and the values of both sides. What nobody
        can read is told in ``left_out``: others' concepts are no reason to answer nothing.
        """
        held: list[tuple[ConceptRecord, F32]] = []
        for record in self._fit(request, model):
            if record.layer == layer:
                with _told(f"Concept {record.id!r}", left_out):
                    held.append((record, concepts.direction(self._storage, record)))
        if held:
            rows = np.array([row for _, row in held], dtype=np.float64)
            named: list[Named] = [("concept", record.id, None, layer) for record, _ in held]
            yield named, positive @ rows.T, negative @ rows.T
        for record in self._saes(request, model):
            values: list[F64] = []
            labels = Labels()
            if record.layer == layer:
                with _told(f"SAE {record.id!r}", left_out):
                    labels = saes.labels(self._storage, record)
                    values = [_encoded(saes.read(self._storage, record), side) for side in (positive, negative)]
            if not values:
                continue
            fires = np.flatnonzero((values[0] > 0).any(axis=0) | (values[1] > 0).any(axis=0))
            ids = [(saes.concept_id(record.id, feature), labels.of(feature)) for feature in fires.tolist()]
            named: list[Named] = [("sae_feature", *each, layer) for each in ids]
            yield named, values[0][:, fires], values[1][:, fires]
        for of_layer in directions:
            if of_layer.array.layer != layer or not of_layer.directions:
                continue
            rows = np.array([each.vector for each in of_layer.directions], dtype=np.float64)
            named: list[Named] = [
                ("direction", f"{of_layer.index.id} direction {each.number}", _along(each), layer)
                for each in of_layer.directions
            ]
            yield named, positive @ rows.T, negative @ rows.T


@contextmanager
def _told(what: str, left_out: list[str]) -> Iterator[None]:
    try:
        yield
    except (Damaged, NotFound) as error:
        left_out.append(f"{what} is left out: {damage.explained(error, None).detail}")


def _encoded(held: sae.Sae, rows: F64) -> F64:
    return sae.encode(held, np.ascontiguousarray(rows, dtype=np.float32))[0].astype(np.float64)


def _along(direction: object) -> str | None:
    aligned = getattr(direction, "concepts", ())
    return f"along {aligned[0].concept.id}" if aligned and abs(aligned[0].cosine) > 0.5 else None


def _suggested(about: list[Named], found: Separation) -> list[Suggestion]:
    figures = zip(found.auroc, found.sign, found.effect, found.p, strict=True)
    return [
        Suggestion(*each, float(auroc), int(sign), float(effect), float(p))
        for each, (auroc, sign, effect, p) in zip(about, figures, strict=True)
    ]


def _warnings(
    found: Sequence[Suggestion], expected: float, n: int, m: int, quarantined: int, both_ways: int
) -> tuple[str, ...]:
    said = []
    if both_ways:
        said.append(f"{both_ways} of the examples are on both sides, and tell nothing apart: take them out of one.")
    if quarantined:
        said.append(f"{quarantined} examples were set aside: {n} positive and {m} negative ones are compared.")
    if found and expected > 0.5:
        said.append(
            f"With {n} + {m} examples, {expected:.1f} of {len(found)} candidates would do as well as the first one "
            "by chance: send more examples before you believe it."
        )
    if found and found[0].auroc < 0.8:
        said.append("No candidate tells the sides apart well: fit a concept on these examples instead.")
    return tuple(said)
