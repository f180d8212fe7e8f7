"""Append, delete and compact over HTTP and on the command line, by a dispatcher with the engine and without Ray."""

import threading
from collections.abc import Iterator

import pytest
import torch
import uvicorn
from typer.testing import CliRunner

from api.cli import app as cli
from api.client import Client, JobFailed, WhenceError
from api.main import create_app
from api.up import free_port
from service.dispatcher import Dispatcher
from service.settings import Settings
from tests import lives
from tests.lives import World, ids_of

INDEXED = ids_of(map(lives.line, range(40)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("life"))
    made.build("x", kinds=("activation",))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def client(world) -> Iterator[Client]:
    lab, port, stop = world.lab, free_port(), threading.Event()
    settings = Settings(storage_url=lab.storage.root, redis_url=lab._server.url, shard_size=8)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=port, log_level="warning"))
    dispatcher = Dispatcher(lab.jobs, lab.engine, name="d", lease_s=10, max_attempts=3)
    threads = [threading.Thread(target=server.run), threading.Thread(target=dispatcher.run, args=(stop,))]
    for thread in threads:
        thread.start()
    while not server.started:
        assert threads[0].is_alive()
    with Client(f"http://127.0.0.1:{port}") as connected:
        yield connected
    stop.set()
    server.should_exit = True
    for thread in threads:
        thread.join()


def test_jobs_that_are_queued_together_stack(client: Client) -> None:
    jobs = [
        client.append("x", "more"),
        client.append("x", "third"),
        client.delete_examples("x", ids=[*INDEXED[:3], *ids_of([lives.line(115)])]),  # one that is appended first
        client.compact("x", rows_per_shard=30),
    ]
    results = [client.wait(job.id, timeout_s=120).result or {} for job in jobs]
    assert [result["index"] for result in results] == ["x@v2", "x@v3", "x@v4", "x@v5"]
    assert [result["parent"] for result in results] == ["x@v1", "x@v2", "x@v3", "x@v4"]
    assert results[2]["deleted"] == 4 and results[3]["shards_after"] < results[3]["shards_before"]
    record = client.index("x")
    assert (record.id, record.parent, record.datasets) == ("x@v5", "x@v4", ("first", "more", "third"))
    answer = client.ask(index="x", concept="v0", k=1000)
    assert answer.rows == record.counts.indexed == 59 - 4
    assert not {hit.example_id for hit in answer.hits} & set(INDEXED[:3])
    page = client.index_quarantine("x")
    assert page.total == record.counts.quarantined
    assert sum(item.reason == "deleted" for item in page.items) == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("nothing/append", {"dataset": "more"}, 404, "index_not_found"),
        ("x/append", {"dataset": "nothing"}, 404, "dataset_not_found"),
        ("x@v1/append", {"dataset": "first"}, 422, "nothing_to_append"),
        ("x/append", {}, 422, None),
        ("x/delete", {}, 422, "ids_or_filter"),
        ("x/delete", {"ids": []}, 422, None),
        ("x/delete", {"ids": ["../../etc"]}, 422, "bad_example_id"),
        ("x/delete", {"ids": ["A" * 64]}, 422, "bad_example_id"),
        ("x/delete", {"ids": INDEXED, "filter": {"n": 1}}, 422, "ids_or_filter"),
        ("nothing/delete", {"ids": INDEXED}, 404, "index_not_found"),
        ("x/compact", {"rows_per_shard": 0}, 422, None),
        ("nothing/compact", {}, 404, "index_not_found"),
    ],
)
def test_what_can_be_refused_at_once_is(
    client: Client, path: str, body: dict, status: int, code: str | None
) -> None:
    before = len(client.jobs())
    with pytest.raises(WhenceError) as refused:
        client._call("POST", f"/v1/indexes/{path}", json=body)
    assert refused.value.status == status
    assert code is None or refused.value.code == code
    assert len(client.jobs()) == before


def test_what_depends_on_the_examples_is_refused_by_the_job(client: Client) -> None:
    with pytest.raises(JobFailed) as failed:
        client.wait(client.delete_examples("x@v1", ids=["0" * 64]).id, timeout_s=60)
    assert (failed.value.code, failed.value.param) == ("example_not_found", "ids")
    with pytest.raises(JobFailed) as failed:
        client.wait(client.append("x", "first").id, timeout_s=60)
    assert failed.value.code == "nothing_to_append"


def test_the_commands(client: Client, world: World, tmp_path) -> None:
    world.build("y", kinds=("activation",))

    def run(*words: str, status: int = 0) -> str:
        result = CliRunner().invoke(cli, ["indexes", *words, "--url", client.url], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return " ".join(result.output.split())

    said = run("append", "y", "more")
    assert "append_index done: index y@v2, parent y@v1" in said and "indexed_new 12" in said
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(INDEXED[1:3]) + "\n")
    assert "deleted 3, deleted_before 0" in run("delete", "y", INDEXED[0], "--from", str(file))
    assert "compact_index done: index y@v4" in run("compact", "y", "--rows-per-shard", "25")
    assert "cannot be read" in run("delete", "y", "--from", str(tmp_path / "none"), status=2)
    assert "--where" in run("delete", "y", "--where", "{", status=2)
    assert client.index("y").counts.indexed == 42 + 12 - 3
