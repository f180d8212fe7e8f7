"""Aliases and the registry over real HTTP, in the typed client and on the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis
from typer.testing import CliRunner

from api import cli, etags
from api.client import Client, WhenceError
from api.transport import checked
from service import codec
from service.aliases import Condition
from service.contracts import AliasRecord
from service.errors import Invalid
from service.registry import Registry
from service.storage import Storage
from tests import shelf

PROD = "/v1/aliases/prod"


@pytest.fixture
def url(server: str, redis: Redis, storage: Storage) -> str:
    """A server with three versions of `a` and one of `b`."""
    shelf.furnish(Registry(redis, storage), storage)
    shelf.add(Registry(redis, storage), "a@v1", "a@v2", "a@v3", "b@v1")
    return server


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def whence(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def put(http: httpx.Client, index: str, **headers: str) -> httpx.Response:
    return http.put(PROD, json={"index": index}, headers={name.replace("_", "-"): v for name, v in headers.items()})


def test_the_life_of_an_alias_in_status_codes_and_etags(http: httpx.Client) -> None:
    assert http.get(PROD).status_code == 404
    made = put(http, "a@v1", If_None_Match="*")
    assert (made.status_code, made.headers["etag"]) == (201, '"1"')
    assert made.json() | {"updated_at": ""} == {
        "name": "prod",
        "index": "a@v1",
        "revision": 1,
        "updated_at": "",
        "previous": None,
    }
    switched = put(http, "a", If_Match=made.headers["etag"])
    assert (switched.status_code, switched.headers["etag"]) == (200, '"2"')
    assert (switched.json()["index"], switched.json()["previous"]) == ("a@v3", "a@v1")
    read = http.get(PROD)
    assert (read.status_code, read.headers["etag"], read.json()) == (200, '"2"', switched.json())
    assert http.get("/v1/aliases").json() == {"items": [read.json()]}
    assert http.get("/v1/indexes/prod").json()["version"] == 3
    gone = http.delete(PROD, headers={"If-Match": '"2"'})
    assert (gone.status_code, gone.content) == (204, b"")
    assert http.get(PROD).status_code == http.get("/v1/indexes/prod").status_code == 404
    assert http.get("/v1/indexes/a").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 428, "precondition_required"),
        ({"If_Match": '"2"'}, 412, "alias_changed"),
        ({"If_Match": 'W/"1"'}, 412, "alias_changed"),
        ({"If_Match": '"one", "3"'}, 412, "alias_changed"),
        ({"If_None_Match": "*"}, 412, "alias_exists"),
        ({"If_Match": "1"}, 422, "bad_etag"),
        ({"If_Match": ""}, 422, "bad_etag"),
        ({"If_None_Match": '"1"'}, 422, "bad_etag"),
    ],
)
def test_a_change_that_nobody_vouches_for_is_a_problem_that_says_what_is_there(
    http: httpx.Client, headers: dict[str, str], status: int, code: str
) -> None:
    put(http, "a@v1")
    answers = [put(http, "a@v2", **headers)]
    if "If_None_Match" not in headers:
        answers.append(http.delete(PROD, headers={name.replace("_", "-"): v for name, v in headers.items()}))
    for answer in answers:
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
        if status != 422:
            assert (problem["etag"], problem["index"], problem["revision"]) == ('"1"', "a@v1", 1)
            assert "a@v1" in problem["detail"]
        if status == 428:
            assert 'If-Match: "1"' in problem["detail"]
    assert http.get(PROD).json()["index"] == "a@v1"


@pytest.mark.parametrize("tags", ['"1"', '"7", "1"', '"a, b","1"', "*", 'W/"1","1"'])
def test_a_condition_that_holds(http: httpx.Client, tags: str) -> None:
    put(http, "a@v1")
    assert put(http, "a@v2", If_Match=tags).status_code == 200


@pytest.mark.parametrize(
    ("tags", "revisions"),
    [('"1"', (1,)), (' "1" ,"20" ', (1, 20)), ('W/"1", "2"', (2,)), ('"a, b"', ()), ('"01"', ()), ('""', ())],
)
def test_which_revisions_a_header_names(tags: str, revisions: tuple[int, ...]) -> None:
    assert etags.condition(tags, None) == Condition(revisions=revisions)


@pytest.mark.parametrize("tags", ["", "1", '"1', '"1" "2"', '"1",', "w/1", '*, "1"', '"1"\n"2"'])
def test_what_is_no_list_of_tags_is_refused(tags: str) -> None:
    with pytest.raises(Invalid) as refused:
        etags.condition(tags, None)
    assert (refused.value.code, refused.value.param) == ("bad_etag", "If-Match")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (PROD, {"index": "a@v9"}, 404, "index_not_found", "index"),
        (PROD, {"index": "nothing"}, 404, "index_not_found", "index"),
        (PROD, {"index": ""}, 404, "index_not_found", "index"),
        (PROD, {}, 422, "invalid_request", "index"),
        (PROD, {"index": "a", "force": True}, 422, "invalid_request", "force"),
        ("/v1/aliases/a", {"index": "a@v1"}, 409, "name_is_index", "name"),
        ("/v1/aliases/a@v1", {"index": "a@v1"}, 422, "bad_id", "name"),
        ("/v1/aliases/%2e%2e", {"index": "a@v1"}, 422, "bad_id", "name"),
        ("/v1/aliases/" + "x" * 129, {"index": "a@v1"}, 422, "bad_id", "name"),
    ],
)
def test_bad_input_is_refused_with_the_field(
    http: httpx.Client, path: str, body: dict, status: int, code: str, param: str
) -> None:
    answer = http.put(path, json=body)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["param"]) == (status, code, param)
    assert http.get("/v1/aliases").json() == {"items": []}


@pytest.mark.parametrize("call", ["/v1/indexes", "/v1/indexes:estimate"])
def test_a_build_may_not_take_the_name_of_an_alias(http: httpx.Client, call: str) -> None:
    put(http, "a@v1")
    problem = http.post(call, json={"name": "prod", "model": "m", "dataset": "d"}).json()
    assert (problem["status"], problem["code"], problem["param"]) == (409, "name_is_alias", "name")
    assert http.post(call, json={"name": "free", "model": "m", "dataset": "d"}).status_code == 202


def test_the_client_makes_switches_and_removes(whence: Client) -> None:
    made = whence.set_alias("prod", "a@v1")
    assert whence.alias("prod") == made
    with pytest.raises(WhenceError) as refused:
        whence.set_alias("prod", "a@v2")
    assert (refused.value.status, refused.value.problem["revision"]) == (428, 1)
    assert whence.set_alias("prod", "a@v2", if_revision=1).revision == 2
    with pytest.raises(WhenceError, match="a@v2"):
        whence.set_alias("prod", "a@v3", if_revision=1)
    forced = whence.set_alias("prod", "a@v3", force=True)
    assert (forced.revision, forced.previous) == (3, "a@v2")
    assert whence.set_alias("next", "prod", force=True).index == "a@v3"
    assert [alias.name for alias in whence.aliases()] == ["next", "prod"]
    assert whence.index("prod").id == "a@v3"
    for wrong in ({}, {"if_revision": 2}):
        with pytest.raises(WhenceError, match="a@v3"):
            whence.remove_alias("prod", **wrong)
    whence.remove_alias("prod", if_revision=3)
    whence.remove_alias("next", force=True)
    assert whence.aliases() == []


def test_after_a_flush_a_rebuild_brings_everything_back_and_counts_it(
    whence: Client, redis: Redis, storage: Storage
) -> None:
    whence.set_alias("prod", "a@v1")
    whence.set_alias("prod", "a@v2", if_revision=1)
    whence.set_alias("old", "b")
    whence.remove_alias("old", if_revision=1)

    def everything() -> list[object]:
        return [whence.models(), whence.datasets(), whence.concepts(), whence.indexes(), whence.aliases()]

    before = everything()
    assert all(before)
    redis.flushall()
    done = whence.rebuild_registry()
    assert codec.to_plain(done) == {
        "models": 1,
        "datasets": 1,
        "concepts": 1,
        "saes": 0,
        "indexes": 4,
        "newest": 2,
        "aliases": 1,
        "damaged": [],
    }
    assert everything() == before
    assert (whence.index("a").id, whence.index("prod").id) == ("a@v3", "a@v2")
    storage.write("indexes/a@v2/record.json", b"{")
    storage.write("aliases/next/record.json", b"{")
    done = whence.rebuild_registry()
    assert (done.indexes, done.damaged) == (3, ("indexes/a@v2", "aliases/next"))


def run(url: str, *words: str, status: int = 0) -> str:
    """The output of `whence`, whose problems are raised here (its entry point prints them)."""
    done = CliRunner().invoke(cli.app, [*words, "--url", url], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def test_the_command_line_makes_lists_switches_and_removes(url: str) -> None:
    assert "alias prod: a@v1 (revision 1)" in run(url, "aliases", "set", "prod", "a@v1")
    with pytest.raises(WhenceError, match="--if-revision 1"):
        run(url, "aliases", "set", "prod", "a@v2")
    assert "revision 2, before a@v1" in run(url, "aliases", "set", "prod", "a@v2", "--if-revision", "1")
    run(url, "aliases", "set", "prod", "a@v3", "--force")
    run(url, "aliases", "set", "prod", "a@v3", "--force", "--if-revision", "3", status=2)
    (item,) = json.loads(run(url, "aliases", "list", "--json"))
    assert codec.from_plain(AliasRecord, item).index == "a@v3"
    with pytest.raises(WhenceError, match="a@v3"):
        run(url, "aliases", "remove", "prod")
    assert "alias prod is gone" in run(url, "aliases", "remove", "prod", "--if-revision", "3")
    assert json.loads(run(url, "aliases", "list", "--json")) == []


def test_the_command_line_rebuilds_and_fails_on_damage(url: str, redis: Redis, storage: Storage) -> None:
    redis.flushall()
    assert "indexes 4, newest 2, aliases 0" in " ".join(run(url, "registry", "rebuild").split())
    storage.write("models/m/record.json", b"{")
    assert "damaged: models/m/record.json" in run(url, "registry", "rebuild", status=1)


def test_a_damaged_alias_is_told_with_the_command_that_mends_it(
    url: str, http: httpx.Client, storage: Storage, redis: Redis
) -> None:
    run(url, "aliases", "set", "prod", "a@v1")
    storage.write("aliases/prod/record.json", storage.read("aliases/prod/record.json").replace(b"a@v1", b"a@v2"))
    redis.flushall()
    query = {"index": "prod", "concept": "c"}
    asked = [
        http.post("/v1/queries", json=query),
        http.get(PROD),
        put(http, "a@v3"),
        *(http.request(method, f"/v1/indexes/prod{path}") for method, path in [("GET", ""), ("POST", "/verify")]),
        http.post("/v1/indexes/prod/repair"),
    ]
    for problem in asked:
        assert problem.status_code == 503, problem.text
        told = problem.json()
        assert (told["code"], told["file"]) == ("damaged_record", "aliases/prod/record.json")
        assert told["repair"] == "whence aliases set prod INDEX --force"
        assert told["detail"].startswith("aliases/prod/record.json is damaged: it is not what was written. Set it")
        assert "retry-after" not in problem.headers
    assert "alias prod: a@v3" in run(url, "aliases", "set", "prod", "a@v3", "--force")
    assert http.get("/v1/indexes/prod").json()["version"] == 3


def test_a_method_that_a_path_does_not_have_is_told_with_those_it_has(http: httpx.Client) -> None:
    refused = http.post(PROD, json={})
    assert (refused.status_code, refused.json()["code"]) == (405, "method_not_allowed")
    assert refused.headers["content-type"] == "application/problem+json"
    assert set(refused.headers["allow"].replace(" ", "").split(",")) <= {"PUT", "GET", "DELETE", "HEAD"}


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"no"', b"null", b"\xff"])
def test_the_page_of_a_proxy_is_an_error_of_the_client_as_well(body: bytes) -> None:
    answer = httpx.Response(502, content=body, request=httpx.Request("GET", "http://proxy/v1/jobs"))
    with pytest.raises(WhenceError, match="http://proxy/v1/jobs answered 502") as told:
        checked(answer)
    assert (told.value.status, told.value.code) == (502, "not_whence")


@pytest.mark.parametrize(("sent", "told"), [("\\ud800", r"\ud800"), ("x" * 60_000, "x" * 100)])
def test_what_is_told_again_can_be_sent_and_is_short(
    http: httpx.Client, registry: Registry, storage: Storage, sent: str, told: str
) -> None:
    shelf.publisher(registry, storage, "whole")(1)
    bodies = {
        "/v1/queries": f'{{"index": "{sent}", "concept": "c"}}',
        "/v1/queries/groups": f'{{"index": "whole", "concept": "c", "group_by": "{sent}"}}',
        "/v1/compare": f'{{"{sent}": 1}}',
        "/v1/concepts:derive": f'{{"id": "x", "terms": [{{"concept": "{sent}", "weight": 1}}]}}',
    }
    for path, body in bodies.items():
        refused = http.post(path, content=body, headers={"content-type": "application/json"})
        assert refused.status_code in {404, 422}, (path, refused.text)
        assert len(refused.content) < 10_000
    assert told in json.dumps(refused.json()).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/indexes/whole/append", {"dataset": "d"}),
        ("POST", "/v1/indexes/whole/delete", {"ids": ["0" * 64]}),
        ("POST", "/v1/indexes/whole/compact", {}),
        ("GET", "/v1/indexes/whole/quarantine", None),
        ("POST", "/v1/queries", {"index": "whole", "concept": "c"}),
        ("GET", "/v1/datasets/d/quarantine", None),
        ("GET", "/v1/concepts/c/safetensors", None),
    ],
)
def test_a_file_that_is_missing_is_no_404(
    http: httpx.Client, registry: Registry, storage: Storage, method: str, path: str, body: object
) -> None:
    shelf.publisher(registry, storage, "whole")(1)
    (storage.local_path("indexes/whole@v1/manifest.json") or Path()).unlink()
    for folder in ("datasets/d", "concepts/c"):
        for name in set(storage.files(folder)) - {"record.json"}:
            storage.remove(f"{folder}/{name}")
    problem = http.request(method, path, json=body)
    assert (problem.status_code, problem.json()["code"]) == (503, "missing_file")
    assert problem.json()["file"].startswith(("indexes/whole@v1/manifest", "datasets/d/", "concepts/c/"))
