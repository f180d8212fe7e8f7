"""What is registered of sparse autoencoders, and the jobs about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from service.contracts import ArrayInfo
from service.terms import Pooling

MOST_FEATURES = 1000  # that groups are made of in one answer


@dataclass(frozen=True)
class SaeRecipe:
    """How a TopK SAE is trained (Gao et al. 2024, arXiv 2406.04093)."""

    features: int
    k: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    auxiliary: float  # weight of the loss by which dead features learn what the others leave
    held_out: float  # share of the rows
    most_rows: int  # more are sampled, by the seed


@dataclass(frozen=True)
class SaeTraining:
    """What came of it. Figures are of the held-out rows but for ``dead``, which is of those trained on.

    ``scale``: what rows were multiplied with while it was trained; the published weights are those for raw rows.
    """

    index: str
    recipe: SaeRecipe
    rows: int
    rows_held_out: int
    scale: float
    explained_variance: float
    l0: float  # features that fire on a row, on average
    dead: float  # share of features that fire on no row
    seconds: float


@dataclass(frozen=True)
class SaeRecord:
    """An SAE at the output of block ``layer`` of a model, stored in SAELens' format; ``sha256`` is of it all."""

    id: str
    model: str
    model_fingerprint: str
    lineage: str
    layer: int
    width: int
    features: int
    architecture: str
    k: int | None
    pooling: Pooling | None  # of the rows that it was trained on; None: single positions of texts
    hook_name: str
    normalisation: str
    centred: bool
    source: str
    training: SaeTraining | None  # None: it was imported
    notes: tuple[str, ...]
    files: Mapping[str, str]  # file name → sha256
    sha256: str
    created_at: str


@dataclass(frozen=True)
class Label:
    """What somebody says that a feature means."""

    feature: int
    text: str
    author: str | None
    at: str


@dataclass(frozen=True)
class Labels:
    """All of an SAE, oldest first; of several about one feature the last is shown."""

    labels: tuple[Label, ...] = ()

    def of(self, feature: int) -> str | None:
        """The newest label of a feature."""
        return self._newest.get(feature)

    @cached_property
    def _newest(self) -> Mapping[int, str]:
        return {each.feature: each.text for each in self.labels}


# --- jobs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSaeSpec:
    """A new SAE on the stored activations of an index."""

    id: str
    index: str  # id of a version
    array: ArrayInfo
    recipe: SaeRecipe


@dataclass(frozen=True)
class EncodeFeaturesSpec:
    """Which features of an SAE fire on the stored activations of an index."""

    key: str
    index: str
    array: ArrayInfo
    sae: str


@dataclass(frozen=True)
class TrainSaeWork:
    """Steps ``start`` to ``stop`` of a training, from the state that ended before them.

    The rows are those of ``array`` in the index whose manifest has that hash.
    """

    index: str
    manifest_sha256: str
    array: ArrayInfo
    recipe: SaeRecipe
    start: int
    stop: int
    state: str | None  # artifact; None: the beginning
