"""Concept health over HTTP."""

from typing import Any

import httpx

from api.schemas_health import HealthOut
from api.transport import Transport
from service import codec
from service.contracts import JobRecord


class HealthCalls(Transport):
    """Methods raise WhenceError, or httpx.TransportError without a server."""

    def concept_health(self, *, index: str, concept: str | None = None, **options: Any) -> HealthOut | JobRecord:
        """What speaks for and against attributions to a concept, or the job that finds out (``settle`` waits).

        ``options`` as in ``api.schemas_health.HealthIn`` (query_set, concept_function, damping, vector, …).
        """
        response = self._send("POST", "/v1/queries/health", json={"index": index, "concept": concept, **options})
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return HealthOut.model_validate_json(response.content)
