"""Files of a remote storage on this machine's disk, by their sha256, up to a size.

A convenience and nothing else: what is damaged is dropped and fetched again, and a disk that is full or cannot be
written costs the saved time only. Several threads and processes may share one folder; kill -9 leaves at most a file
that is swept the next time somebody makes room.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_NAME = re.compile("[0-9a-f]{64}")
_PATIENCE_S = 2.0  # for whoever makes room just now; after that a file is not kept
_KEEP = 0.9  # making room goes down to this share, so that not every file has to look through the folder


@dataclass(frozen=True)
class CacheAt:
    """Where a FileCache may be and how large; 0 bytes: none."""

    folder: Path
    max_bytes: int


class FileCache:
    """``max_bytes`` holds for all files together, whoever wrote them; files being written come on top."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._complained = False
        with self._harmless():
            folder.mkdir(parents=True, exist_ok=True)
            with self._ledger() as ledger:
                ledger.write(self._make_room(0))

    def get(self, sha256: str) -> bytes | None:
        """The bytes with this hash, checked just now; None when they are not here."""
        if not _NAME.fullmatch(sha256):
            return None
        path = self._folder / sha256
        with self._harmless():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                with contextlib.suppress(OSError):
                    os.utime(path)  # the order in which files are let go
                return data
            log.warning("a damaged file in the cache is fetched again: %s", path)
            path.unlink()
        return None

    def put(self, sha256: str, data: bytes) -> None:
        """Keep ``data``, whose hash the caller has checked; older files make room."""
        if not _NAME.fullmatch(sha256) or len(data) > self._max_bytes:
            return
        target = self._folder / sha256
        temporary = self._folder / f".{sha256}.{uuid.uuid4().hex}.tmp"
        with self._harmless():
            if target.exists():
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    # The kernel lets go of it with the process: whoever can take it may remove the file.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.write(data)
                    file.flush()
                    with self._ledger() as ledger:
                        used = ledger.read()
                        if used is None or used + len(data) > self._max_bytes:
                            used = self._make_room(len(data))
                        if used + len(data) <= self._max_bytes:
                            # Counted first: killed in between, we believe in less room than there is.
                            ledger.write(used + len(data))
                            temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> int:
        """Let the longest unused files go until ``size`` more bytes fit; what the rest holds. Under the ledger."""
        found: list[tuple[int, int, Path]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if _NAME.fullmatch(entry.name):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                    elif entry.name.startswith(".") and entry.name.endswith(".tmp"):
                        _sweep(Path(entry.path))
        used = sum(held for _, held, _ in found)
        if used + size <= self._max_bytes:
            return used
        for _, held, path in sorted(found):
            if used + size <= _KEEP * self._max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= held
        return used

    @contextlib.contextmanager
    def _ledger(self) -> Iterator["_Ledger"]:
        """The number of bytes in use, held by nobody else meanwhile."""
        descriptor = os.open(self._folder / ".ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.005)
            yield _Ledger(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Nothing that goes wrong here may fail a read."""
        try:
            yield
        except (FileNotFoundError, BlockingIOError):
            pass  # not here; or somebody else is at it
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("the cache in %s cannot be used, files come from the storage: %s", self._folder, error)


@dataclass(frozen=True)
class _Ledger:
    descriptor: int

    def read(self) -> int | None:
        """None when nobody has counted yet, or a crash of the machine has lost it."""
        text = os.pread(self.descriptor, 32, 0)
        return int(text) if text.strip().isdigit() else None

    def write(self, used: int) -> None:
        os.pwrite(self.descriptor, f"{used:020d}\n".encode(), 0)


def _sweep(temporary: Path) -> None:
    """Remove what a killed writer has left; what is being written is locked."""
    with contextlib.suppress(BlockingIOError), temporary.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink()
