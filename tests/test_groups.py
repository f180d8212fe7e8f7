"""Groups of examples: clusters of what they do, words that tell them apart, and what is shown of each."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from api.cli_groups import bar
from api.schemas_rankings import GroupOut
from service import artifacts, codec, rows
from service.contracts import ArrayInfo, JobRecord
from service.errors import Invalid
from service.feature_groups import FeatureGroups
from service.groups import GroupBy, Groups, Shown
from service.jobs import Jobs
from service.keywords import characteristic, counted
from service.queries import QueryService
from service.questions import Query
from service.registry import Registry
from service.sae_features import FeaturesService
from service.search import VectorIndex
from service.storage import Storage
from service.terms import GroupSort, JobKind, Method, Order
from service.whole import WholeRankings
from tests.test_indexes import EMBEDDING
from tests.test_whole import TOPICS, Topics, ask
from workers.clusters import spherical


def blobs(count: int, d: int, each: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows about ``count`` directions, of lengths that vary a thousandfold."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(d, count)))[0].T
    labels = np.repeat(np.arange(count), each)
    found = centres[labels] + 0.1 * rng.normal(size=(len(labels), d))
    return (found * np.exp(rng.normal(0, 3, (len(labels), 1)))).astype(np.float32), labels


def test_directions_that_are_there_are_found_whatever_the_lengths() -> None:
    made, labels = blobs(5, 24, 60, 0)
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    centres, cohesion = spherical(unit, 5, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-5)
    assert 0.85 < cohesion < 1
    index = VectorIndex(*rows.pack(made), threads=2)
    best, scores = index.nearest(centres)
    assert len({(a, b) for a, b in zip(labels, best, strict=True)}) == 5
    exact = index.take(np.arange(len(made))).astype(np.float64) @ centres.T.astype(np.float64)
    assert best.tolist() == exact.argmax(axis=1).tolist()
    np.testing.assert_allclose(scores, exact.max(axis=1), rtol=1e-4)
    again, _ = spherical(unit, 5, seed=0)
    assert np.array_equal(centres, again)


def test_words_that_are_frequent_here_and_not_elsewhere() -> None:
    ours = [f"the captain sails the sea number {n}" for n in range(30)]
    others = [f"the farmer grows the corn number {n}" for n in range(300)]
    rest, _ = counted([*ours, *others])
    found = characteristic(ours, rest, 10)
    assert {term.word for term in found} == {"captain", "sails", "sea"}
    assert all(term.share == 1 and term.z > 2 for term in found)
    assert characteristic([], rest, 5) == characteristic(ours, rest, 0) == []
    assert characteristic(["the number"], rest, 5) == []
    assert characteristic(["word word"], counted(["word"])[0], 5) == []


def test_a_word_seen_once_is_no_evidence() -> None:
    rest = Counter({"common": 1000, "rare": 1})
    assert characteristic(["rare common"], rest, 5) == []


def test_words_of_any_script() -> None:
    words, holding = counted(["Über_Maß, don't STOP 42 x", "über"])
    assert words == Counter({"über": 2, "maß": 1, "don't": 1, "stop": 1, "42": 1})
    assert holding["über"] == 2


def group(mean: float, low: float | None, high: float | None) -> GroupOut:
    about: dict[str, Any] = {"value": 1, "count": 2, "sum": 0, "share": 0, "share_of_top": 0, "lift": 0}
    return GroupOut(mean=mean, low=low, high=high, examples=[], terms=[], **about)


def test_an_interval_is_drawn_about_zero() -> None:
    assert bar(group(1, 0.5, 1.0), 1.0) == " " * 10 + "│" + " " * 4 + "─" * 5 + "●"
    assert bar(group(-1, None, None), 1.0) == "●" + " " * 9 + "│" + " " * 10
    assert bar(group(0, 0, 0), 0.0) == ""


@pytest.fixture
def shelf(registry: Registry, storage: Storage) -> Topics:
    return Topics(registry, storage)


@pytest.fixture
def grouping(shelf: Topics, registry: Registry, storage: Storage, jobs: Jobs) -> Groups:
    loader = shelf.loader()
    whole = WholeRankings(QueryService(registry, storage, jobs, loader, shard_size=4), loader)
    features = FeaturesService(registry, storage, jobs, loader)
    return Groups(whole, loader, storage, jobs, FeatureGroups(registry, loader, features))


def influence(**about: Any) -> Query:
    return Query(index="a", concept="z", method=Method.CONCEPT_INFLUENCE, order=Order.MOST, k=3, **about)


def test_clusters_are_a_job_and_then_groups(shelf: Topics, grouping: Groups, storage: Storage) -> None:
    record = shelf.publish("a", 1, sections=(shelf.embeddings(without=5),))
    by, shown = GroupBy(clusters=2), Shown(GroupSort.SUM, 10, examples=2, terms=3)
    first = grouping.run(influence(), by, shown)
    assert isinstance(first, JobRecord)
    assert first.kind == JobKind.CLUSTERS
    assert grouping.run(influence(), by, shown) == first
    assert codec.from_plain(ArrayInfo, first.spec["array"]) == EMBEDDING
    held = [row for row in range(9) if row != 5]
    stored = grouping._loader.rows(record, EMBEDDING).index.take(np.arange(8)).astype(np.float64)
    centres = np.stack([stored[0], -stored[0]]) / np.linalg.norm(stored[0])
    tensors = {"centres": {"directions": centres.astype(np.float32)}}
    artifacts.publish(storage, first.spec["key"], tensors, facts={"cohesion": 0.5}, answer=True)
    found = grouping.run(influence(), by, shown)
    assert not isinstance(found, JobRecord)
    assert (found.total, found.cohesion, found.array) == (2, 0.5, EMBEDDING)
    along, exact = stored @ centres[0] > 0, stored @ shelf.vector("z")
    for each in found.groups:
        members = along if each.group.value == 1 else ~along
        assert each.group.count == members.sum()
        assert each.group.sum == pytest.approx(exact[members].sum(), rel=1e-5)
        best = np.flatnonzero(members)[np.argsort(-exact[members])[:2]]
        assert [standing.example.id for standing in each.examples] == [shelf.ids[held[row]] for row in best]


def test_clusters_need_influence_embeddings(shelf: Topics, grouping: Groups) -> None:
    shelf.publish("a", 1)
    with pytest.raises(Invalid, match="influence") as refused:
        grouping.run(ask(), GroupBy(clusters=2), Shown(GroupSort.MEAN, 10))
    assert refused.value.code == "kind_not_indexed"


def test_examples_and_words_of_metadata_groups(shelf: Topics, grouping: Groups) -> None:
    shelf.publish("a", 1)
    found = grouping.run(ask(), GroupBy("topic"), Shown(GroupSort.MEAN, 10, examples=1))
    assert not isinstance(found, JobRecord)
    exact = shelf.exact("x", 1)
    for each in found.groups:
        rows = [row for row in range(9) if (TOPICS[row] if TOPICS[row] != "absent" else None) == each.group.value]
        (first,) = each.examples
        assert first.score == pytest.approx(max(exact[rows]), rel=1e-5)
        assert first.example.id == shelf.ids[max(rows, key=lambda row: exact[row])]
        assert each.terms == ()
