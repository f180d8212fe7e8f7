"""The client's methods about sparse autoencoders."""

from collections.abc import Mapping
from typing import Any

import httpx

from api.schemas_saes import FeaturesOut, LabelsOut, ViewOut
from api.transport import Transport
from service import codec
from service.contracts import ConceptRecord, JobRecord
from service.sae_records import SaeRecord

_SLOW = httpx.Timeout(60.0, read=None)  # copying weights takes as long as it takes


class SaesClient(Transport):
    """Import, train, label and ask SAEs."""

    def import_sae(self, sae_id: str, path: str, *, model: str, centred: bool | None = None) -> SaeRecord:
        """Register a SAELens folder that is on the server, for a registered model."""
        body = {"id": sae_id, "path": path, "model": model, "centred": centred}
        return codec.from_plain(SaeRecord, self._call("POST", "/v1/saes", json=body, timeout=_SLOW))

    def train_sae(self, sae_id: str, *, index: str, **options: Any) -> JobRecord:
        """Queue the training of a TopK SAE on an index's activations.

        ``options`` as in ``api.schemas_saes.SaeTrainIn`` (layer, features, k, steps, seed, …).
        """
        body = {"id": sae_id, "index": index, **options}
        return codec.from_plain(JobRecord, self._call("POST", "/v1/saes:train", json=body))

    def saes(self) -> list[SaeRecord]:
        return [codec.from_plain(SaeRecord, item) for item in self._call("GET", "/v1/saes")["items"]]

    def sae(self, sae_id: str) -> SaeRecord:
        return codec.from_plain(SaeRecord, self._call("GET", f"/v1/saes/{sae_id}"))

    def feature_labels(self, sae_id: str) -> LabelsOut:
        return LabelsOut.model_validate(self._call("GET", f"/v1/saes/{sae_id}/labels"))

    def label_features(self, sae_id: str, labels: Mapping[int, str], *, author: str | None = None) -> LabelsOut:
        """Say what features mean; earlier labels stay, the newest is shown."""
        body = {"labels": dict(labels), "author": author}
        return LabelsOut.model_validate(self._call("POST", f"/v1/saes/{sae_id}/labels", json=body))

    def feature_concept(self, sae_id: str, feature: int, concept_id: str, **options: Any) -> ConceptRecord:
        """Register a feature as a concept; ``options`` as in ``api.schemas_saes.FeatureConceptIn`` (pooling)."""
        path = f"/v1/saes/{sae_id}/features/{feature}:concept"
        return codec.from_plain(ConceptRecord, self._call("POST", path, json={"id": concept_id, **options}))

    def features(self, reference: str, *, sae: str, **options: Any) -> FeaturesOut | JobRecord:
        """Which features fire on the examples of an index, or the job that encodes it (``settle`` waits for it).

        ``options`` as in ``api.schemas_saes.FeaturesIn`` (examples, features, count, top).
        """
        response = self._send("POST", f"/v1/indexes/{reference}/features", json={"sae": sae, **options})
        if response.status_code == httpx.codes.ACCEPTED:
            return codec.from_plain(JobRecord, response.json())
        return FeaturesOut.model_validate_json(response.content)

    def feature_view(self, reference: str, *, sae: str, **options: Any) -> ViewOut:
        """How far the dataset of an index pushes each feature of an SAE.

        ``options`` as in ``api.schemas_saes.ViewIn`` (query_set, damping, count, examples, filter).
        """
        path = f"/v1/indexes/{reference}/feature-view"
        return ViewOut.model_validate(self._call("POST", path, json={"sae": sae, **options}))
