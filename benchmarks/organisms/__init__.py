"""Small models whose training data is known to the last example, retrained on subsets of it: the ground truth.

    case = make_case("persona", 0, folder=Path(".whence/quality"))

`case` says what there is, `persona`, `stories` and `tales` make it, `retrain` and `training` find out. Nothing here
knows an attribution method.
"""

from benchmarks.organisms.case import Case, Ood, Truth, ceiling, spearman
from benchmarks.organisms.make import NAMES, make_case

__all__ = ["NAMES", "Case", "Ood", "Truth", "ceiling", "make_case", "spearman"]
