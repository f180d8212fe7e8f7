"""Groups of examples by the features of an SAE that fire on them: an example is in as many as fire, or in none.

What fires where is read off the table of an encode job. That keeps the strongest features of an example only; where
more fire, those that are asked for are computed again from the rows, so that no group lacks anybody.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from service import sae, sae_features, saes
from service.cache import LoadingCache
from service.contracts import ArrayInfo, JobRecord
from service.errors import Invalid
from service.loading import IndexLoader
from service.rankings import F64, I64, Scores
from service.registry import SAES, Registry
from service.rows import F32
from service.sae_features import FeaturesService, Table
from service.sae_records import MOST_FEATURES, SaeRecord
from service.whole import Scored

_BLOCK = 1 << 16  # examples of the table at a time
_ROW_BYTES = 64 << 20  # of rows that are encoded at a time
_KEPT_BYTES = 128 << 20  # of what fires where, in memory
_ROUNDING = 1e-5  # by which a TopK value may differ when fewer columns are multiplied


@dataclass(frozen=True)
class ByFeatures:
    """A feature fires where its value exceeds ``threshold``, or with ``relative`` that share of its largest one.

    ``features`` None: those that stand out, as many as groups are shown.
    """

    sae: str
    features: tuple[int, ...] | None = None
    threshold: float = 0.0
    relative: bool = False


@dataclass(frozen=True)
class Membership:
    """Entry by entry, ``rows`` (m,) among the ranked examples and ``codes`` (m,) places in ``features``.

    The examples on which none fires have the code behind the last; ``covered`` counts the others.
    """

    features: tuple[int, ...]
    labels: Mapping[int, str | None]  # by code
    rows: I64
    codes: I64
    covered: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Entries:
    """Where features fire: ``rows`` (m,) of the table, ``codes`` (m,) of the features, ``values`` (m,)."""

    rows: I64
    codes: I64
    values: F32

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.codes.nbytes + self.values.nbytes


class FeatureGroups:
    """Thread-safe."""

    def __init__(self, registry: Registry, loader: IndexLoader, features: FeaturesService) -> None:
        self._registry = registry
        self._loader = loader
        self._features = features
        self._fires: LoadingCache[Entries] = LoadingCache(_KEPT_BYTES, lambda found: found.nbytes)

    def find(self, scored: Scored, by: ByFeatures, count: int) -> Membership | JobRecord:
        """Who is in which group, or the job that encodes the index. ``count`` features where none are named.

        Raises NotFound for an SAE or a feature there is none of, and Invalid for an SAE that does not fit the index
        and for a threshold (``bad_threshold``) that nothing exceeds or that is below 0.
        """
        index = scored.prepared.index
        record = self._registry.get(SAES, by.sae, param="sae")
        array = sae_features.choose(index, record)
        check(by, record)
        table = self._features.table(index, array, record)
        if isinstance(table, JobRecord):
            return table
        positions = scored.examples.positions(table["ids"].view("S64").reshape(-1))
        place = np.full(len(scored.examples), -1)
        place[scored.positions] = np.arange(len(scored.positions))
        ranked = place[positions]  # of every row of the table; −1: not ranked
        lows = thresholds(table, by)
        if by.features is not None:
            features = tuple(dict.fromkeys(by.features))
        else:
            features = standing_out(table, ranked, scored.scores, lows, min(count, MOST_FEATURES))
        fires = self._all(scored, array, record, table, positions, features)
        above = (fires.values > lows[list(features)][fires.codes]) & (ranked[fires.rows] >= 0)
        rows, codes = ranked[fires.rows[above]], fires.codes[above]
        none = np.ones(len(scored.scores), dtype=bool)
        none[rows] = False
        others = np.flatnonzero(none)
        rows = np.concatenate([rows, others])
        codes = np.concatenate([codes, np.full(len(others), len(features))])
        order = np.argsort(rows, kind="stable")
        labels = saes.labels(self._registry.storage, record)
        said = [*sae_features.warnings(index, record), *_said(by, features, codes, table, ranked)]
        return Membership(
            features=features,
            labels={code: labels.of(feature) for code, feature in enumerate(features)},
            rows=rows[order],
            codes=codes[order],
            covered=len(none) - len(others),
            warnings=tuple(said),
        )

    def _all(
        self,
        scored: Scored,
        array: ArrayInfo,
        record: SaeRecord,
        table: Table,
        positions: I64,
        features: tuple[int, ...],
    ) -> Entries:
        """Every entry of ``features``, whatever the table left out; kept for whoever asks for them next."""
        index = scored.prepared.index

        def compute() -> Entries:
            short = cut(table)
            found = [stored(table, ~short, features, record.features)]
            wanted = np.flatnonzero(short)
            if len(wanted):
                rows = self._loader.rows(index, array)
                at = np.full(len(scored.examples), -1)
                at[rows.positions] = np.arange(rows.index.n)
                part = sae.narrowed(saes.read(self._registry.storage, record), features)
                step = max(1, _ROW_BYTES // (4 * array.dims))
                for start in range(0, len(wanted), step):
                    some = wanted[start : start + step]
                    values, _ = sae.encode(part, rows.index.take(at[positions[some]]))
                    if record.k is not None:  # weaker than the k-th largest: it is not among those
                        values[values < table["least"][some, None] * np.float32(1 - _ROUNDING)] = 0
                    own, codes = np.nonzero(values)
                    found.append(Entries(some[own], codes, values[own, codes]))
            parts = zip(*((each.rows, each.codes, each.values) for each in found), strict=True)
            return Entries(*map(np.concatenate, parts))

        return self._fires.get((index.manifest_sha256, array, record.sha256, features), compute)


def check(by: ByFeatures, record: SaeRecord) -> None:
    """Raise NotFound or Invalid naming the field."""
    for number, feature in enumerate(by.features or ()):
        saes.check_feature(record, feature, param=f"features[{number}]")
    if not (isfinite(by.threshold) and by.threshold >= 0):
        detail = f"A feature's values are above 0: threshold is a number from 0 on, not {by.threshold}."
        raise Invalid("bad_threshold", detail, param="threshold")
    if by.relative and by.threshold >= 1:
        detail = f"A relative threshold is a share of the largest value: nothing exceeds {by.threshold:g} of it."
        raise Invalid("bad_threshold", detail, param="threshold")


def thresholds(table: Table, by: ByFeatures) -> F64:
    """(f,) what the value of each feature is to exceed."""
    largest = table["largest"].astype(np.float64)
    return by.threshold * largest if by.relative else np.full(len(largest), by.threshold)


def cut(table: Table) -> NDArray[np.bool_]:
    """(n,) whether more features fire on an example than the table keeps of it."""
    return np.diff(table["example_starts"]) < table["l0"]


def stored(table: Table, rows: NDArray[np.bool_], features: Sequence[int], count: int) -> Entries:
    """What the table holds of ``features`` on the ``rows`` (n,) that are True; the SAE has ``count``."""
    place = np.full(count, -1)
    place[list(features)] = np.arange(len(features))
    found = [Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for owners, own, values in entries(table):
        codes = place[own]
        there = (codes >= 0) & rows[owners]
        found.append(Entries(owners[there], codes[there], values[there]))
    parts = zip(*((each.rows, each.codes, each.values) for each in found), strict=True)
    return Entries(*map(np.concatenate, parts))


def standing_out(table: Table, ranked: I64, scores: Scores, lows: F64, count: int) -> tuple[int, ...]:
    """The features whose examples' scores sum to what is furthest from that of as many average examples.

    ``ranked`` (n,): place among ``scores`` of every row of the table, −1: none. A feature that fires everywhere is
    last, whatever its sum is. By what the table keeps: an example's strongest features.
    """
    mean = float(scores.mean(dtype=np.float64)) if len(scores) else 0.0
    sums, fired = np.zeros(len(lows)), np.zeros(len(lows), np.int64)
    for owners, features, values in entries(table):
        places = ranked[owners]
        there = (places >= 0) & (values > lows[features])
        own = features[there]
        sums += np.bincount(own, weights=scores[places[there]] - mean, minlength=len(lows))
        fired += np.bincount(own, minlength=len(lows))
    order = np.argsort(-np.abs(sums), kind="stable")
    return tuple(order[fired[order] > 0][:count].tolist())


def entries(table: Table) -> Iterator[tuple[I64, NDArray[np.int32], F32]]:
    """Blocks of what the table keeps: example, feature, value."""
    starts = table["example_starts"]
    for first in range(0, len(starts) - 1, _BLOCK):
        ends = starts[first : first + _BLOCK + 1]
        span = slice(int(ends[0]), int(ends[-1]))
        owners = np.repeat(np.arange(first, first + len(ends) - 1), np.diff(ends))
        yield owners, table["example_features"][span], table["example_values"][span]


def _said(by: ByFeatures, features: tuple[int, ...], codes: I64, table: Table, ranked: I64) -> list[str]:
    """What the groups do not say by themselves."""
    said = []
    silent = np.flatnonzero(np.bincount(codes, minlength=len(features) + 1)[:-1] == 0).tolist()
    if silent:
        told = ", ".join(str(features[code]) for code in silent[:10]) + (" and others" if len(silent) > 10 else "")
        above = f" above {by.threshold:g}{' of its largest value' if by.relative else ''}" if by.threshold else ""
        said.append(f"No example that is ranked has feature {told} firing{above}: there is no group of it.")
    if by.features is None:
        short = int((cut(table) & (ranked >= 0)).sum())
        if short:
            said.append(
                f"More features fire on {short} of the examples than are kept of each: which features stand out is "
                "told by the strongest. The groups themselves are of all; 'features' names others."
            )
        if not features:
            said.append(
                "No feature fires on any example that is ranked, above this threshold: there are no groups."
            )
    return said
