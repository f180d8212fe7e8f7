"""What workers are asked to do: a *work* is everything that decides its result except the examples."""

from dataclasses import dataclass

from service.contracts import ArrayInfo
from service.reading import Reading
from service.sae_records import TrainSaeWork
from service.terms import ConceptFunction, FactorLabels, FactorPositions, LossReduction, Pooling

FORMAT = 5  # of shards and artifacts; a change that alters their bytes raises it


@dataclass(frozen=True)
class Location:
    """Where a Reading's weights and tokenizer lie: not part of any key, the fingerprints are."""

    model_path: str
    tokenizer_path: str
    adapter: str | None = None  # folder of a LoRA on those weights


# --- a pass over examples: rows ---------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationSpec:
    layers: tuple[int, ...]
    pooling: Pooling


@dataclass(frozen=True)
class Tracked:
    """Which linear maps gradients are taken of: those in blocks ``blocks``, ``blocks`` − ``stride``, … whose name
    inside the block contains one of ``modules``: all, or words joined by commas; attn and mlp mean sublayers.
    """

    blocks: int
    modules: str = "all"
    stride: int = 1

    @property
    def shallowest(self) -> int:
        """The first block with a tracked map: f_v at a layer before it has no gradient here."""
        return (self.blocks - 1) % self.stride + 1


@dataclass(frozen=True)
class Rademacher:
    """Two-sided seeded random signs, p × p numbers per module: the baseline."""

    p: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Eigen:
    """EK-FAC eigenvectors; ``basis`` names the artifact that says which coordinates are kept."""

    curvature: str
    basis: str


@dataclass(frozen=True)
class GradientSpec:
    """Coordinates of ∇L(z) over the tracked modules."""

    tracked: Tracked
    projection: Rademacher | Eigen = Rademacher()
    loss_reduction: LossReduction = LossReduction.MEAN


@dataclass(frozen=True)
class Head:
    """One influence embedding: ``artifact`` holds −R J H⁻¹ in the chosen coordinates."""

    array: ArrayInfo
    artifact: str


@dataclass(frozen=True)
class InfluenceSpec:
    """m_z for every head, read off the coordinates of ∇L(z)."""

    curvature: str
    heads: tuple[Head, ...]
    loss_reduction: LossReduction = LossReduction.MEAN


@dataclass(frozen=True)
class ConceptObjective:
    """Replaces the loss by f_v: its gradient coordinates are the query side of concept influence."""

    concept_sha256: str
    layer: int
    pooling: Pooling
    vector: tuple[float, ...]  # v̂, d numbers
    function: ConceptFunction = ConceptFunction.DOT


@dataclass(frozen=True)
class LossObjective:
    """The loss itself, for a query set: coordinates are kept in float32 and may be zero."""

    loss: str = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class PassSpec(Reading):
    """One forward and at most one backward over examples, and all rows that are read off them."""

    activation: ActivationSpec | None
    gradient: GradientSpec | None
    objective: ConceptObjective | LossObjective | None  # None: training examples
    influence: InfluenceSpec | None = None
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class DifferenceSpec(Reading):
    """a_l(x, y) − a_l(x, y'): y the last answer of the example, y' that of the artifacts ``answers``, in order."""

    layers: tuple[int, ...]
    pooling: Pooling
    answers: tuple[str, ...]
    ends: tuple[int, ...] = ()  # y ends with the first of them, as y' does
    format: int = FORMAT


@dataclass(frozen=True)
class SumSpec:
    """Embeddings summed over the checkpoints of a run: the weighted sum of the same arrays of other shards."""

    sources: tuple[tuple[str, float], ...]  # shard key, weight
    arrays: tuple[ArrayInfo, ...]
    format: int = FORMAT


@dataclass(frozen=True)
class ReadOffSpec:
    """Embeddings from stored gradient coordinates: no model, no training data."""

    source: str  # shard key
    basis: str
    jacobian: str  # J in the coordinates of the basis
    array: ArrayInfo
    format: int = FORMAT


@dataclass(frozen=True)
class CompactSpec:
    """Stored rows of other shards in one, bit for bit, without those of the ids in the artifact ``deleted``."""

    sources: tuple[str, ...]  # shard keys, in order
    arrays: tuple[ArrayInfo, ...]
    deleted: str | None
    format: int = FORMAT


# --- artifacts: what passes need first ----------------------------------------------------------------


@dataclass(frozen=True)
class AnswersSpec:
    """How a model answers prompts itself. Temperature 0 is greedy."""

    temperature: float = 1.0
    max_new_tokens: int = 1000
    seed: int = 0
    ends: tuple[int, ...] = ()  # tokens that end an answer, besides the tokenizer's own


@dataclass(frozen=True)
class AnswersWork:
    """The model's own answers to the prompts of some examples."""

    reading: Reading
    spec: AnswersSpec


@dataclass(frozen=True)
class ElicitWork:
    """Answers to questions under system prompts; every sample of one is another answer."""

    reading: Reading
    spec: AnswersSpec
    prompts: tuple[tuple[str, str, int], ...]  # system prompt, question, number of the sample
    in_question: bool  # the system prompt stands in the user's turn


@dataclass(frozen=True)
class ResponsesWork:
    """a_l of those answers, each under its own system prompt, averaged over the answer's tokens."""

    elicit: ElicitWork
    answers: str  # artifact
    layers: tuple[int, ...]

    @property
    def reading(self) -> Reading:
        return self.elicit.reading


@dataclass(frozen=True)
class CurvatureSpec:
    """How EK-FAC is fitted: on ``examples`` examples drawn by ``seed``, the summed loss."""

    examples: int = 4096
    seed: int = 0
    labels: FactorLabels = FactorLabels.SAMPLED
    positions: FactorPositions = FactorPositions.TARGETS


@dataclass(frozen=True)
class ShapesWork:
    """(d_out, d_in) of every tracked module: what memory and disk will be needed follows from them."""

    reading: Reading
    tracked: Tracked


@dataclass(frozen=True)
class CovarianceWork:
    """Σ a aᵀ and Σ g gᵀ of ``modules`` over some of the sample."""

    reading: Reading
    tracked: Tracked
    spec: CurvatureSpec
    modules: tuple[str, ...]


@dataclass(frozen=True)
class EigenWork:
    """Eigenvectors of one module, all of them, from the summed covariances."""

    parts: tuple[str, ...]
    module: str


@dataclass(frozen=True)
class MomentWork:
    """Σ C² of some modules over some of the sample, in the eigenbases."""

    reading: Reading
    tracked: Tracked
    spec: CurvatureSpec
    bases: tuple[tuple[str, str], ...]  # module, artifact of its eigenvectors


@dataclass(frozen=True)
class LambdaWork:
    """λ of one module from the summed moments."""

    parts: tuple[str, ...]
    module: str


@dataclass(frozen=True)
class ScoutWork:
    """How much each eigenvector of some modules matters to f_v on a query set, from J along a few random
    directions.
    """

    reading: Reading
    curvature: str
    modules: tuple[str, ...]  # in blocks up to the layer: as many as fit into memory with all their eigenvectors
    layer: int
    pooling: Pooling
    function: ConceptFunction
    damping: float


@dataclass(frozen=True)
class NarrowWork:
    """One module of a curvature with p eigenvectors per side: those that scouts found to matter, or the top.

    ``scouts``: for every question those of all its groups of modules.
    """

    curvature: str
    module: str
    p: int
    scouts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class JacobianWork:
    """Rows start … stop − 1 of J, or of D·J for given directions D, averaged over the query set."""

    reading: Reading
    curvature: str
    layer: int
    pooling: Pooling
    function: ConceptFunction
    directions: str | None  # artifact; None: the identity
    start: int
    stop: int


@dataclass(frozen=True)
class PooledWork:
    """What f_v is linear in, a row for every example: pooled h_l, or pooled h_l/‖h_l‖."""

    reading: Reading
    layer: int
    pooling: Pooling
    function: ConceptFunction


@dataclass(frozen=True)
class MixWork:
    """D·J from the rows of J and stored directions D: f_v is linear in v, so no model runs."""

    rows: tuple[str, ...]
    directions: str


@dataclass(frozen=True)
class LossRowsWork:
    """Coordinates of ∇L of single examples, one row each, or of their mean: loss queries, nothing left out."""

    reading: Reading
    curvature: str
    loss_reduction: LossReduction
    mean: bool = False


@dataclass(frozen=True)
class BasisWork:
    """Which coordinates a gradient index keeps: by λ; where query sets are known, half by J, half by ∇L(Q)."""

    curvature: str
    coordinates: int
    damping: float
    jacobians: tuple[tuple[str, ...], ...] = ()  # blocks of rows, for each query set
    losses: tuple[str, ...] = ()  # mean loss gradients, for each query set


@dataclass(frozen=True)
class HeadWork:
    """``sign`` · rows · H⁻¹ in the K coordinates that matter most: what turns coordinates into embeddings."""

    curvature: str
    rows: tuple[str, ...]  # blocks of rows of J (sign −1) or of loss gradients (sign +1)
    damping: float
    coordinates: int | None  # None: all
    sign: int = -1


@dataclass(frozen=True)
class GatherWork:
    """J in the coordinates of a gradient index: with it any v is answered at once."""

    basis: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class TokenSharesWork:
    """What tokens of some examples add to ``weight`` · ⟨u, row⟩, for rows of ``array`` in the pass ``spec``."""

    spec: PassSpec
    array: ArrayInfo
    vector: str  # artifact that holds u
    weight: float = 1.0  # of the point of the run

    @property
    def reading(self) -> Reading:
        return self.spec.reading


ArtifactWork = (
    TokenSharesWork
    | AnswersWork
    | ElicitWork
    | ResponsesWork
    | ShapesWork
    | CovarianceWork
    | EigenWork
    | MomentWork
    | LambdaWork
    | ScoutWork
    | NarrowWork
    | JacobianWork
    | MixWork
    | LossRowsWork
    | BasisWork
    | HeadWork
    | TrainSaeWork
    | PooledWork
    | GatherWork
)
ShardWork = PassSpec | DifferenceSpec | SumSpec | ReadOffSpec | CompactSpec
Work = ShardWork | ArtifactWork
