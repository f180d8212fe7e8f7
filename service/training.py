"""What workers are asked when they train a model again: the recipe, the examples, and what is measured afterwards.

Model state is never kept. What is, answers more than was asked: the mean states of the query set at every layer, by
both concept functions, so that another concept on the same query set needs no training.
"""

from dataclasses import dataclass
from enum import StrEnum

from service.contracts import DatasetRecord
from service.terms import LossReduction, Pooling
from service.work import AnswersSpec, Reading

FULL_RATE, LORA_RATE = 2e-5, 1e-4  # learning rates where none is given


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"  # down to 0 at the last step
    LINEAR = "linear"


@dataclass(frozen=True)
class LoraRecipe:
    """``targets``: words in the names of linear maps, as peft takes them; none: all linear maps of the blocks."""

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """AdamW. ``warmup`` is a share of the steps; ``clip`` the largest norm of a step's gradient; None: any."""

    learning_rate: float
    epochs: int = 1
    batch_size: int = 16
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.05
    clip: float | None = 1.0
    weight_decay: float = 0.0
    loss_reduction: LossReduction = LossReduction.MEAN  # average over examples, or over tokens
    lora: LoraRecipe | None = None  # None: all weights are trained
    autocast: bool = False  # matrix products in bfloat16, beside weights in float32


@dataclass(frozen=True)
class Source:
    """Some examples of a dataset."""

    dataset: DatasetRecord
    rows: tuple[int, ...]


@dataclass(frozen=True)
class RetrainWork:
    """Train the weights of ``reading`` on ``data``; measure on the query set, and have its prompts answered."""

    reading: Reading
    recipe: Recipe
    seed: int  # of the order of examples, of dropout and of a LoRA's start
    data: tuple[Source, ...]
    query_set: DatasetRecord
    pooling: Pooling
    answers: AnswersSpec | None = None


@dataclass(frozen=True)
class ReadAnswersWork:
    """How far along a direction the answers of a run's model lie, read by the model of ``reading``."""

    reading: Reading
    run: str
    layer: int
    pooling: Pooling
    direction: str  # artifact with v̂ as one row
