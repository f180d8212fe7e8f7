"""Persona vectors over HTTP, and the answers behind them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from api.schemas_personas import AnsweredPage
from api.transport import Transport
from service import codec
from service.contracts import JobRecord
from service.personas import Answered

_PAGE = 1000


class PersonaCalls(Transport):
    """Methods raise WhenceError, or httpx.TransportError without a server."""

    def fit_persona(
        self, concept_id: str, *, model: str, trait: Path | Mapping[str, Any] | None = None, **options: Any
    ) -> JobRecord:
        """Queue a persona vector from a trait file here, or from its JSON; ``options`` as in
        ``api.schemas_personas.PersonaIn`` (path, layers, each_layer, samples, answers, judge, system_prompt).
        """
        told = trait.read_bytes().decode() if isinstance(trait, Path) else trait
        body = {"id": concept_id, "model": model, "trait": told, **options}
        return codec.from_plain(JobRecord, self._call("POST", "/v1/personas", json=body))

    def persona_answers(
        self,
        reference: str,
        *,
        side: str | None = None,
        kept: bool | None = None,
        offset: int = 0,
        limit: int = _PAGE,
    ) -> AnsweredPage:
        """A page of the answers behind a persona vector; ``reference``: the concept, or a job's 'answers'."""
        asked = {"side": side, "kept": kept, "offset": offset, "limit": limit}
        told = {name: value for name, value in asked.items() if value is not None}
        return AnsweredPage.model_validate(self._call("GET", f"/v1/concepts/{reference}/answers", params=told))

    def all_persona_answers(self, reference: str, **which: Any) -> Iterator[Answered]:
        """All of them, page by page; ``which``: side, kept."""
        offset = 0
        while (page := self.persona_answers(reference, offset=offset, **which)).items:
            yield from page.items
            offset += len(page.items)
