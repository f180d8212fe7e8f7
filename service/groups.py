"""Which groups of examples pushed the model toward the concept: by a metadata field, by what they do to it, or by
the features of an SAE that fire on them.

Groups are shown with the interval of their mean, the examples that stand out and the words that tell their texts
from the others'.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from service import clusters, columns, keywords
from service.cache import LoadingCache
from service.columns import FieldKind
from service.contracts import ArrayInfo, Example, JobRecord
from service.datasets import render
from service.directions import embeddings
from service.errors import Invalid
from service.examples import Examples
from service.feature_groups import ByFeatures, FeatureGroups, Membership
from service.jobs import Jobs
from service.keywords import Term
from service.loading import IndexLoader
from service.queries import Prepared
from service.questions import Query
from service.rankings import I64, Group, grouped, strengths
from service.storage import Storage
from service.terms import GroupSort, IndexKind, JobKind, Order
from service.whole import Scored, WholeRankings

_READ = 100  # texts of a group that its words are counted in, the first of it
_REST = 2_000  # texts, spread over all, that they are compared with
_KEPT_BYTES = 64 << 20  # of cluster numbers in memory


@dataclass(frozen=True)
class GroupBy:
    """A metadata ``field``, or so many ``clusters`` of the influence embeddings, or ``features``."""

    field: str | None = None
    clusters: int | None = None
    seed: int = 0
    features: ByFeatures | None = None


@dataclass(frozen=True)
class Shown:
    """How much is said of each group."""

    sort: GroupSort
    limit: int
    examples: int = 0
    terms: int = 0


@dataclass(frozen=True)
class Standing:
    """An example of a group, with its score."""

    score: float
    example: Example


@dataclass(frozen=True)
class Portrait:
    """A group, the examples that come first in it, and its words. ``label``: what is said of its feature."""

    group: Group
    examples: tuple[Standing, ...]
    terms: tuple[Term, ...]
    label: str | None = None


@dataclass(frozen=True)
class Grouped:
    """``groups`` that come first, of ``total``; ``k`` examples stood at the top when shares were counted.

    ``cohesion``: of clusters, the mean cosine of an example with the centre of its own. ``rest``: of features, the
    examples on which none of them fires; None: there are none.
    """

    scored: Scored
    groups: tuple[Portrait, ...]
    total: int
    k: int
    array: ArrayInfo | None = None  # whose rows the clusters are of
    cohesion: float | None = None
    members: Membership | None = None
    rest: Portrait | None = None


class Groups:
    """Thread-safe. Raises as ``QueryService.run``: NotFound, Invalid, Damaged."""

    def __init__(
        self,
        whole: WholeRankings,
        loader: IndexLoader,
        storage: Storage,
        jobs: Jobs,
        by_feature: FeatureGroups,
    ) -> None:
        self._whole = whole
        self._by_feature = by_feature
        self._loader = loader
        self._storage = storage
        self._jobs = jobs
        self._assigned: LoadingCache[I64] = LoadingCache(_KEPT_BYTES, lambda codes: codes.nbytes)

    def run(self, query: Query, by: GroupBy, shown: Shown) -> Grouped | JobRecord:
        """The groups, or the job that must end first. ``k`` of the query: the top that shares are of.

        Raises Invalid (``unknown_field``) for a field that no example has, naming those there are, and
        (``kind_not_indexed``) for clusters of an index without influence embeddings, and as ``FeatureGroups.find``.
        """
        scored = self._whole.scores(query)
        if isinstance(scored, JobRecord):
            return scored
        if by.features is not None:
            return self._of_features(scored, query, by.features, shown)
        array, cohesion = None, None
        if by.field is not None:
            codes, names = coded(scored.examples, by.field, param="group_by")
        else:
            array = _clustered(scored.prepared, query)
            found = self._clusters(scored, array, by)
            if isinstance(found, JobRecord):
                return found
            codes, names, cohesion = found
        codes = codes[scored.positions]
        about = {"order": query.order, "by": shown.sort, "limit": shown.limit}
        groups, total = grouped(scored.scores, codes, names, query.k, **about)
        rest = self._words_of_all(scored) if shown.terms else Counter()
        portraits = tuple(_portrait(scored, codes, None, each, rest, query.order, shown) for each in groups)
        return Grouped(scored, portraits, total, min(query.k, len(scored.scores)), array, cohesion)

    def _of_features(self, scored: Scored, query: Query, by: ByFeatures, shown: Shown) -> Grouped | JobRecord:
        """A group for each feature that fires, and beside them the examples on which none does."""
        members = self._by_feature.find(scored, by, shown.limit)
        if isinstance(members, JobRecord):
            return members
        names, none = [*members.features, None], len(members.features)
        about = {"order": query.order, "by": shown.sort, "rows": members.rows}
        groups, _ = grouped(scored.scores, members.codes, names, query.k, **about)
        firing = [each for each in groups if each.code != none]
        words = self._words_of_all(scored) if shown.terms else Counter()

        def portrait(group: Group) -> Portrait:
            found = _portrait(scored, members.codes, members.rows, group, words, query.order, shown)
            return replace(found, label=members.labels.get(group.code))

        portraits = tuple(map(portrait, firing[: shown.limit]))
        rest = next((portrait(each) for each in groups if each.code == none), None)
        top = min(query.k, len(scored.scores))
        return Grouped(scored, portraits, len(firing), top, members=members, rest=rest)

    def _clusters(self, scored: Scored, array: ArrayInfo, by: GroupBy) -> tuple[I64, list[Any], float] | JobRecord:
        """Of every example the number of its cluster from 1, as ``coded`` gives values; None: it does nothing."""
        index = scored.prepared.index
        count = by.clusters or 0
        spec = clusters.plan(index, array, count, by.seed)
        centres = clusters.find(self._storage, spec)
        if centres is None:
            return self._jobs.submit_once(spec.key, JobKind.CLUSTERS, spec)
        rows = self._loader.rows(index, array)

        def assign() -> I64:
            codes = np.full(len(scored.examples), count, dtype=np.int64)
            found = clusters.assign(rows, centres.directions)
            codes[rows.positions] = np.where(found < 0, count, found)
            return codes

        codes = self._assigned.get((spec.key, index.id), assign)
        return codes, [*range(1, count + 1), None], centres.cohesion

    def _words_of_all(self, scored: Scored) -> Counter[str]:
        """Of texts that are spread evenly over those that are ranked."""
        some = np.unique(np.linspace(0, len(scored.positions) - 1, min(_REST, len(scored.positions))).astype(int))
        return keywords.counted(map(_text, scored.examples.take(scored.positions[some])))[0]


def _portrait(
    scored: Scored, codes: I64, owners: I64 | None, group: Group, rest: Counter[str], order: Order, shown: Shown
) -> Portrait:
    """The examples that come first in a group, and words of the first hundred. ``owners``: rows of ``grouped``."""
    wanted = max(shown.examples, _READ if shown.terms else 0)
    if not wanted:
        return Portrait(group, (), ())
    rows = np.flatnonzero(codes == group.code)
    rows = rows if owners is None else owners[rows]
    strength = strengths(scored.scores[rows], order)
    first = rows[np.argsort(-strength, kind="stable")[:wanted]]
    held = scored.examples.take(scored.positions[first])
    standing = zip(scored.scores[first].tolist(), held[: shown.examples], strict=False)
    terms = keywords.characteristic(list(map(_text, held)), rest, shown.terms) if shown.terms else []
    return Portrait(group, tuple(Standing(*each) for each in standing), tuple(terms))


def _text(example: Example) -> str:
    return render(example.content)


def _clustered(prepared: Prepared, query: Query) -> ArrayInfo:
    """The influence embedding that answers the question, or stands beside what does."""
    if prepared.matched.array.kind == IndexKind.INFLUENCE:
        return prepared.matched.array
    concept = prepared.asked.concept
    found = embeddings(prepared.index)
    at_layer = [array for array in found if concept is None or array.layer == concept.layer]
    if not at_layer:
        layers = sorted({array.layer for array in found if array.layer is not None})
        detail = f"Clusters are of influence embeddings; those of index {prepared.index.id} lie at layers {layers}."
        raise Invalid("layer_not_indexed", detail, param="clusters", context={"layers": layers})
    return at_layer[0]


def coded(examples: Examples, field: str, *, param: str) -> tuple[I64, list[Any]]:
    """Of every example its place in the list of values that the field has, and that list; the last one is None."""
    column = examples.field(field, param=param).chunk(0)
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    values = column.dictionary.to_pylist()
    if examples.fields().get(columns.name_of(columns.path_of(field, param=param))) == FieldKind.MIXED:
        values = [json.loads(value) for value in values]
    return column.indices.fill_null(len(values)).to_numpy().astype(np.int64), [*values, None]
