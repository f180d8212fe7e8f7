"""The registry: what Redis is told of storage."""

from fastapi import APIRouter

from api.dependencies import ServicesDep
from api.problems import documented
from service.contracts import Rebuilt

router = APIRouter(prefix="/v1/registry", tags=["registry"])


@router.post(":rebuild", summary="Fill Redis again from storage", responses=documented(503))
def rebuild(services: ServicesDep) -> Rebuilt:
    """Models, datasets, concepts, indexes, the newest version of each name, and aliases: how many there are, and
    which records cannot be read. Storage is only read; queries go on meanwhile.
    """
    return services.registry.rebuild()
