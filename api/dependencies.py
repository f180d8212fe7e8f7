"""What every route needs, made once at start and handed in by FastAPI."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response
from redis import Redis

from service.concept_health import ConceptHealth
from service.contracts import JobRecord
from service.directions import DirectionsService
from service.groups import Groups
from service.jobs import Jobs
from service.queries import QueryService
from service.registry import Registry
from service.reranking import RerankService
from service.sae_features import FeaturesService
from service.sae_view import ViewService
from service.settings import Settings
from service.storage import Storage
from service.suggestions import SuggestService
from service.validating import ValidationService
from service.whole import WholeRankings


@dataclass(frozen=True)
class Services:
    settings: Settings
    redis: Redis
    storage: Storage
    registry: Registry
    jobs: Jobs
    queries: QueryService
    whole: WholeRankings
    groups: Groups
    suggestions: SuggestService
    directions: DirectionsService
    reranking: RerankService
    validations: ValidationService
    health: ConceptHealth
    features: FeaturesService
    views: ViewService


async def _services(request: Request) -> Services:
    # async, so that it costs no hop to a thread
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(_services)]


def accepted(response: Response, job: JobRecord) -> JobRecord:
    """202 with the job and where to follow it."""
    response.status_code = 202
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job
