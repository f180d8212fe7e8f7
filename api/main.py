"""Composition root of the server: Redis, storage, search, and the routes over them.

    python -m api.main

Settings come from the environment (service/settings.py). The process holds no model and no Ray driver.
"""

import gc
import logging
import sys
import threading
from importlib.metadata import PackageNotFoundError, version

import uvicorn
from fastapi import FastAPI

from api import problems
from api.body_limit import BodyLimit
from api.dependencies import Services
from api.routes import (
    aliases,
    concept_health,
    concepts,
    datasets,
    directions,
    health,
    indexes,
    jobs,
    models,
    personas,
    queries,
    rankings,
    rerank,
    saes,
    validations,
)
from api.routes import registry as registry_routes
from api.version import VERSION
from service import kernels
from service.concept_health import ConceptHealth
from service.directions import DirectionsService
from service.errors import DomainError, Unavailable
from service.feature_groups import FeatureGroups
from service.groups import Groups
from service.jobs import Jobs
from service.loading import IndexLoader
from service.queries import QueryService
from service.redis_server import connect
from service.registry import Registry
from service.reranking import RerankService
from service.sae_features import FeaturesService
from service.sae_view import ViewService
from service.settings import Settings, load_settings
from service.storage import Storage
from service.suggestions import SuggestService
from service.validating import ValidationService
from service.whole import WholeRankings

_ALLOCATIONS = 20_000  # more objects than were freed, before young ones are looked through

_DESCRIPTION = """
Which training examples pushed this model toward this concept?

Register a model and a dataset, build an index (a job), fit a concept (a job), then query: the answer needs
no model. A positive score means that training on the example pushes the model toward the concept. Every
error is an RFC 9457 problem document with a stable `code` and the offending `param`.
"""


def create_app(settings: Settings) -> FastAPI:
    """The application, connected. Raises Unavailable when Redis cannot be reached."""
    redis = connect(settings.redis_url.get_secret_value())
    storage = Storage(settings.storage_root, cache=settings.cache)
    registry = Registry(redis, storage)
    registry.rebuild()
    threading.Thread(target=kernels.warm, name="warm", daemon=True).start()
    work = Jobs(redis)
    loader = IndexLoader(registry, storage, threads=settings.search_threads, most_bytes=settings.search_bytes)
    ranked = QueryService(registry, storage, work, loader, shard_size=settings.shard_size)
    whole = WholeRankings(ranked, loader)
    directions_of = DirectionsService(registry, storage, work, loader)
    features = FeaturesService(registry, storage, work, loader)
    app = FastAPI(
        title="Whence", version=VERSION, description=_DESCRIPTION, responses=problems.documented(422, 503)
    )
    app.state.services = Services(
        settings=settings,
        redis=redis,
        storage=storage,
        registry=registry,
        jobs=work,
        queries=ranked,
        whole=whole,
        groups=Groups(whole, loader, storage, work, FeatureGroups(registry, loader, features)),
        directions=directions_of,
        suggestions=SuggestService(registry, storage, work, directions_of, settings),
        reranking=RerankService(registry, storage, work, loader, ranked, settings),
        validations=ValidationService(registry, storage, work, loader, whole, settings),
        health=ConceptHealth(registry, storage, work, ranked.reports, shard_size=settings.shard_size),
        features=features,
        views=ViewService(registry, storage, loader),
    )
    problems.install(app)
    app.add_middleware(BodyLimit)
    # Queries first: routes are tried one after the other.
    shown = (queries, models, datasets, indexes, aliases, directions, concepts, personas, rerank, rankings, jobs)
    for module in (*shown, concept_health, saes, validations, registry_routes, health):
        app.include_router(module.router)
    app.include_router(saes.of_index)
    return app


def check_faiss() -> None:
    """Refuse to start with both FAISS builds installed: they share a folder, and the last one silently wins."""
    found = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            version(name)
            found.append(name)
        except PackageNotFoundError:
            continue
    if len(found) != 1:
        raise Unavailable(
            "faiss_installation",
            f"Exactly one of faiss-cpu and faiss-gpu must be installed, found {found or 'neither'}. "
            "Install whence[server,cpu] or whence[server,gpu] into a fresh environment.",
        )


def _spare_the_collector() -> None:
    """What start has made stays for good: the cycle collector need not walk it while somebody waits. An answer of a
    hundred hits makes thousands of objects and no cycle, so it looks less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 20, 20)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings()
        check_faiss()
        app = create_app(settings)
        _spare_the_collector()
    except DomainError as error:
        logging.getLogger("whence.api").error("%s", error)
        return 1
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
