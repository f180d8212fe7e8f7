"""The cache on a machine's disk: bounded, never wrong, never in the way of a read."""

import errno
import hashlib
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from service.local_cache import FileCache

ROOT = Path(__file__).resolve().parents[1]


def made(seed: int, size: int = 100) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).hexdigest(), data


def held(folder: Path) -> dict[str, int]:
    """Cached files and their sizes."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_is_put_is_got_also_by_others_and_later(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "a" / "cache", 10_000)
    name, data = made(1)
    assert cache.get(name) is None
    cache.put(name, data)
    assert cache.get(name) == data
    assert FileCache(tmp_path / "a" / "cache", 10_000).get(name) == data


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "longer"])
def test_a_damaged_file_is_dropped_and_taken_again(tmp_path: Path, change: str) -> None:
    cache = FileCache(tmp_path, 10_000)
    name, data = made(1)
    cache.put(name, data)
    broken = {"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "empty": b"", "longer": data + b"x"}[
        change
    ]
    (tmp_path / name).write_bytes(broken)
    assert cache.get(name) is None
    assert held(tmp_path) == {}
    cache.put(name, data)
    assert cache.get(name) == data


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    files = [made(seed, 300) for seed in range(4)]
    for name, data in files[:3]:
        cache.put(name, data)
        time.sleep(0.01)
    assert cache.get(files[0][0]) is not None  # used just now: the second is the oldest
    time.sleep(0.01)
    cache.put(*files[3])
    assert set(held(tmp_path)) == {files[number][0] for number in (0, 2, 3)}


def test_the_bound_holds_after_every_file_whatever_their_sizes(tmp_path: Path) -> None:
    cache, chance = FileCache(tmp_path, 5000), random.Random(3)
    kept = 0
    for seed in range(200):
        name, data = made(seed, chance.choice([0, 1, 50, 400, 2000, 4900, 5000]))
        cache.put(name, data)
        assert sum(held(tmp_path).values()) <= 5000
        kept += cache.get(name) == data
    assert kept == 200, "the newest file is always kept"


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    cache.put(*made(1))
    cache.put(*made(2, 1001))
    assert set(held(tmp_path)) == {made(1)[0]}


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    for seed in range(10):
        FileCache(tmp_path, 1000).put(*made(seed))
    assert sum(held(tmp_path).values()) == 1000
    FileCache(tmp_path, 450)
    assert 0 < sum(held(tmp_path).values()) <= 450


@pytest.mark.parametrize("ledger", [b"", b"garbage", b"00000000000000000000\n", b"99999999999999999999\n"])
def test_a_wrong_count_is_set_right(tmp_path: Path, ledger: bytes) -> None:
    for seed in range(9):
        FileCache(tmp_path, 1000).put(*made(seed))
    (tmp_path / ".ledger").write_bytes(ledger)
    cache = FileCache(tmp_path, 1000)  # counts what there is
    for seed in range(9, 30):
        cache.put(*made(seed))
        assert 700 <= sum(held(tmp_path).values()) <= 1000


def test_a_count_lost_while_running_is_made_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    for seed in range(30):
        cache.put(*made(seed))
        (tmp_path / ".ledger").unlink()
    assert 700 <= sum(held(tmp_path).values()) <= 1000


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = {"notes.txt", "x" * 64, "F" * 64, ".hidden"}
    for name in foreign:
        (tmp_path / name).write_bytes(b"z" * 900)
    (tmp_path / "folder").mkdir()
    cache = FileCache(tmp_path, 1000)
    for seed in range(30):
        cache.put(*made(seed))
    assert foreign | {"folder"} <= {path.name for path in tmp_path.iterdir()}
    assert cache.get(made(29)[0]) is not None


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65])
def test_only_hashes_are_names(tmp_path: Path, name: str) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    cache.put(name, b"data")
    assert cache.get(name) is None
    assert held(tmp_path / "cache") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# --- several at once ----------------------------------------------------------------------------------

# Puts and gets files of 2,000 to 20,000 bytes for ever; says when it reads something wrong.
BUSY = """
import hashlib, random, sys
from pathlib import Path
from service.local_cache import FileCache
cache, chance = FileCache(Path(sys.argv[1]), 100_000), random.Random(sys.argv[2])
print("started", flush=True)
while True:
    seed = chance.randrange(40)
    data = random.Random(seed).randbytes(2_000 + 450 * seed)
    name = hashlib.sha256(data).hexdigest()
    if chance.random() < 0.5:
        cache.put(name, data)
    elif (found := cache.get(name)) is not None and found != data:
        print("WRONG", flush=True)
"""


def busy(folder: Path, seed: int) -> subprocess.Popen:
    command = [sys.executable, "-c", BUSY, str(folder), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


def holder(path: Path) -> subprocess.Popen:
    """A process that has locked the file and sleeps."""
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


def test_processes_share_a_folder_and_kill_9_costs_nothing(tmp_path: Path) -> None:
    largest, told = 0, ""
    for round_number in range(4):
        processes = [busy(tmp_path, 10 * round_number + number) for number in range(2)]
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            names = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
            total = 0
            for path in names:
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    total = 0  # changed while it was summed
                    break
            largest = max(largest, total)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            told += process.communicate()[0]
    assert told == "", "wrong bytes, or a complaint"
    # Summed over a moment, files that came and went may be counted together: one of each process at most.
    assert 50_000 < largest <= 100_000 + 2 * 20_000
    assert sum(held(tmp_path).values()) <= 100_000
    FileCache(tmp_path, 100_000)
    assert sum(held(tmp_path).values()) <= 100_000
    for name in held(tmp_path):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == name


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    name, _ = made(1)
    left, written = tmp_path / f".{name}.0.tmp", tmp_path / f".{name}.1.tmp"
    left.write_bytes(b"half")
    writer = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'xb'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(written)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    FileCache(tmp_path, 1000)
    assert (left.exists(), written.exists()) == (False, True)
    process.kill()
    process.communicate()
    cache = FileCache(tmp_path, 1000)
    assert not written.exists()
    cache.put(name, made(1)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ledger", name]


def test_many_threads_use_one_cache(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 20_000)
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            name, data = made(chance.randrange(30), 1000)
            cache.put(name, data)
            if cache.get(name) not in (data, None):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 10_000 < sum(held(tmp_path).values()) <= 20_000
    assert not list(tmp_path.glob(".*.tmp"))


# --- nothing here fails a read ------------------------------------------------------------------------


def test_a_folder_that_cannot_be_used_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with caplog.at_level(logging.WARNING):
        cache = FileCache(tmp_path / "file" / "cache", 1000)
        for seed in range(3):
            cache.put(*made(seed))
            assert cache.get(made(seed)[0]) is None
    assert [record.message.split(",")[0] for record in caplog.records] == [
        f"the cache in {tmp_path}/file/cache cannot be used"
    ]


def test_a_full_disk_is_told_once_and_what_is_there_is_still_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FileCache(tmp_path, 100_000)
    cache.put(*made(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with caplog.at_level(logging.WARNING):
            for seed in (2, 3):
                cache.put(*made(seed, 5000))
                assert cache.get(made(seed, 5000)[0]) is None
        assert cache.get(made(1)[0]) == made(1)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caplog.records) == 1
    assert os.strerror(errno.EFBIG) in caplog.text
    assert not list(tmp_path.glob(".*.tmp"))
    cache.put(*made(2, 5000))
    assert cache.get(made(2, 5000)[0]) is not None


def test_a_folder_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    cache.put(*made(1))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert cache.get(made(1)[0]) is None
    cache.put(*made(1))
    assert cache.get(made(1)[0]) == made(1)[1]


def test_a_process_that_hangs_with_the_count_in_hand_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.local_cache._PATIENCE_S", 0.1)
    cache = FileCache(tmp_path, 1000)
    cache.put(*made(1))
    process = holder(tmp_path / ".ledger")
    cache.put(*made(2))
    assert cache.get(made(1)[0]) == made(1)[1]
    assert cache.get(made(2)[0]) is None
    process.kill()
    process.communicate()
    cache.put(*made(2))
    assert cache.get(made(2)[0]) is not None
