"""Repair gives back the same bytes, or says why it cannot and leaves nothing that reads as intact and is wrong."""

import dataclasses
import random
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

from service import artifacts, datasets, indexes, results, shards, verify
from service.contracts import IndexRecord, JobRecord
from service.errors import Damaged
from service.registry import CONCEPTS, DATASETS, INDEXES
from service.terms import JobKind
from service.work import PassSpec, SumSpec
from tests.whole import ASKED, Whole, broken
from workers import passes
from workers.actor import Worker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    threads = torch.get_num_threads()
    made = Whole(tmp_path_factory.mktemp("repair"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(world: Whole) -> IndexRecord:
    return world.build("x")


@pytest.fixture(scope="module")
def extended(world: Whole, index: IndexRecord) -> IndexRecord:
    """A version that was made from another one: its gradient rows are those of ``index``."""
    return world.extend(index)


@pytest.fixture
def whole(world: Whole, index: IndexRecord) -> Iterator[dict[str, bytes]]:
    """Every file as it was, and again afterwards."""
    world.registry.rebuild()
    before = world.everything()
    yield before
    world.put_back(before)


def damage(world: Whole, *files: str, seed: int = 0) -> None:
    for file in files:
        path = world.root / file
        path.write_bytes(broken(path.read_bytes(), random.Random(f"{seed} {file}")))


def files_of(world: Whole, index: IndexRecord, section: int = 0, number: int = 0) -> dict[str, str]:
    """Paths of a shard's files by their names."""
    ref = indexes.read_manifest(world.storage, index).sections[section].shards[number]
    folder = shards.folder(ref.key)
    return {name: f"{folder}/{name}" for name in world.storage.files(folder)}


def basis_of(world: Whole, index: IndexRecord) -> str:
    gradient = indexes.read_manifest(world.storage, index).spec.gradient
    assert gradient is not None
    return artifacts.folder(gradient.projection.basis)  # pyright: ignore[reportAttributeAccessIssue]


def heal(world: Whole, index: IndexRecord | str) -> dict[str, Any]:
    return world.job(JobKind.REPAIR_INDEX, index if isinstance(index, str) else index.id)


def is_whole(world: Whole, index: IndexRecord, before: dict[str, bytes]) -> bool:
    """The version is intact, and every file of the storage is what it was."""
    return verify.verify(world.storage, index.id).damage == () and world.everything() == before


# --- the same bytes -------------------------------------------------------------------------------------


def test_an_intact_version_is_left_alone(world: Whole, index: IndexRecord, whole: dict[str, bytes]) -> None:
    assert heal(world, index)["repaired"] == 0
    assert world.everything() == whole


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["shard.json", "rows", "scale", "summed", "all of a shard"])
def test_a_damaged_shard_is_the_same_again(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], kind: str, seed: int
) -> None:
    files = files_of(world, index, section=1 if kind == "summed" else 0, number=1)
    rows = next(name for name in files if name.endswith(".npy"))
    scale = next(name for name in files if name.endswith(".scale.npy"))
    wanted = {"shard.json": ["shard.json"], "rows": [rows], "scale": [scale], "summed": [rows]}.get(
        kind, list(files)
    )
    damage(world, *(files[name] for name in wanted), seed=seed)
    result = heal(world, index)
    assert result["repaired"] == len(result["mended"])
    assert set(result["mended"]) <= {files[name] for name in wanted}
    assert is_whole(world, index, whole)


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_artifact_is_the_same_again(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], how: str
) -> None:
    """Whichever it is: one file after the other of the basis, of J, of a head and of the curvature."""
    files = sorted(file for file in whole if file.startswith("artifacts/") and file in reachable(world, index))
    by_folder: dict[str, list[str]] = {}
    for file in files:
        by_folder.setdefault(file.rpartition("/")[0], []).append(file)
    assert len(by_folder) > 8
    for of_folder in by_folder.values():
        file = random.Random(str(of_folder)).choice(of_folder)
        damage(world, file) if how == "flipped" else (world.root / file).unlink()
        assert heal(world, index)["mended"] == [file]
        assert is_whole(world, index, whole), file


def reachable(world: Whole, index: IndexRecord) -> set[str]:
    from tests.whole import Spy

    spy = Spy(world.storage.root)
    verify.verify(spy, index.id, threads=1)
    return spy.keys


def test_a_shard_of_the_version_it_was_made_from_is_repaired_too(
    world: Whole, extended: IndexRecord, whole: dict[str, bytes]
) -> None:
    kinds = [[array.kind for array in section.arrays] for section in world_sections(world, extended)]
    assert kinds[0] == ["activation", "gradient"]
    for section in (0, len(kinds) - 1):  # a pass of the parent's, and what the version itself has read off it
        files = files_of(world, extended, section=section)
        damage(world, *(file for name, file in files.items() if name.endswith(".npy")))
    heal(world, extended)
    assert is_whole(world, extended, whole)


def world_sections(world: Whole, index: IndexRecord) -> Any:
    return indexes.read_manifest(world.storage, index).sections


def test_what_a_sum_was_made_of_is_repaired_although_no_index_names_it(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    ref = world_sections(world, index)[1].shards[0]
    work = shards.read_manifest(world.storage, ref.key).work
    assert isinstance(work, SumSpec)
    folder = shards.folder(work.sources[0][0])
    damage(world, f"{folder}/shard.json", *files_of(world, index, section=1).values())
    heal(world, index)
    assert is_whole(world, index, whole)


@pytest.mark.parametrize("file", ["manifest.json", "record.json", "build.json"])
@pytest.mark.parametrize("flushed", [False, True], ids=["redis", "flushed"])
def test_damaged_manifests_and_records_are_written_again(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], file: str, flushed: bool
) -> None:
    damage(world, f"indexes/{index.id}/{file}")
    if flushed:
        world.redis.flushall()
        world.registry.rebuild()
    if file == "build.json":  # the job's own record says the same, as long as there is one
        with pytest.raises(Damaged) as told:
            heal(world, index)
        assert (told.value.code, told.value.param) == ("cannot_repair", f"indexes/{index.id}/build.json")
        assert "build a new version" in told.value.detail
        return
    heal(world, index)
    assert is_whole(world, index, whole)


def test_build_json_is_written_again_from_its_job(world: Whole, whole: dict[str, bytes]) -> None:
    plain = indexes.read_build(world.storage, "x@v1").spec
    job = world.lab.jobs.submit(JobKind.BUILD_INDEX, {**plain, "name": "of-a-job", "version": 1})
    made = world.registry.get(INDEXES, world.run_job(job)["index"])
    file = f"indexes/{made.id}/build.json"
    before = indexes.read_build(world.storage, made.id)
    damage(world, file)
    assert heal(world, made)["mended"] == [file]
    after = indexes.read_build(world.storage, made.id)
    assert dataclasses.replace(after, versions=before.versions) == before


def test_everything_of_a_version_at_once(world: Whole, index: IndexRecord, whole: dict[str, bytes]) -> None:
    """All that can be computed is damaged, one file of each shard and artifact; nothing but build.json is left."""
    files = {f"indexes/{index.id}/manifest.json"}
    folders: set[str] = set()
    for file in sorted(reachable(world, index)):
        folder = file.rpartition("/")[0]
        if (
            file.startswith(("shards/", "artifacts/"))
            and folder not in folders
            and not file.endswith("artifact.json")
        ):
            folders.add(folder)
            files.add(file)
    damage(world, *files)
    heal(world, index)
    assert is_whole(world, index, whole)


def test_answers_are_the_same_after_a_repair_without_a_restart(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    service = world.service()
    answer = world.ask("vector filter", index.id)
    rows = next(file for name, file in files_of(world, index).items() if name.startswith("00.activation"))
    damage(world, rows)
    with pytest.raises(Damaged):
        world.ask("vector filter", index.id)
    from service.questions import Query
    from service.terms import Order

    query = Query(index=index.id, order=Order.MOST, k=5, **ASKED["vector filter"])
    with pytest.raises(Damaged) as told:
        service.run(query)
    assert (told.value.param, told.value.context["repair"]) == (rows, f"whence indexes repair {index.id}")
    heal(world, index)
    found = service.run(query)
    assert [(hit.rank, hit.score, hit.example.id) for hit in found.hits] == answer  # pyright: ignore


# --- what is not touched goes on --------------------------------------------------------------------------


def test_other_arrays_and_other_versions_are_still_answered(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    other = world.build("other", ("activation",), long_examples="quarantine")
    answers = {name: world.ask(name, index.id) for name in ("vector filter", "embeddings")}
    of_other = world.ask("vector filter", other.id)
    files = files_of(world, index)
    damage(world, next(file for name, file in files.items() if name.startswith("00.activation")))
    with pytest.raises(Damaged):
        world.ask("vector filter", index.id)
    assert world.ask("embeddings", index.id) == answers["embeddings"]
    assert world.ask("vector filter", other.id) == of_other
    # and so it is while the repair runs: what is damaged is marked, not taken away
    results.mark(world.storage, shards.folder(world_sections(world, index)[0].shards[0].key))
    assert world.ask("embeddings", index.id) == answers["embeddings"]


# --- other bytes ------------------------------------------------------------------------------------------


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come out a little different, as with another library."""
    rows = Worker._rows

    def drifted(self: Worker, task: Any, work: Any) -> Any:
        result, encoding = rows(self, task, work)
        moved = {info: (values * np.float32(1.01)).astype(np.float32) for info, values in result.arrays.items()}
        return dataclasses.replace(result, arrays=moved), encoding

    monkeypatch.setattr(Worker, "_rows", drifted)


@pytest.mark.usefixtures("other_machine")
@pytest.mark.parametrize("kind", ["shard.json", "rows"])
def test_other_bytes_are_refused_and_nothing_is_replaced(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], kind: str
) -> None:
    files = files_of(world, index, number=1)
    file = files["shard.json"] if kind == "shard.json" else next(iter(files.values()))
    damage(world, file)
    broken_now = world.everything()
    with pytest.raises(Damaged) as told:
        heal(world, index)
    assert told.value.code == "cannot_repair_exactly"
    assert told.value.context["shard"] == 1
    assert "Shard 1 of x@v1 (activation, gradient)" in told.value.detail
    assert "build a new version" in told.value.detail
    assert [each.file for each in verify.verify(world.storage, index.id).damage] == [file]
    now = world.everything()
    mark = f"{file.rpartition('/')[0]}/{results.MARK}"
    assert {name: data for name, data in now.items() if name != mark} == broken_now
    with pytest.raises(Damaged):
        world.ask("vector filter", index.id)


@pytest.mark.usefixtures("other_machine")
def test_a_new_version_can_be_built_where_repair_was_impossible(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    file = next(iter(files_of(world, index).values()))
    damage(world, file)
    with pytest.raises(Damaged):
        heal(world, index)
    new = world.build("x")
    assert verify.verify(world.storage, new.id).damage == ()
    assert world.ask("vector filter", new.id)
    with pytest.raises(Damaged):  # the old one is not answered from the new rows
        world.ask("vector filter", index.id)


def test_an_artifact_never_changes_under_an_index(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index names an artifact by its hash: other bytes in its place would be believed."""
    from workers.works import choice

    basis = choice.basis
    folder = basis_of(world, index)

    def drifted(*args: Any) -> Any:
        tensors, facts = basis(*args)
        for named in tensors.values():
            if "scale" in named:
                named["scale"] = named["scale"] * np.float32(1.01)
        return tensors, facts

    monkeypatch.setitem(__import__("workers.works", fromlist=["_COMPUTE"])._COMPUTE, repair_basis(), drifted)
    answer = world.ask("vector filter", index.id)
    for file in sorted(file for file in whole if file.startswith(folder)):
        damage(world, file)
        for attempt in (lambda: heal(world, index), lambda: world.build("x")):
            with pytest.raises(Damaged) as told:
                attempt()
            assert told.value.code == "cannot_repair_exactly"
            now = world.everything()
            assert all(now[name] == data for name, data in whole.items() if name != file)
        assert world.ask("vector filter", index.id) == answer
        (world.root / file).write_bytes(whole[file])
        (world.root / folder / results.MARK).unlink()
    damage(world, f"{folder}/artifact.json")  # and no mark yet
    with pytest.raises(Damaged) as told:
        world.build("x")
    assert told.value.code == "cannot_repair_exactly"
    assert all(
        data == whole[name]
        for name, data in world.everything().items()
        if name.endswith(".safetensors") and name in whole
    )


def repair_basis() -> type:
    from service.work import BasisWork

    return BasisWork


# --- what cannot be computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d", "q"])
def test_damaged_texts_wait_for_the_same_file(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], name: str
) -> None:
    record = world.registry.get(DATASETS, name)
    file = f"datasets/{name}/{next(iter(record.files))}"
    rows = next(iter(files_of(world, index).values()))
    damage(world, file, rows)
    with pytest.raises(Damaged) as told:
        heal(world, index)
    assert (told.value.code, told.value.param) == ("cannot_repair", file)
    assert f"whence datasets add FILE --id {name}" in told.value.detail
    assert world.everything() == {**whole, file: world.storage.read(file), rows: world.storage.read(rows)}
    (world.root / file).write_bytes(whole[file])
    heal(world, index)
    assert is_whole(world, index, whole)


def test_a_damaged_concept_is_told_and_the_rest_is_repaired(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    concept = world.registry.get(CONCEPTS, "v")
    file = f"concepts/v/direction-{concept.sha256[:16]}.safetensors"
    rows = next(iter(files_of(world, index).values()))
    damage(world, file, rows)
    with pytest.raises(Damaged) as told:
        heal(world, index)
    assert (told.value.code, told.value.param) == ("cannot_repair", file)
    assert "under another id" in told.value.detail
    assert told.value.context["mended"] == [rows]
    assert [each.file for each in verify.verify(world.storage, index.id).damage] == [file]
    with pytest.raises(Damaged) as asked:
        world.ask("vector filter", index.id)
    assert "under another id" in asked.value.detail


@pytest.mark.parametrize("file", ["models/m", "datasets/d", "datasets/q", "concepts/v", "indexes/x@v1"])
def test_records_come_back_from_their_copy_in_redis(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], file: str
) -> None:
    damage(world, f"{file}/record.json")
    heal(world, index)
    assert is_whole(world, index, whole)


def test_a_damaged_record_that_redis_has_forgotten_too_is_told(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    damage(world, "models/m/record.json")
    world.redis.flushall()
    world.registry.rebuild()
    with pytest.raises(Damaged) as told:
        heal(world, index)
    assert told.value.param == "models/m/record.json"
    assert world.everything()["models/m/record.json"] != whole["models/m/record.json"]


# --- interrupted, and by others -------------------------------------------------------------------------------


def test_a_repair_that_was_killed_is_done_by_the_next_one(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write: whatever is there then reads as damaged or is right, and the next repair mends it."""
    files = [*files_of(world, index).values(), *files_of(world, index, section=1).values()]
    chosen = [file for file in files if file.endswith(".npy")][::2]
    answers = {name: world.ask(name, index.id) for name in ("vector filter", "embeddings")}
    write, count = type(world.storage).write, 0

    class Killed(BaseException):
        pass

    def dying(self: Any, key: str, data: bytes) -> str:
        nonlocal count
        count += 1
        if count >= limit:  # and nothing after it either
            raise Killed
        return write(self, key, data)

    killed = 0
    for limit in range(1, 40):
        damage(world, *chosen, seed=limit)
        count = 0
        with monkeypatch.context() as patched:
            patched.setattr(type(world.storage), "write", dying)
            try:
                heal(world, index)
            except Killed:
                killed += 1
        for name, answer in answers.items():
            try:
                assert world.ask(name, index.id) == answer
            except Damaged:
                assert count >= limit
        heal(world, index)
        assert verify.verify(world.storage, index.id).damage == ()
        world.build("x")  # takes marks away that nobody needs any more
        now = world.everything()
        assert {name: now.get(name) for name in whole} == whole
        assert not [name for name in now if name.endswith(results.MARK)]
        if count < limit:
            break
    assert killed > 6


def test_a_build_that_meets_damage_makes_it_again(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    """Half-written and damaged manifests are absent; a damaged file that is read is made again."""
    sources = shards.read_manifest(world.storage, world_sections(world, index)[1].shards[0].key).work
    assert isinstance(sources, SumSpec)
    folder = shards.folder(sources.sources[0][0])
    of_sum = files_of(world, index, section=1)
    damage(world, of_sum["shard.json"])
    for name in world.storage.files(folder):
        if name.endswith(".npy"):
            damage(world, f"{folder}/{name}")
    world.build("again")
    assert verify.verify(world.storage, index.id).damage == ()
    now = world.everything()
    assert {name: now.get(name) for name in whole} == whole


def test_an_estimate_counts_what_is_damaged_and_changes_nothing(
    world: Whole, index: IndexRecord, whole: dict[str, bytes]
) -> None:
    spec = indexes.read_build(world.storage, index.id).spec

    def estimate() -> list[str]:
        job = world.lab.jobs.submit(JobKind.ESTIMATE_INDEX, {"build": {**spec, "name": "e", "version": 1}})
        return [stage["name"] for stage in world.run_job(job)["stages"]]

    assert "checkpoint 2 of 2: rows" not in estimate()
    damage(world, f"{basis_of(world, index)}/artifact.json", files_of(world, index)["shard.json"])
    for _ in range(2):
        before = world.everything()
        assert {"checkpoint 2 of 2: choosing coordinates", "checkpoint 2 of 2: rows"} <= set(estimate())
        assert world.everything() == before
        results.mark(world.storage, basis_of(world, index))


def test_a_damaged_answer_is_asked_for_again(world: Whole, index: IndexRecord, whole: dict[str, bytes]) -> None:
    before = world.everything().keys()
    for ask in (lambda: world.ask("loss", index.id), lambda: world.tokens(index.id)):
        job = ask()
        assert isinstance(job, JobRecord)
        world.run_job(job)
        answer = ask()
        made = world.everything().keys() - before
        for file in sorted(made):
            data = world.storage.read(file)
            damage(world, file)
            found = ask()
            if isinstance(found, JobRecord):
                world.run_job(found)
                found = ask()
            assert found == answer
            (world.root / file).write_bytes(data)
        before = world.everything().keys()


# --- the small parts ------------------------------------------------------------------------------------------


def test_the_files_of_a_dataset_come_back_with_the_same_upload(world: Whole, whole: dict[str, bytes]) -> None:
    def parsed(text: bytes) -> datasets.Parsed:
        return datasets.parse(
            BytesIO(text), "f.jsonl", quarantine_malformed=False, max_bytes=1 << 20, max_line_bytes=1 << 20
        )

    text = b'{"text": "one"}\n{"text": "two"}\n'
    record = datasets.publish(world.storage, "up", parsed(text))
    files = {f"datasets/up/{name}" for name in record.files}
    assert datasets.mend(world.storage, record, parsed(text)) == []
    for file in files:
        data = world.storage.read(file)
        damage(world, file)
        assert datasets.mend(world.storage, record, parsed(text)) == [file]
        assert world.storage.read(file) == data
        world.storage.remove(file)
        assert datasets.mend(world.storage, record, parsed(text)) == [file]
        assert world.storage.read(file) == data
    adopted = datasets.adopt(world.storage, "up", parsed(text))
    assert adopted is not None and dataclasses.replace(adopted, created_at=record.created_at) == record
    assert datasets.adopt(world.storage, "up", parsed(b'{"text": "other"}\n')) is None
    assert datasets.adopt(world.storage, "nothing", parsed(text)) is None


def test_build_json_says_how_to_build_the_version_again(world: Whole, index: IndexRecord) -> None:
    built = indexes.read_build(world.storage, index.id)
    assert (built.kind, built.spec["name"], built.job) == (JobKind.BUILD_INDEX, "x", index.job)
    assert built.created_at == index.created_at


def test_a_result_without_a_trace_is_made_again_by_the_same_versions_only(
    world: Whole, whole: dict[str, bytes]
) -> None:
    storage = world.storage
    made = artifacts.publish(storage, "00" * 32, {"a": {"x": np.ones(3)}}, versions={"torch": "1"})
    folder = artifacts.folder(made.key)
    for versions, fine in (({"torch": "1"}, True), ({"torch": "2"}, False), (None, False)):
        for name in storage.files(folder):
            storage.remove(f"{folder}/{name}")
        results.mark(storage, folder, versions=versions)
        again = lambda: artifacts.publish(storage, made.key, {"a": {"x": np.ones(3)}}, versions={"torch": "1"})  # noqa: E731
        if fine:
            assert again() == made
            assert storage.files(folder) == ["a.safetensors", "artifact.json"]
        else:
            with pytest.raises(Damaged):
                again()
            assert storage.files(folder) == [results.MARK]


def test_what_was_made_with_other_batches_is_made_with_those_again(
    world: Whole, index: IndexRecord, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version may find results from before the token budget was lowered: its own job would round differently."""
    settings = world.lab.settings
    world.lab.settings = settings.model_copy(update={"token_budget": 16})
    try:
        later = world.build("lowered")
    finally:
        world.lab.settings = settings
    found = indexes.read_manifest(world.storage, later)
    assert found.sections == indexes.read_manifest(world.storage, index).sections  # nothing was made anew
    before, budgets, run = world.everything(), set(), passes.run

    def watched(loaded: Any, readout: Any, spec: PassSpec, examples: Any) -> passes.PassResult:
        budgets.add(spec.token_budget)
        return run(loaded, readout, spec, examples)

    monkeypatch.setattr(passes, "run", watched)
    for file in (file for name, file in files_of(world, later).items() if name.endswith(".npy")):
        (world.root / file).unlink()
        assert heal(world, later)["mended"] == [file]
        assert is_whole(world, later, before), file
    assert budgets == {settings.token_budget}
    numbers = [file for file in before if file.startswith("artifacts/") and file.endswith(".safetensors")]
    read_texts = {file for file in numbers if b"token_budget" in before[f"{file.rpartition('/')[0]}/artifact.json"]}
    assert len(read_texts) > 10  # sums of the curvature, rows of J: behind what the version names
    for file in read_texts | (set(numbers) & reachable(world, later)):
        (world.root / file).unlink()
    heal(world, later)
    now = world.everything()
    assert verify.verify(world.storage, later.id).damage == ()
    assert len(read_texts & now.keys()) > 10  # others nothing had to be made of
    assert all(now.get(file, data) == data for file, data in before.items())
    assert before.keys() - now.keys() <= read_texts
