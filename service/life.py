"""Append, delete and compact, as asked over HTTP: checked as far as can be before there is a job.

What depends on the examples of the index is checked by the job: other jobs on the same name may run before it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from service import filters, indexes, tombstones
from service.contracts import IndexRecord
from service.errors import Conflict, Invalid
from service.examples import Examples, select_ids
from service.registry import DATASETS, MODELS, Registry
from service.settings import Settings
from service.specs import MOST_IDS, AppendIndexSpec, CompactIndexSpec, DeleteExamplesSpec
from service.storage import Storage

_EXAMPLE_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


def plan_append(
    reference: str, dataset: str, registry: Registry, storage: Storage, settings: Settings
) -> AppendIndexSpec:
    """Raises NotFound or Invalid naming the field; Conflict for a version of another release."""
    source = _source(reference, registry, storage)
    registry.get(MODELS, source.model, param="index")
    part = registry.get(DATASETS, dataset, param="dataset")
    if "@" in reference:  # another job may still make a bare name mean another version
        refuse_part(source, part.id, part.fingerprint)
    return AppendIndexSpec(reference, part.id, settings.shard_size)


def plan_delete(
    reference: str,
    ids: Sequence[str] | None,
    filter: Mapping[str, Any] | None,
    registry: Registry,
    storage: Storage,
) -> DeleteExamplesSpec:
    """Raises NotFound or Invalid naming the field; Conflict for a version of another release."""
    if (ids is None) == (filter is None):
        raise Invalid("ids_or_filter", "Name the examples either by 'ids' or by a 'filter'.", param="ids")
    source = _source(reference, registry, storage)
    if filter is not None:
        chosen(source, filter, registry, storage)  # refuses what does not fit the metadata
        return DeleteExamplesSpec(reference, None, filter)
    assert ids is not None  # noqa: S101  (one of both is given)
    if not 1 <= len(ids) <= MOST_IDS:
        detail = f"One request deletes 1 to {MOST_IDS:,} examples, not {len(ids):,}: send several."
        raise Invalid("bad_count", detail, param="ids")
    for number, item in enumerate(ids):
        if not _EXAMPLE_ID.fullmatch(item):
            detail = f"{item[:80]!r} is no example id: those are 64 hexadecimal digits, as hits name them."
            raise Invalid("bad_example_id", detail, param=f"ids[{number}]")
    return DeleteExamplesSpec(reference, tombstones.store(storage, ids, asked=True))


def chosen(source: IndexRecord, filter: Mapping[str, Any], registry: Registry, storage: Storage) -> list[str]:
    """Ids of the version's examples that a filter keeps, deleted ones and those set aside too. Raises Invalid."""
    parts = [registry.get(DATASETS, name) for name in source.datasets]
    return select_ids(Examples(storage, parts), filters.parse(filter))


def plan_compact(reference: str, rows_per_shard: int, registry: Registry, storage: Storage) -> CompactIndexSpec:
    """Raises NotFound; Conflict for a version of another release."""
    _source(reference, registry, storage)
    return CompactIndexSpec(reference, rows_per_shard)


def refuse_part(source: IndexRecord, dataset: str, fingerprint: str) -> None:
    """Raises Invalid when the index holds the dataset, or one with the very same examples; Conflict when it holds
    another one under the same id.
    """
    parts = {source.dataset_fingerprint: source.dataset}
    parts |= {part.fingerprint: part.dataset for part in source.appended}
    if dataset in parts.values() and fingerprint not in parts:
        detail = (
            f"Index {source.id} was made of another dataset {dataset!r}, which is gone. Register this "
            "one under an id of its own."
        )
        raise Conflict("dataset_changed", detail, param="dataset")
    if fingerprint in parts:
        same = "" if parts[fingerprint] == dataset else f", which has the same examples as {dataset!r}"
        detail = f"Index {source.id} holds dataset {parts[fingerprint]!r} already{same}. Nothing was published."
        raise Invalid("nothing_to_append", detail, param="dataset")


def some(ids: Sequence[str]) -> str:
    """The first few ids, for a sentence."""
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else "")


def _source(reference: str, registry: Registry, storage: Storage) -> IndexRecord:
    record = indexes.resolve(registry, reference)
    indexes.read_manifest(storage, record)  # refuses one of another format
    return record
