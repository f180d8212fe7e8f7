"""Every error as an RFC 9457 problem document: the one place where domain errors meet status codes."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.exceptions import HTTPException

from service import damage, errors

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_LONGEST = 2_000  # characters of one text in a problem

_STATUS: dict[type[errors.DomainError], int] = {
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.PreconditionRequired: 428,
    errors.Invalid: 422,
    errors.Forbidden: 403,
    errors.TooLarge: 413,
    errors.Unavailable: 503,
    errors.Damaged: 503,
}


class Problem(BaseModel):
    """RFC 9457 problem details; ``code`` is stable and meant for programs."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:whence:problem:<code>")
    title: str = Field(description="The status in words")
    status: int
    code: str = Field(description="What went wrong, stable across releases", examples=["layer_out_of_range"])
    detail: str = Field(description="What happened, to which input, and what to do next")
    param: str | None = Field(None, description="The offending field, file or line", examples=["layers"])
    instance: str | None = Field(None, description="The path that was called")


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    param: str | None = None,
    again: bool = True,
    **extra: Any,
) -> JSONResponse:
    """The response for one error; ``again``: a 503 may pass by itself."""
    title = HTTPStatus(status).phrase
    body = {"type": f"urn:whence:problem:{code}", "title": title, "status": status, "code": code, "detail": detail}
    headers = {"Retry-After": "2"} if status == HTTPStatus.SERVICE_UNAVAILABLE and again else None
    return JSONResponse(
        _sendable({**extra, **body, "param": param, "instance": request.url.path}),
        status_code=status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )


def _sendable(value: Any) -> Any:
    """What was sent to us is told again in problems: half a character is no UTF-8, and a long text is cut."""
    match value:
        case str():
            text = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
            return text.encode(errors="backslashreplace").decode()
        case Mapping():
            return {_sendable(key): _sendable(item) for key, item in value.items()}
        case list() | tuple():
            return [_sendable(item) for item in value]
        case _:
            return value


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the problems a route may answer with."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document, and describe it in the OpenAPI schema."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        schema["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        return schema

    app.openapi = openapi

    @app.exception_handler(errors.DomainError)
    async def domain(request: Request, error: errors.DomainError) -> JSONResponse:
        if isinstance(error, errors.Damaged | errors.NotFound) and damage.is_damage(error):
            error = damage.explained(error, None)
            log.error("%s", error)
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        again = not isinstance(error, errors.Damaged)  # damage stays until somebody mends it
        return problem(request, status, error.code, error.detail, param=error.param, again=again, **error.context)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in {"body", "query", "path"}]
        code = "invalid_json" if first["type"] == "json_invalid" else "invalid_request"
        param = ".".join(where) or None
        fields = [{"param": ".".join(map(str, item["loc"][1:])), "detail": item["msg"]} for item in error.errors()]
        detail = f"{param}: {first['msg']}."
        if param is None:  # of the body as a whole: fields that do not go together, or no JSON object at all
            together = first["type"] == "value_error"
            detail = f"{first['msg']}." if together else "Send a JSON object, with content-type application/json."
        return problem(request, 422, code, detail, param=param, errors=fields[:20])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == HTTPStatus.BAD_REQUEST:
            detail = "The body is not valid JSON, not UTF-8, or nested too deep."
            return problem(request, 400, "invalid_json", detail, param="body")
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        detail = f"{request.method} {request.url.path}: {error.detail}. See /docs for what there is."
        response = problem(request, error.status_code, code, detail)
        response.headers.update(error.headers or {})  # of a 405: what is allowed
        return response

    @app.exception_handler(RedisConnectionError)
    @app.exception_handler(RedisTimeoutError)
    async def redis(request: Request, error: RedisError) -> JSONResponse:
        log.warning("redis does not answer: %s", error)
        detail = "Redis does not answer. What was asked for may have been done; look before you ask again."
        return problem(request, 503, "redis_unavailable", detail)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.exception("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
        detail = f"An unexpected {type(error).__name__}. The server's log has the details."
        response = problem(request, 500, "internal_error", detail)
        response.headers["Connection"] = "close"  # the server drops it after an error; say so to the client's pool
        return response
