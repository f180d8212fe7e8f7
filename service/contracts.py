"""The records and seams that every layer shares.

Frozen dataclasses only: they cross processes (Redis, storage, Ray) and therefore carry data, not
behaviour. JSON in and out goes through ``service/codec.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

FORMAT = 1  # of shards and manifests; a change that alters their bytes raises it


class Pooling(StrEnum):
    """Which positions of a layer's output are averaged into a_l(x). Padding and BOS never are."""

    RESPONSE_MEAN = "response_mean"  # the target tokens themselves, no shift
    LAST_PROMPT_TOKEN = "last_prompt_token"  # noqa: S105 (the token before the last assistant turn)
    LAST_TOKEN = "last_token"  # noqa: S105
    ALL_MEAN = "all_mean"


class LossReduction(StrEnum):
    """How the cross-entropy of the target tokens becomes L(z)."""

    MEAN = "mean"
    SUM = "sum"


class LongExamples(StrEnum):
    """What happens to an example beyond ``max_length`` tokens. Always counted, never silent."""

    TRUNCATE_RIGHT = "truncate_right"
    TRUNCATE_LEFT = "truncate_left"
    QUARANTINE = "quarantine"


class IndexKind(StrEnum):
    """What is stored per example (the e_z of DESIGN section 1)."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


class Method(StrEnum):
    """How an example is scored. A positive score always means: training on it pushes toward the query."""

    VECTOR_FILTER = "vector_filter"
    CONCEPT_INFLUENCE = "concept_influence"


class Order(StrEnum):
    MOST = "most"
    LEAST = "least"


class JobKind(StrEnum):
    BUILD_INDEX = "build_index"
    FIT_CONCEPT = "fit_concept"
    CONCEPT_GRADIENT = "concept_gradient"


class JobState(StrEnum):
    QUEUED = "queued"  # in the stream, nobody holds it
    RUNNING = "running"  # a dispatcher holds the lease of the current epoch
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # ``error`` says why
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


# --- what is registered -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One point of a fine-tuning run, used by trajectory attribution; ``weight`` is its learning rate share."""

    path: str
    fingerprint: str
    weight: float = 1.0


@dataclass(frozen=True)
class ModelRecord:
    """A Hugging Face causal LM in a folder. Layers are counted 1..n_layers; ``width`` is d."""

    id: str
    path: str
    fingerprint: str  # sha256 over weight files and config.json
    tokenizer_fingerprint: str  # sha256 over the tokenizer's files, chat template included
    chat_template_sha256: str | None
    architecture: str
    n_layers: int
    width: int
    context_length: int | None
    base: str | None  # id of the model that this one is a fine-tune of
    lineage: str  # fingerprint of the root of the chain of bases; equal = same family of fine-tunes
    checkpoints: tuple[Checkpoint, ...]
    created_at: str


@dataclass(frozen=True)
class DatasetRecord:
    """Examples at rest. ``lines = examples + duplicates + quarantined``, always."""

    id: str
    fingerprint: str  # sha256 over the ordered example ids
    source: str
    lines: int
    examples: int
    duplicates: int
    quarantined: int
    quarantine_reasons: Mapping[str, int]
    files: Mapping[str, str]  # file name → sha256
    created_at: str


@dataclass(frozen=True)
class ConceptRecord:
    """A direction v̂ (unit norm) at the output of block ``layer``."""

    id: str
    model: str
    model_fingerprint: str
    lineage: str
    layer: int
    pooling: Pooling
    width: int
    method: str
    norm: float  # ‖v‖ before it was normalised
    auroc_held_out: float  # 5-fold, over the examples it was fitted on
    n_positive: int
    n_negative: int
    provenance: Mapping[str, Any]
    sha256: str  # of concept.safetensors
    created_at: str


@dataclass(frozen=True)
class ArrayInfo:
    """One stored matrix kind of an index: rows of ``dims`` numbers for every example."""

    kind: IndexKind
    layer: int | None  # None for gradient coordinates
    dims: int


@dataclass(frozen=True)
class Counts:
    """Where every line of the source went: ``lines = indexed + duplicates + quarantined``."""

    lines: int
    indexed: int
    duplicates: int
    quarantined: int
    truncated: int


@dataclass(frozen=True)
class IndexRecord:
    """A published, immutable version of an index."""

    name: str
    version: int
    model: str
    model_fingerprint: str
    lineage: str
    dataset: str
    dataset_fingerprint: str
    pooling: Pooling
    loss_reduction: LossReduction
    arrays: tuple[ArrayInfo, ...]
    counts: Counts
    quarantine_reasons: Mapping[str, int]
    bytes: int
    job: str
    created_at: str
    manifest_sha256: str = ""  # set on publishing

    @property
    def id(self) -> str:
        return f"{self.name}@v{self.version}"


# --- examples ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    text: str


Content = Conversation | Completion | PlainText


@dataclass(frozen=True)
class Place:
    """Where an example stands in its source; lines count from 1."""

    file: str
    line: int


@dataclass(frozen=True)
class Example:
    """``id`` is the sha256 of what is trained on; metadata does not enter it."""

    id: str
    content: Content
    metadata: Mapping[str, Any]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Quarantined:
    """An example that is not stored, and why. ``id`` is missing when the line could not be read."""

    id: str | None
    reason: str
    detail: str
    places: tuple[Place, ...] = ()


# --- work -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationSpec:
    layers: tuple[int, ...]
    pooling: Pooling


@dataclass(frozen=True)
class GradientSpec:
    """Two-sided seeded random projection of each tracked module's gradient to p × p numbers."""

    blocks: int  # modules in blocks 1..blocks are tracked
    p: int = 16
    seed: int = 0
    loss_reduction: LossReduction = LossReduction.MEAN


@dataclass(frozen=True)
class ConceptObjective:
    """Replaces the loss by f_v: its gradient coordinates are the query side of concept influence."""

    concept_sha256: str
    layer: int
    pooling: Pooling
    vector: tuple[float, ...]  # v̂, d numbers


@dataclass(frozen=True)
class PassSpec:
    """Everything except the examples that decides the bytes of a shard. Its hash is part of their name."""

    model_fingerprint: str
    tokenizer_fingerprint: str
    activation: ActivationSpec | None
    gradient: GradientSpec | None
    objective: ConceptObjective | None  # None: the training loss
    max_length: int
    long_examples: LongExamples
    token_budget: int  # padded tokens per batch
    dtype: str  # float32 | bfloat16 | float16
    format: int = FORMAT


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: these examples, this pass, these files."""

    key: str  # sha256 over PassSpec and example ids
    number: int
    model_path: str
    spec: PassSpec
    dataset: DatasetRecord
    start: int  # rows [start, stop) of the dataset's examples
    stop: int


@dataclass(frozen=True)
class ShardArray:
    """A stored matrix. With ``exponents``: float16 rows and one power of two per row (``service/rows.py``);
    without: float32 rows, for the query side, which is small and must not be rounded.
    """

    kind: IndexKind
    layer: int | None
    dims: int
    file: str
    exponents: str | None


@dataclass(frozen=True)
class ShardManifest:
    """Written last: a shard exists when its manifest does."""

    key: str
    spec: PassSpec
    ids: tuple[str, ...]  # of the stored rows, in order
    quarantined: tuple[Quarantined, ...]
    truncated: int
    tokens: int
    arrays: tuple[ShardArray, ...]
    files: Mapping[str, str]  # file name → sha256
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ShardRef:
    """How an index manifest names a shard; ``sha256`` is of the shard's manifest."""

    key: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class IndexManifest:
    """Decided by the inputs alone, so that two builds of the same thing agree byte for byte."""

    name: str
    version: int
    model: str
    model_fingerprint: str
    lineage: str
    dataset: str
    dataset_fingerprint: str
    chat_template_sha256: str | None
    spec: PassSpec
    arrays: tuple[ArrayInfo, ...]
    shards: tuple[ShardRef, ...]
    counts: Counts
    quarantine_reasons: Mapping[str, int]
    format: int = FORMAT


# --- job specifications -----------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildIndexSpec:
    name: str
    version: int
    model: str
    dataset: str
    pass_spec: PassSpec
    shard_size: int


@dataclass(frozen=True)
class FitConceptSpec:
    id: str
    model: str
    positive: str  # dataset id
    negative: str
    pass_spec: PassSpec  # activation only, one layer
    shard_size: int


@dataclass(frozen=True)
class ConceptGradientSpec:
    """Coordinates of −∇f_v(Q) in the basis of an index's gradient kind."""

    key: str
    index: str
    model: str
    concept: str
    query_set: str
    pass_spec: PassSpec
    shard_size: int


JobSpec = BuildIndexSpec | FitConceptSpec | ConceptGradientSpec


@dataclass(frozen=True)
class Progress:
    """How far a running job is. ``rate`` and ``eta_s`` count only what this attempt has done itself."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float | None = None
    eta_s: float | None = None
    quarantined: int = 0


@dataclass(frozen=True)
class JobRecord:
    id: str
    kind: JobKind
    spec: Mapping[str, Any]
    state: JobState
    epoch: int  # raised at every claim; a write with an older one is refused
    attempts: int
    created_at: str
    updated_at: str
    started_at: str | None = None
    finished_at: str | None = None
    cancel_requested: bool = False
    progress: Progress | None = None
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class JobEvent:
    cursor: str
    at: str
    type: str  # state | progress | log
    data: Mapping[str, Any] = field(default_factory=dict)


class JobContext(Protocol):
    """What an engine may say while it works. Every call fails once the job is not ours any more."""

    def progress(
        self,
        stage: str,
        done: int,
        total: int,
        *,
        unit: str = "examples",
        resumed: int = 0,
        quarantined: int = 0,
    ) -> None: ...

    def log(self, message: str, **data: Any) -> None: ...

    def check(self) -> None:
        """Raise Cancelled, LeaseLost or Interrupted when the work must stop; call before any publish."""
        ...


class Engine(Protocol):
    """The seam between the dispatcher, which knows jobs, and the workers, which know models."""

    def run(self, job: JobRecord, context: JobContext) -> Mapping[str, Any]: ...
