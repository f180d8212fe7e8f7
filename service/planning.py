"""From what a user asks to a job specification, checked against the model and data it names.

Whatever can be refused without loading a model is refused here, before a job exists.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from redis import Redis

from service import aliases, concepts, indexes
from service.contracts import Checkpoint, ModelRecord, Point
from service.errors import Invalid
from service.models import end_point, end_tokens
from service.registry import DATASETS, MODELS, Registry, check_id
from service.settings import Settings
from service.specs import (
    BuildIndexSpec,
    DifferencePlan,
    EstimateSpec,
    ExtendIndexSpec,
    GradientPlan,
    InfluencePlan,
)
from service.storage import Storage
from service.terms import (
    Checkpoints,
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    LongExamples,
    Lora,
    LossReduction,
    Pooling,
    Projection,
)
from service.work import AnswersSpec, CurvatureSpec, Eigen, Rademacher, Reading, Tracked

T = TypeVar("T")

_DEFAULT_LENGTH = 2048  # when the model's configuration names no context length
_MOST_P = 4096
_RADEMACHER_P, _EIGEN_P = 16, 64
_WHOLE_WIDTH = 128  # up to this width every eigenvector is kept by default


@dataclass(frozen=True)
class CurvatureRequest:
    examples: int
    seed: int
    labels: FactorLabels
    positions: FactorPositions


@dataclass(frozen=True)
class IndexRequest:
    name: str
    model: str
    dataset: str
    kinds: tuple[IndexKind, ...]
    layers: tuple[int, ...]
    pooling: Pooling
    loss_reduction: LossReduction
    projection: Projection
    projection_dim: int | None
    coordinates: int
    seed: int
    query_sets: tuple[str, ...]
    concept_functions: tuple[ConceptFunction, ...]
    dampings: tuple[float, ...]
    embedding_coordinates: int | None
    rank: int | None
    directions: tuple[str, ...]
    checkpoints: Checkpoints
    modules: str
    stride: int
    lora: Lora
    answers: AnswersSpec
    curvature: CurvatureRequest
    max_length: int | None
    long_examples: LongExamples


def plan_estimate(request: IndexRequest, registry: Registry, settings: Settings) -> EstimateSpec:
    """What the build of the request would cost; no version is taken. Raises as ``plan_index``."""
    return EstimateSpec(_plan(request, registry, settings, lambda: 0))


def plan_index(request: IndexRequest, registry: Registry, redis: Redis, settings: Settings) -> BuildIndexSpec:
    """The build of a new version. Raises NotFound or Invalid naming the field."""
    return _plan(request, registry, settings, lambda: indexes.next_version(redis, registry, request.name))


def _plan(
    request: IndexRequest, registry: Registry, settings: Settings, version: Callable[[], int]
) -> BuildIndexSpec:
    check_id(request.name, param="name")
    aliases.check_not_alias(registry, request.name)
    model = registry.get(MODELS, request.model, param="model")
    dataset = registry.get(DATASETS, request.dataset, param="dataset")
    if not dataset.examples:
        raise Invalid("empty_dataset", f"{dataset.id!r} holds no example.", param="dataset")
    layers = layers_of(model, request.layers, param="layers")
    if request.projection_dim is not None and not 1 <= request.projection_dim <= _MOST_P:
        raise Invalid("bad_projection_dim", f"projection_dim must lie in 1..{_MOST_P}.", param="projection_dim")
    kinds = set(request.kinds)
    if not kinds:
        raise Invalid("no_kinds", "Name at least one kind to build.", param="kinds")
    influence = None
    if IndexKind.INFLUENCE in kinds:
        influence = _influence(request, model, layers, registry, settings)
    elif request.query_sets:
        raise Invalid("query_sets_not_used", "Query sets are for kind 'influence': add it.", param="query_sets")
    rademacher = None
    if request.projection == Projection.RADEMACHER:
        rademacher = Rademacher(request.projection_dim or _RADEMACHER_P, request.seed)
    p = request.projection_dim or (None if model.width <= _WHOLE_WIDTH else _EIGEN_P)
    return BuildIndexSpec(
        name=request.name,
        version=version(),
        model=model.id,
        dataset=dataset.id,
        reading=replace(
            reading_of(model, settings, request.max_length, request.long_examples), lora=_lora(model, request.lora)
        ),
        points=points_of(model, request.checkpoints, request.lora, registry) if influence else (end_point(model),),
        tracked=_tracked(request, layers),
        p=p if request.projection == Projection.EIGEN else None,
        layers=layers,
        pooling=request.pooling,
        loss_reduction=request.loss_reduction,
        activation=bool(kinds & {IndexKind.ACTIVATION, IndexKind.DIFFERENCE}),
        difference=_difference(request, model, registry) if IndexKind.DIFFERENCE in kinds else None,
        gradient=GradientPlan(request.coordinates, rademacher) if IndexKind.GRADIENT in kinds else None,
        influence=influence,
        curvature=CurvatureSpec(**vars(request.curvature)),
        curvature_bytes=settings.curvature_bytes,
        shard_size=settings.shard_size,
    )


@dataclass(frozen=True)
class ExtendRequest:
    query_sets: tuple[str, ...]
    layers: tuple[int, ...]
    pooling: Pooling
    concept_functions: tuple[ConceptFunction, ...]
    dampings: tuple[float, ...]


def plan_extension(
    reference: str, request: ExtendRequest, registry: Registry, storage: Storage, redis: Redis, settings: Settings
) -> ExtendIndexSpec:
    """More questions for a ``gradient`` index. Raises NotFound or Invalid naming the field."""
    source = indexes.resolve(registry, reference)
    gradient = indexes.read_manifest(storage, source).spec.gradient
    if gradient is None or not isinstance(gradient.projection, Eigen):
        detail = (
            f"Index {source.id} holds no EK-FAC gradient coordinates to read embeddings off: build it with kind "
            "'gradient' and projection 'eigen'."
        )
        raise Invalid("kind_not_indexed", detail, param="index")
    model = registry.get(MODELS, source.model, param="model")
    layers = layers_of(model, request.layers or (gradient.tracked.blocks,), param="layers")
    if layers[0] < gradient.tracked.shallowest:
        raise Invalid(
            "layer_not_indexed",
            f"The first block that index {source.id} tracks is {gradient.tracked.shallowest}: f_v at layer "
            f"{layers[0]} has no gradient in it.",
            param="layers",
        )
    if layers[-1] > gradient.tracked.blocks:
        raise Invalid(
            "layer_not_indexed",
            f"Index {source.id} tracks blocks 1 to {gradient.tracked.blocks} only: at layer {layers[-1]} part of "
            f"the gradient would be missing. Build the index with layer {layers[-1]}.",
            param="layers",
            context={"layers": list(range(1, gradient.tracked.blocks + 1))},
        )
    plan = InfluencePlan(
        query_sets=_query_sets(request.query_sets, registry),
        layers=layers,
        pooling=request.pooling,
        functions=_unique(request.concept_functions, param="concept_functions"),
        dampings=_unique(request.dampings, param="dampings"),
        coordinates=None,
        rank=None,
        directions=(),
        head_bytes=settings.head_bytes,
    )
    version = indexes.next_version(redis, registry, source.name)
    return ExtendIndexSpec(source.name, version, source.id, model.id, plan, settings.shard_size)


def _influence(
    request: IndexRequest, model: ModelRecord, layers: tuple[int, ...], registry: Registry, settings: Settings
) -> InfluencePlan:
    if request.projection != Projection.EIGEN:
        detail = "Influence embeddings are made of EK-FAC coordinates: use projection 'eigen'."
        raise Invalid("needs_eigen", detail, param="projection")
    at_layer: Counter[int] = Counter()
    for name in dict.fromkeys(request.directions):
        concept = concepts.get(registry, name, param="directions")
        if concept.lineage != model.lineage or concept.width != model.width:
            detail = f"Concept {name!r} belongs to another model: {concept.model!r}."
            raise Invalid("concept_of_other_lineage", detail, param="directions")
        if concept.layer not in layers:
            detail = (
                f"Concept {name!r} lies at layer {concept.layer}, which is not among the layers {list(layers)}."
            )
            raise Invalid("layer_not_indexed", detail, param="directions")
        at_layer[concept.layer] += 1
    most = max(at_layer.values(), default=0)  # each layer has directions of its own
    rank = request.rank or most or None
    if rank is not None and rank < most:
        detail = f"{most} directions of one layer do not fit into rank {rank}."
        raise Invalid("rank_too_small", detail, param="rank")
    return InfluencePlan(
        query_sets=_query_sets(request.query_sets, registry),
        layers=layers,
        pooling=request.pooling,
        functions=_unique(request.concept_functions, param="concept_functions"),
        dampings=_unique(request.dampings, param="dampings"),
        coordinates=request.embedding_coordinates,
        rank=None if rank is None or rank >= model.width else rank,
        directions=tuple(dict.fromkeys(request.directions)),
        head_bytes=settings.head_bytes,
    )


def _tracked(request: IndexRequest, layers: tuple[int, ...]) -> Tracked:
    blocks = layers[-1]
    if not all(word.strip() for word in request.modules.split(",")):
        detail = "modules is 'all', or words such as attn, mlp or q_proj, joined by commas: one of them is empty."
        raise Invalid("bad_modules", detail, param="modules")
    tracked = Tracked(blocks, request.modules, request.stride)
    if layers[0] < tracked.shallowest and IndexKind.INFLUENCE in request.kinds:
        detail = (
            f"With stride {request.stride} back from block {blocks} the first tracked block is "
            f"{tracked.shallowest}: no gradient of layer {layers[0]} would be seen. Choose a smaller one."
        )
        raise Invalid("nothing_tracked", detail, param="stride")
    return tracked


def _difference(request: IndexRequest, model: ModelRecord, registry: Registry) -> DifferencePlan:
    """Answers come from the declared base, as in the paper; a model without one answers itself."""
    if request.pooling == Pooling.LAST_PROMPT_TOKEN:
        detail = (
            "Pooled before the answer, every difference is zero. Use another pooling, or leave out 'difference'."
        )
        raise Invalid("no_difference", detail, param="pooling")
    answerer = model if model.base is None else registry.get(MODELS, model.base, param="model")
    answers = replace(request.answers, ends=end_tokens(Path(answerer.path)))
    return DifferencePlan(end_point(answerer), answers, answerer.context_length)


def _lora(model: ModelRecord, wanted: Lora) -> Lora:
    if wanted == Lora.ADAPTER and model.adapter is None:
        detail = f"{model.id!r} is no adapter: there are no LoRA maps to track. Leave 'lora' at merged."
        raise Invalid("not_an_adapter", detail, param="lora")
    return wanted


def _query_sets(names: tuple[str, ...], registry: Registry) -> tuple[str, ...]:
    if not names:
        raise Invalid(
            "query_set_needed",
            "Influence embeddings score ∇f_v(Q): name at least one dataset Q in 'query_sets' "
            "(prompts with answers on which the behaviour shows).",
            param="query_sets",
        )
    for name in names:
        if not registry.get(DATASETS, name, param="query_sets").examples:
            raise Invalid("empty_query_set", f"{name!r} holds no example.", param="query_sets")
    return _unique(names, param="query_sets")


def _unique(values: tuple[T, ...], *, param: str) -> tuple[T, ...]:
    if not values:
        raise Invalid(f"no_{param}", f"Name at least one value in {param!r}.", param=param)
    return tuple(dict.fromkeys(values))


def points_of(model: ModelRecord, wanted: Checkpoints, lora: Lora, registry: Registry) -> tuple[Point, ...]:
    """The run, base first and the model itself last: the declared checkpoints, else base and end. The base has no
    LoRA whose own maps could be tracked.
    """
    end = end_point(model)
    if wanted == Checkpoints.END:
        return (end,)
    points = declared_points(model)
    if lora == Lora.ADAPTER:
        points = [point for point in points if point.adapter is not None]
    if not points and model.base is not None and lora == Lora.MERGED:
        base = registry.get(MODELS, model.base, param="model")
        points = [end_point(base)]
    before = tuple(point for point in points if point.fingerprint != model.fingerprint)
    declared = next((point for point in points if point.fingerprint == model.fingerprint), end)
    return (*before, replace(end, weight=declared.weight))


def declared_points(model: ModelRecord) -> list[Point]:
    """The checkpoints of the model's run, in order."""
    return [_point(model, each) for each in model.checkpoints]


def _point(model: ModelRecord, each: Checkpoint) -> Point:
    name = Path(each.path).name
    if model.adapter is None or each.path == model.path:  # of a LoRA's run, its base may be the first point
        return Point(name, each.path, each.fingerprint, each.weight)
    return Point(name, model.path, each.fingerprint, each.weight, each.path)


def layers_of(model: ModelRecord, layers: tuple[int, ...], *, param: str) -> tuple[int, ...]:
    """Sorted, without repeats; the middle layer when none is named."""
    wanted = tuple(sorted(set(layers))) or ((model.n_layers + 1) // 2,)
    for layer in wanted:
        if not 1 <= layer <= model.n_layers:
            raise Invalid(
                "layer_out_of_range",
                f"Layer {layer} does not exist: model {model.id!r} has layers 1 to {model.n_layers} "
                "(the output of each block).",
                param=param,
                context={"n_layers": model.n_layers},
            )
    return wanted


def reading_of(
    model: ModelRecord, settings: Settings, max_length: int | None, long_examples: LongExamples
) -> Reading:
    most = model.context_length or _DEFAULT_LENGTH
    if max_length is not None and not 2 <= max_length <= most:
        raise Invalid(
            "bad_max_length", f"max_length must lie in 2..{most} for model {model.id!r}.", param="max_length"
        )
    return Reading(
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        max_length=max_length or min(most, _DEFAULT_LENGTH),
        long_examples=long_examples,
        token_budget=settings.token_budget,
        dtype=settings.dtype,
    )
