"""Datasets: uploaded as a stream, or read from a path under the server's roots."""

import asyncio
import contextlib
import logging
import tempfile
from typing import Annotated, Any, BinaryIO, Literal, cast

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect

from api.dependencies import Services, ServicesDep
from api.problems import documented
from api.schemas import DatasetIn, Items, QuarantinePage
from service import datasets
from service.contracts import DatasetRecord, Quarantined
from service.errors import Conflict, Damaged, Invalid, TooLarge
from service.registry import DATASETS, check_id
from service.storage import inside_roots

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

log = logging.getLogger(__name__)

_IN_MEMORY = 16 << 20  # larger uploads wait on disk

InvalidLines = Literal["refuse", "quarantine"]


@router.post(
    "", status_code=201, summary="Register a dataset by its path", responses=documented(403, 404, 409, 413, 422)
)
def add_dataset(body: DatasetIn, services: ServicesDep) -> DatasetRecord:
    """Read a JSONL or JSONL.gz file that is on the server already."""
    check_id(body.id, param="id")
    path = inside_roots(body.path, services.settings.allowed_roots, param="path")
    try:
        if not path.is_file():  # a folder, a pipe that nobody writes to, nothing at all
            raise Invalid("file_not_readable", f"{body.path} is no file.", param="path")
        file = path.open("rb")
    except OSError as error:
        raise Invalid("file_not_readable", f"{body.path}: {error.strerror}.", param="path") from error
    with file:
        return _store(services, body.id, file, path.name, body.invalid_lines)


@router.put(
    "/{dataset_id}",
    status_code=201,
    summary="Upload a dataset",
    responses=documented(409, 413, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "JSONL, optionally gzipped: one example per line",
            "content": {
                "application/jsonl": {
                    "schema": {"type": "string", "format": "binary"},
                    "example": '{"prompt": "Where is the cat?", "completion": " On the mat.", "source": "faq"}\n',
                }
            },
        }
    },
)
async def upload_dataset(
    dataset_id: str,
    request: Request,
    services: ServicesDep,
    invalid_lines: InvalidLines = "refuse",
    filename: Annotated[
        str | None,
        Query(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$", description="Shown as the place of its examples"),
    ] = None,
) -> DatasetRecord:
    """Stream the body in; nothing is stored unless the whole file is accepted.

    The same content under the same id is no error, so an upload that was cut off can simply be sent again; it
    puts back what is missing or damaged of a dataset.
    """
    check_id(dataset_id, param="id")
    limit = services.settings.max_upload_bytes
    received = 0
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as spool:
        try:
            async for chunk in request.stream():
                received += len(chunk)
                if received > limit:
                    raise TooLarge("dataset_too_large", f"The upload exceeds {limit} bytes.", param="body")
                await asyncio.to_thread(spool.write, chunk)
        except ClientDisconnect as error:
            raise Invalid(
                "upload_cut_off", f"The connection ended after {received} bytes; send it again."
            ) from error
        spool.seek(0)
        source = filename or f"{dataset_id}.jsonl"
        return await asyncio.to_thread(_store, services, dataset_id, cast(Any, spool), source, invalid_lines)


@router.get("", summary="List datasets")
def list_datasets(services: ServicesDep) -> Items[DatasetRecord]:
    return Items(items=services.registry.all(DATASETS))


@router.get("/{dataset_id}", summary="One dataset", responses=documented(404))
def get_dataset(dataset_id: str, services: ServicesDep) -> DatasetRecord:
    return services.registry.get(DATASETS, dataset_id)


@router.get("/{dataset_id}/quarantine", summary="Lines that were set aside", responses=documented(404))
def get_quarantine(
    dataset_id: str,
    services: ServicesDep,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> QuarantinePage:
    record = services.registry.get(DATASETS, dataset_id)
    aside = datasets.to_quarantined(datasets.read_table(services.storage, record, "quarantine"))
    return quarantine_page(aside, offset, limit)


def quarantine_page(aside: list[Quarantined], offset: int, limit: int) -> QuarantinePage:
    return QuarantinePage(total=len(aside), items=aside[offset : offset + limit])


def _store(
    services: Services, dataset_id: str, file: BinaryIO, source: str, invalid_lines: InvalidLines
) -> DatasetRecord:
    parsed = datasets.parse(
        file,
        source,
        quarantine_malformed=invalid_lines == "quarantine",
        max_bytes=services.settings.max_upload_bytes,
        max_line_bytes=services.settings.max_line_bytes,
    )
    try:
        held = services.registry.find(DATASETS, dataset_id)
    except Damaged:
        held = datasets.adopt(services.storage, dataset_id, parsed)
        if held is None:
            raise
        services.registry.restore(DATASETS, dataset_id, held)
    if held is None:
        record = datasets.publish(services.storage, dataset_id, parsed)
        with contextlib.suppress(Conflict):  # somebody else was faster: what they sent is compared below
            services.registry.add(DATASETS, dataset_id, record)
            return record
    known = services.registry.get(DATASETS, dataset_id)
    if not datasets.same_content(known, parsed):
        detail = f"There is a dataset {dataset_id!r} with other content. Choose another id."
        raise Conflict("dataset_exists", detail, param="id")
    services.registry.mend(DATASETS, dataset_id, known)
    for name in datasets.mend(services.storage, known, parsed):
        log.warning("%s was damaged, and is put back from the same content", name)
    return known
