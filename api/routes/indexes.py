"""Indexes: built by jobs, published as immutable versions."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.dependencies import ServicesDep, accepted
from api.problems import documented
from api.routes.datasets import quarantine_page
from api.schemas import AppendIn, CompactIn, DeleteIn, IndexIn, Items, QuarantinePage, QuerySetsIn
from service import codec, indexes
from service.contracts import IndexRecord, JobRecord
from service.damage import asking, published
from service.life import plan_append, plan_compact, plan_delete
from service.planning import ExtendRequest, IndexRequest, plan_estimate, plan_extension, plan_index
from service.registry import INDEXES
from service.specs import RepairSpec, VerifySpec
from service.terms import JobKind

router = APIRouter(prefix="/v1/indexes", tags=["indexes"])

_NEW_VERSION = documented(404, 409, 422)


@router.post("", status_code=202, summary="Build an index", responses=documented(404, 409, 422))
def build_index(body: IndexIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue the build of a new version; follow it at the Location that is answered."""
    request = codec.from_plain(IndexRequest, body.model_dump())
    spec = plan_index(request, services.registry, services.redis, services.settings)
    return accepted(response, services.jobs.submit(JobKind.BUILD_INDEX, spec))


@router.post(":estimate", status_code=202, summary="What a build would cost", responses=documented(404, 422))
def estimate_index(body: IndexIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a short measurement on the workers. The job's result: ``seconds``, ``worker_bytes`` (most memory of one
    worker), ``device_bytes`` (of its GPU), ``disk_bytes``, and the same for each of the ``stages``.
    """
    request = codec.from_plain(IndexRequest, body.model_dump())
    spec = plan_estimate(request, services.registry, services.settings)
    return accepted(response, services.jobs.submit(JobKind.ESTIMATE_INDEX, spec))


@router.post(
    "/{reference}/query-sets", status_code=202, summary="Embed for more query sets", responses=documented(404, 422)
)
def add_query_sets(reference: str, body: QuerySetsIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a new version with embeddings read off the stored gradient coordinates: the training data is not
    read again. They are those of the model itself, not summed over its checkpoints.
    """
    request = codec.from_plain(ExtendRequest, body.model_dump())
    spec = plan_extension(
        reference, request, services.registry, services.storage, services.redis, services.settings
    )
    return accepted(response, services.jobs.submit(JobKind.EXTEND_INDEX, spec))


@router.post("/{reference}/append", status_code=202, summary="Add examples", responses=_NEW_VERSION)
def append_examples(reference: str, body: AppendIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a new version with the examples of one more dataset. Only those that the index does not hold are run;
    everything else is used as it is. A bare name means its newest version at the time the job runs.
    """
    spec = plan_append(reference, body.dataset, services.registry, services.storage, services.settings)
    return accepted(response, services.jobs.submit(JobKind.APPEND_INDEX, spec))


@router.post("/{reference}/delete", status_code=202, summary="Take examples out", responses=_NEW_VERSION)
def delete_examples(reference: str, body: DeleteIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a new version that never ranks some examples. Their rows stay until ``compact``; versions before this
    one keep them. Deleted examples stay deleted when they are appended again.
    """
    spec = plan_delete(reference, body.ids, body.filter, services.registry, services.storage)
    return accepted(response, services.jobs.submit(JobKind.DELETE_EXAMPLES, spec))


@router.post("/{reference}/compact", status_code=202, summary="Few large shards", responses=_NEW_VERSION)
def compact_index(reference: str, body: CompactIn, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a new version that ranks the same examples with the same numbers, in few large shards and without the
    rows of deleted examples.
    """
    spec = plan_compact(reference, body.rows_per_shard, services.registry, services.storage)
    return accepted(response, services.jobs.submit(JobKind.COMPACT_INDEX, spec))


@router.get("", summary="List published indexes, every version")
def list_indexes(services: ServicesDep) -> Items[IndexRecord]:
    return Items(items=services.registry.all(INDEXES))


@router.get("/{reference}", summary="One index", responses=documented(404))
def get_index(reference: str, services: ServicesDep) -> IndexRecord:
    """``name`` answers the newest version, ``name@v3`` that one, an alias the one that it points at."""
    return indexes.resolve(services.registry, reference)


@router.get("/{reference}/quarantine", summary="What is not in the index, and why", responses=documented(404))
def get_quarantine(
    reference: str,
    services: ServicesDep,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> QuarantinePage:
    record = indexes.resolve(services.registry, reference)
    with asking(lambda: record.id):
        aside = indexes.quarantined(services.storage, services.registry, record)
    return quarantine_page(aside, offset, limit)


@router.post("/{reference}/verify", status_code=202, summary="Is every file intact?", responses=documented(404))
def verify_index(reference: str, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a check of the sha256 of every file that the version needs. The job's result: ``files``, ``bytes``,
    ``damaged`` and ``damage``: file, what (missing, changed, unreadable), belongs_to, owner.
    """
    spec = VerifySpec(published(services.storage, services.registry, reference))
    return accepted(response, services.jobs.submit(JobKind.VERIFY_INDEX, spec))


@router.post(
    "/{reference}/repair", status_code=202, summary="Make what is damaged again", responses=documented(404, 503)
)
def repair_index(reference: str, services: ServicesDep, response: Response) -> JobRecord:
    """Queue a repair: what is damaged is computed again from what is intact, and takes its place when it is the
    same, byte for byte. Otherwise the job fails with ``cannot_repair_exactly`` or ``cannot_repair``, which say what
    to do.
    """
    spec = RepairSpec(published(services.storage, services.registry, reference))
    return accepted(response, services.jobs.submit(JobKind.REPAIR_INDEX, spec))
