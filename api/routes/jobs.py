"""Jobs: what runs, how far it is, what came of it."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.dependencies import ServicesDep
from api.problems import documented
from api.schemas import EventPage, Items
from service.contracts import JobRecord

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("", summary="The newest jobs")
def list_jobs(services: ServicesDep, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Items[JobRecord]:
    return Items(items=services.jobs.recent(limit))


@router.get("/{job_id}", summary="One job", responses=documented(404))
def get_job(job_id: str, services: ServicesDep) -> JobRecord:
    """State, progress with rate and ETA, and in the end its result or its error."""
    return services.jobs.get(job_id)


@router.get("/{job_id}/events", summary="What happened to a job since a cursor", responses=documented(404, 422))
def get_events(
    job_id: str,
    services: ServicesDep,
    after: Annotated[str, Query(description="Cursor of the last page; '0' is the beginning")] = "0",
    limit: Annotated[int, Query(ge=1, le=5000)] = 500,
) -> EventPage:
    events = services.jobs.events(job_id, after, limit)
    return EventPage(events=events, cursor=events[-1].cursor if events else after)


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job", responses=documented(404, 409))
def cancel_job(job_id: str, services: ServicesDep) -> JobRecord:
    """A waiting job ends at once, a running one within seconds; finished shards are kept."""
    return services.jobs.cancel(job_id)
