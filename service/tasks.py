"""One unit of work for one worker, what it is named by, and the manifests of what it leaves in storage.

A task adds to a work (``service/work.py``) the examples and where the weights lie. Results are named by the hash of
work and examples, so a finished one is found again by every job that needs it: a resumed build, a rebuild, another
query on the same data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from service import codec
from service.contracts import ArrayInfo, DatasetRecord, Quarantined
from service.training import ReadAnswersWork, RetrainWork
from service.work import Location, ShardWork, Work

AnyWork = Work | RetrainWork | ReadAnswersWork

# Among the versions of a result: the padded tokens that its batches held at most, and whether memory made that so.
BUDGET, LOWERED = "token_budget", "lowered_token_budget"


def identity(work: Any) -> Any:
    """What keys are hashes of: a work, or a part of one, as plain data without its token budget.

    Rows depend on their batches by rounding only. Whoever lowers the budget after running out of memory finds all
    that is done; what a result was computed with is in its versions.
    """
    return _without_budget(codec.to_plain(work))


def libraries(versions: Mapping[str, str]) -> dict[str, str]:
    """Of the versions of a result those of libraries and machine."""
    return {name: said for name, said in versions.items() if name not in {BUDGET, LOWERED}}


def _without_budget(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {name: _without_budget(value) for name, value in plain.items() if name != BUDGET}
    return [_without_budget(value) for value in plain] if isinstance(plain, list) else plain


@dataclass(frozen=True)
class Task:
    """One unit of work for one worker. ``rows`` are positions among the dataset's examples."""

    key: str
    title: str  # for people
    work: AnyWork
    location: Location | None = None
    dataset: DatasetRecord | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """The manifest of an artifact, written last; files are safetensors."""

    key: str
    facts: Mapping[str, float | int | str]
    files: Mapping[str, str]  # file name → sha256
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ShardArray:
    """A stored matrix: see ``service/rows.py`` for ``encoding``.

    ``half``: float16 rows and one power of two per row; ``int8``: one float32 scale per row; ``single``:
    float32, for the query side, which is small and must not be rounded.
    """

    info: ArrayInfo
    encoding: str
    file: str
    scale: str | None  # the file with a number per row


def _apart(ids: Any) -> Any:
    return (tuple(ids.split(",")) if ids else ()) if isinstance(ids, str) else ids


# One string instead of a list of strings: a hundred times faster to read, and thousands of manifests are.
Ids = Annotated[tuple[str, ...], BeforeValidator(_apart), PlainSerializer(",".join)]


@dataclass(frozen=True)
class ShardManifest:
    """Written last: a shard exists when its manifest does."""

    key: str
    work: ShardWork
    ids: Ids  # of the stored rows, in order
    quarantined: tuple[Quarantined, ...]
    long: tuple[str, ...]  # of ``ids``: longer than the context, cut or split by the reading's rule
    tokens: int
    arrays: tuple[ShardArray, ...]
    files: Mapping[str, str]  # file name → sha256
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ShardRef:
    """How an index manifest names a shard; ``sha256`` is of the shard's manifest."""

    key: str
    sha256: str
    rows: int
