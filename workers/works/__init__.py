"""How each artifact is computed: one function per kind of work, from stored inputs to tensors and facts."""

from collections.abc import Callable, Mapping, Sequence

from service.contracts import Example
from service.storage import Storage
from service.training import ReadAnswersWork, RetrainWork
from service.work import (
    AnswersWork,
    ArtifactWork,
    BasisWork,
    CovarianceWork,
    EigenWork,
    ElicitWork,
    GatherWork,
    HeadWork,
    JacobianWork,
    LambdaWork,
    LossRowsWork,
    MixWork,
    MomentWork,
    NarrowWork,
    PooledWork,
    ResponsesWork,
    ScoutWork,
    ShapesWork,
    TokenSharesWork,
    TrainSaeWork,
)
from workers.models import Loaded
from workers.works import answers, choice, factors, personas, pooled, retrain, rows, sae, token_shares
from workers.works.result import Result

_COMPUTE: Mapping[type, Callable[..., Result]] = {
    AnswersWork: answers.answers,
    ElicitWork: personas.elicit,
    ResponsesWork: personas.responses,
    ShapesWork: factors.shapes,
    CovarianceWork: factors.covariances,
    EigenWork: factors.eigen,
    MomentWork: factors.moments,
    LambdaWork: factors.eigenvalues,
    ScoutWork: choice.scout,
    NarrowWork: choice.narrow,
    BasisWork: choice.basis,
    HeadWork: choice.head,
    GatherWork: choice.gather,
    JacobianWork: rows.concept_jacobian,
    MixWork: rows.mix,
    LossRowsWork: rows.loss_rows,
    TokenSharesWork: token_shares.token_shares,
    RetrainWork: retrain.retrain,
    ReadAnswersWork: retrain.read_answers,
    TrainSaeWork: sae.train,
    PooledWork: pooled.pooled,
}


def compute(
    work: ArtifactWork | RetrainWork | ReadAnswersWork,
    storage: Storage,
    loaded: Loaded | None,
    examples: Sequence[Example],
) -> Result:
    """``loaded`` is given when the work has a reading, ``examples`` when it reads some. Raises Invalid when the
    model or the examples cannot give what is asked.
    """
    return _COMPUTE[type(work)](work, storage, loaded, examples)
