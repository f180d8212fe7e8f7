"""The field's terms: every choice a user or a record can name."""

from enum import StrEnum


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


class ConceptFunction(StrEnum):
    """f_v: the mean over pooled positions of ⟨v̂, h⟩, or of ⟨v̂, h⟩/‖h‖. Both are linear in v."""

    DOT = "dot"
    COSINE = "cosine"


class FactorLabels(StrEnum):
    """Whose labels the curvature's gradients have: the model's own (the Fisher), or the data's (empirical)."""

    SAMPLED = "sampled"
    TRUE = "true"


class FactorPositions(StrEnum):
    """Where the curvature's loss is: at every token that follows another, or at the training targets."""

    ALL = "all"
    TARGETS = "targets"


class LongExamples(StrEnum):
    """What happens to an example beyond ``max_length`` tokens. Always counted, never silent."""

    TRUNCATE_RIGHT = "truncate_right"
    TRUNCATE_LEFT = "truncate_left"
    SPLIT_AND_SUM = "split_and_sum"  # windows that see only themselves; their gradients add up to one row
    QUARANTINE = "quarantine"


class Lora(StrEnum):
    """How an adapter is attributed to. Without one there is no difference."""

    MERGED = "merged"  # added to the weights, which are tracked
    ADAPTER = "adapter"  # its own two maps are tracked: what training really moved


class IndexKind(StrEnum):
    """What is stored per example (the e_z of DESIGN section 1)."""

    ACTIVATION = "activation"
    DIFFERENCE = "difference"  # to the activations of the base model's own answer
    GRADIENT = "gradient"
    INFLUENCE = "influence"


class ProbeMethod(StrEnum):
    """How a direction is found between labelled examples: see workers/probes.py."""

    DIFFERENCE_OF_MEANS = "difference_of_means"
    WHITENED_DIFFERENCE_OF_MEANS = "whitened_difference_of_means"
    LOGISTIC = "logistic"
    WHITENED_LOGISTIC = "whitened_logistic"
    LDA = "lda"


class Projection(StrEnum):
    """How gradients become coordinates: EK-FAC eigenvectors, or seeded random signs as a baseline."""

    EIGEN = "eigen"
    RADEMACHER = "rademacher"


class Checkpoints(StrEnum):
    """Which points of the training run influence embeddings are summed over."""

    ALL = "all"  # those that are declared, or base and end
    END = "end"


class Method(StrEnum):
    """How an example is scored. A positive score always means: training on it pushes toward the query."""

    VECTOR_FILTER = "vector_filter"
    PROJECTION_DIFFERENCE = "projection_difference"
    CONCEPT_INFLUENCE = "concept_influence"
    INFLUENCE_FUNCTION = "influence_function"


class Order(StrEnum):
    MOST = "most"
    LEAST = "least"
    ABSOLUTE = "absolute"  # whichever way they push


class GroupSort(StrEnum):
    """What groups of examples are sorted by."""

    MEAN = "mean"  # score
    SUM = "sum"  # of scores
    SHARE = "share"  # of the best k examples


class JobKind(StrEnum):
    BUILD_INDEX = "build_index"
    ESTIMATE_INDEX = "estimate_index"
    FIT_CONCEPT = "fit_concept"
    EXTEND_INDEX = "extend_index"
    APPEND_INDEX = "append_index"
    DELETE_EXAMPLES = "delete_examples"
    COMPACT_INDEX = "compact_index"
    VERIFY_INDEX = "verify_index"
    REPAIR_INDEX = "repair_index"
    DIRECTIONS = "directions"
    CLUSTERS = "clusters"
    SUGGEST_CONCEPTS = "suggest_concepts"
    RERANK = "rerank"
    VALIDATE = "validate"
    TRAIN_SAE = "train_sae"
    CONCEPT_HEALTH = "concept_health"
    ENCODE_FEATURES = "encode_features"
    QUERY_GRADIENT = "query_gradient"
    PERSONA_VECTOR = "persona_vector"
    TOKEN_SHARES = "token_shares"  # noqa: S105


class JobState(StrEnum):
    QUEUED = "queued"  # in the stream, nobody holds it
    RUNNING = "running"  # a dispatcher holds the lease of the current epoch
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # ``error`` says why
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
