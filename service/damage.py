"""How damage is told: the file, the version that it belongs to, and what mends it.

Storage knows its files only; which index was asked, and what can be done, is known here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from service import indexes
from service.errors import Damaged, NotFound
from service.registry import INDEXES, Registry
from service.storage import Storage

P = ParamSpec("P")
R = TypeVar("R")

MISSING = "file_not_found"  # what storage says of a file that is not there
_OF_THEIR_OWN = ("aliases/", "concepts/", "datasets/", "models/", "saes/")  # files that belong to no index
_FOUND = {MISSING, "missing_artifact", "damaged_file", "damaged_record"}


class _Query(Protocol):
    @property
    def index(self) -> str: ...


class _Service(Protocol):
    _registry: Registry


S = TypeVar("S", bound=_Service)
Q = TypeVar("Q", bound=_Query)


def told(run: Callable[Concatenate[S, Q, P], R]) -> Callable[Concatenate[S, Q, P], R]:
    """A method that answers a query: what it finds damaged is told with its index and the way to mend it."""

    @wraps(run)
    def guarded(self: S, query: Q, *args: P.args, **kwargs: P.kwargs) -> R:
        with asking(lambda: _id(self._registry, query.index)):
            return run(self, query, *args, **kwargs)

    return guarded


@contextmanager
def asking(index: Callable[[], str | None]) -> Iterator[None]:
    """What is found damaged in here is told with the index that was asked and the way to mend it."""
    try:
        yield
    except (Damaged, NotFound) as error:
        if not is_damage(error):
            raise
        raise explained(error, index()) from error


def is_damage(error: Damaged | NotFound) -> bool:
    """Whether a file that something refers to is not what it was, or not there."""
    return isinstance(error, Damaged) or error.code == MISSING


def explained(error: Damaged | NotFound, index: str | None) -> Damaged:
    """The same error for those who asked ``index``. One that has been explained stays as it is."""
    if "repair" in error.context and isinstance(error, Damaged):
        return error
    if error.code not in _FOUND or error.param is None:
        return error if isinstance(error, Damaged) else Damaged(error.code, error.detail, param=error.param)
    file = error.param
    code, what = ("missing_file", "is missing") if error.code in {MISSING, "missing_artifact"} else (error.code, "")
    way, sentence = remedy(file, index)
    of = f" of index {index}" if index and not file.startswith(_OF_THEIR_OWN) else ""
    detail = f"{file}{of} {what or 'is damaged: it is not what was written'}. {sentence}"
    context: dict[str, Any] = {**error.context, "file": file, "index": index, "repair": way}
    return Damaged(code, detail, param=file, context=context)


def remedy(file: str, index: str | None) -> tuple[str | None, str]:
    """The command that mends a file, where there is one, and a sentence for people."""
    kind, _, rest = file.partition("/")
    owner = rest.partition("/")[0]
    if kind == "datasets":
        command = f"whence datasets add FILE --id {owner}"
        return command, f"Upload the same file again: `{command}`; the same content puts it back."
    if kind == "aliases":
        command = f"whence aliases set {owner} INDEX --force"
        detail = (
            f"Set it again with `{command}` (PUT with If-Match: *), or remove it: nothing else says what it was."
        )
        return command, detail
    if kind == "concepts" and not rest.endswith("record.json"):
        detail = (
            f"Import the export of concept {owner!r} (`whence concepts import`), send the request that derived "
            "or gave it once more, or fit it again under another id: nothing else says what it was."
        )
        return None, detail
    if kind == "saes" and not rest.endswith("record.json"):
        detail = (
            f"Import the folder of SAE {owner!r} again under the same id (`whence saes import`): the same files "
            "put it back. One that was trained here is trained again under another id."
        )
        lost = f"What was said of features of SAE {owner!r} is lost: remove the file, and label them again."
        return None, lost if rest.endswith("labels.json") else detail
    index = owner if kind == "indexes" else index
    command = f"whence indexes repair {index}" if index else None
    if command is None:
        return None, "`whence indexes repair NAME@v3` mends what an index version needs."
    return command, f"`{command}` makes it again and checks that it is the same; other versions are not touched."


def published(storage: Storage, registry: Registry, reference: str) -> str:
    """The id of the version that a reference means, also where its record is damaged or gone. Raises NotFound, and
    Damaged when nobody can tell which version an alias means.
    """
    try:
        return indexes.resolve(registry, reference).id
    except Damaged as error:
        kind, _, rest = str(error.param).partition("/")
        if kind != INDEXES.name:
            raise
        return rest.partition("/")[0]
    except NotFound:
        left = (indexes.BUILD, indexes.MANIFEST)
        if "@" not in reference or not any(storage.exists(f"indexes/{reference}/{name}") for name in left):
            raise
        return reference


def _id(registry: Registry, reference: str) -> str | None:
    try:
        return indexes.resolve(registry, reference).id
    except (Damaged, NotFound):
        return reference
