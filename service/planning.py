"""From what a user asks to a job specification, checked against the model and data it names.

Whatever can be refused without loading a model is refused here, before a job exists.
"""

from dataclasses import dataclass

from redis import Redis

from service import indexes
from service.contracts import (
    ActivationSpec,
    BuildIndexSpec,
    FitConceptSpec,
    GradientSpec,
    IndexKind,
    LongExamples,
    LossReduction,
    ModelRecord,
    PassSpec,
    Pooling,
)
from service.errors import Conflict, Invalid
from service.registry import CONCEPTS, DATASETS, MODELS, Registry, check_id
from service.settings import Settings

_DEFAULT_LENGTH = 2048  # when the model's configuration names no context length
_MOST_P = 256
FEWEST_EXAMPLES = 5  # a side of a concept, one per held-out fold


@dataclass(frozen=True)
class IndexRequest:
    name: str
    model: str
    dataset: str
    kinds: tuple[IndexKind, ...]
    layers: tuple[int, ...]
    pooling: Pooling
    loss_reduction: LossReduction
    projection_dim: int
    seed: int
    max_length: int | None
    long_examples: LongExamples


def plan_index(request: IndexRequest, registry: Registry, redis: Redis, settings: Settings) -> BuildIndexSpec:
    """The build of a new version. Raises NotFound or Invalid naming the field."""
    check_id(request.name, param="name")
    model = registry.get(MODELS, request.model, param="model")
    registry.get(DATASETS, request.dataset, param="dataset")
    layers = _layers(model, request.layers, param="layers")
    if not 1 <= request.projection_dim <= _MOST_P:
        raise Invalid("bad_projection_dim", f"projection_dim must lie in 1..{_MOST_P}.", param="projection_dim")
    kinds = set(request.kinds)
    if not kinds:
        raise Invalid("no_kinds", "Name at least one kind to build.", param="kinds")
    gradient = GradientSpec(max(layers), request.projection_dim, request.seed, request.loss_reduction)
    spec = _pass_spec(
        model,
        settings,
        activation=ActivationSpec(layers, request.pooling) if IndexKind.ACTIVATION in kinds else None,
        gradient=gradient if IndexKind.GRADIENT in kinds else None,
        max_length=request.max_length,
        long_examples=request.long_examples,
    )
    version = indexes.next_version(redis, registry, request.name)
    return BuildIndexSpec(request.name, version, model.id, request.dataset, spec, settings.shard_size)


@dataclass(frozen=True)
class ConceptRequest:
    id: str
    model: str
    positive: str
    negative: str
    layer: int
    pooling: Pooling
    max_length: int | None


def plan_concept(request: ConceptRequest, registry: Registry, settings: Settings) -> FitConceptSpec:
    """The fit of a new concept. Raises NotFound, Invalid or Conflict naming the field."""
    check_id(request.id, param="id")
    if registry.find(CONCEPTS, request.id) is not None:
        raise Conflict(
            "concept_exists", f"There is a concept {request.id!r} already. Choose another id.", param="id"
        )
    model = registry.get(MODELS, request.model, param="model")
    sides = {side: registry.get(DATASETS, getattr(request, side), param=side) for side in ("positive", "negative")}
    for side, dataset in sides.items():
        if dataset.examples < FEWEST_EXAMPLES:
            detail = f"{dataset.id!r} holds {dataset.examples} examples; {FEWEST_EXAMPLES} are least, 100 are good."
            raise Invalid("too_few_examples", detail, param=side)
    if sides["positive"].fingerprint == sides["negative"].fingerprint:
        detail = "Both sides are the same examples: there is no direction between them."
        raise Invalid("identical_sides", detail, param="negative")
    (layer,) = _layers(model, (request.layer,), param="layer")
    spec = _pass_spec(
        model,
        settings,
        activation=ActivationSpec((layer,), request.pooling),
        gradient=None,
        max_length=request.max_length,
        long_examples=LongExamples.TRUNCATE_RIGHT,
    )
    return FitConceptSpec(request.id, model.id, request.positive, request.negative, spec, settings.shard_size)


def _layers(model: ModelRecord, layers: tuple[int, ...], *, param: str) -> tuple[int, ...]:
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


def _pass_spec(
    model: ModelRecord,
    settings: Settings,
    *,
    activation: ActivationSpec | None,
    gradient: GradientSpec | None,
    max_length: int | None,
    long_examples: LongExamples,
) -> PassSpec:
    most = model.context_length or _DEFAULT_LENGTH
    if max_length is not None and not 2 <= max_length <= most:
        raise Invalid(
            "bad_max_length", f"max_length must lie in 2..{most} for model {model.id!r}.", param="max_length"
        )
    return PassSpec(
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        activation=activation,
        gradient=gradient,
        objective=None,
        max_length=max_length or min(most, _DEFAULT_LENGTH),
        long_examples=long_examples,
        token_budget=settings.token_budget,
        dtype=settings.dtype,
    )
