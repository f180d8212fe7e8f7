"""From labelled examples to the job that fits a concept, checked against the model and data it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service import labelled
from service.contracts import DatasetRecord
from service.errors import Conflict, Invalid
from service.planning import layers_of, reading_of
from service.registry import CONCEPTS, DATASETS, MODELS, Registry, check_id
from service.settings import Settings
from service.specs import FitConceptSpec, Labels
from service.storage import Storage
from service.terms import LongExamples, Pooling, ProbeMethod
from service.work import ActivationSpec, PassSpec

FEWEST_EXAMPLES = 5  # a side of a concept, one per held-out fold

Sent = tuple[str | Mapping[str, Any], ...]


@dataclass(frozen=True)
class ConceptRequest:
    """``positive`` and ``negative``: a dataset's id, or examples; or ``dataset`` with ``labels``."""

    id: str
    model: str
    positive: str | Sent | None
    negative: str | Sent | None
    dataset: str | None
    labels: Labels | None
    layer: int | None
    layers: tuple[int, ...] | None  # instead of ``layer``; empty: all
    method: ProbeMethod
    compare: tuple[ProbeMethod, ...]
    pooling: Pooling
    max_length: int | None


def plan_concept(
    request: ConceptRequest, registry: Registry, storage: Storage, settings: Settings
) -> FitConceptSpec:
    """The fit of a new concept. Examples of the request become a dataset. Raises NotFound, Invalid or Conflict
    naming the field.
    """
    check_id(request.id, param="id")
    if registry.find(CONCEPTS, request.id) is not None:
        raise Conflict(
            "concept_exists", f"There is a concept {request.id!r} already. Choose another id.", param="id"
        )
    model = registry.get(MODELS, request.model, param="model")
    if request.layer is not None:
        layers = layers_of(model, (request.layer,), param="layer")
    else:
        layers = layers_of(model, request.layers or tuple(range(1, model.n_layers + 1)), param="layers")
    reading = reading_of(model, settings, request.max_length, LongExamples.TRUNCATE_RIGHT)
    if request.labels is not None:
        dataset = registry.get(DATASETS, request.dataset or "", param="dataset")
        _check_labelled(storage, dataset, request.labels)
        positive = negative = dataset
    else:
        positive, negative = (
            _side(request, side, registry, storage, settings) for side in ("positive", "negative")
        )
        labelled.check_sides(storage, positive, negative)
    spec = PassSpec(
        **vars(reading), activation=ActivationSpec(layers, request.pooling), gradient=None, objective=None
    )
    return FitConceptSpec(
        id=request.id,
        model=model.id,
        positive=positive.id,
        negative=negative.id,
        pass_spec=spec,
        shard_size=settings.shard_size,
        method=request.method,
        compare=tuple(each for each in dict.fromkeys(request.compare) if each != request.method),
        labels=request.labels,
    )


def _side(
    request: ConceptRequest, side: str, registry: Registry, storage: Storage, settings: Settings
) -> DatasetRecord:
    given = getattr(request, side)
    if isinstance(given, str):
        dataset = registry.get(DATASETS, given, param=side)
        name = repr(dataset.id)
    else:
        _check_count(f"The {side} side", len(given), side)
        dataset = labelled.keep(storage, registry, given, side=side, max_bytes=settings.max_line_bytes)
        name = f"The {side} side"
    _check_count(name, dataset.examples, side)
    return dataset


def _check_labelled(storage: Storage, dataset: DatasetRecord, labels: Labels) -> None:
    positive, negative = labelled.split(storage, dataset, labels)
    _check_count(f"The positive side of {dataset.id!r}", len(positive), "positive_values")
    param = "positive_values" if labels.negative is None else "negative_values"
    _check_count(f"The negative side of {dataset.id!r}", len(negative), param)


def _check_count(name: str, count: int, param: str) -> None:
    if count < FEWEST_EXAMPLES:
        detail = f"{name} holds {count} examples; {FEWEST_EXAMPLES} are least, 100 are good."
        raise Invalid("too_few_examples", detail, param=param)
