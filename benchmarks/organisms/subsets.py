"""Which examples a retraining sees: groups are dropped at random, whole.

Dropping single examples at random would leave every subset with the same mixture, and what is left of the
outcome would be the training seed's noise. Whole groups move it, and not only through how many planted
examples there are: two subsets with the same count differ in which.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


def group_dropout(groups: Sequence[str], count: int, *, seed: int, keep: float = 0.5) -> Bools:
    """`count` different subsets (M, N) of N examples; every group is in a subset with probability `keep`.

    Each subset holds between a quarter and three quarters of the examples, so that training lengths stay
    comparable. The first subsets are the same for every `count`. Raises ValueError when there are too few
    groups for that many subsets.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng([seed, 0x5B5E])
    found: dict[bytes, Bools] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        kept = rng.random(len(names)) < keep
        subset = kept[number]
        if 0.25 <= subset.mean() <= 0.75:
            found.setdefault(kept.tobytes(), subset)
    if len(found) < count:
        raise ValueError(f"{count} different subsets wanted, {len(names)} groups give only {len(found)}")
    return np.stack(list(found.values()))
