"""The records and seams that every layer shares.

Frozen dataclasses only: they cross processes (Redis, storage, Ray) and therefore carry data, not
behaviour. JSON in and out goes through ``service/codec.py``; what workers are asked to do stands in
``service/work.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.terms import (
    ConceptFunction,
    IndexKind,
    JobKind,
    JobState,
    LongExamples,
    Lora,
    LossReduction,
    Pooling,
)

# --- what is registered -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One point of a fine-tuning run, used by trajectory attribution; ``weight`` is its learning rate share.

    ``path`` is a folder of whole weights or, in the run of an adapter, of its LoRA.
    """

    path: str
    fingerprint: str
    weight: float = 1.0


@dataclass(frozen=True)
class ModelRecord:
    """A Hugging Face causal LM in a folder. Layers are counted 1..n_layers; ``width`` is d.

    A LoRA has the weights of its base in ``path`` and its own in ``adapter``.
    """

    id: str
    path: str
    fingerprint: str  # sha256 over weight files and config.json, those of an adapter included
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
    adapter: str | None = None
    tokenizer_path: str = ""  # where it is not ``path``


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
    auroc_held_out: float | None  # 5-fold, over the examples it was fitted on; None: it was given, not fitted
    n_positive: int
    n_negative: int
    provenance: Mapping[str, Any]
    sha256: str  # of concept.safetensors
    created_at: str


@dataclass(frozen=True)
class Embedding:
    """Which question an influence embedding answers: f_v on a query set, at one damping."""

    query_set: str
    query_set_fingerprint: str
    pooling: Pooling
    function: ConceptFunction
    damping: float
    points: int = 1  # of the training run that are summed; 1: the end alone
    rank: int | None = None  # rows of R; None: the identity
    directions: str | None = None  # artifact that holds R


@dataclass(frozen=True)
class ArrayInfo:
    """One stored matrix kind of an index: rows of ``dims`` numbers for every example."""

    kind: IndexKind
    layer: int | None  # None for gradient coordinates
    dims: int
    embedding: Embedding | None = None  # of kind ``influence``


@dataclass(frozen=True)
class Point:
    """A point of a training run: a folder of weights, the LoRA on them, and its share of the learning rate."""

    name: str
    path: str
    fingerprint: str
    weight: float = 1.0
    adapter: str | None = None


@dataclass(frozen=True)
class Fidelity:
    """How well stored rows rank examples, against wider coordinates: Spearman over ``queries`` random
    queries on ``examples`` examples. ``held_out``: they took no part in fitting the curvature.
    """

    array: ArrayInfo
    query: str  # concept | loss
    mean: float
    least: float
    queries: int
    examples: int
    held_out: bool
    against: str  # what the wider coordinates were
    query_set: str | None = None  # that the concept queries were about, and how they were asked:
    layer: int | None = None
    function: ConceptFunction | None = None
    damping: float | None = None


@dataclass(frozen=True)
class Counts:
    """Where every line of the source went: ``lines = indexed + duplicates + quarantined``."""

    lines: int
    indexed: int
    duplicates: int
    quarantined: int
    truncated: int  # examples of the index that were cut to the context
    split: int = 0  # those that run in several windows instead


@dataclass(frozen=True)
class DatasetPart:
    """A dataset that was appended to an index: of its examples, those that no part before it holds."""

    dataset: str
    fingerprint: str


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
    points: tuple[Point, ...] = ()  # of the run, as far as embeddings are summed over it
    fidelity: tuple[Fidelity, ...] = ()
    max_length: int | None = None
    long_examples: LongExamples | None = None
    blocks: int | None = None  # gradients are taken of ``modules`` in blocks ``blocks``, ``blocks`` − ``stride``, …
    modules: str | None = None
    stride: int = 1
    lora: Lora = Lora.MERGED
    answerer: str | None = None  # of kind ``difference``: whose answers the examples' are compared with
    appended: tuple[DatasetPart, ...] = ()  # after ``dataset``, in order
    parent: str | None = None  # the version that this one was made from: by appending, deleting, …
    manifest_sha256: str = ""  # set on publishing

    @property
    def id(self) -> str:
        return f"{self.name}@v{self.version}"

    @property
    def datasets(self) -> tuple[str, ...]:
        """Ids of every dataset whose examples are in it, the first one and what was appended."""
        return (self.dataset, *(part.dataset for part in self.appended))


@dataclass(frozen=True)
class AliasRecord:
    """A name that can be pointed at another index version; its ETag is ``revision``, raised at every switch.

    Without an ``index`` it was removed: what is left keeps the count, so that no old ETag fits an alias made anew.
    """

    name: str
    index: str  # id of a published version
    revision: int
    updated_at: str
    previous: str | None = None  # what it pointed at before


@dataclass(frozen=True)
class Rebuilt:
    """What storage holds and Redis has been told of; ``damaged`` names what cannot be read, as ``models/bot``."""

    models: int
    datasets: int
    concepts: int
    indexes: int
    newest: int  # names of indexes, each with its newest version
    aliases: int
    damaged: tuple[str, ...] = ()
    saes: int = 0

    @property
    def records(self) -> int:
        return self.models + self.datasets + self.concepts + self.saes + self.indexes


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


# --- jobs -------------------------------------------------------------------------------------------


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
    tokens_per_s: float | None = None  # where the stage reads or writes texts


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
        tokens: int = 0,
    ) -> None:
        """``resumed`` of ``done`` were there before; ``tokens``: those of what this attempt has done."""
        ...

    def log(self, message: str, **data: Any) -> None: ...

    def check(self) -> None:
        """Raise Cancelled, LeaseLost or Interrupted when the work must stop; call before any publish."""
        ...


class Engine(Protocol):
    """The seam between the dispatcher, which knows jobs, and the workers, which know models."""

    def run(self, job: JobRecord, context: JobContext) -> Mapping[str, Any]: ...
