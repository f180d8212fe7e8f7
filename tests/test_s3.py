"""Storage on an S3-compatible server (moto's server mode, a process): what a disk does not have.

What both promise alike is in test_storage.py. A proxy in front of the server counts requests and breaks them.
"""

import contextlib
import errno
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from redis import Redis

from service import indexes, object_store
from service.errors import Damaged, Invalid, NotFound, Unavailable
from service.local_cache import CacheAt
from service.registry import INDEXES, Registry
from service.settings import Settings
from service.storage import Storage, sha256_bytes
from tests import s3
from tests.test_indexes import ARRAYS, D, Shelf

ROOT = Path(__file__).resolve().parents[1]
BUCKET, PREFIX = "whence-test", "some/prefix"


@pytest.fixture
def storage(bucket: str) -> Storage:
    return Storage(bucket)


@pytest.fixture
def proxy(bucket: str, s3_server: s3.Moto, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """In front of the server; whatever is opened from here on goes through it."""
    between = s3.Proxy(s3_server.port)
    between.up()
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    yield between
    between.down()


# --- keys ---------------------------------------------------------------------------------------------

ODD = [
    "a b/é+%41&=?#;:@,$.bin",
    "☃/日本語",
    "a*b[c]{d}",
    "quote'\"<x>&amp;",
    "...",
    "a/...b",
    "trailing ",
    " leading",
    "percent%2Fslash",
    "back\\slash",
    "name@v3/record.json",
    "tilde~",
    "e\u0301",  # not the same as é
    "control\x01\x7f",
    "x" * 200,
]


@pytest.mark.parametrize("key", ODD)
def test_an_odd_key_is_the_name_of_one_file(storage: Storage, key: str) -> None:
    storage.write("folder/other", b"other")
    assert not storage.exists(f"folder/{key}")
    digest = storage.write(f"folder/{key}", b"data")
    assert storage.read(f"folder/{key}", sha256=digest) == b"data"
    assert storage.exists(f"folder/{key}")
    first, *rest = key.split("/")
    assert storage.folders("folder") == ([first] if rest else [])
    assert storage.files("folder") == sorted(["other", *([] if rest else [first])])
    if rest:
        assert storage.files(f"folder/{first}") == rest
    storage.remove(f"folder/{key}")
    assert not storage.exists(f"folder/{key}")
    assert storage.read("folder/other") == b"other"


@pytest.mark.parametrize("alias", ["./a/b", "a//b", "a/./b", "a/b/"])
def test_a_file_has_one_key_in_the_store_as_on_a_disk(storage: Storage, s3_server: s3.Moto, alias: str) -> None:
    storage.write(alias, b"x")
    assert storage.read("a/b") == b"x"
    listed = s3_server.boto().list_objects_v2(Bucket=BUCKET)["Contents"]
    assert [item["Key"] for item in listed] == [f"{PREFIX}/a/b"]


@pytest.mark.parametrize("key", ["a?versionId=3", "a\0b", "\ud800"])
def test_a_key_that_would_mean_another_file_is_refused(storage: Storage, key: str) -> None:
    storage.write("a", b"old")
    with pytest.raises(Invalid) as refused:
        storage.write(key, b"new")
    assert refused.value.code == "bad_storage_key"
    assert storage.read("a") == b"old"


def test_a_key_longer_than_the_store_takes_is_refused() -> None:  # moto takes any
    told = object_store.explain(OSError(errno.ENAMETOOLONG, "KeyTooLongError"), "s3://b", "x" * 2000)
    assert isinstance(told, Invalid)
    assert len(told.detail) < 200


# --- listings -----------------------------------------------------------------------------------------


def test_what_others_write_and_remove_is_seen_at_once(bucket: str) -> None:
    mine, theirs = Storage(bucket), Storage(bucket)
    for number in range(3):
        assert mine.folders("indexes") == [f"v{each}" for each in range(number)]
        assert mine.files("indexes/v0") == (["m"] if number else [])
        assert not mine.exists(f"indexes/v{number}/m")
        theirs.write(f"indexes/v{number}/m", b"x")
        assert mine.exists(f"indexes/v{number}/m")
    theirs.write("indexes/v0/m", b"y")
    assert mine.read("indexes/v0/m") == b"y"
    theirs.remove("indexes/v1/m")
    assert mine.folders("indexes") == ["v0", "v2"]
    assert not mine.exists("indexes/v1/m")
    with pytest.raises(NotFound):
        mine.read("indexes/v1/m")


def test_more_entries_than_fit_on_a_page(storage: Storage, s3_server: s3.Moto) -> None:
    boto = s3_server.boto()
    names = [f"{number:04d}" for number in range(2 * s3.PAGE + 1)]
    for name in names:
        boto.put_object(Bucket=BUCKET, Key=f"{PREFIX}/many/{name}", Body=b"")
    assert boto.list_objects_v2(Bucket=BUCKET)["IsTruncated"], "there is only one page"
    assert storage.files("many") == names
    assert storage.folders("many") == []


def test_the_marks_that_consoles_make_for_folders_are_no_files(storage: Storage, s3_server: s3.Moto) -> None:
    for key in (f"{PREFIX}/", f"{PREFIX}/models/", f"{PREFIX}/models/a/"):
        s3_server.boto().put_object(Bucket=BUCKET, Key=key, Body=b"")
    assert (storage.files("models"), storage.folders("models")) == ([], ["a"])
    assert (storage.files("models/a"), storage.folders("models/a")) == ([], [])


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_has_nothing_below_it(request: pytest.FixtureRequest, tmp_path: Path, remote: bool) -> None:
    storage = Storage(request.getfixturevalue("bucket") if remote else str(tmp_path))
    storage.write("a/b", b"x")
    assert (storage.files("a/b"), storage.folders("a/b")) == ([], [])
    for act in (storage.read, lambda key: storage.read(key, sha256="0" * 64)):
        with pytest.raises(NotFound):
            act("a/b/c")
        with pytest.raises(NotFound):
            act("a")


def test_where_a_file_lies_on_this_machine(storage: Storage, tmp_path: Path) -> None:
    assert storage.local_path("a/b") is None
    on_disk = Storage(f"file://{tmp_path}/store")
    assert on_disk.local_path("a//b") == tmp_path / "store" / "a" / "b"
    on_disk.write("a/b", b"x")
    assert (tmp_path / "store" / "a" / "b").read_bytes() == b"x"
    with pytest.raises(Invalid):
        on_disk.local_path("../x")


def test_removing_leaves_the_neighbours(storage: Storage) -> None:
    for key in ("a", "a/b", "ab"):
        storage.write(key, key.encode())
    storage.remove("a")
    storage.remove("a")
    assert [storage.exists(key) for key in ("a/b", "ab")] == [True, True]
    with pytest.raises(NotFound):
        storage.read("a")


# --- large objects ------------------------------------------------------------------------------------


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(
    proxy: s3.Proxy, bucket: str, s3_server: s3.Moto
) -> None:
    storage = Storage(bucket)
    data = random.Random(1).randbytes(1 << 20) * 101
    digest = storage.write("large", data)
    assert storage.read("large", sha256=digest) == data
    head = s3_server.boto().head_object(Bucket=BUCKET, Key=f"{PREFIX}/large")
    assert head["ETag"].strip('"').endswith("-3")
    assert proxy.count("PUT") == 3
    assert proxy.count("GET") == 1, "a read is one request: it sees one version of the object"
    assert "Uploads" not in s3_server.boto().list_multipart_uploads(Bucket=BUCKET)


def test_an_upload_that_breaks_off_leaves_the_old_file(proxy: s3.Proxy, bucket: str) -> None:
    storage = Storage(bucket)
    storage.write("large", b"old")
    threading.Timer(0.3, proxy.down).start()
    with pytest.raises(Unavailable):
        while True:
            storage.write("large", b"n" * (101 << 20))
            storage.write("large", b"old")
    proxy.up()
    assert storage.read("large") in (b"old", b"n" * (101 << 20))


# --- errors -------------------------------------------------------------------------------------------


def everything(storage: Storage, *left_out: str) -> Iterator[tuple[str, Unavailable]]:
    """What each operation is refused with."""
    acts = {
        "read": lambda: storage.read("a/b"),
        "checked read": lambda: storage.read("a/b", sha256="0" * 64),
        "exists": lambda: storage.exists("a/b"),
        "size": lambda: storage.size("a/b"),
        "write": lambda: storage.write("a/b", b"x"),
        "large write": lambda: storage.write("a/b", b"x" * (101 << 20)),
        "remove": lambda: storage.remove("a/b"),
        "folders": lambda: storage.folders("a"),
        "files": lambda: storage.files("a"),
    }
    for name in acts.keys() - set(left_out):
        with pytest.raises(Unavailable) as refused:
            acts[name]()
        error = refused.value
        told = f"{error!r} {error} {error.as_dict()}"
        assert s3.SECRET not in told
        assert s3.KEY not in told
        yield name, error


def test_a_missing_bucket_is_not_an_empty_one(bucket: str) -> None:
    for name, error in everything(Storage("s3://no-such-bucket/prefix")):
        assert error.code == "storage_bucket_missing", name
        assert "s3://no-such-bucket/prefix" in error.detail
        assert "WHENCE_STORAGE_URL" in error.detail


def test_missing_credentials_are_told_by_the_names_of_their_variables(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, error in everything(Storage(bucket)):
        assert error.code == "storage_no_credentials", name
        assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in error.detail


@pytest.mark.parametrize("who", ["a stranger", "somebody without rights", "a wrong secret"])
def test_who_may_not_is_told_what_to_set(
    bucket: str, s3_server: s3.Moto, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    if who != "a stranger":
        iam = s3_server.boto("iam")
        iam.create_user(UserName="weak")
        key = iam.create_access_key(UserName="weak")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        secret = key["SecretAccessKey"] if who == "somebody without rights" else s3.SECRET
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3_server.check_credentials(after=0)
    try:
        for name, error in everything(Storage(bucket)):
            assert error.code == "storage_forbidden", name
            assert "AWS_ACCESS_KEY_ID" in error.detail
            assert "AWS_ENDPOINT_URL" in error.detail
    finally:
        s3_server.check_credentials(after=10**9)


def test_a_store_that_is_not_there_is_told_with_its_address_and_in_time(proxy: s3.Proxy, bucket: str) -> None:
    storage = Storage(bucket)
    proxy.down()
    for name, error in everything(
        storage, "checked read", "large write", "remove", "folders", "size"
    ):  # seconds each
        assert error.code == "storage_unavailable", name
        assert error.detail.startswith(f"Storage {bucket} at {proxy.url} does not answer"), error.detail
        assert "AWS_ENDPOINT_URL" in error.detail
    began = time.monotonic()
    with pytest.raises(Unavailable):
        storage.read("a")
    assert time.monotonic() - began < 15


def test_an_endpoint_that_is_no_address_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    with pytest.raises(Unavailable, match="AWS_ENDPOINT_URL"):
        Storage(bucket).read("a")


@pytest.mark.parametrize(
    "root",
    [
        "s3://",
        "s3:///prefix",
        "s3://no bucket/x",
        "s3://key:hunter2@bucket/x",
        "nosuchprotocol://x",
        "s3://" + "b" * 300,
    ],
)
def test_an_address_nobody_can_use_is_refused_at_the_start(root: str) -> None:
    with pytest.raises(Invalid) as refused:
        Storage(root)
    assert (refused.value.code, refused.value.param) == ("bad_storage_url", "WHENCE_STORAGE_URL")
    assert "hunter2" not in str(refused.value)


def test_a_driver_that_is_not_installed_is_told_by_name(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # who has it, keeps it
    with pytest.raises(Unavailable, match=r"whence\[s3\]") as refused:
        Storage(bucket)
    assert refused.value.code == "storage_driver_missing"


def test_an_earlier_error_is_not_taken_for_the_reason_of_a_later_one(bucket: str) -> None:
    elsewhere, storage = Storage("s3://no-such-bucket/x"), Storage(bucket)
    try:
        elsewhere.read("a")
    except Unavailable:
        with pytest.raises(NotFound):
            storage.read("a")
        assert not storage.exists("a")


# --- trouble that passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("what", ["read", "write", "exists", "files", "remove"])
def test_an_error_that_passes_is_ridden_out(proxy: s3.Proxy, bucket: str, status: int, what: str) -> None:
    storage = Storage(bucket)
    storage.write("a/b", b"x")
    proxy.failures.extend([status, status])
    act = {
        "read": lambda: storage.read("a/b") == b"x",
        "write": lambda: storage.write("a/c", b"y") == sha256_bytes(b"y"),
        "exists": lambda: storage.exists("a/b"),
        "files": lambda: storage.files("a") == ["b"],
        "remove": lambda: storage.remove("a/b") is None,
    }
    assert act[what]()
    assert not proxy.failures


def test_an_error_that_stays_is_told_after_a_bounded_number_of_tries(proxy: s3.Proxy, bucket: str) -> None:
    storage = Storage(bucket)
    storage.write("a", b"x")
    before = len(proxy.requests)
    proxy.failures.extend([503] * 1000)
    with pytest.raises(Unavailable, match="SlowDown"):
        storage.read("a")
    assert 3 <= len(proxy.requests) - before <= 12
    proxy.failures.clear()
    assert storage.read("a") == b"x"


def test_a_store_that_takes_requests_and_never_answers_is_given_up(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_S3_CONFIG", object_store._S3_CONFIG | {"read_timeout": 0.2})
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:  # the kernel accepts, nobody reads
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unavailable) as told:
            Storage(bucket).read("a")
        silent.setblocking(False)
        tries = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tries += 1
    assert told.value.code == "storage_unavailable"
    assert 3 <= tries <= 12


@pytest.mark.parametrize("after", [0, 1, 50_000])
def test_a_read_that_breaks_off_is_done_again(proxy: s3.Proxy, bucket: str, after: int) -> None:
    storage = Storage(bucket)
    data = os.urandom(200_000)
    digest = storage.write("a", data)
    proxy.cuts.append(after)
    assert storage.read("a", sha256=digest) == data
    assert proxy.count("GET") == 2


def test_a_store_that_goes_away_in_mid_read_is_told_and_fine_again_when_it_is_back(
    proxy: s3.Proxy, bucket: str
) -> None:
    storage = Storage(bucket)
    data = os.urandom(200_000)
    digest = storage.write("a", data)
    proxy.cuts.extend([100_000] * 100)
    with pytest.raises(Unavailable) as told:
        storage.read("a", sha256=digest)
    assert told.value.code == "storage_unavailable"
    proxy.cuts.clear()
    proxy.down()
    with pytest.raises(Unavailable):
        storage.read("a", sha256=digest)
    proxy.up()
    assert storage.read("a", sha256=digest) == data
    assert storage.exists("a")


# --- threads and processes ----------------------------------------------------------------------------


def test_many_threads_share_one_storage_from_its_first_use(storage: Storage) -> None:
    start = threading.Barrier(16)

    def work(number: int) -> bool:
        start.wait()
        data = bytes([number]) * 10_000
        digest = storage.write(f"t/{number}", data)
        return storage.read(f"t/{number}", sha256=digest) == data and storage.exists(f"t/{number}")

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    assert len(storage.files("t")) == 16


FORKED = """
import os, sys
from service.storage import Storage
storage = Storage(sys.argv[1])
storage.write("a", b"parent")
child = os.fork()
if child == 0:
    storage.write("b", b"child of " + storage.read("a"))
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert storage.read("b") == b"child of parent"
"""


def test_a_forked_child_uses_what_its_parent_has_used(bucket: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, bucket], cwd=ROOT, check=True, timeout=60)


# --- the local cache ----------------------------------------------------------------------------------


def cached(bucket: str, folder: Path, max_bytes: int = 1 << 20) -> Storage:
    return Storage(bucket, cache=CacheAt(folder, max_bytes))


def test_a_file_is_fetched_once_and_then_read_from_this_machine(
    proxy: s3.Proxy, bucket: str, tmp_path: Path
) -> None:
    storage = cached(bucket, tmp_path)
    digest = storage.write("a", b"data")
    for _ in range(3):
        assert storage.read("a", sha256=digest) == b"data"
    assert cached(bucket, tmp_path).read("a", sha256=digest) == b"data"
    assert proxy.count("GET") == 1
    proxy.down()
    assert storage.read("a", sha256=digest) == b"data"


def test_what_has_no_hash_is_always_fetched(proxy: s3.Proxy, bucket: str, tmp_path: Path) -> None:
    storage = cached(bucket, tmp_path)
    for data in (b"one", b"two"):
        storage.write("a", data)
        assert storage.read("a") == data
    assert proxy.count("GET") == 2
    assert [path.name for path in tmp_path.iterdir()] == [".ledger"]


def test_a_damaged_cache_file_is_fetched_again(proxy: s3.Proxy, bucket: str, tmp_path: Path) -> None:
    storage = cached(bucket, tmp_path)
    digest = storage.write("a", b"data")
    storage.read("a", sha256=digest)
    (tmp_path / digest).write_bytes(b"dat4")
    assert storage.read("a", sha256=digest) == b"data"
    assert proxy.count("GET") == 2
    assert (tmp_path / digest).read_bytes() == b"data"


def test_damage_in_the_store_is_never_cached(bucket: str, tmp_path: Path) -> None:
    storage = cached(bucket, tmp_path)
    digest = storage.write("a", b"data")
    storage.write("a", b"dat4")
    for _ in range(2):
        with pytest.raises(Damaged):
            storage.read("a", sha256=digest)
    assert [path.name for path in tmp_path.iterdir()] == [".ledger"]


def test_one_who_verifies_sees_the_store_and_not_the_cache(bucket: str, tmp_path: Path) -> None:
    storage = cached(bucket, tmp_path)
    digest = storage.write("a", b"data")
    storage.read("a", sha256=digest)
    storage.write("a", b"dat4")
    assert storage.read("a", sha256=digest) == b"data"
    with pytest.raises(Damaged):
        storage.read("a", sha256=digest, cached=False)
    storage.remove("a")
    with pytest.raises(NotFound):
        storage.read("a", sha256=digest, cached=False)


@pytest.mark.parametrize("kind", ["a folder", "no bytes", "a folder that cannot be used"])
def test_without_a_cache_everything_is_read_all_the_same(bucket: str, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache"
    if kind == "a folder that cannot be used":
        folder.write_bytes(b"in the way")
    root = str(tmp_path / "store") if kind == "a folder" else bucket
    storage = cached(root, folder, 0 if kind == "no bytes" else 1000)
    digest = storage.write("a", b"data")
    for _ in range(2):
        assert storage.read("a", sha256=digest) == b"data"
    assert not folder.is_dir()


def test_the_settings_say_where_the_cache_is_and_how_large(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)  # pyright: ignore[reportCallIssue]
    assert settings.cache == CacheAt(tmp_path / "cache", 8 << 30)


# --- indexes in a bucket ------------------------------------------------------------------------------


@pytest.fixture
def remote_registry(redis: Redis, storage: Storage) -> Registry:
    return Registry(redis, storage)


def test_flushed_redis_is_filled_again_from_the_bucket(
    remote_registry: Registry, redis: Redis, bucket: str
) -> None:
    shelf = Shelf(remote_registry, Storage(bucket))
    records = [shelf.publish("a", version) for version in (1, 2)]
    redis.flushall()
    again = Registry(redis, Storage(bucket))
    assert again.rebuild().records == 3  # the dataset and two versions
    assert indexes.versions(again, "a") == records
    assert indexes.next_version(redis, again, "a") == 3


@pytest.mark.parametrize("room", [1 << 20, 2500])
def test_an_index_in_a_bucket_is_searched_through_the_cache(
    remote_registry: Registry, proxy: s3.Proxy, bucket: str, tmp_path: Path, room: int
) -> None:
    Shelf(remote_registry, Storage(bucket)).publish("a", 1)
    record = remote_registry.get(INDEXES, "a@v1")

    def first_answer() -> list[int]:
        """What a server that has just started finds."""
        storage = cached(bucket, tmp_path / "cache", room)
        rows = Shelf(remote_registry, storage).loader().rows(record, ARRAYS[0])
        return rows.index.search(np.ones(D, np.float32), 9).rows.tolist()

    expected = first_answer()
    cold = proxy.count("GET")
    assert cold >= 10  # three shards of three files, the manifest
    assert first_answer() == expected
    warm = proxy.count("GET") - cold
    assert warm == 0 if room > 10_000 else 0 < warm <= cold
    files = [path for path in (tmp_path / "cache").iterdir() if path.name != ".ledger"]
    assert 0 < sum(path.stat().st_size for path in files) <= room
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert first_answer() == expected
    if room > 10_000:
        before = proxy.count("GET")
        proxy.down()
        assert first_answer() == expected, "the cache is mended and the store is not asked"
        assert proxy.count("GET") == before


def test_a_query_while_the_store_is_down_is_refused_and_works_when_it_is_back(
    remote_registry: Registry, proxy: s3.Proxy, bucket: str
) -> None:
    shelf = Shelf(remote_registry, Storage(bucket))
    record, loader = shelf.publish("a", 1), shelf.loader()
    proxy.down()
    with pytest.raises(Unavailable):
        loader.rows(record, ARRAYS[0])
    proxy.up()
    assert loader.rows(record, ARRAYS[0]).index.n == 9
    proxy.down()
    assert loader.rows(record, ARRAYS[0]).index.n == 9  # in memory
