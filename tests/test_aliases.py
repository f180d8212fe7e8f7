"""Aliases: one name for everybody, switched in one step, by exactly one of those who try, whatever breaks."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from redis import Redis

from service import aliases, indexes, keys
from service.aliases import Condition
from service.contracts import AliasRecord
from service.errors import (
    Conflict,
    Damaged,
    DomainError,
    Invalid,
    NotFound,
    PreconditionFailed,
    PreconditionRequired,
)
from service.redis_server import EmbeddedRedis, connect
from service.registry import Registry
from service.storage import Storage
from tests import shelf

ROOT = Path(__file__).resolve().parents[1]
WHATEVER = Condition(present=True)
FILE = "aliases/prod/record.json"


def known(*revisions: int) -> Condition:
    return Condition(revisions=revisions)


class World:
    """What one process has in hand; others have their own client of the same Redis."""

    def __init__(self, url: str, storage: Storage) -> None:
        self.redis, self.storage = connect(url), storage
        self.registry = Registry(self.redis, storage)

    def switch(self, name: str, target: str, condition: Condition | None = None) -> AliasRecord:
        record = indexes.resolve(self.registry, target)
        return aliases.switch(self.registry, self.redis, name, record, condition or Condition())[0]

    def of(self, name: str) -> str:
        return indexes.resolve(self.registry, name).id


@pytest.fixture(scope="module")
def stocked(redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with some versions, to be copied: making it costs dozens of fsyncs."""
    folder = tmp_path_factory.mktemp("stocked")
    maker = World(redis_server.url, Storage(str(folder)))
    maker.redis.flushall()  # of what another module has left there
    shelf.add(maker.registry, "a@v1", "a@v2", "a@v3", "b@v1")
    maker.redis.close()
    return folder


@pytest.fixture
def world(redis_server: EmbeddedRedis, stocked: Path, redis: Redis, storage: Storage) -> Iterator[World]:
    shutil.copytree(stocked, storage.root, dirs_exist_ok=True)
    made = World(redis_server.url, storage)
    made.registry.rebuild()
    yield made
    made.redis.close()


@pytest.fixture
def other(redis_server: EmbeddedRedis, world: World) -> Iterator[World]:
    made = World(redis_server.url, Storage(world.storage.root))
    yield made
    made.redis.close()


# --- life -----------------------------------------------------------------------------------------------


def test_an_alias_is_made_switched_and_removed(world: World, other: World) -> None:
    made = world.switch("prod", "a@v1")
    assert (made.name, made.index, made.revision, made.previous) == ("prod", "a@v1", 1, None)
    assert other.of("prod") == "a@v1"
    switched = other.switch("prod", "b@v1", known(1))
    assert (switched.index, switched.revision, switched.previous) == ("b@v1", 2, "a@v1")
    assert world.of("prod") == other.of("prod") == "b@v1"
    assert aliases.get(world.registry, "prod") == switched == other.registry.aliases()[0]
    aliases.remove(world.registry, "prod", known(2))
    assert other.registry.aliases() == []
    for asked in (lambda: other.of("prod"), lambda: aliases.get(other.registry, "prod")):
        with pytest.raises(NotFound):
            asked()


def test_a_name_and_another_alias_stand_for_what_they_are_now(world: World) -> None:
    assert world.switch("prod", "a").index == "a@v3"
    assert world.switch("next", "prod").index == "a@v3"
    shelf.add(world.registry, "a@v4")
    assert (world.of("prod"), world.of("next"), world.of("a")) == ("a@v3", "a@v3", "a@v4")
    world.switch("prod", "a", WHATEVER)
    assert (world.of("prod"), world.of("next")) == ("a@v4", "a@v3")


def test_revisions_go_on_after_a_removal_so_that_no_old_one_fits(world: World, redis: Redis) -> None:
    world.switch("prod", "a@v1")
    aliases.remove(world.registry, "prod", known(1))
    redis.flushall()
    made = world.switch("prod", "a@v2")
    assert (made.revision, made.previous) == (2, None)
    with pytest.raises(PreconditionFailed):
        world.switch("prod", "a@v3", known(1))


def test_pointing_at_the_same_version_again_is_no_switch(world: World) -> None:
    made = world.switch("prod", "a@v1")
    assert world.switch("prod", "a@v1", known(1)) == made


@pytest.mark.parametrize("target", ["a@v9", "c", "a@", "", "../a", "a@v01", "nowhere"])
def test_what_is_not_published_is_no_target(world: World, target: str) -> None:
    with pytest.raises(NotFound) as missing:
        world.switch("prod", target)
    assert (missing.value.code, missing.value.param) == ("index_not_found", "index")
    assert world.registry.aliases() == []


@pytest.mark.parametrize("name", ["", "a@v1", "../x", "a b", ".a", "x" * 129, "\ud800", "é"])
def test_names_are_ids(world: World, name: str) -> None:
    with pytest.raises(Invalid) as refused:
        world.switch(name, "a")
    assert (refused.value.code, refused.value.param) == ("bad_id", "name")
    with pytest.raises(NotFound):
        aliases.get(world.registry, name)


# --- conditions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "error", "code"),
    [
        (Condition(), PreconditionRequired, "precondition_required"),
        (known(1), PreconditionFailed, "alias_changed"),
        (known(3, 4), PreconditionFailed, "alias_changed"),
        (known(), PreconditionFailed, "alias_changed"),
        (Condition(absent=True), PreconditionFailed, "alias_exists"),
        (Condition(absent=True, present=True), PreconditionFailed, "alias_exists"),
    ],
)
def test_a_wrong_or_missing_condition_changes_nothing_and_says_what_is_there(
    world: World, condition: Condition, error: type[DomainError], code: str
) -> None:
    world.switch("prod", "a@v1")
    world.switch("prod", "a@v2", known(1))
    before = world.storage.read(FILE)
    changes: list[Callable[[], object]] = [lambda: world.switch("prod", "a@v3", condition)]
    changes.append(lambda: world.switch("prod", "a@v2", condition))  # where it points already: no better
    if not condition.absent:
        changes.append(lambda: aliases.remove(world.registry, "prod", condition))
    for change in changes:
        with pytest.raises(error) as refused:
            change()
        assert refused.value.code == code
        assert "a@v2" in refused.value.detail
        assert refused.value.context == {"index": "a@v2", "revision": 2, "etag": '"2"'}
    assert world.storage.read(FILE) == before
    assert world.of("prod") == "a@v2"


@pytest.mark.parametrize("condition", [known(2), known(1, 2), WHATEVER])
def test_a_condition_that_holds_lets_the_change_through(world: World, condition: Condition) -> None:
    world.switch("prod", "a@v1")
    world.switch("prod", "a@v2", known(1))
    assert world.switch("prod", "a@v3", condition).revision == 3


@pytest.mark.parametrize("condition", [known(1), WHATEVER])
def test_a_condition_on_what_is_not_there_fails(world: World, condition: Condition) -> None:
    with pytest.raises(PreconditionFailed, match="no alias 'prod'"):
        world.switch("prod", "a", condition)
    with pytest.raises(NotFound):
        aliases.remove(world.registry, "prod", condition)
    assert world.switch("prod", "a", Condition(absent=True)).revision == 1


# --- one name, one meaning --------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [False, True])
def test_an_alias_may_not_have_the_name_of_an_index_nor_an_index_that_of_an_alias(
    world: World, redis: Redis, flushed: bool
) -> None:
    world.switch("prod", "a@v1")
    assert indexes.next_version(world.redis, world.registry, "building") == 1
    if flushed:
        redis.flushall()
    for name in ("a", "b") if flushed else ("a", "b", "building"):  # with Redis its jobs are lost
        with pytest.raises(Conflict) as taken:
            world.switch(name, "a@v1")
        assert (taken.value.code, taken.value.param) == ("name_is_index", "name")
    with pytest.raises(Conflict, match="of a@v1") as taken:
        indexes.next_version(world.redis, world.registry, "prod")
    assert (taken.value.code, taken.value.param) == ("name_is_alias", "name")
    aliases.remove(world.registry, "prod", WHATEVER)
    assert indexes.next_version(world.redis, world.registry, "prod") == 1


def test_of_an_alias_and_an_index_that_want_a_name_at_once_one_gets_it(world: World, other: World) -> None:
    def attempt(act: Callable[[], object], start: threading.Barrier) -> bool:
        start.wait()
        try:
            act()
        except Conflict:
            return False
        return True

    for number in range(8):
        name, start = f"n{number}", threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(attempt, lambda name=name: world.switch(name, "a@v1"), start)
            two = pool.submit(
                attempt, lambda name=name: indexes.next_version(other.redis, other.registry, name), start
            )
            assert one.result() != two.result()


def test_a_build_that_wants_the_name_of_an_alias_that_is_being_made_waits_and_is_refused(
    redis_server: EmbeddedRedis, world: World, other: World
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked: list[Future[int]] = []

        def ask() -> None:
            asked.append(pool.submit(indexes.next_version, other.redis, other.registry, "prod"))
            assert not wait(asked, timeout=0.3).done

        maker = World(redis_server.url, Halting(world.storage.root, "before writing", ask))
        maker.switch("prod", "a@v1")
        with pytest.raises(Conflict, match="of a@v1"):
            asked[0].result()
        maker.redis.close()


@pytest.mark.parametrize("first", [True, False])
def test_of_those_that_change_an_alias_at_once_exactly_one_wins(
    redis_server: EmbeddedRedis, world: World, first: bool
) -> None:
    worlds = [World(redis_server.url, Storage(world.storage.root)) for _ in range(3)]

    def attempt(one: World, target: str, condition: Condition, start: threading.Barrier) -> str | DomainError:
        start.wait()
        try:
            return one.switch(name, target, condition).index
        except (PreconditionFailed, PreconditionRequired) as error:
            return error

    for number in range(6):
        name, start = f"race{number}", threading.Barrier(len(worlds))
        if not first:
            world.switch(name, "b@v1")
        condition = Condition() if first else known(1)
        with ThreadPoolExecutor(len(worlds)) as pool:
            tries = [
                pool.submit(attempt, one, f"a@v{v}", condition, start) for v, one in enumerate(worlds, start=1)
            ]
            told = [each.result() for each in tries]
        (winner,) = (each for each in told if isinstance(each, str))
        assert all(winner in each.detail for each in told if isinstance(each, DomainError))
        assert world.of(name) == winner
        assert world.registry.pointers.stored(name).revision == (1 if first else 2)
    for one in worlds:
        one.redis.close()


# --- what breaks ------------------------------------------------------------------------------------------


class Halting(Storage):
    """Stops whoever uses it at one of the steps of a switch, and lets something else happen there."""

    STEPS = ("first look", "second look", "before writing", "after writing")

    def __init__(self, root: str, step: str, happens: Callable[[], None]) -> None:
        super().__init__(root)
        self._step, self._happens, self._looks = step, happens, 0

    def read(self, key: str, *, sha256: str | None = None, cached: bool = True) -> bytes:
        if key == FILE:
            self._looks += 1
            self._reach({1: "first look", 2: "second look"}.get(self._looks, "later"))
        return super().read(key, sha256=sha256, cached=cached)

    def write(self, key: str, data: bytes) -> str:
        if key != FILE:
            return super().write(key, data)
        self._reach("before writing")
        written = super().write(key, data)
        self._reach("after writing")
        return written

    def _reach(self, step: str) -> None:
        if step == self._step:
            self._step = ""
            self._happens()


@pytest.mark.parametrize("step", ["first look", "second look"])
def test_a_paused_writer_whose_lock_ran_out_overwrites_nothing(
    redis_server: EmbeddedRedis, world: World, redis: Redis, step: str
) -> None:
    world.switch("prod", "a@v1")

    def another_writer() -> None:
        redis.delete(keys.lock("name:prod"))  # as its time to live does
        world.switch("prod", "a@v2", known(1))

    paused = World(redis_server.url, Halting(world.storage.root, step, another_writer))
    with pytest.raises(PreconditionFailed, match="a@v2"):
        paused.switch("prod", "b@v1", known(1))
    assert (world.of("prod"), paused.of("prod")) == ("a@v2", "a@v2")
    assert world.registry.pointers.stored("prod").revision == 2
    paused.redis.close()


@pytest.mark.parametrize("filled_again", [False, True])
@pytest.mark.parametrize("step", Halting.STEPS)
def test_a_redis_flushed_in_the_middle_of_a_switch_agrees_with_storage_afterwards(
    redis_server: EmbeddedRedis, world: World, redis: Redis, step: str, filled_again: bool
) -> None:
    world.switch("prod", "a@v1")

    def flush() -> None:
        redis.flushall()
        if filled_again:
            world.registry.rebuild()

    writer = World(redis_server.url, Halting(world.storage.root, step, flush))
    assert writer.switch("prod", "b@v1", known(1)).revision == 2
    assert (world.of("prod"), writer.of("prod")) == ("b@v1", "b@v1")
    assert [alias.index for alias in world.registry.aliases()] == ["b@v1"]
    writer.redis.close()


KILLED = """
import os, signal, sys
from service.aliases import Condition
from service.storage import Storage
from tests.test_aliases import Halting, World
url, root, step = sys.argv[1:]
World(url, Halting(root, step, lambda: os.kill(os.getpid(), signal.SIGKILL))).switch(
    "prod", "a@v2", Condition(revisions=(1,))
)
"""


@pytest.mark.parametrize("step", Halting.STEPS)
def test_a_writer_killed_at_any_step_leaves_one_answer_for_all(
    redis_server: EmbeddedRedis, world: World, other: World, redis: Redis, step: str
) -> None:
    world.switch("prod", "a@v1")
    command = [sys.executable, "-c", KILLED, redis_server.url, world.storage.root, step]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    left = "a@v2" if step == "after writing" else "a@v1"
    for _ in range(2):
        assert (world.of("prod"), other.of("prod")) == (left, left)
        assert [alias.index for alias in other.registry.aliases()] == [left]
        other.registry.rebuild()
    assert redis.delete(keys.lock("name:prod")) == 1  # it was killed with the lock in hand, which runs out
    assert world.switch("prod", "a@v3", known(2 if left == "a@v2" else 1)).previous == left
    assert other.of("prod") == "a@v3"


def test_a_disk_that_is_full_leaves_the_alias_as_it_was(redis_server: EmbeddedRedis, world: World) -> None:
    world.switch("prod", "a@v1")

    def full() -> None:
        raise OSError("No space left on device")

    writer = World(redis_server.url, Halting(world.storage.root, "before writing", full))
    with pytest.raises(OSError, match="No space"):
        writer.switch("prod", "a@v2", known(1))
    assert world.of("prod") == "a@v1"
    assert world.redis.hget(keys.ALIASES, "prod") != ""  # readers need not go to storage
    assert writer.switch("prod", "a@v2", known(1)).revision == 2
    writer.redis.close()


def another(text: bytes) -> bytes:
    """What a flipped bit makes of it: sound JSON, and another version."""
    return text.replace(b"a@v1", b"a@v3")


def test_every_flip_and_every_cut_of_an_alias_is_noticed(world: World, redis: Redis) -> None:
    world.switch("prod", "a@v1")
    intact = world.storage.read(FILE)
    damaged = [intact[:place] for place in range(len(intact))]
    damaged += [intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :] for place in range(len(intact))]
    for data in damaged:
        Path(world.storage.root, FILE).write_bytes(data)
        redis.hset(keys.ALIASES, "prod", data)  # of either copy
        with pytest.raises(Damaged):
            world.of("prod")
    world.storage.write(FILE, intact)
    assert world.of("prod") == "a@v1"


def test_an_alias_of_a_version_that_is_gone_says_so(world: World, redis: Redis) -> None:
    world.switch("prod", "b@v1")
    shutil.rmtree(Path(world.storage.root, "indexes/b@v1"))
    redis.flushall()
    world.registry.rebuild()
    with pytest.raises(Damaged, match="'prod' points at b@v1, and indexes/b@v1/record.json is missing") as told:
        world.of("prod")
    assert told.value.code == "missing_file"
    world.switch("prod", "a@v1", WHATEVER)
    assert world.of("prod") == "a@v1"


def test_the_file_of_another_alias_is_not_believed(world: World, redis: Redis) -> None:
    world.switch("prod", "a@v1")
    world.switch("next", "a@v2")
    world.storage.write(FILE, world.storage.read("aliases/next/record.json"))
    redis.flushall()
    with pytest.raises(Damaged, match="it is the file of alias 'next'"):
        world.of("prod")


def test_who_forces_a_damaged_alias_makes_it_anew_and_no_old_etag_fits(world: World, other: World) -> None:
    world.switch("prod", "a@v1")
    world.storage.write(FILE, b"{oops")
    for condition in (Condition(), known(1), Condition(absent=True)):
        with pytest.raises(Damaged):
            other.switch("prod", "a@v3", condition)
        with pytest.raises(Damaged):
            aliases.remove(other.registry, "prod", condition)
    made = world.switch("prod", "a@v2", WHATEVER)
    assert (made.previous, other.of("prod")) == (None, "a@v2")
    with pytest.raises(PreconditionFailed):
        other.switch("prod", "a@v1", known(1, 2, 3))
    world.storage.write(FILE, b"{oops")
    aliases.remove(other.registry, "prod", WHATEVER)
    with pytest.raises(NotFound):
        world.of("prod")
    assert world.switch("prod", "a@v3").revision > made.revision


def test_a_damaged_file_of_a_removed_alias_gives_no_alias_the_name_of_an_index(world: World) -> None:
    world.switch("taken", "a@v1")
    aliases.remove(world.registry, "taken", WHATEVER)
    shelf.add(world.registry, "taken@v1")
    world.storage.write("aliases/taken/record.json", b"{oops")
    for _ in range(2):
        with pytest.raises(Conflict, match="name of an index"):
            world.switch("taken", "a@v1", WHATEVER)
        world.redis.flushall()
    aliases.remove(world.registry, "taken", WHATEVER)
    assert indexes.next_version(world.redis, world.registry, "taken") == 2


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"{oops", lambda _: b"{}", lambda _: b"\xff", another])
def test_a_damaged_alias_is_named_and_neither_guessed_nor_in_the_way_of_others(
    world: World, other: World, redis: Redis, damage: Callable[[bytes], bytes]
) -> None:
    world.switch("prod", "a@v1")
    world.switch("next", "a@v2")
    world.storage.write(FILE, damage(world.storage.read(FILE)))
    redis.flushall()
    assert world.registry.rebuild().damaged == ("aliases/prod",)
    for asked in (
        lambda: other.of("prod"),
        lambda: other.switch("prod", "a@v3", known(1)),
        lambda: indexes.next_version(other.redis, other.registry, "prod"),
    ):
        with pytest.raises(Damaged, match=r"aliases/prod/record\.json"):
            asked()
    assert [alias.name for alias in other.registry.aliases()] == ["next"]
    assert other.of("next") == "a@v2"


def test_an_alias_of_a_version_that_is_lost_says_so_and_never_comes_to_mean_another(world: World) -> None:
    world.switch("prod", "a@v3")
    shutil.rmtree(Path(world.storage.root) / "indexes/a@v3")
    world.redis.flushall()
    world.registry.rebuild()
    with pytest.raises(Damaged, match="'prod' points at a@v3") as told:
        world.of("prod")
    assert (told.value.code, told.value.param) == ("missing_file", "indexes/a@v3/record.json")
    assert world.of("a") == "a@v2"
    assert indexes.next_version(world.redis, world.registry, "a") == 4
