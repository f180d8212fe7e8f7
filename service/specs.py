"""Job specifications, and the manifest that a build publishes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.contracts import ArrayInfo, Counts, DatasetPart, Fidelity, Point
from service.health_records import HealthSpec
from service.personas import PersonaSpec
from service.sae_records import EncodeFeaturesSpec, TrainSaeSpec
from service.tasks import ShardRef
from service.terms import ConceptFunction, IndexKind, JobKind, LossReduction, Method, Pooling, ProbeMethod
from service.validation_spec import ValidateSpec
from service.work import FORMAT, AnswersSpec, CurvatureSpec, PassSpec, Rademacher, Reading, Tracked

MOST_IDS = 100_000  # deleted by one request
ROWS_PER_SHARD = 65_536  # of a compacted index
MOST_CLUSTERS = 256
MOST_TERMS = 64  # concepts of one recipe


@dataclass(frozen=True)
class GradientPlan:
    """``projection`` None: EK-FAC eigenvectors. ``coordinates``: k of an eigen index."""

    coordinates: int
    projection: Rademacher | None


@dataclass(frozen=True)
class InfluencePlan:
    """One embedding for every query set × layer × function × damping."""

    query_sets: tuple[str, ...]  # dataset ids
    layers: tuple[int, ...]
    pooling: Pooling
    functions: tuple[ConceptFunction, ...]
    dampings: tuple[float, ...]
    coordinates: int | None  # K; None: as many as ``head_bytes`` allows
    rank: int | None  # rows of R; None: the identity
    directions: tuple[str, ...]  # concept ids that R spans first
    head_bytes: int


@dataclass(frozen=True)
class DifferencePlan:
    """Whose answers y' are: the base's, or the model's own where it declares none."""

    answerer: Point
    answers: AnswersSpec
    context_length: int | None  # of the answerer


@dataclass(frozen=True)
class BuildIndexSpec:
    name: str
    version: int
    model: str
    dataset: str
    reading: Reading  # of the model itself; its checkpoints differ in their fingerprint only
    points: tuple[Point, ...]  # of the run, the model itself last; more than one for ``influence`` only
    tracked: Tracked
    p: int | None  # eigenvectors per side; None: all
    layers: tuple[int, ...]
    pooling: Pooling
    loss_reduction: LossReduction
    activation: bool
    gradient: GradientPlan | None
    influence: InfluencePlan | None
    curvature: CurvatureSpec
    curvature_bytes: int  # of the factors that a worker holds at a time
    shard_size: int
    difference: DifferencePlan | None = None


@dataclass(frozen=True)
class EstimateSpec:
    """What would the build cost? Its version is not taken."""

    build: BuildIndexSpec


@dataclass(frozen=True)
class ExtendIndexSpec:
    """A new version of a ``gradient`` index with embeddings for more query sets or layers."""

    name: str
    version: int
    source: str  # index id
    model: str
    influence: InfluencePlan
    shard_size: int


@dataclass(frozen=True)
class AppendIndexSpec:
    """A new version with the examples of one more dataset; ``reference`` is resolved when the job runs."""

    reference: str
    dataset: str
    shard_size: int


@dataclass(frozen=True)
class DeleteExamplesSpec:
    """A new version without some examples: those of the artifact ``ids``, or those that ``filter`` keeps."""

    reference: str
    ids: str | None
    filter: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CompactIndexSpec:
    """A new version with the same rows in few large shards."""

    reference: str
    rows_per_shard: int


@dataclass(frozen=True)
class Labels:
    """Which examples of one dataset are positive and which negative, by a field of their metadata."""

    field: str
    positive: tuple[bool | int | float | str, ...]
    negative: tuple[bool | int | float | str, ...] | None  # None: every other value


@dataclass(frozen=True)
class FitConceptSpec:
    id: str
    model: str
    positive: str  # dataset id
    negative: str  # with ``labels`` the same
    pass_spec: PassSpec  # activation only; of several layers the best is chosen
    shard_size: int
    method: ProbeMethod = ProbeMethod.DIFFERENCE_OF_MEANS
    compare: tuple[ProbeMethod, ...] = ()  # whose directions it is compared with
    labels: Labels | None = None


@dataclass(frozen=True)
class QueryGradientSpec:
    """Coordinates of −∇f_v(Q) or ∇L(Q) in the basis of an index's gradient kind."""

    key: str
    index: str
    model: str
    query_set: str
    pass_spec: PassSpec  # with its objective
    shard_size: int


@dataclass(frozen=True)
class TokenSharesSpec:
    """What every token of some examples adds to their score, asked like a query."""

    key: str
    index: str
    method: Method
    concept: str | None
    query_set: str | None
    function: ConceptFunction
    damping: float | None
    through: IndexKind | None
    examples: tuple[str, ...]
    shard_size: int


@dataclass(frozen=True)
class VerifySpec:
    """Is every file that a version needs what it was?"""

    index: str  # id of a version


@dataclass(frozen=True)
class RepairSpec:
    """Make what is damaged of a version again, and compare."""

    index: str  # id of a version


@dataclass(frozen=True)
class DirectionsSpec:
    """The top singular directions of one influence embedding."""

    key: str
    index: str
    array: ArrayInfo
    count: int
    seed: int


@dataclass(frozen=True)
class SuggestSpec:
    """The activations of a few labelled examples, which candidates are compared on."""

    key: str
    model: str
    positive: str  # dataset id
    negative: str
    pass_spec: PassSpec  # activation only
    shard_size: int


@dataclass(frozen=True)
class ClustersSpec:
    """The centres of ``count`` clusters of one influence embedding."""

    key: str
    index: str
    array: ArrayInfo
    count: int
    seed: int


@dataclass(frozen=True)
class RerankSpec:
    """Exact EK-FAC scores of some examples of an index, for the question that ``array`` answers."""

    key: str
    index: str
    array: ArrayInfo  # whose approximate scores chose them
    candidates: str  # artifact with their ids
    query_set: str
    damping: float
    direction: str | None  # artifact that holds v̂ as one row; None: the loss on the query set
    layer: int | None
    pooling: Pooling | None
    function: ConceptFunction
    curvature_bytes: int
    shard_size: int


JobSpec = (
    BuildIndexSpec
    | EstimateSpec
    | ExtendIndexSpec
    | AppendIndexSpec
    | DeleteExamplesSpec
    | CompactIndexSpec
    | FitConceptSpec
    | QueryGradientSpec
    | TokenSharesSpec
    | VerifySpec
    | RepairSpec
    | DirectionsSpec
    | ClustersSpec
    | SuggestSpec
    | RerankSpec
    | PersonaSpec
    | ValidateSpec
    | TrainSaeSpec
    | HealthSpec
    | EncodeFeaturesSpec
)


# --- what a build publishes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Arrays that lie together in one list of shards, cut at the same examples in every section."""

    arrays: tuple[ArrayInfo, ...]
    shards: tuple[ShardRef, ...]


@dataclass(frozen=True)
class CachedJacobian:
    """J(Q, l) in the coordinates of the gradient kind."""

    query_set_fingerprint: str
    layer: int
    pooling: Pooling
    function: ConceptFunction
    artifact: str
    directions: str | None  # artifact that holds R; None: the identity


@dataclass(frozen=True)
class Built:
    """``build.json``: who built a version and when, and the job that would build it again."""

    job: str
    created_at: str
    versions: Mapping[str, str]
    kind: JobKind
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class IndexManifest:
    """Decided by the inputs alone, so that two builds of the same thing agree byte for byte.

    An example is indexed when every section has it.
    """

    name: str
    version: int
    model: str
    model_fingerprint: str
    lineage: str
    dataset: str
    dataset_fingerprint: str
    chat_template_sha256: str | None
    spec: PassSpec  # of the pass over the model itself
    points: tuple[Point, ...]
    curvature: CurvatureSpec | None  # None: no kind of this index needs one
    sections: tuple[Section, ...]
    counts: Counts
    quarantine_reasons: Mapping[str, int]
    jacobians: tuple[CachedJacobian, ...] = ()
    fidelity: tuple[Fidelity, ...] = ()
    p: int | None = None  # eigenvectors per side that were kept; None: all
    difference: DifferencePlan | None = None
    tracked: Tracked | None = None  # where gradients stand behind a kind
    appended: tuple[DatasetPart, ...] = ()
    parent: str | None = None  # id of the version that this one was made from
    deleted: str | None = None  # artifact with the ids that were taken out: their rows are there, and never ranked
    format: int = FORMAT

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        return tuple(array for section in self.sections for array in section.arrays)
