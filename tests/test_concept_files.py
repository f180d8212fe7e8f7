"""Concepts out of concepts, out of numbers, and out of files that another server or library wrote."""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from redis import Redis
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from api.client import Client, WhenceError
from api.main import create_app
from service import codec, concepts
from service.contracts import ConceptRecord, ModelRecord
from service.derived import combine
from service.errors import DomainError
from service.evidence import Evidence, LayerEvidence
from service.redis_server import EmbeddedRedis
from service.registry import CONCEPTS, MODELS, Registry
from service.settings import Settings
from service.storage import Storage
from service.terms import ProbeMethod

D = 8
RNG = np.random.default_rng(3)


class Site(Client):
    """The client, talking to an app in this process."""

    def __init__(self, app: TestClient) -> None:
        self.url, self._http = "http://testserver", app


@pytest.fixture
def site(redis: Redis, redis_server: EmbeddedRedis, tmp_path: Path) -> Iterator[Site]:
    home = tmp_path / "home"
    settings = Settings(home=home, redis_url=redis_server.url)  # pyright: ignore[reportArgumentType]
    registry = Registry(redis, Storage(settings.storage_root))
    for name, base, fingerprint in (
        ("bot", "", "f0"),
        ("bot-ft", "bot", "f1"),
        ("other", "", "g0"),
        ("wide", "", "f2"),
    ):
        lineage = "f0" if name != "other" else "g0"
        width = 2 * D if name == "wide" else D
        model = ModelRecord(
            name, "", fingerprint, "", base or None, "none", 4, width, 64, None, lineage, (), "2026-11-26"
        )
        registry.add(MODELS, name, model)
    with TestClient(create_app(settings)) as app:
        yield Site(app)


def give(site: Site, name: str, **about: Any) -> tuple[ConceptRecord, np.ndarray]:
    vector = RNG.normal(size=D) * 5
    record = site.give_concept(name, vector.tolist(), **{"model": "bot", "layer": 2, **about})
    return record, vector / np.linalg.norm(vector)


def direction(site: Site, name: str) -> np.ndarray:
    data = site._send("GET", f"/v1/concepts/{name}/safetensors").content
    return load_safetensors(data)["direction"].astype(np.float64)


def refused(call: Any, status: int, code: str, *words: str, param: str | None = None) -> None:
    from api.transport import WhenceError

    with pytest.raises(WhenceError) as error:
        call()
    assert (error.value.status, error.value.code) == (status, code), error.value.detail
    assert all(word in error.value.detail for word in words), error.value.detail
    if param is not None:
        assert error.value.param == param


def test_a_difference_and_an_average_and_what_is_left_without_others(site: Site) -> None:
    (_, a), (_, b), (_, c) = (give(site, name) for name in "abc")
    record = site.derive_concept("a-b", {"a": 1, "b": -1})
    difference = a - b
    assert record.norm == pytest.approx(np.linalg.norm(difference), rel=1e-6)
    np.testing.assert_allclose(direction(site, "a-b"), difference / np.linalg.norm(difference), atol=1e-6)
    site.derive_concept("mean", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    mean = (a + b + c) / 3
    np.testing.assert_allclose(direction(site, "mean"), mean / np.linalg.norm(mean), atol=1e-6)
    # b and a+b span what a and b do
    site.derive_concept("ab", {"a": 1, "b": 1})
    site.derive_concept("rest", {"c": 2}, project_out=["b", "ab", "a"])
    found = direction(site, "rest")
    basis, _ = np.linalg.qr(np.stack([a, b], axis=1))
    expected = c - basis @ (basis.T @ c)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)
    assert abs(found @ a) < 1e-6 > abs(found @ b)


def test_a_recipe_is_kept_and_sent_twice_registered_once(site: Site) -> None:
    (a, _), (b, _) = give(site, "a"), give(site, "b")
    record = site.derive_concept("x", {"a": 2, "b": -0.5}, project_out=["b"])
    assert record.method == "derived"
    assert record.provenance == {
        "terms": [
            {"concept": "a", "sha256": a.sha256, "weight": 2},
            {"concept": "b", "sha256": b.sha256, "weight": -0.5},
        ],
        "project_out": [{"concept": "b", "sha256": b.sha256}],
    }
    assert site.derive_concept("x", {"a": 2, "b": -0.5}, project_out=["b"]) == record
    refused(lambda: site.derive_concept("x", {"a": 2}), 409, "concept_exists", "'x'", param="id")


def test_the_same_request_many_times_at_once_registers_one_concept(site: Site) -> None:
    give(site, "a")
    together = Barrier(6)

    def derive(number: int) -> ConceptRecord:
        together.wait(10)
        return site.derive_concept(f"d{number // 6}", {"a": -2.0})

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(derive, number) for number in range(30)]
    made = [each.result() for each in asked]
    assert made == [each for number in range(5) for each in [site.concept(f"d{number}")] * 6]


def test_concepts_of_different_spaces_are_not_added(site: Site) -> None:
    give(site, "a")
    for name, about, differing in (
        ("deeper", {"layer": 3}, "layer"),
        ("pooled", {"pooling": "last_token"}, "pooling"),
        ("foreign", {"model": "other"}, "lineage"),
    ):
        give(site, name, **about)
        code, sums = f"concepts_of_different_{differing}", partial(site.derive_concept, "x")
        refused(partial(sums, {"a": 1, name: 1}), 422, code, f"'{name}'", param="terms[1].concept")
        refused(partial(sums, {"a": 1}, project_out=[name]), 422, code, param="project_out[0]")
    give(site, "tuned", model="bot-ft")
    assert site.derive_concept("related", {"a": 1, "tuned": 1}).model == "bot"
    refused(
        lambda: site.derive_concept("x", {"a": 1, "nobody": 1}), 404, "concept_not_found", param="terms[1].concept"
    )


def test_nothing_left_is_refused(site: Site) -> None:
    give(site, "a")
    site.derive_concept("again", {"a": 0.1})
    refused(lambda: site.derive_concept("x", {"a": 1, "again": -1}), 422, "zero_direction", "cancel", param="terms")
    refused(
        lambda: site.derive_concept("x", {"a": 3}, project_out=["again"]),
        422,
        "zero_direction",
        param="project_out",
    )
    refused(lambda: site.derive_concept("x", {"a": 0}), 422, "zero_direction")


@pytest.mark.parametrize("seed", range(5))
def test_projection_against_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, out = rng.normal(size=(3, 20)).astype(np.float32), rng.normal(size=(4, 20)).astype(np.float32)
    weights = rng.normal(size=3)
    out[3] = out[0] - 2 * out[1]  # adds nothing to the span
    total = sum(weight * vector.astype(np.float64) for weight, vector in zip(weights, vectors, strict=True))
    onto = out[:3].astype(np.float64)
    expected = total - onto.T @ np.linalg.solve(onto @ onto.T, onto @ total)
    np.testing.assert_allclose(combine(vectors, weights, out), expected, atol=1e-5)
    np.testing.assert_allclose(combine(vectors, weights, out[:0]), total, atol=1e-12)


def test_numbers_that_are_no_direction_of_the_model(site: Site) -> None:
    refused(lambda: site.give_concept("x", [1.0] * 9, model="bot", layer=1), 422, "vector_of_other_width", "8")
    refused(lambda: site.give_concept("x", [0.0] * D, model="bot", layer=1), 422, "bad_vector")
    refused(lambda: site.give_concept("x", [1.0] * D, model="bot", layer=5), 422, "layer_out_of_range", "1 to 4")
    refused(lambda: site.give_concept("x", [1.0] * D, model="none", layer=1), 404, "model_not_found", param="model")
    refused(lambda: site.give_concept("../x", [1.0] * D, model="bot", layer=1), 422, "bad_id", param="id")


def test_what_is_exported_is_imported_as_it_was(site: Site, tmp_path: Path) -> None:
    record, vector = give(site, "a")
    tensor, sidecar = site.export_concept("a", tmp_path / "out")
    np.testing.assert_allclose(load_safetensors(tensor.read_bytes())["direction"], vector, atol=1e-6)
    assert site.import_concept(tensor) == record
    copy = site.import_concept(tensor, concept_id="copy")
    assert (copy.sha256, copy.method, copy.norm) == (record.sha256, record.method, record.norm)
    told = json.loads(sidecar.read_text())
    assert told["format"] == "whence-concept-1"


def test_an_import_belongs_to_a_model_of_its_lineage(site: Site, tmp_path: Path) -> None:
    record, _ = give(site, "a")
    tensor, sidecar = site.export_concept("a", tmp_path)
    tuned = site.import_concept(tensor, concept_id="t", model="bot-ft")
    assert (tuned.model, tuned.method, tuned.lineage) == ("bot-ft", "imported", record.lineage)
    assert tuned.provenance["exported"] == {"model": "bot", "model_fingerprint": "f0", "method": "given"}
    refused(
        lambda: site.import_concept(tensor, concept_id="x", model="other"),
        422, "concept_of_other_lineage", "no declared base", param="model",
    )  # fmt: skip
    refused(lambda: site.import_concept(tensor, concept_id="x", model="wide"), 422, "concept_of_other_width", "16")
    told = json.loads(sidecar.read_text())
    at = LayerEvidence(2, 0.9, (0.8, 1.0), 0.1, 0.1, 0.9, {})
    evidence = codec.to_plain(Evidence(ProbeMethod.LDA, 5, 5, 0, 5, 2, (at,), None, 1.0, 0.0, ()))
    for change, code in (
        ({"lineage": "unknown"}, "concept_of_other_lineage"),
        ({"layer": 9}, "layer_out_of_range"),
        ({"pooling": "nowhere"}, "bad_sidecar"),
        ({"format": "2"}, "other_format"),
        ({"width": 9}, "concept_of_other_width"),
        ({"sha256": "0"}, "other_safetensors"),
        ({"auroc_held_out": 1.5}, "bad_sidecar"),
        ({"evidence": evidence | {"layer": 1}}, "bad_sidecar"),
        ({"evidence": evidence | {"layers": []}}, "bad_sidecar"),
    ):
        sidecar.write_text(json.dumps(told | change))
        refused(lambda: site.import_concept(tensor, concept_id="x"), 422, code)
    sent = {"id": "x", "safetensors": base64.b64encode(tensor.read_bytes()).decode()}
    for change in ({"norm": float("nan")}, {"provenance": {"said": "half \ud83d"}}):  # what Python takes for JSON
        body = json.dumps({**sent, "concept": told | change})
        answer = site._http.post("/v1/concepts:import", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_sidecar")
    sidecar.write_text(json.dumps(told | {"evidence": evidence}))
    assert site.import_concept(tensor, concept_id="x").evidence is not None


def test_a_vector_of_another_library(site: Site, tmp_path: Path) -> None:
    vector = RNG.normal(size=(1, D))
    file = tmp_path / "v.safetensors"
    where = {"model": "bot", "layer": 1, "pooling": "last_token"}
    for number, dtype in enumerate(("float16", "float32", "float64")):
        file.write_bytes(save_safetensors({"w": vector.astype(dtype)}))
        record = site.import_concept(file, concept_id=f"v{number}", **where)
        assert (record.layer, record.pooling, record.method) == (1, "last_token", "given")
        np.testing.assert_allclose(direction(site, record.id), vector[0] / np.linalg.norm(vector), atol=2e-3)
    for tensors in (
        {"a": vector, "b": vector},
        {"w": np.ones((2, D))},
        {"w": np.ones(D, dtype=np.int64)},
        {},
    ):
        file.write_bytes(save_safetensors(tensors))
        refused(
            lambda: site.import_concept(file, concept_id="x", **where), 422, "bad_safetensors", param="safetensors"
        )
    file.write_bytes(b"\x80\x04pickle")
    refused(lambda: site.import_concept(file, concept_id="x", **where), 422, "bad_safetensors")
    file.write_bytes(save_safetensors({"w": np.full(D, np.nan)}))
    refused(lambda: site.import_concept(file, concept_id="x", **where), 422, "bad_vector")
    refused(lambda: site.import_concept(file, concept_id="x", layer=1), 422, "invalid_request", "model, pooling")


def test_a_file_too_large_for_a_vector_is_refused(site: Site) -> None:
    body = {"id": "x", "model": "bot", "layer": 1, "pooling": "last_token"}
    body["safetensors"] = base64.b64encode(b"0" * (5 << 20)).decode()
    refused(lambda: site._call("POST", "/v1/concepts:import", json=body), 422, "invalid_request", "4 MiB")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"?")])
def test_a_direction_that_is_damaged_or_gone_is_put_back_by_its_export_and_by_the_same_request(
    site: Site, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    record, _ = give(site, "a")
    give(site, "b")
    derived = site.derive_concept("d", {"a": 1, "b": -1})
    export, _ = site.export_concept("a", tmp_path)
    root = Path(site._http.app.state.services.storage.root)  # pyright: ignore[reportAttributeAccessIssue]
    for known, again in (
        (record, lambda: site.import_concept(export)),
        (derived, lambda: site.derive_concept("d", {"a": 1, "b": -1})),
    ):
        path = root / concepts._tensor_key(known.id, known.sha256)
        data = path.read_bytes()
        damage(path)
        with pytest.raises(WhenceError, match="whence concepts import") as told:
            site.export_concept(known.id, tmp_path / "again")
        assert (told.value.status, told.value.problem["file"]) == (503, str(path.relative_to(root)))
        assert again() == known
        assert path.read_bytes() == data


def test_a_damaged_direction_is_not_handed_out(site: Site, redis: Redis) -> None:
    give(site, "a")
    services = site._http.app.state.services  # pyright: ignore[reportAttributeAccessIssue]
    record = services.registry.get(CONCEPTS, "a")
    path = Path(services.storage.root) / concepts._tensor_key("a", record.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(lambda: site.export_concept("a", path.parent), 503, "damaged_file")
    with pytest.raises(DomainError):
        concepts.direction(services.storage, record)
