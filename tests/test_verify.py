"""Nothing is believed before it has been checked: every flipped bit and every cut is told, by file, before use."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import torch
from redis import Redis

from service import artifacts, codec, datasets, indexes, keys, shards, verify
from service.contracts import IndexRecord, JobRecord, Place
from service.errors import Damaged
from service.registry import DATASETS, Registry
from service.storage import Storage
from service.work import PassSpec, SumSpec
from tests.whole import ASKED, Spy, Whole, broken

CASES = 1000
SEED = int(os.environ.get("TEST_SEED", "20260301"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    threads = torch.get_num_threads()
    made = Whole(tmp_path_factory.mktemp("verify"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(world: Whole) -> IndexRecord:
    """The second version of ``x``; the first one is smaller, and answers other things."""
    world.build("x", ("activation",))
    made = world.build("x")
    for name in ASKED:  # what needs a job first has it now
        found = world.ask(name, made.id)
        if isinstance(found, JobRecord):
            world.run_job(found)
    world.run_job(world.tokens(made.id))
    return made


def read_by(world: Whole, index: IndexRecord, name: str) -> set[str]:
    """What a process that has just started reads for a query, Redis being empty."""
    world.redis.flushall()
    spy = Spy(world.storage.root)
    world.tokens(index.id, spy) if name == "tokens" else world.ask(name, index.id, spy)
    return spy.keys


def checked(world: Whole, index: IndexRecord) -> set[str]:
    spy = Spy(world.storage.root)
    report = verify.verify(spy, index.id, threads=1)
    assert report.damage == ()
    assert report.files == len(spy.keys)
    return spy.keys


# --- what is looked at --------------------------------------------------------------------------------


def test_an_intact_version_has_no_damage_and_every_kind_of_file(world: Whole, index: IndexRecord) -> None:
    kinds = Counter(key.split("/")[0] for key in checked(world, index))
    assert kinds.keys() == {"indexes", "models", "datasets", "concepts", "shards", "artifacts"}
    manifest = indexes.read_manifest(world.storage, index)
    assert {array.kind for array in manifest.arrays} == {"activation", "gradient", "influence"}
    assert len(manifest.sections[0].shards) == 2


def test_what_sums_over_the_run_were_made_of_is_verified_too(world: Whole, index: IndexRecord) -> None:
    """Token shares read the passes at every point, and their heads and curvature."""
    files = checked(world, index)
    ref = indexes.read_manifest(world.storage, index).sections[1].shards[0]
    total = shards.read_manifest(world.storage, ref.key).work
    assert isinstance(total, SumSpec) and len(total.sources) == 2
    for key, _ in total.sources:
        source = shards.read_manifest(world.storage, key)
        assert isinstance(source.work, PassSpec) and source.work.influence is not None
        assert {f"{shards.folder(key)}/{name}" for name in ("shard.json", *source.files)} <= files
        for artifact in (source.work.influence.curvature, *(head.artifact for head in source.work.influence.heads)):
            assert f"{artifacts.folder(artifact)}/artifact.json" in files
        facts = artifacts.get(world.storage, source.work.influence.curvature).facts
        named = [str(each) for fact, each in facts.items() if fact.startswith(("eigen:", "lambda:"))]
        assert len(named) == 8
        assert {f"{artifacts.folder(each)}/artifact.json" for each in named} <= files


@pytest.mark.parametrize("name", [*ASKED, "tokens"])
def test_what_a_query_reads_is_verified(world: Whole, index: IndexRecord, name: str) -> None:
    """All of it, but for the records of others that a restart reads and answers that can be computed again."""
    read = {key for key in read_by(world, index, name) if not key.startswith(("indexes/x@v1/", "models/"))}
    answers = read - checked(world, index)
    assert {key.split("/")[0] for key in answers} <= {"artifacts"}
    assert len({key.split("/")[2] for key in answers}) == (name in {"loss", "tokens"})
    assert len(read - answers) > 6


def test_progress_is_in_bytes_and_complete(world: Whole, index: IndexRecord) -> None:
    told: list[tuple[str, int, int, str]] = []
    report = verify.verify(world.storage, index.id, progress=lambda *each: told.append(each))
    of_files = [(done, total) for stage, done, total, unit in told if unit == "bytes"]
    assert of_files[0] == (0, report.bytes)
    assert of_files[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in of_files] == sorted(done for done, _ in of_files)
    sizes = sum((world.root / key).stat().st_size for key in checked(world, index) if not key.endswith(".json"))
    assert report.bytes == sizes


def test_a_stopped_verification_ends(world: Whole, index: IndexRecord) -> None:
    def stop(stage: str, *_rest: object) -> None:
        if stage == "files":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify.verify(world.storage, index.id, progress=stop)


def test_a_missing_file_is_told_as_missing(world: Whole, index: IndexRecord) -> None:
    for file in sorted(checked(world, index)):
        path = world.root / file
        data = path.read_bytes()
        path.unlink()
        found = verify.verify(world.storage, index.id, known=index).damage
        path.write_bytes(data)
        if file.startswith("concepts/") and file.endswith("record.json"):
            assert found == ()  # a folder without a record is no concept
            continue
        assert [(each.file, each.what) for each in found] == [(file, verify.MISSING)]


def test_several_damaged_files_are_all_told(world: Whole, index: IndexRecord) -> None:
    files = [key for key in sorted(checked(world, index)) if not key.endswith(".json")]
    before = {key: (world.root / key).read_bytes() for key in files}
    for key, data in before.items():
        (world.root / key).write_bytes(broken(data, random.Random(key)))
    found = verify.verify(world.storage, index.id, known=index).damage
    for key, data in before.items():
        (world.root / key).write_bytes(data)
    assert [each.file for each in found] == files
    assert {each.belongs_to for each in found} == {"shard", "artifact", "dataset", "concept"}


def test_a_shard_that_another_machine_has_made_is_damage_although_it_agrees_with_itself(
    world: Whole, index: IndexRecord
) -> None:
    ref = indexes.read_manifest(world.storage, index).sections[0].shards[0]
    path = world.root / f"shards/{ref.key[:2]}/{ref.key}/shard.json"
    data = path.read_bytes()
    text = data.decode().partition('"record":')[2][:-1].replace('"threads":"1"', '"threads":"2"')
    path.write_text(codec.seal(text))
    (found,) = verify.verify(world.storage, index.id, known=index).damage
    path.write_bytes(data)
    assert (found.file, found.belongs_to, found.pinned) == (str(path.relative_to(world.root)), "shard", ref.sha256)


def test_every_bit_of_the_head_of_a_rows_file_matters(world: Whole, index: IndexRecord) -> None:
    """numpy reads it before there is a hash to compare: no flip may end in an error of its own."""
    ref = indexes.read_manifest(world.storage, index).sections[0].shards[0]
    manifest = shards.read_manifest(world.storage, ref.key)
    for array in manifest.arrays:
        path = world.root / shards.folder(ref.key) / array.file
        data, out = path.read_bytes(), np.zeros((len(manifest.ids), array.info.dims), dtype=np.float16)
        shards.read_into(world.storage, manifest, array.info, out)
        for place in range(128):
            for bit in range(8):
                path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
                with pytest.raises(Damaged):
                    shards.read_into(world.storage, manifest, array.info, out)
        path.write_bytes(data)
        shards.read_into(world.storage, manifest, array.info, out)


# --- a thousand flips and cuts ------------------------------------------------------------------------


def test_every_flip_and_every_cut_is_noticed_before_use(world: Whole, index: IndexRecord) -> None:
    """Verify tells exactly the file; a query that reads it says so, and one that does not gives the same answer."""
    print(f"seed {SEED}: TEST_SEED={SEED} replays this")
    rng = random.Random(SEED)
    reads = {name: read_by(world, index, name) for name in ASKED}
    answers = {name: world.ask(name, index.id) for name in ASKED}
    files = sorted(checked(world, index))
    by_kind = {
        kind: [key for key in files if key.startswith(kind)] for kind in {key.split("/")[0] for key in files}
    }
    told: Counter[str] = Counter()
    for case in range(CASES):
        # As many of each kind, though there are a hundred artifacts for every dataset.
        file = rng.choice(by_kind[rng.choice(sorted(by_kind))])
        path = world.root / file
        data = path.read_bytes()
        path.write_bytes(broken(data, rng))
        about = f"case {case} of seed {SEED}: {file}"
        world.redis.flushall()
        found = verify.verify(Storage(world.storage.root), index.id, threads=1).damage
        assert [each.file for each in found] == [file], about
        readers = [name for name in ASKED if file in reads[name]]
        name = rng.choice(readers or list(ASKED))
        reference = rng.choice(["x", "x@v2"])
        try:
            answer = world.ask(name, reference)
        except Damaged as error:
            assert error.param == file or (file.startswith("indexes/x@v2") and reference == "x"), about
            assert error.context["repair"] or file.startswith("concepts/"), about
            told["damaged"] += 1
        else:
            assert answer == answers[name], about
            assert file not in reads[name] or file.startswith("indexes/x@v1") or _of_others(file), about
            told["same answer"] += 1
        path.write_bytes(data)
    assert told["damaged"] > CASES // 4
    assert told["same answer"] > CASES // 20
    for name, answer in answers.items():
        assert world.ask(name, "x") == answer


def _of_others(file: str) -> bool:
    """Read when Redis is filled again, and of no consequence for an answer."""
    return file.startswith("models/")


# --- seals ----------------------------------------------------------------------------------------------


def test_a_seal_breaks_with_any_bit_any_cut_and_anything_added() -> None:
    record = Place("é 😀.jsonl", 7)
    sealed = codec.seal(codec.encode(record)).encode()
    assert codec.unseal(Place, sealed) == codec.unseal(Place, sealed.decode()) == record
    wrong = [sealed[:stop] for stop in range(len(sealed))]
    wrong += [sealed + more for more in (b" ", b"\n", b"}", sealed)]
    for place in range(len(sealed)):
        for bit in range(8):
            wrong.append(sealed[:place] + bytes([sealed[place] ^ (1 << bit)]) + sealed[place + 1 :])
    for data in (*wrong, codec.encode(record).encode()):
        with pytest.raises(ValueError):
            codec.unseal(Place, data)
    own = json.loads(sealed)["sha256"]
    assert codec.unseal(Place, sealed, sha256=own) == record
    with pytest.raises(ValueError):
        codec.unseal(Place, sealed, sha256=own[::-1])


def test_a_damaged_copy_in_redis_is_not_believed(registry: Registry, redis: Redis, storage: Storage) -> None:
    parsed = datasets.parse(
        BytesIO(b'{"text": "one"}'), "f", quarantine_malformed=False, max_bytes=99, max_line_bytes=99
    )
    record = datasets.publish(storage, "d", parsed)
    registry.add(DATASETS, "d", record)
    held = str(redis.hget(keys.records("datasets"), "d"))
    for damaged in (held.replace('"lines":1', '"lines":2'), held[:-1], "", "{}"):
        redis.hset(keys.records("datasets"), "d", damaged)
        fresh = Registry(redis, storage)  # another process
        assert fresh.remembered(DATASETS, "d") is None
        assert fresh.all(DATASETS) == registry.all(DATASETS) == [record]
        assert redis.hget(keys.records("datasets"), "d") == held  # and it is put right
