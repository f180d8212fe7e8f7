"""What a dataset does to a model, said in the features of an SAE: how far training on it pushes each of them.

A feature's direction is w, its decoder row with unit norm, and Σ_z ⟨m_z, R w⟩ = ⟨Σ_z m_z, R w⟩: the sum of the
embeddings answers for every feature at once, without a model. It is the sum of the scores that the concept
``sae:ID/N`` has by ``concept_influence``.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service import artifacts, damage, indexes, sae_features, saes
from service.cache import LoadingCache
from service.contracts import ArrayInfo, Example, IndexRecord
from service.directions import DirectionsRequest, choose
from service.errors import Invalid
from service.filters import Filter
from service.loading import IndexLoader, Rows
from service.masks import Mask
from service.registry import DATASETS, SAES, Registry
from service.rows import F32
from service.sae_records import SaeRecord
from service.storage import Storage
from service.terms import ConceptFunction

F64 = NDArray[np.float64]

_SUMS = 256  # kept: one for each embedding and filter
_BLOCK = 1 << 14  # rows summed at a time
_LOW_SHARE = 0.9


@dataclass(frozen=True)
class ViewRequest:
    """Which SAE, and which embedding of the index (the fields may be left out where there is one only)."""

    index: str
    sae: str
    query_set: str | None
    concept_function: ConceptFunction | None
    damping: float | None
    count: int
    examples: int
    filter: Filter | None


@dataclass(frozen=True)
class Pushed:
    """``push``: Σ over the examples; ``share`` of Σ|push| over all features; ``error``: standard error of ``mean``.

    ``upward``: share of the examples that push up; ``captured``: share of ‖w‖² within R.
    """

    feature: int
    label: str | None
    push: float
    mean: float
    error: float
    share: float
    cosine: float  # of the dataset's whole push with the direction
    upward: float
    captured: float
    examples: tuple[tuple[float, Example], ...]


@dataclass(frozen=True)
class View:
    index: IndexRecord
    sae: SaeRecord
    array: ArrayInfo
    rows: int  # that were summed
    norm: float  # of the mean embedding
    up: tuple[Pushed, ...]
    down: tuple[Pushed, ...]
    warnings: tuple[str, ...]
    total_ms: float


class ViewService:
    def __init__(self, registry: Registry, storage: Storage, loader: IndexLoader) -> None:
        self._registry = registry
        self._storage = storage
        self._loader = loader
        self._sums: LoadingCache[F64] = LoadingCache(_SUMS)

    @damage.told
    def run(self, request: ViewRequest) -> View:
        """The features that the dataset pushes most, up and down. Raises NotFound and Invalid naming the field."""
        began = time.perf_counter()
        index = indexes.resolve(self._registry, request.index)
        record = self._registry.get(SAES, request.sae, param="sae")
        sae_features.check_fits(index, record)
        array = self._array(index, record, request)
        rows = self._loader.rows(index, array)
        mask = self._mask(request, index, rows)
        count = rows.index.n if mask is None else int(mask.sum())
        key = (index.manifest_sha256, array, request.filter)
        total = self._sums.get(key, lambda: summed(rows, mask))
        whole = saes.directions(saes.read(self._storage, record))
        within = self._within(array, whole)
        sizes = np.sqrt(np.einsum("ij,ij->i", within, within, dtype=np.float64))
        pushes = within @ total
        norm = float(np.linalg.norm(total))
        labels = saes.labels(self._storage, record)
        everything = float(np.abs(pushes).sum())

        def pushed(feature: int, sign: float) -> Pushed:
            w, push = within[feature], float(pushes[feature])
            scores = rows.index.scores(w).astype(np.float64)
            scores = scores if mask is None else scores[mask]
            spread = float(scores.std(ddof=1)) if count > 1 else 0.0
            examples = self._examples(index, rows, np.float32(sign) * w, sign, mask, request.examples)
            size = norm * float(sizes[feature])
            return Pushed(
                feature=feature,
                label=labels.of(feature),
                push=push,
                mean=push / max(1, count),
                error=spread / max(1, count) ** 0.5,
                share=abs(push) / everything if everything else 0.0,
                cosine=push / size if size else 0.0,
                upward=float((scores > 0).mean()) if count else 0.0,
                captured=float(sizes[feature] ** 2),
                examples=examples,
            )

        order = np.argsort(-pushes, kind="stable")
        up = [int(each) for each in order[: request.count] if pushes[each] > 0]
        down = [int(each) for each in order[::-1][: request.count] if pushes[each] < 0]
        shown = (tuple(pushed(each, 1.0) for each in up), tuple(pushed(each, -1.0) for each in down))
        return View(
            index=index,
            sae=record,
            array=array,
            rows=count,
            norm=norm / max(1, count),
            up=shown[0],
            down=shown[1],
            warnings=_warnings(index, record, array, (*shown[0], *shown[1])),
            total_ms=1e3 * (time.perf_counter() - began),
        )

    def _array(self, index: IndexRecord, record: SaeRecord, request: ViewRequest) -> ArrayInfo:
        query_set = None
        if request.query_set is not None:
            query_set = self._registry.get(DATASETS, request.query_set, param="query_set")
        about = (request.concept_function, request.damping)
        asked = DirectionsRequest(index.id, request.query_set, record.layer, *about, 1, 0, 0, 0)
        try:
            return choose(index, query_set, asked)
        except Invalid as error:
            if error.param != "layer":
                raise
            detail = f"SAE {record.id!r} sits at layer {record.layer}. {error.detail}"
            raise Invalid(error.code, detail, param="sae", context=error.context) from error

    def _mask(self, request: ViewRequest, index: IndexRecord, rows: Rows) -> Mask | None:
        if request.filter is None:
            return rows.allowed(None)
        return rows.allowed(self._loader.examples(index).mask(request.filter)[rows.positions])

    def _within(self, array: ArrayInfo, directions: F32) -> F32:
        """(d_sae, r): what the embedding's directions R hold of each feature's."""
        assert array.embedding is not None  # noqa: S101  (``choose`` picks embeddings)
        key = array.embedding.directions
        if key is None:
            return directions
        r = artifacts.read(self._storage, artifacts.get(self._storage, key), "directions")["rows"]
        return np.ascontiguousarray(directions @ r.astype(np.float32).T)

    def _examples(
        self, index: IndexRecord, rows: Rows, query: F32, sign: float, mask: Mask | None, count: int
    ) -> tuple[tuple[float, Example], ...]:
        """Those that push the feature furthest, with their own scores."""
        if not count:
            return ()
        top = rows.batcher.search(query, count, mask)
        held = self._loader.examples(index).take(rows.positions[top.rows])
        return tuple((sign * float(score), example) for score, example in zip(top.scores, held, strict=True))


def summed(rows: Rows, mask: Mask | None) -> F64:
    """Σ of the rows that ``mask`` allows, (dims,), in float64 and block by block."""
    chosen = np.arange(rows.index.n) if mask is None else np.flatnonzero(mask)
    total = np.zeros(rows.index.d)
    for start in range(0, len(chosen), _BLOCK):
        total += rows.index.take(chosen[start : start + _BLOCK]).sum(axis=0, dtype=np.float64)
    return total


def _warnings(
    index: IndexRecord, record: SaeRecord, array: ArrayInfo, shown: tuple[Pushed, ...]
) -> tuple[str, ...]:
    said = list(record.notes)
    if record.model_fingerprint != index.model_fingerprint:
        said.append(f"SAE {record.id!r} belongs to {record.model!r}, the index to {index.model!r}.")
    if array.embedding is not None and array.embedding.points == 1:
        said.append(
            f"Evaluated at {index.model!r} only, not along its training run: where fine-tuning has overshot, the "
            "end point can turn signs round. Declare the run's base or checkpoints and build again."
        )
    low = [each for each in shown if each.captured < _LOW_SHARE]
    if low:
        said.append(
            f"The index's directions capture less than {_LOW_SHARE:.0%} of {len(low)} of the features shown (the "
            f"least: {min(each.captured for each in low):.0%}): build it with a higher rank, or with them as "
            "directions (sae:ID/N)."
        )
    return tuple(said)
