"""Liveness and readiness, for supervisors and load balancers."""

from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from api.dependencies import ServicesDep
from api.schemas import Health
from api.version import VERSION

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is this process alive?")
async def healthz() -> dict[str, str]:
    return {"status": "ok", "version": VERSION}


@router.get("/readyz", summary="Can it do its work?", responses={503: {"model": Health}})
def readyz(services: ServicesDep, response: Response) -> Health:
    """503 without Redis. Without a dispatcher queries are answered and jobs wait: 'degraded', but ready."""
    try:
        services.redis.ping()
        redis, dispatcher = True, services.jobs.dispatcher_alive()
    except RedisError:
        redis = dispatcher = False
        response.status_code = 503
    return Health(status="ok" if dispatcher else "degraded", redis=redis, dispatcher=dispatcher, version=VERSION)
