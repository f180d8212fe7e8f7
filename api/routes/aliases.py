"""Aliases: names that are switched from one index version to another."""

from typing import Annotated

from fastapi import APIRouter, Header, Response

from api import etags
from api.dependencies import ServicesDep
from api.problems import documented
from api.schemas import AliasIn, Items
from service import aliases, indexes
from service.contracts import AliasRecord

router = APIRouter(prefix="/v1/aliases", tags=["aliases"])

IfMatch = Annotated[str | None, Header(description="ETag of the alias as you know it, or * whatever it is")]
IfNoneMatch = Annotated[str | None, Header(description="*: only if there is no such alias yet")]


@router.put(
    "/{name}",
    summary="Make or switch an alias",
    responses={201: {"model": AliasRecord, "description": "Made"}, **documented(404, 409, 412, 422, 428, 503)},
)
def put_alias(
    name: str,
    body: AliasIn,
    services: ServicesDep,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> AliasRecord:
    """Point the name at a published version, for everybody at once: 201 for a new alias, 200 for a switched one.

    Switching needs ``If-Match`` with the ETag of the alias, so that nobody undoes what he has not seen.
    """
    condition = etags.condition(if_match, if_none_match)
    target = indexes.resolve(services.registry, body.index)
    alias, new = aliases.switch(services.registry, services.redis, name, target, condition)
    response.status_code = 201 if new else 200
    response.headers["ETag"] = aliases.etag(alias)
    return alias


@router.get("", summary="List aliases")
def list_aliases(services: ServicesDep) -> Items[AliasRecord]:
    return Items(items=services.registry.aliases())


@router.get("/{name}", summary="One alias, with its ETag", responses=documented(404))
def get_alias(name: str, services: ServicesDep, response: Response) -> AliasRecord:
    alias = aliases.get(services.registry, name)
    response.headers["ETag"] = aliases.etag(alias)
    return alias


@router.delete("/{name}", status_code=204, summary="Remove an alias", responses=documented(404, 412, 422, 428, 503))
def delete_alias(name: str, services: ServicesDep, if_match: IfMatch = None) -> None:
    """The version that it points at stays. Needs ``If-Match``, as switching does."""
    aliases.remove(services.registry, name, etags.condition(if_match, None))
