"""Append, delete and compact against builds from scratch: every kind, every line counted, nothing done twice."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.lab import Quiet
from service import aliases, artifacts, indexes, keys, members, shards, token_shares, tombstones
from service.errors import Conflict, Damaged, Invalid
from service.life import plan_append, plan_delete
from service.planning import plan_index
from service.registry import DATASETS, INDEXES, record_file
from service.specs import TokenSharesSpec
from service.tasks import Task
from service.terms import ConceptFunction, IndexKind, JobKind, Method, Order
from service.work import CompactSpec, DifferenceSpec, PassSpec, ReadOffSpec, SumSpec
from tests import lives
from tests.exact import spearman
from tests.lives import ASKED, FIRST, MORE, World, ids_of

NEW = ids_of(map(lives.line, range(100, 111)))
INDEXED = ids_of(map(lives.line, range(40)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("life"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built(world):
    """Version 2 of ``x``: every kind, and embeddings that were read off coordinates later."""
    world.build("x")
    return world.extend("x@v1")


@pytest.fixture(scope="module")
def appended(world, built):
    return world.append("x", "more")[0]


@pytest.fixture(scope="module")
def whole(world):
    """Both files built at once, on the same sample of the curvature."""
    world.build("whole", "whole")
    return world.extend("whole")


def adds_up(counts) -> bool:
    return counts.lines == counts.indexed + counts.duplicates + counts.quarantined


# --- append -------------------------------------------------------------------------------------------------


def test_the_two_builds_have_the_same_passes(world, built, whole):
    """What makes the comparisons below exact: curvature, bases and heads are the same artifacts."""
    assert world.manifest(built).spec == world.manifest(whole).spec
    assert set(built.arrays) == set(whole.arrays)


@pytest.mark.parametrize("kind", ASKED)
def test_an_appended_index_ranks_as_one_that_was_built_of_everything(world, appended, whole, kind):
    ours = dict(world.ranking(appended, **ASKED[kind]))
    theirs = dict(world.ranking(whole, **ASKED[kind]))
    assert ours.keys() == theirs.keys() == set(INDEXED) | set(NEW)
    a, b = (np.array([[scores[item]] for item in sorted(ours)]) for scores in (ours, theirs))
    assert spearman(a, b).min() >= 0.999
    assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()
    assert len({round(score, 6) for score in ours.values()}) > 40  # and there is something to compare


def test_every_row_of_an_appended_index_is_that_of_a_build(world, appended, whole):
    assert len(appended.arrays) == 5
    for array in appended.arrays:
        ours, theirs = world.rows(appended, array), world.rows(whole, array)
        assert ours.keys() == theirs.keys()
        for item, row in theirs.items():
            assert np.abs(ours[item] - row).max() <= 1.2e-2 * np.abs(row).max(), (array, item)


def test_counts_are_those_of_both_files(world, built, appended, whole):
    assert adds_up(built.counts) and adds_up(appended.counts)
    assert appended.counts == whole.counts
    assert appended.quarantine_reasons == whole.quarantine_reasons
    assert Counter(item.reason for item in world.quarantined(appended)) == appended.quarantine_reasons
    assert (appended.parent, appended.datasets) == (built.id, ("first", "more"))
    assert built.counts.lines == len(FIRST) and appended.counts.lines == len(FIRST) + len(MORE)
    assert (built.counts.indexed, appended.counts.indexed) == (40, 51)


def test_the_result_says_what_became_of_the_new_lines(world, built):
    index, told = world.append(built.id, "more")
    said = {name: told[f"{name}_new"] for name in ("lines", "indexed", "duplicates", "quarantined")}
    # known: 36 to 39, 38 again, and what had been set aside; 105 twice. Set aside: two by the pass, one blank line.
    assert said == {"lines": len(MORE), "indexed": 11, "duplicates": 7, "quarantined": 3}
    assert told["index"] == index.id and told["parent"] == built.id


def test_the_bytes_of_old_shards_are_untouched_and_used(world, built):
    before = world.files(built)
    index, _ = world.append(built.id, "third")
    assert {path: about for path, about in world.files(index).items() if path in before} == before
    for old, new in zip(world.manifest(built).sections, world.manifest(index).sections, strict=True):
        assert new.shards[: len(old.shards)] == old.shards
        assert len(new.shards) > len(old.shards) and new.arrays == old.arrays


def test_an_append_computes_and_reads_only_what_is_new(world, built, monkeypatch):
    storage, registry = world.lab.storage, world.lab.registry
    world.file("fresh", map(lives.line, range(400, 410)))
    read: list[str] = []
    original = type(storage).read

    def watched(self, key: str, **about: Any) -> bytes:
        read.append(key)
        return original(self, key, **about)

    monkeypatch.setattr(type(storage), "read", watched)
    world.tasks.clear()
    index, _ = world.append(built.id, "fresh")
    kinds = Counter(type(task.work).__name__ for task in world.tasks)
    assert kinds == {"PassSpec": 4, "SumSpec": 2, "DifferenceSpec": 2, "AnswersWork": 2, "ReadOffSpec": 2}
    assert {task.dataset.id for task in world.tasks if task.dataset} == {"fresh"}
    old = {ref.key for section in world.manifest(built).sections for ref in section.shards}
    rows = [key for key in read if key.startswith("shards/") and key.endswith(".npy")]
    assert rows and not [key for key in rows if key.split("/")[2] in old]
    texts = [key for key in read if key.startswith("datasets/")]
    assert texts and all(key.startswith("datasets/fresh/") for key in texts if key.endswith(".parquet"))
    assert registry.get(INDEXES, index.id).counts.indexed == 50


def test_hits_show_the_text_and_every_place(world, appended):
    hits = {hit.example.id: hit.example for hit in world.ask(appended).hits}
    places = {
        number: [(place.file, place.line) for place in hits[ids_of([lives.line(number)])[0]].places]
        for number in (3, 38, 105)
    }
    assert places == {
        3: [("first.jsonl", 4), ("first.jsonl", 44)],
        38: [("first.jsonl", 42), ("more.jsonl", 3), ("more.jsonl", 17)],
        105: [("more.jsonl", 10), ("more.jsonl", 16)],
    }
    aside = {item.id: item for item in world.quarantined(appended)}
    once = aside[ids_of([lives.BAD[1]])[0]]
    assert [(place.file, place.line) for place in once.places] == [("first.jsonl", 22), ("more.jsonl", 18)]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("first", None),
        ("same-examples", [*FIRST, None, FIRST[0]]),
        ("part", FIRST[5:9] * 2),
        ("all-aside", [lives.WORSE[0]]),
        ("aside-before", [lives.BAD[0]]),
    ],
)
def test_what_adds_nothing_is_refused(world, built, name, rows):
    if rows is not None:
        world.file(name, rows)
    before = indexes.versions(world.lab.registry, "x")
    for reference in (built.id, "x"):
        with pytest.raises(Invalid) as refused:
            world.append(reference, name)
        assert (refused.value.code, refused.value.param) == ("nothing_to_append", "dataset")
    assert indexes.versions(world.lab.registry, "x") == before
    if name == "part":
        assert "8 lines are duplicates" in refused.value.detail


def test_another_dataset_under_the_id_of_a_part_is_refused(world):
    lab = world.lab
    world.file("changing", map(lives.line, range(700, 710)))
    index = world.build("changing", "changing", kinds=("activation",))
    lab.storage.remove(record_file(DATASETS, "changing"))
    lab.redis.hdel(keys.records("datasets"), "changing")
    lab.registry.rebuild()  # forgets what this process has read
    world.file("changing", map(lives.line, range(705, 715)))
    for reference in ("changing", index.id):
        with pytest.raises(Conflict) as refused:
            world.append(reference, "changing")
        assert refused.value.code == "dataset_changed"


def test_appends_that_are_planned_together_build_on_each_other(world):
    world.build("queue", kinds=("activation",))
    lab = world.lab
    specs = [plan_append("queue", name, lab.registry, lab.storage, lab.settings) for name in ("more", "third")]
    first, second = (world.run(JobKind.APPEND_INDEX, spec)[0] for spec in specs)
    assert (first.parent, second.parent) == ("queue@v1", first.id)
    assert second.datasets == ("first", "more", "third")
    assert adds_up(second.counts) and second.counts.indexed == 42 + 12 + 5  # 3 more have activations
    assert set(dict(world.ranking("queue"))) > {*INDEXED, *NEW, *ids_of(map(lives.line, range(111, 116)))}
    # a version that is named is the one, whatever came after it
    third, _ = world.append("queue@v1", "third")
    assert (third.parent, third.datasets, third.version) == ("queue@v1", ("first", "third"), 4)


class MeanwhileContext(Quiet):
    """Does something else as soon as the job has begun to compute."""

    other: Callable[[], Any] | None = None

    def progress(self, stage: str, done: int, total: int, **rest: Any) -> None:
        if stage == "rows" and self.other:
            other, self.other = self.other, None
            other()


def test_an_append_that_ends_in_between_is_not_lost(world):
    world.build("race", kinds=("activation",))
    context = MeanwhileContext(None, {})  # pyright: ignore[reportArgumentType]
    context.other = lambda: world.append("race", "third")
    last, told = world.append("race", "more", context=context)
    assert [record.datasets for record in indexes.versions(world.lab.registry, "race")] == [
        ("first",),
        ("first", "third"),
        ("first", "third", "more"),
    ]
    assert last.parent == "race@v2" and adds_up(last.counts)
    assert told["indexed_new"] == 12 - 3  # 108 to 110 came with the other


def test_a_job_on_an_alias_that_died_after_publishing_publishes_nothing_more(world):
    world.build("aliased", kinds=("activation",))
    lab = world.lab
    record = lab.registry.get(INDEXES, "aliased@v1")
    aliases.switch(lab.registry, lab.redis, "alias", record, aliases.Condition())
    first, told = world.append("alias", "third", job="job-on-alias")
    aliases.switch(lab.registry, lab.redis, "alias", first, aliases.Condition(present=True))
    assert world.append("alias", "third", job="job-on-alias") == (first, told)
    assert [each.id for each in indexes.versions(lab.registry, "aliased")] == ["aliased@v1", "aliased@v2"]


def test_nobody_publishes_a_build_between_the_last_look_of_an_append_and_its_publishing(world):
    lab = world.lab
    key, held = keys.lock("versions:turns"), []

    class Watching(Quiet):
        def check(self) -> None:
            held.append(lab.redis.exists(key))

    world.build("turns", kinds=("activation",))
    request = lab._request("turns", "m", "third", lives.LAYER, {"kinds": ("activation",)})
    spec = plan_index(request, lab.registry, lab.redis, lab.settings)
    world.run(JobKind.BUILD_INDEX, spec, context=Watching(None, {}))  # pyright: ignore[reportArgumentType]
    assert held[-1] and not held[0] and not lab.redis.exists(key)


class StoppedError(Exception): ...


def test_a_stopped_append_goes_on_where_it_was(world):
    base = world.build("stopped", kinds=("activation", "gradient", "influence"), dampings=(0.5,))
    worker = world.lab.engine._pool._worker
    process, done = worker.process, []

    def stops(task: Task) -> Any:
        if len(done) == 3:
            raise StoppedError
        done.append(task.key)
        return process(task)

    worker.process = stops
    try:
        with pytest.raises(StoppedError):
            world.append("stopped", "more", job="job-1")
    finally:
        worker.process = process
    assert indexes.versions(world.lab.registry, "stopped") == [base]
    world.tasks.clear()
    index, told = world.append("stopped", "more", job="job-1")
    again = [task.key for task in world.tasks]
    assert again and not set(again) & set(done)
    # died between publishing and saying so: the same job has nothing left to do
    world.tasks.clear()
    assert world.append("stopped", "more", job="job-1") == (index, told)
    assert world.tasks == [] and len(indexes.versions(world.lab.registry, "stopped")) == 2


def test_what_it_takes_to_make_a_version_again_stands_beside_it(world, built, appended):
    for record, kind, name in ((appended, "append_index", "dataset"), (built, "extend_index", "influence")):
        said = json.loads(world.lab.storage.read(f"indexes/{record.id}/build.json"))["record"]
        assert (said["kind"], said["job"]) == (kind, record.job) and name in said["spec"]


def test_other_weights_than_those_registered_are_refused(world, built, appended):
    """Also where every shard is there, and no worker would have loaded the model."""
    for folder in world.folders:
        path = folder / "config.json"
        text = path.read_text()
        path.write_text(text.replace("{", '{"changed": 1,', 1))
        with pytest.raises(Conflict) as refused:
            world.append(built.id, "more")
        path.write_text(text)
        assert refused.value.code == "model_changed"


# --- delete -------------------------------------------------------------------------------------------------

GONE = [INDEXED[2], INDEXED[38], NEW[4]]


@pytest.fixture(scope="module")
def deleted(world, appended):
    return world.delete(appended.id, [*GONE, GONE[0]])


@pytest.mark.parametrize("order", [Order.MOST, Order.LEAST])
@pytest.mark.parametrize("kind", ASKED)
def test_what_is_deleted_is_never_ranked(world, appended, deleted, kind, order):
    about = {**ASKED[kind], "order": order}
    before, after = world.ranking(appended, **about), world.ranking(deleted[0], **about)
    assert after == [(item, score) for item, score in before if item not in GONE]
    assert len(after) == len(before) - 3 == world.ask(deleted[0], **about).rows


def test_deleted_examples_are_counted_and_told_with_their_places(world, appended, deleted):
    index, told = deleted
    assert {name: told[name] for name in ("deleted", "deleted_before", "not_indexed")} == {
        "deleted": 3,
        "deleted_before": 0,
        "not_indexed": 0,
    }
    counts, before = index.counts, appended.counts
    assert adds_up(counts)
    assert counts == replace(before, indexed=before.indexed - 3, quarantined=before.quarantined + 3)
    assert index.quarantine_reasons == {**appended.quarantine_reasons, "deleted": 3}
    listed = world.quarantined(index)
    assert Counter(item.reason for item in listed) == index.quarantine_reasons
    places = {item.id: [place.file for place in item.places] for item in listed if item.reason == "deleted"}
    assert places == {
        GONE[0]: ["first.jsonl"],
        GONE[1]: ["first.jsonl"] + ["more.jsonl"] * 2,
        GONE[2]: ["more.jsonl"],
    }
    assert world.manifest(index).sections == world.manifest(appended).sections
    assert index.parent == appended.id


def test_a_second_deletion_adds_to_the_first(world, deleted):
    aside = ids_of([lives.BAD[0]])
    index, told = world.delete(deleted[0].id, [*GONE[:2], INDEXED[7], *aside])
    assert (told["deleted"], told["deleted_before"], told["not_indexed"]) == (1, 2, 1)
    assert index.quarantine_reasons["deleted"] == 4 and adds_up(index.counts)
    assert tombstones.read(world.lab.storage, world.manifest(index).deleted) == {*GONE, INDEXED[7]}
    with pytest.raises(Invalid) as refused:
        world.delete(index.id, [GONE[0], *aside])
    assert refused.value.code == "nothing_to_delete"


def test_unknown_ids_and_everything_are_refused(world, appended):
    with pytest.raises(Invalid, match="0" * 64) as refused:
        world.delete(appended.id, [GONE[0], "0" * 64])
    assert (refused.value.code, refused.value.param) == ("example_not_found", "ids")
    with pytest.raises(Invalid) as refused:
        world.delete(appended.id, [*INDEXED, *NEW])
    assert refused.value.code == "deletes_everything"
    for ids, code in (([], "bad_count"), (["no id"], "bad_example_id"), (["0" * 64] * 100_001, "bad_count")):
        with pytest.raises(Invalid) as refused:
            world.delete(appended.id, ids)
        assert refused.value.code == code


def test_what_a_filter_keeps_is_refused_as_the_filter(world, appended):
    registry, storage = world.lab.registry, world.lab.storage
    for wanted, code, said in (
        ({"n": 10**6}, "nothing_to_delete", "The filter keeps no example"),
        ({"n": {"gte": 0}}, "deletes_everything", "all 51 examples"),
    ):
        with pytest.raises(Invalid, match=said) as refused:
            world.run(JobKind.DELETE_EXAMPLES, plan_delete(appended.id, None, wanted, registry, storage))
        assert (refused.value.code, refused.value.param) == (code, "filter")


def test_what_is_deleted_stays_deleted_when_it_is_appended_again(world, deleted, compacted):
    world.file("again", [*map(lives.line, (2, 500))])
    for start in (deleted[0], compacted[0]):
        index, told = world.append(start.id, "again")
        assert (told["indexed_new"], told["duplicates_new"]) == (1, 1)
        assert GONE[0] not in dict(world.ranking(index)) and adds_up(index.counts)


def test_ids_that_were_tampered_with_are_noticed(world, deleted):
    storage, key = world.lab.storage, world.manifest(deleted[0]).deleted
    other = tombstones.store(storage, [GONE[0]])
    path, theirs = (f"{artifacts.folder(each)}/" for each in (key, other))
    kept = {name: storage.read(path + name) for name in storage.files(path.rstrip("/"))}
    try:
        for name in kept:  # a whole artifact in the place of another
            storage.write(path + name, storage.read(theirs + name).replace(other.encode(), key.encode()))
        with pytest.raises(Damaged):
            tombstones.read(storage, key)
    finally:
        for name, data in kept.items():
            storage.write(path + name, data)
    assert tombstones.read(storage, key) == set(GONE)


# --- compact ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compacted(world, deleted):
    return world.compact(deleted[0].id)


@pytest.mark.parametrize("kind", ASKED)
def test_a_compacted_index_gives_the_same_numbers(world, deleted, compacted, kind):
    for order in (Order.MOST, Order.LEAST):
        about = {**ASKED[kind], "order": order}
        assert world.ranking(compacted[0], **about) == world.ranking(deleted[0], **about)


def test_a_compacted_index_holds_the_stored_bytes_of_what_is_ranked(world, deleted, compacted):
    storage, ranked = world.lab.storage, {*INDEXED, *NEW} - set(GONE)
    manifests = world.manifest(deleted[0]), world.manifest(compacted[0])
    for old, new in zip(*(manifest.sections for manifest in manifests), strict=True):
        assert len(new.shards) == 1 < len(old.shards)
        for array in new.arrays:
            held: list[dict[str, bytes]] = []
            for section in (old, new):
                rows: dict[str, bytes] = {}
                for ref in section.shards:
                    shard = shards.read_manifest(storage, ref.key, sha256=ref.sha256)
                    stored = shards.read_stored(storage, shard, array)
                    assert stored.scales is not None
                    for item, row, scale in zip(shard.ids, stored.packed, stored.scales, strict=True):
                        rows[item] = row.tobytes() + scale.tobytes() + stored.encoding.encode()
                held.append(rows)
            assert set(held[1]) == ranked
            assert held[1] == {item: row for item, row in held[0].items() if item in ranked}
    told = compacted[1]
    assert (told["shards_before"], told["shards_after"]) == (4 * len(manifests[0].sections[0].shards), 4)
    assert told["rows_dropped"] >= 4 * 3


def test_a_compacted_index_accounts_for_every_line(world, deleted, compacted):
    assert compacted[0].counts == deleted[0].counts
    assert compacted[0].quarantine_reasons == deleted[0].quarantine_reasons
    assert sorted(world.quarantined(compacted[0]), key=str) == sorted(world.quarantined(deleted[0]), key=str)


def test_what_is_compact_is_left_alone(world, deleted, compacted):
    with pytest.raises(Invalid) as refused:
        world.compact(compacted[0].id)
    assert refused.value.code == "nothing_to_compact"
    some, _ = world.compact(deleted[0].id, rows=20)
    sizes = [ref.rows for ref in world.manifest(some).sections[0].shards]
    assert sum(sizes) == 48 and max(sizes) <= 20 and len(sizes) < 6
    with pytest.raises(Invalid):
        world.compact(some.id, rows=20)
    # of large shards those stay that nothing is to be taken out of
    less, _ = world.delete(some.id, [INDEXED[39]])
    again, _ = world.compact(less.id, rows=20)
    for before, after in zip(world.manifest(some).sections, world.manifest(again).sections, strict=True):
        assert len(set(before.shards) & set(after.shards)) == len(before.shards) - 1
    assert world.ranking(again) == world.ranking(less)


def test_a_shard_without_a_row_left_goes_with_its_neighbour(world, built):
    """Its examples are still told, although the neighbour is large enough by itself."""
    refs = world.manifest(built).sections[0].shards
    first, second, *_, last = (members.read(world.lab.storage, ref) for ref in refs)
    less, _ = world.delete(
        built.id, [item for each in (first, second, last) for item in each.ids if item in INDEXED]
    )
    small, _ = world.compact(less.id, rows=4)
    assert all(ref.rows for section in world.manifest(small).sections for ref in section.shards)
    assert world.ranking(small) == world.ranking(less) and small.counts == less.counts
    assert sorted(world.quarantined(small), key=str) == sorted(world.quarantined(less), key=str)
    with pytest.raises(Invalid) as refused:
        world.compact(small.id, rows=4)
    assert refused.value.code == "nothing_to_compact"


def test_a_compacted_index_lives_on(world, deleted, compacted):
    """Appended to, deleted from, compacted again: as if it had not been compacted."""
    ends = []
    for start in (deleted[0], compacted[0]):
        index, told = world.append(start.id, "third")
        assert (told["indexed_new"], told["duplicates_new"]) == (5, 4)
        index, _ = world.delete(index.id, [INDEXED[0]])
        last, _ = world.compact(index.id)
        for kind in ASKED.values():
            assert world.ranking(last, **kind) == world.ranking(index, **kind)
        assert last.counts == index.counts and adds_up(last.counts)
        ends.append(last)
    for kind in ASKED.values():
        assert world.ranking(ends[0], **kind) == world.ranking(ends[1], **kind)
    assert ends[0].counts == ends[1].counts
    assert len(world.quarantined(ends[1])) == ends[1].counts.quarantined


def test_what_was_set_aside_is_known_after_compaction(world):
    """One example has its row in the section of the end alone: compaction drops it, an append leaves it."""
    world.build("partial", kinds=("activation", "influence"))
    world.compact("partial")
    world.file("aside-once", [lives.BAD[1], lives.line(600)])
    index, told = world.append("partial", "aside-once")
    assert (told["indexed_new"], told["duplicates_new"], told["quarantined_new"]) == (1, 1, 0)
    assert len(world.quarantined(index)) == index.counts.quarantined


def test_a_compacted_index_can_be_extended(world):
    plain = world.build("later", kinds=("gradient",))
    direct = world.extend(plain.id)
    small, _ = world.compact(plain.id)
    after = world.extend(small.id)
    assert world.ranking(after, **ASKED["extended"]) == world.ranking(direct, **ASKED["extended"])
    assert after.counts == direct.counts == plain.counts


def test_works_are_followed_to_their_origin(world, compacted):
    storage = world.lab.storage
    firsts = [members.read(storage, section.shards[0]) for section in world.manifest(compacted[0]).sections]
    assert all(isinstance(first.work, CompactSpec) for first in firsts)
    kinds = [type(members.origin(storage, first).work) for first in firsts]
    assert kinds == [PassSpec, SumSpec, DifferenceSpec, ReadOffSpec]


# --- rows without a section of their own, long examples -------------------------------------------------------


def test_embeddings_alone_and_long_examples(world):
    about = {"kinds": ("influence",), "max_length": 9, "checkpoints": "all"}
    base, whole = world.build("long", **about), world.build("long-whole", "whole", **about)
    assert base.counts.truncated > 3 and len(world.manifest(base).sections) == 1
    index, _ = world.append("long", "more")
    assert index.counts == whole.counts and index.quarantine_reasons == whole.quarantine_reasons
    small, _ = world.compact("long", rows=16)
    gone = [item for item, _ in world.ranking(index, **ASKED["influence"])][:30]
    left = [world.delete(each.id, gone)[0] for each in (index, small)]
    assert left[0].counts == left[1].counts and adds_up(left[0].counts)
    assert 0 < left[0].counts.truncated < index.counts.truncated
    rest = [item for item, _ in world.ranking(left[0], **ASKED["influence"])]
    none, _ = world.delete(left[0].id, rest[:-1])
    assert none.counts.indexed == 1 and none.counts.truncated in {0, 1}


# --- token shares ---------------------------------------------------------------------------------------------


def test_token_shares_of_examples_from_any_part(world, appended, deleted, compacted):
    asked = [NEW[0], INDEXED[5], GONE[2], NEW[1], INDEXED[5]]
    for index in (appended, compacted[0]):
        scores = dict(world.ranking(index, **ASKED["influence"]))
        spec = TokenSharesSpec(
            key=f"shares-{index.version}",
            index=index.id,
            method=Method.CONCEPT_INFLUENCE,
            concept="v0",
            query_set="q",
            function=ConceptFunction.DOT,
            damping=None,
            through=IndexKind.INFLUENCE,
            examples=tuple(asked),
            shard_size=8,
        )
        world.lab.run(JobKind.TOKEN_SHARES, spec)
        found = token_shares.read(world.lab.storage, spec.key)
        assert [bool(each.texts) for each in found] == [item in scores for item in asked]
        largest = max(map(abs, scores.values()))
        for item, each in zip(asked, found, strict=True):
            if item in scores:
                assert each.score == pytest.approx(scores[item], abs=2e-2 * largest)
    assert not found[2].texts  # deleted
