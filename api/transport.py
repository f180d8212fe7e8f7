"""The connection of a client, and what a server's refusal becomes."""

from collections.abc import Mapping
from typing import Any, Self, TypeVar

import httpx

from service import codec
from service.contracts import JobRecord

T = TypeVar("T")


class WhenceError(Exception):
    """The server said no: ``code`` for programs, ``detail`` for people, ``param`` names the culprit."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        self.code = str(problem.get("code", "unknown"))
        self.detail = str(problem.get("detail", ""))
        self.param = problem.get("param")
        super().__init__(f"{self.detail or self.code} [{self.code}]")


class JobFailed(WhenceError):
    """A job that was waited for did not succeed."""

    def __init__(self, job: JobRecord) -> None:
        self.job = job
        cancelled = {"code": "cancelled", "detail": f"Job {job.id} was cancelled."}
        super().__init__(200, job.error or cancelled)


class Transport:
    """One connection pool to one server."""

    def __init__(self, url: str = "http://127.0.0.1:8311", *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _items(self, path: str, kind: type[T]) -> list[T]:
        return [codec.from_plain(kind, item) for item in self._call("GET", path)["items"]]

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return checked(self._http.request(method, path, **options))


def checked(response: httpx.Response) -> httpx.Response:
    """The response itself. Raises WhenceError for a 4xx or 5xx, whoever sent it."""
    if response.is_error:
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):  # a proxy's own page, perhaps
            detail = (
                f"{response.url} answered {response.status_code}, and not as Whence does. Is there a Whence server?"
            )
            problem = {"code": "not_whence", "detail": detail}
        raise WhenceError(response.status_code, problem)
    return response


def if_match(revision: int | None) -> dict[str, str]:
    """Headers of a change that is only right while this is the revision; None: whatever it is."""
    return {} if revision is None else {"If-Match": f'"{revision}"'}
