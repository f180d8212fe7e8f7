"""Which features of an SAE fire on the examples of an index: encoded once by a job, then asked either way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifacts, codec, damage, example_ids, indexes, saes
from service.cache import LoadingCache
from service.contracts import ArrayInfo, Example, IndexRecord, JobRecord
from service.errors import Invalid, NotFound
from service.jobs import Jobs
from service.loading import IndexLoader
from service.registry import SAES, Registry
from service.row_blocks import id_bytes
from service.rows import F32
from service.sae_records import EncodeFeaturesSpec, SaeRecord
from service.sae_tally import Tally
from service.storage import Storage
from service.terms import IndexKind, JobKind, Pooling
from service.work import FORMAT

FILE = "features"
_KEPT_BYTES = 512 << 20
_TABLE = 2  # version of what the job leaves: the first had no ``least``
Table = dict[str, NDArray[Any]]  # as ``Tally.finish`` makes it, with ``ids``
_MEANS = {Pooling.RESPONSE_MEAN, Pooling.ALL_MEAN}


# --- asking ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeaturesRequest:
    """``examples``: ids whose features are asked for; ``features``: those whose examples are."""

    index: str
    sae: str
    examples: tuple[str, ...]
    features: tuple[int, ...]
    count: int  # features of an example, and examples of a feature
    top: int  # features that fire on most examples, told as well


@dataclass(frozen=True)
class Fires:
    feature: int
    value: float
    label: str | None


@dataclass(frozen=True)
class OfExample:
    """``l0``: how many fire, of which the strongest are told."""

    example: Example
    l0: int
    features: tuple[Fires, ...]


@dataclass(frozen=True)
class OfFeature:
    """``share`` of the examples on which it fires; ``mean`` where it does; ``training_share``: as its maker saw."""

    feature: int
    label: str | None
    share: float
    mean: float
    largest: float
    training_share: float | None
    examples: tuple[tuple[float, Example], ...]


@dataclass(frozen=True)
class Features:
    index: IndexRecord
    sae: SaeRecord
    rows: int
    l0: float
    silent: float  # share of features that fire on no example
    examples: tuple[OfExample, ...]
    features: tuple[OfFeature, ...]
    most: tuple[OfFeature, ...]  # that fire on most examples, without them
    warnings: tuple[str, ...]


class FeaturesService:
    def __init__(self, registry: Registry, storage: Storage, jobs: Jobs, loader: IndexLoader) -> None:
        self._registry = registry
        self._storage = storage
        self._jobs = jobs
        self._loader = loader
        self._tables: LoadingCache[Table] = LoadingCache(_KEPT_BYTES, _bytes_of)

    @damage.told
    def run(self, request: FeaturesRequest) -> Features | JobRecord:
        """What fires where, or the job that encodes the index. Raises NotFound and Invalid naming the field."""
        index = indexes.resolve(self._registry, request.index)
        record = self._registry.get(SAES, request.sae, param="sae")
        array = choose(index, record)
        for number, feature in enumerate(request.features):
            saes.check_feature(record, feature, param=f"features[{number}]")
        examples = self._loader.examples(index)
        places = examples.positions(example_ids.of(request.examples))
        for number in np.flatnonzero(places < 0):
            detail = f"Index {index.id} holds no example {request.examples[number]!r}."
            raise NotFound("example_not_found", detail, param=f"examples[{number}]")
        table = self.table(index, array, record)
        return table if isinstance(table, JobRecord) else self._answer(request, index, record, table)

    def table(self, index: IndexRecord, array: ArrayInfo, record: SaeRecord) -> Table | JobRecord:
        """What the job that encodes the index left, or the job."""
        spec = plan(index, array, record)

        def load() -> Table:
            known = artifacts.find_answer(self._storage, spec.key, FILE)
            if known is None:
                raise _NotThereError
            return known[1]

        try:
            return self._tables.get(spec.key, load)
        except _NotThereError:
            return self._jobs.submit_once(spec.key, JobKind.ENCODE_FEATURES, spec)

    def _answer(
        self, request: FeaturesRequest, index: IndexRecord, record: SaeRecord, table: Mapping[str, NDArray[Any]]
    ) -> Features:
        examples, labels = self._loader.examples(index), saes.labels(self._storage, record)
        ids = table["ids"].view("S64").reshape(-1)
        rows = {item.decode(): row for row, item in enumerate(ids.tolist())} if request.examples else {}
        of_examples = []
        for number, item in enumerate(request.examples):
            if item not in rows:
                detail = f"Example {item!r} is not indexed in {index.id}: it was set aside or deleted."
                raise NotFound("example_not_indexed", detail, param=f"examples[{number}]")
            of_examples.append((item, rows[item]))
        shown = examples.take(examples.positions(example_ids.of([item for item, _ in of_examples])))
        training = self._training_share(record)

        def of_feature(feature: int, count: int) -> OfFeature:
            span = slice(table["feature_starts"][feature], table["feature_starts"][feature + 1])
            at, values = table["feature_examples"][span][:count], table["feature_values"][span][:count]
            held = examples.take(examples.positions(np.asarray(ids[at]))) if len(at) else []
            fired = int(table["counts"][feature])
            return OfFeature(
                feature=feature,
                label=labels.of(feature),
                share=fired / max(1, len(ids)),
                mean=float(table["sums"][feature]) / max(1, fired),
                largest=float(table["largest"][feature]),
                training_share=None if training is None else float(training[feature]),
                examples=tuple(zip(map(float, values), held, strict=True)),
            )

        def of_example(example: Example, row: int) -> OfExample:
            span = slice(table["example_starts"][row], table["example_starts"][row + 1])
            pairs = zip(
                table["example_features"][span].tolist(), table["example_values"][span].tolist(), strict=True
            )
            fires = tuple(
                Fires(feature, value, labels.of(feature)) for feature, value in list(pairs)[: request.count]
            )
            return OfExample(example, int(table["l0"][row]), fires)

        counts = table["counts"]
        most = np.argsort(-counts, kind="stable")[: request.top]
        return Features(
            index=index,
            sae=record,
            rows=len(ids),
            l0=float(table["l0"].mean()) if len(ids) else 0.0,
            silent=float((counts == 0).mean()),
            examples=tuple(of_example(each, row) for each, (_, row) in zip(shown, of_examples, strict=True)),
            features=tuple(of_feature(each, request.count) for each in request.features),
            most=tuple(of_feature(int(each), 0) for each in most if counts[each]),
            warnings=warnings(index, record),
        )

    def _training_share(self, record: SaeRecord) -> F32 | None:
        if saes.SPARSITY not in record.files:
            return None
        return np.power(np.float32(10), saes.log_sparsity(saes.file(self._storage, record, saes.SPARSITY)))


class _NotThereError(Exception):
    """Not encoded yet: nothing for a cache to remember."""


def _bytes_of(table: Table) -> int:
    return sum(each.nbytes for each in table.values())


def choose(index: IndexRecord, record: SaeRecord) -> ArrayInfo:
    """The activations that the SAE reads. Raises Invalid when the index has none that it can."""
    check_fits(index, record)
    held = [array for array in index.arrays if array.kind == IndexKind.ACTIVATION]
    if not held:
        detail = f"Index {index.id} holds no activations; build it with kind 'activation'."
        raise Invalid("kind_not_indexed", detail, param="index")
    for array in held:
        if array.layer == record.layer:
            break
    else:
        layers = [array.layer for array in held]
        detail = f"SAE {record.id!r} sits at layer {record.layer}; index {index.id} has activations at {layers}."
        raise Invalid("layer_not_indexed", detail, param="sae", context={"layers": layers})
    if record.pooling is not None and record.pooling != index.pooling:
        detail = (
            f"SAE {record.id!r} was trained on rows pooled by {record.pooling}, index {index.id} has "
            f"{index.pooling}: they are not comparable."
        )
        raise Invalid("sae_of_other_pooling", detail, param="sae")
    return array


def check_fits(index: IndexRecord, record: SaeRecord) -> None:
    """Raise Invalid unless both belong to one family of models."""
    if record.lineage != index.lineage:
        detail = (
            f"SAE {record.id!r} belongs to model {record.model!r}, which shares no declared base with "
            f"{index.model!r}, the model of index {index.id}."
        )
        raise Invalid("sae_of_other_lineage", detail, param="sae")


def warnings(index: IndexRecord, record: SaeRecord) -> tuple[str, ...]:
    """What figures of this SAE on this index do not say by themselves."""
    said = list(record.notes)
    if record.pooling is None and index.pooling in _MEANS:
        said.append(
            f"SAE {record.id!r} was trained on single positions, the index holds means over positions "
            f"({index.pooling}): these are the features of the mean, not the means of features. Train one on the "
            "index (whence saes train), or build the index with pooling last_token."
        )
    if record.model_fingerprint != index.model_fingerprint:
        said.append(f"SAE {record.id!r} belongs to {record.model!r}, the index to {index.model!r}.")
    return tuple(said)


def plan(index: IndexRecord, array: ArrayInfo, record: SaeRecord) -> EncodeFeaturesSpec:
    """The job's specification; its key covers everything that decides the result."""
    key = codec.digest([FORMAT, "features", _TABLE, index.manifest_sha256, codec.to_plain(array), record.sha256])
    return EncodeFeaturesSpec(key, index.id, array, record.id)


def pack(tally: Tally, ids: list[str]) -> dict[str, dict[str, NDArray[Any]]]:
    """Tensors by file, as ``artifacts.publish`` takes them."""
    return {FILE: {**tally.finish(), "ids": id_bytes(tuple(ids))}}
