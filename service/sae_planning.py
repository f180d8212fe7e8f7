"""What training an SAE takes, checked before there is a job."""

from dataclasses import dataclass

from service import indexes
from service.errors import Conflict, Invalid
from service.registry import SAES, Registry, check_id
from service.sae_records import SaeRecipe, TrainSaeSpec
from service.terms import IndexKind

MOST_NUMBERS = 1 << 27  # of a decoder: six of its size are held, and stored ten times while it is trained

_ROWS_PER_FEATURE = 20
_MOST_K = 32  # as Gao et al. have it


@dataclass(frozen=True)
class TrainSaeRequest:
    """``features``, ``k``, ``batch``, ``steps`` and ``learning_rate`` None: by the size of what there is."""

    id: str
    index: str
    layer: int | None
    features: int | None
    k: int | None
    steps: int | None
    batch: int | None
    learning_rate: float | None
    seed: int
    auxiliary: float
    held_out: float
    most_rows: int


def plan_training(request: TrainSaeRequest, registry: Registry) -> TrainSaeSpec:
    """The job of a new SAE. Raises NotFound, Conflict or Invalid naming the field."""
    check_id(request.id, param="id")
    if registry.find(SAES, request.id) is not None:
        raise Conflict("sae_exists", f"There is an SAE {request.id!r} already. Choose another id.", param="id")
    index = indexes.resolve(registry, request.index)
    held = [array for array in index.arrays if array.kind == IndexKind.ACTIVATION]
    layers = [array.layer for array in held]
    if not held:
        detail = f"Index {index.id} holds no activations; build it with kind 'activation'."
        raise Invalid("kind_not_indexed", detail, param="index")
    if request.layer is None and len(held) > 1:
        detail = f"Index {index.id} has activations at layers {layers}: name one in 'layer'."
        raise Invalid("layer_needed", detail, param="layer", context={"layers": layers})
    array = next((array for array in held if request.layer in {None, array.layer}), None)
    if array is None:
        detail = f"Index {index.id} has activations at layers {layers}, not at {request.layer}."
        raise Invalid("layer_not_indexed", detail, param="layer", context={"layers": layers})
    rows = min(index.counts.indexed, request.most_rows)
    features = request.features or default_features(rows, array.dims)
    if features * array.dims > MOST_NUMBERS:
        detail = f"{features} features of width {array.dims} are too many: {MOST_NUMBERS // array.dims} at most."
        raise Invalid("too_many_features", detail, param="features")
    k = request.k or max(1, min(_MOST_K, features // 3))
    if k > features:
        raise Invalid("bad_k", f"k is {k}, and there are {features} features.", param="k")
    batch = request.batch or max(16, min(1024, rows // 4))
    recipe = SaeRecipe(
        features=features,
        k=k,
        steps=request.steps or default_steps(rows, batch),
        batch=batch,
        learning_rate=request.learning_rate or default_learning_rate(features),
        seed=request.seed,
        auxiliary=request.auxiliary,
        held_out=request.held_out,
        most_rows=request.most_rows,
    )
    return TrainSaeSpec(request.id, index.id, array, recipe)


def default_features(rows: int, width: int) -> int:
    """One for every twenty rows, 8 at least and 8 for each dimension at most: with more, what one feature could say
    is split over several (docs/decisions/0019).
    """
    return min(max(8, min(rows // _ROWS_PER_FEATURE, 8 * width)), MOST_NUMBERS // width)


def default_learning_rate(features: int) -> float:
    """2e-4 at 16,384 features and as 1/√features, at most 0.01: the scaling of Gao et al. (Figure 3), as
    EleutherAI's sparsify sets it.
    """
    return min(0.01, 2e-4 * (16_384 / features) ** 0.5)


def default_steps(rows: int, batch: int) -> int:
    """Twenty passes over the rows, but no fewer than 2,000 steps."""
    return max(2000, 20 * rows // batch)
