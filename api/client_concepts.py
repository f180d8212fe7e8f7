"""Concepts over HTTP: fitting, putting together, bringing along and taking away."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from api.schemas_concepts import SuggestionsOut
from api.transport import Transport
from service import codec
from service.contracts import ConceptRecord, JobRecord


class ConceptCalls(Transport):
    """Methods raise WhenceError, or httpx.TransportError without a server."""

    def fit_concept(
        self,
        concept_id: str,
        *,
        model: str,
        positive: str | Sequence[str | Mapping[str, Any]] | None = None,
        negative: str | Sequence[str | Mapping[str, Any]] | None = None,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        **options: Any,
    ) -> JobRecord:
        """Queue the fit. ``positive`` and ``negative`` are datasets, or lists of examples (texts, or objects as in
        a line of a dataset); ``layers`` several, or "all"; ``options`` as in ``api.schemas_probes.ConceptIn``:
        dataset with label and positive_values instead of both sides, method, compare, pooling, max_length.
        """
        body = {"positive": positive, "negative": negative, "layer": layer, "layers": layers, **options}
        told = {name: _plain(value) for name, value in body.items() if value is not None}
        about = {"id": concept_id, "model": model, **told}
        return codec.from_plain(JobRecord, self._call("POST", "/v1/concepts", json=about))

    def concepts(self) -> list[ConceptRecord]:
        return self._items("/v1/concepts", ConceptRecord)

    def concept(self, concept_id: str) -> ConceptRecord:
        return codec.from_plain(ConceptRecord, self._call("GET", f"/v1/concepts/{concept_id}"))

    def derive_concept(
        self, concept_id: str, weights: Mapping[str, float], *, project_out: Sequence[str] = ()
    ) -> ConceptRecord:
        """Σ weight · direction, less its part in the span of ``project_out``: ``{"a": 1, "b": -1}`` is a − b."""
        terms = [{"concept": name, "weight": weight} for name, weight in weights.items()]
        body = {"id": concept_id, "terms": terms, "project_out": list(project_out)}
        return codec.from_plain(ConceptRecord, self._call("POST", "/v1/concepts:derive", json=body))

    def give_concept(
        self, concept_id: str, vector: Sequence[float], *, model: str, layer: int, **options: Any
    ) -> ConceptRecord:
        """Register numbers as a direction; ``options``: pooling."""
        body = {"id": concept_id, "model": model, "layer": layer, "vector": [float(each) for each in vector]}
        return codec.from_plain(ConceptRecord, self._call("POST", "/v1/concepts:give", json=body | options))

    def suggest_concepts(
        self, *, model: str, positive: Sequence[Any], negative: Sequence[Any], **options: Any
    ) -> SuggestionsOut | JobRecord:
        """Which known directions tell a few labelled examples apart; or the job that must end first.

        Examples are texts, or objects as in a line of a dataset; ``options``: layers, pooling, index, query_set, k.
        """
        body = {"model": model, "positive": list(positive), "negative": list(negative), **options}
        response = self._send("POST", "/v1/concepts:suggest", json=body)
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return SuggestionsOut.model_validate_json(response.content)

    def export_concept(self, concept_id: str, folder: Path) -> tuple[Path, Path]:
        """Write ``ID.safetensors`` and ``ID.json`` into a folder; their paths."""
        about = self._call("GET", f"/v1/concepts/{concept_id}/sidecar")
        data = self._send("GET", f"/v1/concepts/{concept_id}/safetensors").content
        folder.mkdir(parents=True, exist_ok=True)
        tensor, sidecar = folder / f"{concept_id}.safetensors", folder / f"{concept_id}.json"
        tensor.write_bytes(data)
        sidecar.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return tensor, sidecar

    def import_concept(
        self, file: Path, *, concept_id: str | None = None, model: str | None = None, **where: Any
    ) -> ConceptRecord:
        """Register a safetensors file with the sidecar beside it (same name, ``.json``).

        Without a sidecar ``concept_id``, ``model``, ``layer`` and ``pooling`` say what it is.
        """
        body = {"id": concept_id, "model": model, **where}
        sidecar = file.with_suffix(".json")
        if sidecar.is_file() and not where:
            body["concept"] = json.loads(sidecar.read_text(encoding="utf-8"))
        body["safetensors"] = base64.b64encode(file.read_bytes()).decode()
        told = {name: value for name, value in body.items() if value is not None}
        return codec.from_plain(ConceptRecord, self._call("POST", "/v1/concepts:import", json=told))


def _plain(value: Any) -> Any:
    """What JSON has: sequences as lists."""
    return value if isinstance(value, str | int | float) else list(value)
