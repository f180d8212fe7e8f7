"""Models: folders on the server, with their lineage."""

from pathlib import Path

from fastapi import APIRouter

from api.dependencies import ServicesDep
from api.problems import documented
from api.schemas import Items, ModelIn
from service import models
from service.contracts import ModelRecord
from service.registry import MODELS, check_id
from service.storage import inside_roots

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post("", status_code=201, summary="Register a model", responses=documented(403, 404, 409, 422))
def add_model(body: ModelIn, services: ServicesDep) -> ModelRecord:
    """Describe a Hugging Face folder and hash its weights. The same folder under the same id is no error."""
    check_id(body.id, param="id")
    roots = services.settings.allowed_roots

    def checked(path: str, param: str) -> Path:
        """The folder, if it and every file that a link in it leads to lie under the roots."""
        folder = inside_roots(path, roots, param=param)
        for entry in folder.iterdir() if folder.is_dir() else ():
            inside_roots(str(entry), roots, param=param)
        return folder

    base = services.registry.get(MODELS, body.base, param="base") if body.base else None
    record = models.inspect(
        body.id,
        checked(body.path, "path"),
        base=base,
        checkpoints=[
            (checked(point.path, f"checkpoints[{number}]"), point.weight)
            for number, point in enumerate(body.checkpoints)
        ],
        redis=services.redis,
    )
    return models.register(services.registry, record)


@router.get("", summary="List models")
def list_models(services: ServicesDep) -> Items[ModelRecord]:
    return Items(items=services.registry.all(MODELS))


@router.get("/{model_id}", summary="One model", responses=documented(404))
def get_model(model_id: str, services: ServicesDep) -> ModelRecord:
    return services.registry.get(MODELS, model_id)
