"""A result at rest: a folder of files and a sealed manifest over them, written last. Shards and artifacts are such.

One that is damaged is *marked*, and then made again. Whoever makes results takes a marked one for absent; whoever
reads goes on with what is intact of it. What takes its place is compared with what was recorded before any of it is
written: an index that names the old bytes never meets others, and a death in between leaves the mark.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from service import codec
from service.errors import Damaged, NotFound
from service.storage import Storage, sha256_bytes
from service.tasks import libraries

log = logging.getLogger(__name__)

T = TypeVar("T")

MARK = "damaged.json"
NOT_EXACTLY = "cannot_repair_exactly"


class Manifest(Protocol):
    @property
    def files(self) -> Mapping[str, str]: ...  # file name → sha256

    @property
    def versions(self) -> Mapping[str, str]: ...


M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Mark:
    """What is known of a damaged result. ``exact``: only the recorded bytes may take its place."""

    manifest: str | None  # sha256 by which an index names its manifest
    exact: bool = True
    versions: Mapping[str, str] | None = (
        None  # of libraries and machine that built the index: same ones, same bytes
    )


# --- sealed files -------------------------------------------------------------------------------------


def sealed(record: Any) -> bytes:
    """A record as the bytes of a sealed file."""
    return codec.seal(codec.encode(record)).encode()


def read_text(storage: Storage, key: str, *, sha256: str) -> bytes:
    """The text of the record in a sealed file, checked but not decoded. Raises NotFound or Damaged."""
    if (text := storage.held(sha256)) is not None:
        return text
    data = storage.read(key)
    try:
        text = codec.opened(data, sha256=sha256)
    except ValueError as error:
        raise _not_as_written(key, error) from error
    storage.keep(sha256, text)
    return text


def read_sealed(storage: Storage, key: str, kind: type[T], *, sha256: str | None = None) -> T:
    """The record in a sealed file, checked before it is believed. Raises NotFound or Damaged."""
    data = storage.read(key)
    try:
        return codec.unseal(kind, data, sha256=sha256)
    except ValueError as error:
        raise _not_as_written(key, error) from error


def _not_as_written(key: str, error: ValueError) -> Damaged:
    detail = f"{key} is not what was written: {str(error)[:300]}."
    return Damaged("damaged_file", detail, param=key, context={"file": key})


def intact(storage: Storage, key: str, kind: type[T], *, sha256: str | None = None) -> T | None:
    """The record in a sealed file, or None when it is missing or damaged."""
    try:
        return read_sealed(storage, key, kind, sha256=sha256)
    except (NotFound, Damaged):
        return None


# --- results ------------------------------------------------------------------------------------------


def publish(
    storage: Storage,
    folder: str,
    name: str,
    manifest: M,
    files: Mapping[str, bytes],
    *,
    named: bool,
    by_content: bool = False,
) -> M:
    """Store the files and then the manifest; what stands there afterwards.

    ``named``: whoever refers to this result does so by the hash of its manifest, and notices another one.
    ``by_content``: the folder is named by the hash of what is in it, so that nothing else can be published there.
    Of others a damaged one is replaced by its like alone. Raises Damaged (``cannot_repair_exactly``) before
    anything is written.
    """
    mark = _mark(storage, folder)
    guarded = not by_content and _guarded(storage, folder, name, mark, named)
    held = _replaced(storage, folder, name, manifest, mark) if guarded else None
    if held is None:
        storage.publish(folder, files, (name, sealed(manifest)))
    else:
        for file, data in files.items():
            storage.write(f"{folder}/{file}", data)
    if mark is not None:
        storage.remove(f"{folder}/{MARK}")
    return manifest if held is None else held


def made(storage: Storage, folder: str, name: str, kind: type[T]) -> T | None:
    """A result's manifest for those who make what is missing: one that is damaged or marked is to be made again."""
    try:
        manifest = read_sealed(storage, f"{folder}/{name}", kind)
    except NotFound:
        return None
    except Damaged as error:
        log.warning("%s It is made again.", error)
        return None
    return None if storage.exists(f"{folder}/{MARK}") else manifest


def mark(
    storage: Storage, folder: str, *, manifest: str | None = None, versions: Mapping[str, str] | None = None
) -> None:
    """Have the result made again, by those who need it next, exactly as it was."""
    storage.write(f"{folder}/{MARK}", sealed(Mark(manifest, versions=versions)))


def give_up(storage: Storage, folder: str) -> None:
    """Let another build make a marked result as it can; only for results that are named by their hash."""
    storage.write(f"{folder}/{MARK}", sealed(Mark(None, exact=False)))


def _mark(storage: Storage, folder: str) -> Mark | None:
    key = f"{folder}/{MARK}"
    if not storage.exists(key):
        return None
    return intact(storage, key, Mark) or Mark(None)


def _guarded(storage: Storage, folder: str, name: str, mark: Mark | None, named: bool) -> bool:
    """Whether something stands there that may be replaced by its like only."""
    if mark is not None:
        return mark.exact
    return not named and storage.exists(f"{folder}/{name}")


def _replaced(storage: Storage, folder: str, name: str, manifest: M, mark: Mark | None) -> M | None:
    """The manifest that stays because it is intact; None: the new one is to be written. Raises Damaged."""
    pinned = mark.manifest if mark else None
    held = intact(storage, f"{folder}/{name}", type(manifest), sha256=pinned)
    if held is not None:
        recorded = dict(held.files)
    elif pinned is not None:
        if sha256_bytes(codec.encode(manifest).encode()) != pinned:
            raise _differs(folder, name, [name], manifest.versions, None)
        return None
    else:  # nothing says what it was but the files that are left
        left = set(storage.files(folder))
        recorded = {file: sha256_bytes(storage.read(f"{folder}/{file}")) for file in manifest.files if file in left}
        if (
            mark is not None
            and mark.versions is not None
            and libraries(mark.versions) == libraries(manifest.versions)
        ):
            recorded = dict(manifest.files) | recorded  # of what is gone without a trace: as good as it gets
    if other := sorted(file for file, sha256 in manifest.files.items() if recorded.get(file) != sha256):
        raise _differs(folder, name, other, manifest.versions, held.versions if held else None)
    return held


def _differs(
    folder: str, name: str, files: list[str], now: Mapping[str, str], then: Mapping[str, str] | None
) -> Damaged:
    changed = {key: (value, now.get(key)) for key, value in (then or {}).items() if now.get(key) != value}
    why = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items()) or "not known why"
    return Damaged(
        NOT_EXACTLY,
        f"{folder} is damaged, and what is computed now in its place differs from what was recorded, in "
        f"{', '.join(files[:5])} ({why}). Nothing was replaced. Repair it on a machine and with libraries like "
        "those that built it, or build a new version.",
        param=f"{folder}/{name}",
        context={"file": f"{folder}/{name}", "files": files},
    )
