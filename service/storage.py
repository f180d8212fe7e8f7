"""Files under one root, local or remote: the only place that writes them.

Publishing is atomic: on a local disk a file is written beside its place, fsynced and renamed; on an
object store a put is atomic by itself. A folder is published by writing its manifest last, so a reader
that starts from a manifest never sees half of anything.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import fsspec

from service.errors import Damaged, Forbidden, Invalid, NotFound

_LOCAL = ("file", "local")


def sha256_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a local file, read once in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Storage:
    """Keys are relative POSIX paths; ``root`` is a folder or an fsspec URL such as s3://bucket/prefix."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, self._base = fsspec.core.url_to_fs(root)
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._local = any(name in _LOCAL for name in protocols)
        if self._local:
            Path(self._base).mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> str:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts:
            raise Invalid("bad_storage_key", f"{key!r} is not a relative path without '..'.")
        return f"{self._base.rstrip('/')}/{key}"

    def local_path(self, key: str) -> Path | None:
        """Where ``key`` lies on this machine's disk; None on an object store."""
        return Path(self._path(key)) if self._local else None

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(self._path(key)))

    def size(self, key: str) -> int | None:
        """Bytes of a file; None when there is none."""
        try:
            return int(self._fs.info(self._path(key), refresh=True)["size"])
        except FileNotFoundError:
            return None

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """The bytes of ``key``; with ``sha256`` they are checked before anybody uses them.

        Raises NotFound when there is no such file, Damaged when the hash differs.
        """
        try:
            data: bytes = self._fs.cat_file(self._path(key))
        except FileNotFoundError as error:
            raise NotFound("file_not_found", f"Storage has no {key}.", param=key) from error
        if sha256 is not None and sha256_bytes(data) != sha256:
            raise Damaged(
                "damaged_file",
                f"{key} is not what its manifest says (sha256 differs). Rebuild it.",
                param=key,
            )
        return data

    def write(self, key: str, data: bytes) -> str:
        """Publish ``data`` at ``key`` atomically, replacing what was there; returns its sha256."""
        path = self._path(key)
        if not self._local:
            self._fs.pipe_file(path, data)
            return sha256_bytes(data)
        target = Path(path)
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
        return sha256_bytes(data)

    def remove(self, key: str) -> None:
        """Delete a file; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def publish(self, folder: str, files: Mapping[str, bytes], manifest: tuple[str, bytes]) -> None:
        """Write ``files`` into ``folder`` and, when all of them are safe, the manifest (name, bytes)."""
        for name, data in files.items():
            self.write(f"{folder}/{name}", data)
        self.write(f"{folder}/{manifest[0]}", manifest[1])

    def folders(self, key: str) -> list[str]:
        """Names of the folders directly below ``key``, sorted; empty when there is no such folder."""
        return sorted(
            PurePosixPath(entry["name"].rstrip("/")).name
            for entry in self._entries(key)
            if entry["type"] == "directory"
        )

    def files(self, key: str) -> list[str]:
        """Names of the files directly below ``key``, sorted, unfinished ones left out."""
        names = [PurePosixPath(entry["name"]).name for entry in self._entries(key) if entry["type"] == "file"]
        return sorted(name for name in names if not name.endswith(".tmp"))

    def _entries(self, key: str) -> list[dict[str, str]]:
        with contextlib.suppress(FileNotFoundError):
            return self._fs.ls(self._path(key), detail=True, refresh=True)
        return []


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
