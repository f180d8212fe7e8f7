"""How each artifact is computed: one function per kind of work, from stored inputs to tensors and facts."""

from collections.abc import Callable, Mapping, Sequence

from service.contracts import Example
from service.storage import Storage
from service.work import (
    AnswersWork,
    ArtifactWork,
    BasisWork,
    CovarianceWork,
    EigenWork,
    GatherWork,
    HeadWork,
    JacobianWork,
    LambdaWork,
    LossRowsWork,
    MixWork,
    MomentWork,
    NarrowWork,
    PooledWork,
    ScoutWork,
    ShapesWork,
    TokenSharesWork,
    TrainSaeWork,
)
from workers.models import Loaded
from workers.works import answers, choice, factors, pooled, rows, sae, token_shares
from workers.works.result import Result

_COMPUTE: Mapping[type, Callable[..., Result]] = {
    AnswersWork: answers.answers,
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
    TrainSaeWork: sae.train,
    PooledWork: pooled.pooled,
}


def compute(work: ArtifactWork, storage: Storage, loaded: Loaded | None, examples: Sequence[Example]) -> Result:
    """``loaded`` is given when the work has a reading, ``examples`` when it reads some. Raises Invalid when the
    model or the examples cannot give what is asked.
    """
    return _COMPUTE[type(work)](work, storage, loaded, examples)
