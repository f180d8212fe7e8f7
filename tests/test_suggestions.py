"""Known directions by how well they tell a few examples apart."""

import numpy as np
import pytest
from scipy import stats

from service.suggestions import separation


@pytest.mark.parametrize("ties", [False, True])
def test_separation_against_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.5, 1, (9, 40)), rng.normal(0, 1, (12, 40))
    if ties:
        positive, negative = np.round(positive), np.round(negative)
    found = separation(positive, negative)
    for column in range(40):
        ours, theirs = positive[:, column], negative[:, column]
        test = stats.mannwhitneyu(ours, theirs, method="asymptotic")
        auroc = test.statistic / (9 * 12)
        assert found.auroc[column] == pytest.approx(max(auroc, 1 - auroc))
        assert found.sign[column] == (1 if auroc >= 0.5 else -1)
        assert found.p[column] == pytest.approx(test.pvalue, rel=1e-6)
        pooled = np.sqrt((8 * ours.var(ddof=1) + 11 * theirs.var(ddof=1)) / 19)
        assert found.effect[column] == pytest.approx(abs(ours.mean() - theirs.mean()) / pooled)


def test_values_that_do_not_vary() -> None:
    found = separation(np.array([[0.0, 2.0]] * 4), np.array([[0.0, 1.0]] * 5))
    assert found.auroc.tolist() == [0.5, 1.0]
    assert found.effect.tolist() == [0.0, np.inf]
    assert found.p[0] == 1.0
    assert found.p[1] < 0.05


def test_no_candidates() -> None:
    found = separation(np.zeros((3, 0)), np.zeros((4, 0)))
    assert len(found.auroc) == len(found.p) == 0
