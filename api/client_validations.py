"""Validations over HTTP: asked for, and read."""

from collections.abc import Mapping
from typing import Any

import httpx

from api.schemas_validations import ValidationOut
from api.transport import Transport
from service import codec
from service.contracts import JobRecord


class ValidationCalls(Transport):
    """Methods raise WhenceError, or httpx.TransportError without a server."""

    def validate(
        self, *, index: str, concept: str | None = None, budget: Mapping[str, Any], **options: Any
    ) -> ValidationOut | JobRecord:
        """Whether the scores predict what retraining does, or the job that must end first (then ask again, or use
        ``settle``).

        ``options`` as in ``api.schemas_validations.ValidationIn`` (method, query_set, recipe, design, trait, …);
        ``budget``: ``{"runs": 100}``, ``{"minutes": 60}`` or both.
        """
        body = {"index": index, "concept": concept, "budget": dict(budget), **options}
        response = self._send("POST", "/v1/validations", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return ValidationOut.model_validate_json(response.content)

    def validation(self, reference: str) -> ValidationOut:
        """By its id or by its job's: how far it is, its plan, its report."""
        return ValidationOut.model_validate(self._call("GET", f"/v1/validations/{reference}"))
