"""Repair of versions that were made from others: what was deleted, what was compacted, and who came before."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from service import artifacts, indexes, results, shards, verify
from service.errors import Damaged
from service.life import plan_append, plan_compact, plan_delete
from service.registry import INDEXES
from service.specs import IndexManifest
from service.terms import JobKind
from service.work import CompactSpec
from tests.whole import TRAIN, Whole, example


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """``x``: built, appended to (@v2), three deleted by a filter (@v3), two by id (@v4), compacted (@v5)."""
    threads = torch.get_num_threads()
    made = Whole(tmp_path_factory.mktemp("life"))
    lab = made.lab
    made.build("x", kinds=("activation",))
    lab.dataset("more", [example(number) for number in range(20, 27)])
    lab.run(JobKind.APPEND_INDEX, plan_append("x", "more", lab.registry, lab.storage, lab.settings))
    by_filter = plan_delete("x", None, {"number": {"lt": 3}}, lab.registry, lab.storage)
    lab.run(JobKind.DELETE_EXAMPLES, by_filter)
    by_id = plan_delete("x", [TRAIN[4].id, TRAIN[7].id], None, lab.registry, lab.storage)
    lab.run(JobKind.DELETE_EXAMPLES, by_id)
    lab.run(JobKind.COMPACT_INDEX, plan_compact("x", 100, lab.registry, lab.storage))
    yield made
    lab.close()
    torch.set_num_threads(threads)


@pytest.fixture
def whole(world: Whole) -> Iterator[dict[str, bytes]]:
    before = world.everything()
    yield before
    world.put_back(before)


def flip(world: Whole, file: str) -> None:
    data = bytearray((world.root / file).read_bytes())
    data[len(data) // 2] ^= 1
    (world.root / file).write_bytes(data)


def manifest(world: Whole, version: str) -> IndexManifest:
    return indexes.read_manifest(world.storage, world.registry.get(INDEXES, version))


def deleted(world: Whole, version: str) -> str:
    key = manifest(world, version).deleted
    assert key is not None
    return artifacts.folder(key)


def heal(world: Whole, version: str) -> dict[str, Any]:
    return world.job(JobKind.REPAIR_INDEX, version)


@pytest.mark.parametrize("version", ["x@v3", "x@v4", "x@v5"])
@pytest.mark.parametrize("how", ["ids", "manifest", "gone"])
def test_what_was_deleted_is_made_again(world: Whole, whole: dict[str, bytes], version: str, how: str) -> None:
    folder = deleted(world, version)
    if how == "gone":
        shutil.rmtree(world.root / folder)
    else:
        flip(world, f"{folder}/{'artifact.json' if how == 'manifest' else 'deleted.safetensors'}")
    assert verify.verify(world.storage, version).damage
    assert heal(world, version)["repaired"] == 1
    assert world.everything() == whole


def test_a_request_that_meets_damaged_ids_of_an_earlier_one_writes_them_again(
    world: Whole, whole: dict[str, bytes]
) -> None:
    spec = indexes.read_build(world.storage, "x@v4").spec
    flip(world, f"{artifacts.folder(spec['ids'])}/deleted.safetensors")
    again = plan_delete("x@v3", [TRAIN[7].id, TRAIN[4].id], None, world.registry, world.storage)
    assert again.ids == spec["ids"]
    assert world.everything() == whole


def test_where_both_copies_of_the_ids_are_damaged_the_one_to_put_back_is_named(
    world: Whole, whole: dict[str, bytes]
) -> None:
    asked = f"{artifacts.folder(indexes.read_build(world.storage, 'x@v4').spec['ids'])}/deleted.safetensors"
    flip(world, asked)
    flip(world, f"{deleted(world, 'x@v4')}/deleted.safetensors")
    with pytest.raises(Damaged, match="backup") as told:
        heal(world, "x@v5")
    assert (told.value.code, told.value.param) == ("cannot_repair", asked)


@pytest.mark.parametrize("source", range(4))
def test_a_compacted_shard_whose_sources_are_damaged_too(
    world: Whole, whole: dict[str, bytes], source: int
) -> None:
    """Verification of the compacted version sees the first of them at most, and only when it can read its own."""
    (ref,) = manifest(world, "x@v5").sections[0].shards
    work = shards.read_manifest(world.storage, ref.key).work
    assert isinstance(work, CompactSpec) and len(work.sources) == 4
    for key in (ref.key, work.sources[source]):
        shutil.rmtree(world.root / shards.folder(key))
    assert heal(world, "x@v5")["repaired"] == 1
    assert world.everything() == whole


@pytest.mark.parametrize("version", ["x@v2", "x@v4", "x@v5"])
def test_a_record_that_redis_has_forgotten_is_written_again_with_a_shard_of_an_earlier_version(
    world: Whole, whole: dict[str, bytes], version: str
) -> None:
    key = manifest(world, version).sections[0].shards[0].key
    flip(world, f"indexes/{version}/record.json")
    flip(world, f"{shards.folder(key)}/shard.json")
    world.forget()
    assert heal(world, version)["repaired"] == 2
    assert world.everything() == whole


def test_a_damaged_parent_is_to_be_repaired_first(world: Whole, whole: dict[str, bytes]) -> None:
    key = manifest(world, "x@v2").sections[0].shards[-1].key
    shutil.rmtree(world.root / shards.folder(key))
    flip(world, "indexes/x@v1/manifest.json")
    with pytest.raises(Damaged, match="`whence indexes repair x@v1`"):
        heal(world, "x@v2")
    heal(world, "x@v1")
    assert heal(world, "x@v2")["repaired"] == 1
    assert world.everything() == whole


@pytest.mark.parametrize("version", ["x@v1", "x@v2"])
def test_a_manifest_that_nothing_vouches_for_makes_no_intact_shard_damaged(
    world: Whole, whole: dict[str, bytes], version: str
) -> None:
    ref = manifest(world, version).sections[0].shards[0]
    file = f"indexes/{version}/manifest.json"
    other = ("0" if ref.sha256[0] != "0" else "1") + ref.sha256[1:]
    (world.root / file).write_bytes(whole[file].replace(ref.sha256.encode(), other.encode()))
    flip(world, f"indexes/{version}/record.json")
    world.forget()
    with pytest.raises(Damaged) as told:
        heal(world, version)
    assert (told.value.code, told.value.param) == (results.NOT_EXACTLY, file)
    assert not [each for each in world.everything() if each.endswith(results.MARK)]
