"""Files under one root, local or remote: the only place that writes them.

Publishing is atomic: on a local disk a file is written beside its place, fsynced and renamed; on an
object store a put is atomic by itself. A folder is published by writing its manifest last, so a reader
that starts from a manifest never sees half of anything.
"""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from service import object_store
from service.errors import Damaged, Forbidden, Invalid, NotFound, Unavailable
from service.local_cache import CacheAt, FileCache

# What a disk says of a file that it has and cannot give back: a sector, a checksum or the folder's entry is bad.
_ROTTEN = {errno.EIO, errno.EBADMSG, errno.ELOOP, getattr(errno, "EUCLEAN", errno.EIO)}  # the last: Linux alone
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a local file, read once in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def on_disk(key: str, *, writing: bool = False) -> Iterator[None]:
    """What a local disk says of the file of ``key``, as an error of ours: NotFound, Damaged or Unavailable;
    where it is being written, the last alone.
    """
    try:
        yield
    except OSError as error:
        said, verb = error.strerror or str(error), "write" if writing else "read"
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) and not writing:
            raise NotFound("file_not_found", f"Storage has no {key}.", param=key) from error
        if error.errno in _ROTTEN and not writing:
            detail = f"The disk has {key} and cannot give it back ({said})."
            raise Damaged("damaged_file", detail, param=key) from error
        full = error.errno in _FULL
        todo = "Make room" if full else "Check that the disk is there and that this process may read and write it"
        raise Unavailable(
            "storage_full" if full else "storage_unavailable",
            f"Storage cannot {verb} {key} ({said}). {todo}; the same call works again then.",
            param=key,
        ) from error


class Storage:
    """Keys are relative POSIX paths; ``root`` is a folder or an fsspec URL such as s3://bucket/prefix.

    Safe in many threads, and in a forked child. Raises Unavailable when the disk or a remote root does not answer,
    with what to do; ``cache`` keeps what was read from a remote root by its hash, and is nothing to a folder.
    """

    def __init__(self, root: str, *, cache: CacheAt | None = None) -> None:
        self.root = root
        self._process = os.getpid()
        self._fs, self._base, self._local = object_store.connect(root)
        wanted = cache is not None and cache.max_bytes > 0 and not self._local
        self._cache = FileCache(cache.folder, cache.max_bytes) if cache is not None and wanted else None
        if self._local:
            with on_disk(root, writing=True):
                Path(self._base).mkdir(parents=True, exist_ok=True)

    def local_path(self, key: str) -> Path | None:
        """Where the file of ``key`` lies on this machine, be it there or not; None on a remote root."""
        return Path(self._path(key)) if self._local else None

    def exists(self, key: str) -> bool:
        path = self._path(key)
        if self._local:
            with on_disk(key):
                return Path(path).exists()
        try:
            with self._remote(key) as fs:
                fs.info(path)
        except NotFound:
            return False
        return True

    def size(self, key: str) -> int | None:
        """Bytes of a file; None when there is none."""
        path = self._path(key)
        try:
            if self._local:
                with on_disk(key):
                    return Path(path).stat().st_size
            with self._remote(key) as fs:
                return int(fs.info(path)["size"])
        except NotFound:
            return None

    def read(self, key: str, *, sha256: str | None = None, cached: bool = True) -> bytes:
        """The bytes of ``key``; with ``sha256`` they are checked before anybody uses them.

        With ``cached`` false they come from the store itself, whatever this machine holds of them. Raises
        NotFound when there is no such file, Damaged when the hash differs, Unavailable.
        """
        path = self._path(key)
        cache = self._cache if sha256 is not None and cached else None
        if cache is not None and sha256 is not None and (held := cache.get(sha256)) is not None:
            return held
        data = self._read_local(key, path) if self._local else self._read_remote(key, path)
        if sha256 is not None and sha256_bytes(data) != sha256:
            raise Damaged(
                "damaged_file",
                f"{key} is not what its manifest says (sha256 differs). Rebuild it.",
                param=key,
            )
        if cache is not None and sha256 is not None:
            cache.put(sha256, data)
        return data

    def held(self, sha256: str) -> bytes | None:
        """What this machine's cache has by that hash; None without a cache."""
        return None if self._cache is None else self._cache.get(sha256)

    def keep(self, sha256: str, data: bytes) -> None:
        """Have the cache, where there is one, hold data whose hash the caller has checked."""
        if self._cache is not None:
            self._cache.put(sha256, data)

    def _read_local(self, key: str, path: str) -> bytes:
        with on_disk(key):
            return Path(path).read_bytes()

    def _read_remote(self, key: str, path: str) -> bytes:
        with self._remote(key) as fs:
            return fs.cat_file(path)

    def write(self, key: str, data: bytes) -> str:
        """Publish ``data`` at ``key`` atomically, replacing what was there; returns its sha256."""
        path = self._path(key)
        if not self._local:
            with self._remote(key) as fs:
                fs.pipe_file(path, data)
            return sha256_bytes(data)
        with on_disk(key, writing=True):
            _write_local(Path(path), data)
        return sha256_bytes(data)

    def remove(self, key: str) -> None:
        """Delete a file; one that is not there is no error."""
        path = self._path(key)
        if self._local:
            with on_disk(key, writing=True):
                Path(path).unlink(missing_ok=True)
            return
        with contextlib.suppress(NotFound), self._remote(key) as fs:
            fs.rm_file(path)

    def publish(self, folder: str, files: Mapping[str, bytes], manifest: tuple[str, bytes]) -> None:
        """Write ``files`` into ``folder`` and, when all of them are safe, the manifest (name, bytes)."""
        for name, data in files.items():
            self.write(f"{folder}/{name}", data)
        self.write(f"{folder}/{manifest[0]}", manifest[1])

    def folders(self, key: str) -> list[str]:
        """Names of the folders directly below ``key``, sorted; empty when there is no such folder."""
        return sorted(name for name, kind in self._entries(key) if kind == "directory")

    def files(self, key: str) -> list[str]:
        """Names of the files directly below ``key``, sorted, unfinished ones left out."""
        return sorted(name for name, kind in self._entries(key) if kind == "file" and not name.endswith(".tmp"))

    def _entries(self, key: str) -> list[tuple[str, str]]:
        """(name, type) of what lies directly below ``key``."""
        path = self._path(key)
        try:
            if self._local:
                with on_disk(key), os.scandir(path) as entries:
                    return [(entry.name, "directory" if entry.is_dir() else "file") for entry in entries]
            with self._remote(key) as fs:
                listed = fs.ls(path, detail=True, refresh=True)
        except NotFound:
            return []
        found = [(entry["name"].rstrip("/"), entry["type"]) for entry in listed]
        # Not the file itself, nor the empty object by which consoles mark a folder.
        return [(PurePosixPath(name).name, kind) for name, kind in found if name != path]

    def _path(self, key: str) -> str:
        """Where ``key`` lies in the filesystem. Raises Invalid for what would lie outside the root, or nowhere."""
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts:
            raise Invalid("bad_storage_key", f"{key!r} is not a relative path without '..'.")
        # The last one: s3fs takes it for a version of the object, and would write another key.
        if "\0" in key or not _is_unicode(key) or "?versionId=" in key:
            raise Invalid("bad_storage_key", f"{key!r} cannot be the name of a file in every kind of storage.")
        # Put together again, since a//b and ./a/b are a/b on a disk but not on an object store.
        return f"{self._base.rstrip('/')}/{'/'.join(parts)}"

    @contextlib.contextmanager
    def _remote(self, key: str) -> Iterator[Any]:
        """The filesystem, whose errors become ours. In a forked child it is opened anew: its thread is gone."""
        if self._process != os.getpid():
            self._fs, self._base, self._local = object_store.connect(self.root)
            self._process = os.getpid()
        try:
            yield self._fs
        except Exception as error:
            told = object_store.explain(error, self.root, key)
            if told is None:
                raise
            raise told from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_local(target: Path, data: bytes) -> None:
    """The file is whole or as it was, also when the machine loses power at any point."""
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """mkdir -p, every new entry made durable in its parent."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable: the folder's entry is data too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside_roots(path: str, roots: tuple[Path, ...], *, param: str) -> Path:
    """``path`` with symbolic links resolved, if it lies under one of ``roots``.

    Raises Invalid for a relative path and Forbidden for one outside the roots, before touching the disk.
    """
    given = Path(path)
    if not given.is_absolute():
        raise Invalid("relative_path", f"{path!r} is relative; the server needs an absolute path.", param=param)
    try:
        resolved = given.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise Invalid("bad_path", f"{path!r} is not a usable path.", param=param) from error
    if not any(resolved.is_relative_to(root) for root in roots):
        shown = ", ".join(map(str, roots)) or "none configured"
        raise Forbidden(
            "path_outside_roots",
            f"{path} is outside the folders this server may read ({shown}). "
            "Move it there, start the server with WHENCE_ROOTS (or `whence up --root`), or upload the file.",
            param=param,
        )
    return resolved
