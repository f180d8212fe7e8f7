"""The typed client: every endpoint as a method. Needs httpx and pydantic only.

with Client("http://127.0.0.1:8311") as whence:
    whence.add_model("bot", "/models/bot")
    whence.upload_dataset("sft", Path("sft.jsonl"))
    job = whence.build_index("sft", model="bot", dataset="sft", layers=[16])
    whence.wait(job.id)
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx

from api.client_concepts import ConceptCalls
from api.client_health import HealthCalls
from api.client_personas import PersonaCalls
from api.client_saes import SaesClient
from api.client_validations import ValidationCalls
from api.schemas import EventPage, Health, QuarantinePage, QueryOut, TokenSharesOut
from api.schemas_evidence import DirectionsOut, RerankOut
from api.schemas_rankings import CompareOut, GroupsOut
from api.transport import JobFailed, WhenceError, checked, if_match
from service import codec
from service.contracts import (
    AliasRecord,
    DatasetRecord,
    IndexRecord,
    JobEvent,
    JobRecord,
    ModelRecord,
    Rebuilt,
)
from service.terms import TERMINAL, JobState

T = TypeVar("T")

_CHUNK = 1 << 20
_MOST_JOBS = 3  # that one answer may need, one after another
_OUTAGE_S = 60.0  # a server that restarts is waited for
_SLOW = httpx.Timeout(60.0, read=None)  # hashing weights or reading a large file takes as long as it takes


class Client(ConceptCalls, HealthCalls, PersonaCalls, SaesClient, ValidationCalls):
    """Every endpoint of one server. Methods raise WhenceError, or httpx.TransportError without a server."""

    # --- models, datasets ---------------------------------------------------------------------------

    def add_model(
        self, model_id: str, path: str, *, base: str | None = None, checkpoints: Sequence[str] = ()
    ) -> ModelRecord:
        """Register a folder on the server; ``checkpoints`` are folders of the same run, base first."""
        body = {"id": model_id, "path": path, "base": base, "checkpoints": [{"path": item} for item in checkpoints]}
        return codec.from_plain(ModelRecord, self._call("POST", "/v1/models", json=body, timeout=_SLOW))

    def models(self) -> list[ModelRecord]:
        return self._items("/v1/models", ModelRecord)

    def model(self, model_id: str) -> ModelRecord:
        return codec.from_plain(ModelRecord, self._call("GET", f"/v1/models/{model_id}"))

    def add_dataset(self, dataset_id: str, path: str, *, invalid_lines: str = "refuse") -> DatasetRecord:
        """Register a file that is on the server already."""
        body = {"id": dataset_id, "path": path, "invalid_lines": invalid_lines}
        return codec.from_plain(DatasetRecord, self._call("POST", "/v1/datasets", json=body, timeout=_SLOW))

    def upload_dataset(
        self,
        dataset_id: str,
        file: Path,
        *,
        invalid_lines: str = "refuse",
        on_sent: Callable[[int], None] | None = None,
    ) -> DatasetRecord:
        """Stream a local file to the server; ``on_sent`` is told the bytes sent so far."""

        def chunks() -> Iterator[bytes]:
            sent = 0
            with file.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    yield chunk
                    sent += len(chunk)
                    if on_sent is not None:
                        on_sent(sent)

        plain = self._call(
            "PUT",
            f"/v1/datasets/{dataset_id}",
            content=chunks(),
            params={"invalid_lines": invalid_lines, "filename": file.name},
            headers={"Content-Type": "application/jsonl"},
            timeout=_SLOW,
        )
        return codec.from_plain(DatasetRecord, plain)

    def datasets(self) -> list[DatasetRecord]:
        return self._items("/v1/datasets", DatasetRecord)

    def dataset(self, dataset_id: str) -> DatasetRecord:
        return codec.from_plain(DatasetRecord, self._call("GET", f"/v1/datasets/{dataset_id}"))

    def dataset_quarantine(self, dataset_id: str, *, offset: int = 0, limit: int = 1000) -> QuarantinePage:
        page = {"offset": offset, "limit": limit}
        return QuarantinePage.model_validate(
            self._call("GET", f"/v1/datasets/{dataset_id}/quarantine", params=page)
        )

    # --- indexes, queries ---------------------------------------------------------------------------

    def build_index(self, name: str, *, model: str, dataset: str, **options: Any) -> JobRecord:
        """Queue a build; ``options`` as in ``api.schemas.IndexIn`` (kinds, layers, query_sets, …)."""
        body = {"name": name, "model": model, "dataset": dataset, **options}
        return codec.from_plain(JobRecord, self._call("POST", "/v1/indexes", json=body))

    def estimate_index(self, name: str, *, model: str, dataset: str, **options: Any) -> JobRecord:
        """Queue an estimate of what ``build_index`` with the same arguments would cost."""
        body = {"name": name, "model": model, "dataset": dataset, **options}
        return codec.from_plain(JobRecord, self._call("POST", "/v1/indexes:estimate", json=body))

    def extend_index(self, reference: str, *, query_sets: Sequence[str], **options: Any) -> JobRecord:
        """Queue a new version with embeddings for more query sets, read off the stored gradient coordinates.

        ``options`` as in ``api.schemas.QuerySetsIn`` (layers, pooling, concept_functions, dampings).
        """
        body = {"query_sets": list(query_sets), **options}
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/indexes/{reference}/query-sets", json=body))

    def verify_index(self, reference: str) -> JobRecord:
        """Queue a check of every file of a version; the job's result lists what is damaged."""
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/indexes/{reference}/verify"))

    def repair_index(self, reference: str) -> JobRecord:
        """Queue a repair: what is damaged is made again, when it comes out the same byte for byte."""
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/indexes/{reference}/repair"))

    def append(self, reference: str, dataset: str) -> JobRecord:
        """Queue a new version with the examples of one more dataset that the index does not hold yet."""
        path = f"/v1/indexes/{reference}/append"
        return codec.from_plain(JobRecord, self._call("POST", path, json={"dataset": dataset}))

    def delete_examples(
        self, reference: str, *, ids: Sequence[str] | None = None, filter: Mapping[str, Any] | None = None
    ) -> JobRecord:
        """Queue a new version that never ranks these examples, or all with such metadata."""
        body = {"ids": None if ids is None else list(ids), "filter": filter}
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/indexes/{reference}/delete", json=body))

    def compact(self, reference: str, **options: Any) -> JobRecord:
        """Queue a new version in few large shards; ``options`` as in ``api.schemas.CompactIn`` (rows_per_shard)."""
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/indexes/{reference}/compact", json=options))

    def indexes(self) -> list[IndexRecord]:
        return self._items("/v1/indexes", IndexRecord)

    def index(self, reference: str) -> IndexRecord:
        return codec.from_plain(IndexRecord, self._call("GET", f"/v1/indexes/{reference}"))

    def index_quarantine(self, reference: str, *, offset: int = 0, limit: int = 1000) -> QuarantinePage:
        page = {"offset": offset, "limit": limit}
        return QuarantinePage.model_validate(self._call("GET", f"/v1/indexes/{reference}/quarantine", params=page))

    def query(self, *, index: str, concept: str | None = None, **options: Any) -> QueryOut | JobRecord:
        """The ranking, or the job that must end first (then ask again, or use ``ask``).

        ``options`` as in ``api.schemas.QueryIn`` (method, query_set, damping, k, …).
        """
        body = {"index": index, "concept": concept, **options}
        response = self._send("POST", "/v1/queries", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return QueryOut.model_validate_json(response.content)

    def query_each(self, *, index: str, concepts: Sequence[str], **options: Any) -> list[QueryOut | JobRecord]:
        """One ranking for each concept, searched together; a job where one must end first."""
        body = {"index": index, "concepts": [{"id": each} for each in concepts], **options}
        return [
            QueryOut.model_validate(item) if "hits" in item else codec.from_plain(JobRecord, item)
            for item in self._call("POST", "/v1/queries/each", json=body)["items"]
        ]

    def ask(
        self, *, index: str, concept: str | None = None, timeout_s: float | None = None, **options: Any
    ) -> QueryOut:
        """Query, waiting for the job that the answer needs, if it needs one."""
        answer = self.query(index=index, concept=concept, **options)
        if isinstance(answer, JobRecord):
            self.wait(answer.id, timeout_s=timeout_s)
            answer = self.query(index=index, concept=concept, **options)
        if isinstance(answer, JobRecord):
            raise WhenceError(202, {"code": "not_ready", "detail": f"Job {answer.id} is still needed; ask again."})
        return answer

    def tokens(self, *, index: str, examples: Sequence[str], **options: Any) -> list[TokenSharesOut] | JobRecord:
        """What every token of the examples adds to their score, or the job that must end first.

        ``options`` as in ``api.schemas.TokenQueryIn`` (concept, method, query_set, damping, …).
        """
        body = {"index": index, "examples": list(examples), **options}
        response = self._send("POST", "/v1/queries/tokens", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return [TokenSharesOut.model_validate(item) for item in response.json()["items"]]

    def rerank(
        self, *, index: str, concept: str | None = None, candidates: int = 200, **options: Any
    ) -> RerankOut | JobRecord:
        """The best candidates of a query in the order of their exact EK-FAC scores, or the job that must end first
        (then ask again, or use ``settle``).

        ``options`` as in ``api.schemas.QueryIn`` (method, query_set, damping, k, …).
        """
        body = {"index": index, "concept": concept, "candidates": candidates, **options}
        response = self._send("POST", "/v1/queries/rerank", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return RerankOut.model_validate_json(response.content)

    def directions(self, reference: str, **options: Any) -> DirectionsOut | JobRecord:
        """What the dataset of an index does to the model: its main directions, or the job that finds them.

        ``options`` as in ``api.schemas_evidence.DirectionsIn`` (query_set, layer, count, examples, …).
        """
        response = self._send("POST", f"/v1/indexes/{reference}/directions", json=options)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return DirectionsOut.model_validate_json(response.content)

    def settle(self, call: Callable[[], T | JobRecord], *, wait: Callable[[JobRecord], object] | None = None) -> T:
        """What ``call`` answers once the jobs that it names have ended: ``settle(lambda: whence.rerank(…))``.

        ``wait`` follows a job to its end; the default is ``self.wait``. Raises JobFailed.
        """
        for _ in range(_MOST_JOBS):
            answer = call()
            if not isinstance(answer, JobRecord):
                return answer
            (wait or (lambda job: self.wait(job.id)))(answer)
        answer = call()
        if isinstance(answer, JobRecord):
            raise WhenceError(202, {"code": "not_ready", "detail": f"Job {answer.id} is still needed; ask again."})
        return answer

    # --- aliases, registry --------------------------------------------------------------------------

    def aliases(self) -> list[AliasRecord]:
        return self._items("/v1/aliases", AliasRecord)

    def alias(self, name: str) -> AliasRecord:
        return codec.from_plain(AliasRecord, self._call("GET", f"/v1/aliases/{name}"))

    def set_alias(
        self, name: str, index: str, *, if_revision: int | None = None, force: bool = False
    ) -> AliasRecord:
        """Point an alias at a version. One that is there already is switched only from revision ``if_revision``,
        or whatever it is with ``force``; otherwise WhenceError with status 412 or 428 says what it is.
        """
        path, body = f"/v1/aliases/{name}", {"index": index}
        try:
            found = self._call("PUT", path, json=body, headers=if_match(if_revision))
        except WhenceError as error:
            if not force or (error.status != httpx.codes.PRECONDITION_REQUIRED and error.code != "damaged_record"):
                raise
            found = self._call("PUT", path, json=body, headers={"If-Match": "*"})
        return codec.from_plain(AliasRecord, found)

    def remove_alias(self, name: str, *, if_revision: int | None = None, force: bool = False) -> None:
        """Take an alias away, from revision ``if_revision`` or with ``force``; the version it points at stays."""
        self._send("DELETE", f"/v1/aliases/{name}", headers={"If-Match": "*"} if force else if_match(if_revision))

    def rebuild_registry(self) -> Rebuilt:
        """Fill Redis again from storage; how much there is of everything, and what is damaged."""
        return codec.from_plain(Rebuilt, self._call("POST", "/v1/registry:rebuild", timeout=_SLOW))

    def download_scores(
        self,
        path: Path,
        *,
        index: str,
        concept: str | None = None,
        on_received: Callable[[int], None] | None = None,
        **options: Any,
    ) -> JobRecord | None:
        """The whole ranking into the Parquet file ``path``, or the job that must end first.

        ``options`` as in ``api.schemas_rankings.ScoresIn`` (method, order, metadata, …); ``on_received`` is told
        the bytes received so far. The file appears when it is complete; one that is there is replaced then.
        """
        body = {"index": index, "concept": concept, **options}
        with self._http.stream("POST", "/v1/queries/scores", json=body, timeout=_SLOW) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                return codec.from_plain(JobRecord, checked(response).json())
            part = path.with_name(f".{path.name}.{uuid4().hex}")
            try:
                with part.open("xb") as file:
                    for chunk in response.iter_bytes(_CHUNK):
                        file.write(chunk)
                        if on_received is not None:
                            on_received(file.tell())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)  # there only when something went wrong
        return None

    def groups(
        self, *, index: str, concept: str | None = None, group_by: str | None = None, **options: Any
    ) -> GroupsOut | JobRecord:
        """Groups of examples by a metadata field, ``clusters=N`` or ``sae=ID``; or the job that must end first.

        ``options`` as in ``api.schemas_rankings.GroupsIn`` (method, order, k, sort, limit, examples, terms, …).
        """
        named = {} if group_by is None else {"group_by": group_by}
        body = {"index": index, "concept": concept, **named, **options}
        response = self._send("POST", "/v1/queries/groups", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return GroupsOut.model_validate_json(response.content)

    def compare(
        self, a: Mapping[str, Any], b: Mapping[str, Any], *, k: int = 100, movers: int = 20
    ) -> CompareOut | JobRecord:
        """Two rankings side by side, or a job that must end first: then ask again.

        ``a`` and ``b`` as in ``api.schemas.QuestionIn`` (index, concept, method, …).
        """
        body = {"a": dict(a), "b": dict(b), "k": k, "movers": movers}
        response = self._send("POST", "/v1/compare", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return CompareOut.model_validate_json(response.content)

    # --- jobs ---------------------------------------------------------------------------------------

    def jobs(self, limit: int = 50) -> list[JobRecord]:
        plain = self._call("GET", "/v1/jobs", params={"limit": limit})
        return [codec.from_plain(JobRecord, item) for item in plain["items"]]

    def job(self, job_id: str) -> JobRecord:
        return codec.from_plain(JobRecord, self._call("GET", f"/v1/jobs/{job_id}"))

    def events(self, job_id: str, after: str = "0") -> EventPage:
        return EventPage.model_validate(self._call("GET", f"/v1/jobs/{job_id}/events", params={"after": after}))

    def cancel(self, job_id: str) -> JobRecord:
        return codec.from_plain(JobRecord, self._call("POST", f"/v1/jobs/{job_id}/cancel"))

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 0.2,
        on_event: Callable[[JobEvent], None] | None = None,
    ) -> JobRecord:
        """The finished job, however long it takes unless ``timeout_s`` says otherwise.

        Raises JobFailed when it did not succeed, TimeoutError; rides over restarts of the server.
        """
        deadline = time.monotonic() + (timeout_s if timeout_s is not None else math.inf)
        outage_ends = math.inf
        cursor = "0"
        while True:
            try:
                job = self.job(job_id)
                while on_event is not None and (page := self.events(job_id, cursor)).events:
                    cursor = page.cursor
                    for event in page.events:
                        on_event(event)
                outage_ends = math.inf
            except (httpx.TransportError, WhenceError) as error:
                if isinstance(error, WhenceError) and error.status != httpx.codes.SERVICE_UNAVAILABLE:
                    raise
                outage_ends = min(outage_ends, time.monotonic() + _OUTAGE_S)
                if time.monotonic() > min(outage_ends, deadline):
                    raise
                time.sleep(1.0)
                continue
            if job.state in TERMINAL:
                if job.state == JobState.SUCCEEDED:
                    return job
                raise JobFailed(job)
            if time.monotonic() > deadline:
                raise TimeoutError(f"Job {job_id} is still {job.state} after {timeout_s:.0f} s; it goes on.")
            time.sleep(poll_s)

    def ready(self) -> Health:
        """Whether the server can do its work; a degraded one answers as well."""
        response = self._http.get("/readyz")
        return Health.model_validate_json(response.content)
