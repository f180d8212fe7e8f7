"""No request makes the server hold more than so many bytes of JSON: one that says so, or sends so, is 413."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem

MOST_BYTES = 64 << 20  # a filter with a hundred thousand ids has 7 MB
_DETAIL = f"The body may have {MOST_BYTES} bytes at most; a dataset is uploaded with PUT /v1/datasets/{{id}}."


class BodyLimit:
    """ASGI middleware. Uploads of datasets are streams with a limit of their own (``WHENCE_MAX_UPLOAD_BYTES``)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _streamed(scope):
            await self._app(scope, receive, send)
            return
        if _announced(scope) > MOST_BYTES:
            refusal = problem(Request(scope), 413, "body_too_large", _DETAIL, param="body")
            refusal.headers["Connection"] = "close"  # what is still being sent is not read
            await refusal(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, _DETAIL)
            return message

        await self._app(scope, counted, send)


def _streamed(scope: Scope) -> bool:
    return scope["method"] == "PUT" and scope["path"].startswith("/v1/datasets/")


def _announced(scope: Scope) -> int:
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(length) if length.isdigit() else 0
