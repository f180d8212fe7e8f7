"""Storage: whole files or none under kill -9, every flipped byte noticed, no way out of the root."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from service.errors import Damaged, Forbidden, Invalid, NotFound, Unavailable
from service.storage import Storage, inside_roots, sha256_bytes, sha256_file

ROOT = Path(__file__).resolve().parents[1]
SIZE = 4_000_000


@pytest.fixture(params=["folder", "file://", "memory://", "s3://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """The same promises on a disk and on an object store."""
    if request.param == "s3://":
        yield Storage(request.getfixturevalue("bucket"))
    elif request.param == "memory://":
        root = f"memory://{uuid.uuid4().hex}/prefix"
        yield Storage(root)
        fsspec.filesystem("memory").rm(root.removeprefix("memory:/").rsplit("/", 1)[0], recursive=True)
    else:
        yield Storage(("file://" if request.param == "file://" else "") + str(tmp_path / "store"))


# --- the api ------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_its_hash_returned(store: Storage) -> None:
    data = bytes(range(256)) * 100
    digest = store.write("a/b/c.bin", data)
    assert digest == sha256_bytes(data)
    assert store.read("a/b/c.bin", sha256=digest) == data
    assert store.exists("a/b/c.bin")
    assert (store.size("a/b/c.bin"), store.size("a/b/d.bin"), store.size("a/b/c.bin/x")) == (len(data), None, None)
    assert store.write("a/b/c.bin", b"") == sha256_bytes(b"")
    assert store.read("a/b/c.bin") == b""


def test_every_flipped_byte_is_damage(store: Storage) -> None:
    data = b"thirty-two bytes of a small file"
    digest = store.write("f", data)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        store.write("f", bytes(flipped))
        with pytest.raises(Damaged) as found:
            store.read("f", sha256=digest)
        assert found.value.param == "f"
    for other in (data[:-1], data + b"\n", b""):
        store.write("f", other)
        with pytest.raises(Damaged):
            store.read("f", sha256=digest)
    store.write("f", data)
    assert store.read("f", sha256=digest) == data


def test_what_is_not_there_is_not_found(store: Storage) -> None:
    store.write("a/b", b"x")
    assert not store.exists("a/c")
    with pytest.raises(NotFound) as missing:
        store.read("a/c", sha256="0" * 64)
    assert missing.value.param == "a/c"
    assert (store.folders("nowhere"), store.files("nowhere")) == ([], [])


def test_listings_are_sorted_and_tell_files_from_folders(store: Storage) -> None:
    assert store.folders("models") == []
    for key in ("models/b/record.json", "models/a/record.json", "models/z.json", "models/a/deep/x", "other/c/d"):
        store.write(key, b"x")
    assert store.folders("models") == ["a", "b"]
    assert store.files("models") == ["z.json"]
    assert store.files("models/a") == ["record.json"]


def test_a_folder_is_published_with_its_manifest_last(store: Storage) -> None:
    files = {f"{n}.bin": os.urandom(200_000) for n in range(8)}
    torn: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if store.exists("shard/manifest.json"):
                torn.extend(name for name in files if not store.exists(f"shard/{name}"))

    reader = threading.Thread(target=look)
    reader.start()
    store.publish("shard", files, ("manifest.json", b"{}"))
    done.set()
    reader.join()
    assert torn == []
    assert store.files("shard") == sorted([*files, "manifest.json"])


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "..", "/etc/passwd", "", ".", "/", "//x"])
def test_a_key_cannot_leave_the_root(store: Storage, key: str) -> None:
    store.write("a/x", b"x")
    for act in (store.read, store.exists, store.folders, store.files, lambda key: store.write(key, b"y")):
        with pytest.raises(Invalid) as refused:
            act(key)
        assert refused.value.code == "bad_storage_key"


# --- atomic on a disk ---------------------------------------------------------------------------------

# Forks a writer for every line it is sent: one import for all the kills.
WRITERS = f"""
import os, sys
from service.storage import Storage
storage = Storage(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        generation = int(line)
        while True:
            for mark in (b"a", b"b"):
                storage.write(f"generation-{{generation}}", mark * {SIZE})
                generation += 1
                if generation % 3 == 0:
                    storage.write("shared", mark * {SIZE})
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_kill_9_leaves_every_file_whole_or_absent(tmp_path: Path) -> None:
    chance = random.Random(20260)
    storage = Storage(str(tmp_path))
    storage.write("shared", b"-" * SIZE)
    torn: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            data = storage.read("shared")
            if data != data[:1] * SIZE:
                torn.append(len(data))

    reader = threading.Thread(target=look)
    reader.start()
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as writers:
        assert writers.stdin
        assert writers.stdout
        for round_number in range(15):
            writers.stdin.write(f"{round_number * 1000}\n")
            writers.stdin.flush()
            victim = int(writers.stdout.readline())
            done.wait(chance.uniform(0.005, 0.08))
            os.kill(victim, signal.SIGKILL)
        writers.stdin.close()
    done.set()
    reader.join()
    assert torn == []
    published = list(tmp_path.glob("generation-*"))
    assert published
    assert {path.stat().st_size for path in published} == {SIZE}
    assert list(tmp_path.glob(".*.tmp")), "no writer was killed in the middle of a file: the test shows nothing"


def test_writers_of_one_key_never_mix(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def write(mark: bytes) -> None:
        for _ in range(10):
            storage.write("shared", mark * 500_000)

    threads = [threading.Thread(target=write, args=(mark,)) for mark in (b"a", b"b", b"c")]
    storage.write("shared", b"-" * 500_000)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        data = storage.read("shared")
        assert data == data[:1] * 500_000
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


@pytest.mark.parametrize("limit", [0, 1, 4096, 99_999])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path, limit: int) -> None:
    storage = Storage(str(tmp_path))
    storage.write("f", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # like a full disk: the write stops at this byte
    try:
        with pytest.raises(Unavailable, match=f"cannot write f .{os.strerror(errno.EFBIG)}.. Make room"):
            storage.write("f", b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.read("f") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_disk_that_cannot_give_a_file_back_has_damaged_it_and_one_that_refuses_is_unavailable(
    tmp_path: Path,
) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Damaged, match="cannot give it back") as damaged:
        storage.read("loop")
    assert (damaged.value.code, damaged.value.param) == ("damaged_file", "loop")
    storage.write("loop", b"again")  # as a repair does
    assert storage.read("loop") == b"again"
    long = "x" * 300
    for act in (storage.read, storage.exists, storage.size, lambda key: storage.write(key, b"")):
        with pytest.raises(Unavailable, match=os.strerror(errno.ENAMETOOLONG)) as refused:
            act(long)
        assert refused.value.param == long
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(NotFound):
        storage.read("folder")
    for key in ("folder", "loop/below"):
        with pytest.raises(Unavailable, match=f"cannot write {key}"):
            storage.write(key, b"")


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/f", b"x")
    (tmp_path / "a" / ".g.0123.tmp").write_bytes(b"half")
    assert storage.files("a") == ["f"]


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data)
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- paths in requests --------------------------------------------------------------------------------


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, ...]:
    """Two roots with a file each, a secret beside them, and links in all directions."""
    for name in ("one", "two", "one-secret"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "f").write_text(name)
    one, two, secret = (tmp_path / name for name in ("one", "two", "one-secret"))
    (one / "out").symlink_to(secret)
    (one / "out-file").symlink_to(secret / "f")
    (one / "chain").symlink_to(one / "out-file")
    (one / "relative-out").symlink_to("../one-secret/f")
    (one / "inside").symlink_to(one / "sub")
    (one / "across").symlink_to(two / "f")
    (one / "loop").symlink_to(one / "loop")
    return one, two


@pytest.mark.parametrize("inner", ["one", "one/f", "one/sub/../f", "two/f", "one/./f", "one/not-there/yet"])
def test_a_path_under_a_root_is_resolved(tmp_path: Path, roots: tuple[Path, ...], inner: str) -> None:
    expected = Path(os.path.normpath(tmp_path / inner))
    assert inside_roots(f"{tmp_path}/{inner}", roots, param="path") == expected


@pytest.mark.parametrize(("link", "target"), [("inside", "one/sub"), ("across", "two/f")])
def test_a_link_that_stays_under_the_roots_is_followed(
    tmp_path: Path, roots: tuple[Path, ...], link: str, target: str
) -> None:
    assert inside_roots(str(roots[0] / link), roots, param="path") == tmp_path / target


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "one-secret/f",
        "one/../one-secret/f",
        "one/sub/../../one-secret/f",
        "one/..",
        "one/out",
        "one/out/f",
        "one/out/sub/not-there",
        "one/out-file",
        "one/chain",
        "one/relative-out",
        "one/inside/../../one-secret/f",
    ],
)
def test_a_path_that_leads_out_of_the_roots_is_forbidden(
    tmp_path: Path, roots: tuple[Path, ...], inner: str
) -> None:
    with pytest.raises(Forbidden) as refused:
        inside_roots(f"{tmp_path}/{inner}", roots, param="checkpoints[1]")
    assert (refused.value.code, refused.value.param) == ("path_outside_roots", "checkpoints[1]")


@pytest.mark.parametrize("path", ["/etc/passwd", "/", "/proc/self/environ"])
def test_without_roots_everything_is_forbidden(path: str) -> None:
    with pytest.raises(Forbidden, match="none configured"):
        inside_roots(path, (), param="path")


@pytest.mark.parametrize("path", ["f", "./f", "../f", "", ".", "~/f", "file:///etc/passwd"])
def test_a_relative_path_is_refused(roots: tuple[Path, ...], path: str) -> None:
    with pytest.raises(Invalid) as refused:
        inside_roots(path, roots, param="path")
    assert refused.value.code == "relative_path"


@pytest.mark.parametrize("end", ["loop", "loop/f", "f\0", "\ud800"])
def test_a_path_that_cannot_be_resolved_is_refused(roots: tuple[Path, ...], end: str) -> None:
    with pytest.raises(Invalid) as refused:
        inside_roots(f"{roots[0]}/{end}", roots, param="path")
    assert (refused.value.code, refused.value.param) == ("bad_path", "path")
