"""Domain errors: what went wrong, with which input, and what to do next. No status codes here.

``code`` is stable and meant for programs; ``detail`` is a sentence for people; ``param`` names the
offending field, file or line. The api maps each class to a status in one place (``api/problems.py``).
"""

from collections.abc import Mapping
from typing import Any, Self


class DomainError(Exception):
    """Base of every error that is an answer rather than a bug."""

    def __init__(
        self, code: str, detail: str, *, param: str | None = None, context: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.param = param
        self.context = dict(context or {})

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray carries errors between processes; the default would lose the keyword arguments.
        return (type(self)._rebuild, (self.code, self.detail, self.param, self.context))

    @classmethod
    def _rebuild(cls, code: str, detail: str, param: str | None, context: dict[str, Any]) -> Self:
        return cls(code, detail, param=param, context=context)

    def as_dict(self) -> dict[str, Any]:
        """The error as stored in a failed job and shown in a problem document."""
        return {"code": self.code, "detail": self.detail, "param": self.param, **self.context}


class NotFound(DomainError):
    """The named thing does not exist."""


class Conflict(DomainError):
    """The name is taken by something else, or the state does not allow the change."""


class PreconditionRequired(DomainError):
    """Something shared would change: the caller must say which state of it he has seen."""


class PreconditionFailed(DomainError):
    """What the caller has seen is not what is there now; nothing was changed."""


class Invalid(DomainError):
    """The input can never be accepted as it is."""


class Forbidden(DomainError):
    """The input points outside what this server may touch."""


class TooLarge(DomainError):
    """The input is beyond a configured limit."""


class Unavailable(DomainError):
    """Something this needs (Redis, storage) does not answer; the same call may work later."""


class Damaged(DomainError):
    """A stored file is not what its manifest says."""


class Cancelled(DomainError):
    """Somebody cancelled the job."""


class LeaseLost(DomainError):
    """Another dispatcher owns the job now; whatever this one still does must not be recorded."""


class Interrupted(DomainError):
    """This dispatcher is shutting down; the job goes back to the queue."""
