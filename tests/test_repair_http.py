"""Damage over HTTP and on the command line: told with its file and its cure, verified, repaired, uploaded again."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from typer.testing import CliRunner

from api.cli import app
from api.client import Client, JobFailed, WhenceError
from api.main import create_app
from api.up import Stack, free_port
from service import artifacts, indexes, shards
from service.contracts import IndexRecord
from service.dispatcher import Dispatcher
from service.jobs import Jobs
from service.redis_server import connect
from service.registry import MODELS, Registry
from service.settings import Settings
from service.storage import Storage
from service.terms import JobState
from service.work import Eigen
from tests import tiny
from tests.whole import V, Whole

LINES = b"".join(b'{"prompt": "the cat %d ", "completion": "sat on"}\n' % number for number in range(9))


class Served:
    def __init__(self, world: Whole, index: IndexRecord, url: str, registry: Registry) -> None:
        self.world, self.index, self.url, self.registry = world, index, url, registry
        self.root = world.root

    def cli(self, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*words, "--url", self.url], env={"COLUMNS": "400", "TERM": "dumb"})
        return result.exit_code, result.output

    def rows(self, kind: str = "activation", number: int = 0) -> str:
        manifest = indexes.read_manifest(self.world.storage, self.index)
        folder = shards.folder(manifest.sections[0].shards[number].key)
        names = self.world.storage.files(folder)
        return f"{folder}/{next(name for name in names if f'.{kind}' in name and 'scale' not in name)}"

    def flip(self, file: str) -> bytes:
        path = self.root / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return data


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The api and a dispatcher, in threads, on an index that was built from an uploaded file."""
    threads = torch.get_num_threads()
    world = Whole(tmp_path_factory.mktemp("http"))
    address = world.lab._server.url
    port, stop = free_port(), threading.Event()
    environment = pytest.MonkeyPatch()
    environment.setenv("WHENCE_REDIS_URL", address)
    served_app = create_app(Settings(storage_url=str(world.root)))
    server = uvicorn.Server(uvicorn.Config(served_app, port=port, log_level="warning"))
    jobs = Jobs(connect(address))
    dispatcher = Dispatcher(jobs, world.lab.engine, name="one", lease_s=5, max_attempts=3)
    running = [threading.Thread(target=server.run), threading.Thread(target=dispatcher.run, args=(stop,))]
    for thread in running:
        thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{port}"
    with Client(url) as client:
        file = tmp_path_factory.mktemp("upload") / "up.jsonl"
        file.write_bytes(LINES)
        client.upload_dataset("up", file)
        client.build_index("warm", model="m", dataset="up", layers=[2], kinds=["activation"])
        job = client.build_index("x", model="m", dataset="up", layers=[1, 2], kinds=["activation"])
        client.wait(job.id)
        world.lab.concept("low", world.registry.get(MODELS, "m"), V, layer=1)
        yield Served(world, client.index("x"), url, served_app.state.services.registry)
    stop.set()
    server.should_exit = True
    for thread in running:
        thread.join()
    world.lab.close()
    environment.undo()
    torch.set_num_threads(threads)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url) as connected:
        yield connected


def asked(served: Served, **more: object) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/queries", json={"index": "x", "concept": "v", "k": 3, **more})


def test_a_query_against_damage_is_503_with_the_file_and_the_cure(served: Served, client: Client) -> None:
    file = served.rows()
    data = served.flip(file)
    response = asked(served, concept="low")
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (503, 503, "damaged_file")
    assert response.headers["content-type"] == "application/problem+json"
    assert "retry-after" not in response.headers  # it does not go away by itself
    assert problem["param"] == problem["file"] == file
    assert problem["index"] == "x@v1"
    assert problem["repair"] == "whence indexes repair x@v1"
    assert "x@v1" in problem["detail"] and "`whence indexes repair x@v1`" in problem["detail"]
    assert asked(served).status_code == 200  # layer 2 lies in other files
    assert asked(served, index="warm").status_code == 200
    code, output = served.cli("indexes", "verify", "x")
    assert code == 1
    assert file in output and "changed" in output and "shard" in output
    assert "whence indexes repair x@v1" in output
    code, output = served.cli("indexes", "verify", "x", "--json")
    assert code == 1
    report = json.loads(output[output.index("{") :])
    assert [(each["file"], each["what"], each["belongs_to"]) for each in report["damage"]] == [
        (file, "changed", "shard")
    ]
    code, output = served.cli("indexes", "repair", "x@v1")
    assert (code, served.root.joinpath(file).read_bytes()) == (0, data)
    assert "repaired 1" in output
    assert asked(served, concept="low").status_code == 200
    code, output = served.cli("indexes", "verify", "x")
    assert (code, "all intact" in output) == (0, True)


def test_a_missing_file_is_damage_and_not_an_unknown_name(served: Served, client: Client) -> None:
    other = client.wait(
        client.build_index("y", model="m", dataset="up", layers=[2], max_length=64, kinds=["activation"]).id
    )
    assert other.result is not None
    manifest = indexes.read_manifest(served.world.storage, client.index("y"))
    folder = shards.folder(manifest.sections[0].shards[0].key)
    for name in ("shard.json", "00.activation.l2.npy"):
        path = served.root / folder / name
        data = path.read_bytes()
        path.unlink()
        response = asked(served, index="y")
        assert (response.status_code, response.json()["code"]) == (503, "missing_file")
        assert response.json()["param"] == f"{folder}/{name}"
        client.wait(client.repair_index("y").id)
        assert path.read_bytes() == data
    assert asked(served, index="y").status_code == 200


def test_a_damaged_record_does_not_let_an_older_version_answer(served: Served, client: Client) -> None:
    for layer in (1, 2):
        client.wait(client.build_index("z", model="m", dataset="up", layers=[layer], kinds=["activation"]).id)
    file = "indexes/z@v2/record.json"
    data = served.flip(file)
    redis = connect(served.world.lab._server.url)
    redis.delete("whence:indexes", "whence:registry:filled")
    response = asked(served, index="z", concept="low")
    assert (response.status_code, response.json()["param"]) == (503, file)
    assert response.json()["repair"] == "whence indexes repair z@v2"
    assert asked(served, index="z@v1", concept="low").status_code == 200
    assert httpx.get(f"{served.url}/v1/indexes/z").status_code == 503
    done = client.wait(client.repair_index("z").id)
    assert (done.result or {})["mended"] == [file]
    assert (served.root / file).read_bytes() == data
    assert client.index("z").version == 2
    redis.close()


def test_damaged_texts_are_put_back_by_the_same_upload(served: Served, client: Client, tmp_path: Path) -> None:
    record = client.dataset("up")
    for name in record.files:
        file = f"datasets/up/{name}"
        data = served.flip(file)
        with pytest.raises(JobFailed) as told:
            client.wait(client.repair_index("x").id)
        assert (told.value.code, told.value.param) == ("cannot_repair", file)
        assert "whence datasets add FILE --id up" in told.value.detail
        upload = tmp_path / "up.jsonl"
        upload.write_bytes(LINES + b'{"text": "one more"}\n')
        with pytest.raises(WhenceError) as refused:
            client.upload_dataset("up", upload)
        assert (refused.value.status, refused.value.code) == (409, "dataset_exists")
        upload.write_bytes(LINES)
        assert client.upload_dataset("up", upload) == record
        assert (served.root / file).read_bytes() == data
        assert (client.wait(client.repair_index("x").id).result or {})["repaired"] == 0


def test_a_damaged_record_of_a_dataset_is_put_back_by_the_same_upload(
    served: Served, client: Client, tmp_path: Path
) -> None:
    record = client.dataset("up")
    upload = tmp_path / "up.jsonl"
    data = served.flip("datasets/up/record.json")
    upload.write_bytes(LINES)
    assert client.upload_dataset("up", upload) == record  # this process still knows it
    assert (served.root / "datasets/up/record.json").read_bytes() == data
    served.flip("datasets/up/record.json")
    redis = connect(served.world.lab._server.url)
    redis.delete("whence:datasets")
    served.registry.rebuild()  # as a start does: nobody knows it any more
    upload.write_bytes(b'{"text": "another"}\n')
    with pytest.raises(WhenceError) as told:
        client.upload_dataset("up", upload)
    assert (told.value.status, told.value.code) == (503, "damaged_record")
    assert "whence datasets add FILE --id up" in told.value.detail
    upload.write_bytes(LINES)
    again = client.upload_dataset("up", upload)
    assert (again.fingerprint, again.files) == (record.fingerprint, record.files)
    redis.delete("whence:datasets")
    served.registry.rebuild()
    assert client.dataset("up") == again
    redis.close()


def test_the_quarantine_of_a_damaged_version_says_so_too(served: Served, client: Client) -> None:
    manifest = indexes.read_manifest(served.world.storage, served.index)
    file = f"{shards.folder(manifest.sections[0].shards[0].key)}/shard.json"
    data = served.flip(file)
    response = httpx.get(f"{served.url}/v1/indexes/x/quarantine")
    assert (response.status_code, response.json()["param"]) == (503, file)
    (served.root / file).write_bytes(data)


@pytest.mark.parametrize("verb", ["verify", "repair"])
def test_an_unknown_version_is_404(served: Served, client: Client, verb: str) -> None:
    for reference in ("nothing", "x@v99", "x@v1x", "nothing@v1"):
        response = httpx.post(f"{served.url}/v1/indexes/{reference}/{verb}")
        assert response.status_code == 404, reference


def test_a_job_can_be_left_to_itself(served: Served, client: Client) -> None:
    for verb in ("verify", "repair"):
        code, output = served.cli("indexes", verb, "x", "--detach")
        assert code == 0
        assert client.wait(output.strip().splitlines()[-1]).state == JobState.SUCCEEDED


@pytest.mark.stack
def test_workers_on_ray_tell_damage_and_mend_it(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The error crosses processes: a worker reads λ, which is damaged, and the repair makes it again."""
    folder = tmp_path_factory.mktemp("ray")
    path = tiny.save(folder / "model", "llama", tiny.words(bos=True))
    (folder / "of-ray.jsonl").write_bytes(LINES)
    storage = Storage(str(stack.home / "storage"))
    with Client(stack.url) as client:
        client.add_model("of-ray", path)
        client.upload_dataset("of-ray", folder / "of-ray.jsonl")
        job = client.build_index("of-ray", model="of-ray", dataset="of-ray", layers=[2], kinds=["gradient"])
        client.wait(job.id)
        gradient = indexes.read_manifest(storage, client.index("of-ray")).spec.gradient
        assert gradient is not None and isinstance(gradient.projection, Eigen)
        facts = artifacts.get(storage, gradient.projection.curvature).facts
        of_lambda = artifacts.folder(next(str(key) for name, key in facts.items() if name.startswith("lambda:")))
        files = [f"{of_lambda}/lambda.safetensors"]
        files += [f"{artifacts.folder(gradient.projection.basis)}/spectrum.safetensors"]
        before = [storage.read(file) for file in files]
        for file, data in zip(files, before, strict=True):
            storage.write(file, data[:-3])
        assert (client.wait(client.verify_index("of-ray").id).result or {})["damaged"] == 2
        done = client.wait(client.repair_index("of-ray").id)
        assert sorted((done.result or {})["mended"]) == sorted(files)
        assert [storage.read(file) for file in files] == before
        shutil.rmtree(stack.home / "storage" / of_lambda)
        client.wait(client.repair_index("of-ray").id)  # nothing of it is left, and the same versions make the same
        assert storage.read(files[0]) == before[0]
