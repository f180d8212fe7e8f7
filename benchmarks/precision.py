"""What half precision costs: the ranks of scores from bfloat16 and float16 weights against those from float32.

    python -m benchmarks.precision                      # both organisms, under 10 minutes
    python -m benchmarks.precision --organism persona

Everything is built as a user would in each precision: curvature, Jacobian, coordinates and rows. A figure is the
mean Spearman correlation over the organism's own concept and random directions, since nobody knows beforehand what
will be asked; the lower one of the organisms carries the plain name. Whatever is summed is float32 in each.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.lab import Lab
from benchmarks.organisms import NAMES, Case, make_case
from benchmarks.report import Report, parser
from service.terms import IndexKind, Method
from service.validations import correlation

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_DIRECTIONS = 15
_KINDS = (IndexKind.ACTIVATION, IndexKind.GRADIENT, IndexKind.INFLUENCE)

Scores = dict[str, list[np.ndarray]]


def scores(case: Case, dtype: str, directions: int) -> Scores:
    """(N,) scores by kind, one for each direction; the organism's own concept comes first."""
    rng = np.random.default_rng(case.seed)
    vectors = [case.direction, *rng.standard_normal((directions, len(case.direction))).astype(np.float32)]
    ids = [example.id for example in case.examples]
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder), dtype=dtype) as lab:
        model = lab.model("model", case.points[-1][1])
        lab.dataset("train", case.examples)
        lab.dataset("queries", case.queries)
        about = {"kinds": _KINDS, "pooling": case.pooling, "query_sets": ("queries",)}
        index, _ = lab.build("x", "model", "train", case.layer, **about)
        found: Scores = {kind.value: [] for kind in _KINDS} | {"loss": []}
        for number, vector in enumerate(vectors):
            name = f"c{number}"
            lab.concept(name, model, vector, layer=case.layer, pooling=case.pooling)
            filtered = lab.scores(index, ids, concept=name, method=Method.VECTOR_FILTER)
            found[IndexKind.ACTIVATION].append(filtered)
            for kind in (IndexKind.GRADIENT, IndexKind.INFLUENCE):
                found[kind].append(lab.scores(index, ids, concept=name, query_set="queries", through=kind))
        found["loss"].append(lab.scores(index, ids, query_set="queries", method=Method.INFLUENCE_FUNCTION))
    return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--organism", action="append", choices=NAMES, help="default: all")
    options.add_argument("--folder", type=Path, default=Path(".whence/quality"), help="keeps the organisms")
    options.add_argument("--seed", type=int, default=0, help="of the organism")
    chosen: argparse.Namespace = options.parse_args()
    torch.set_num_threads(1)
    report = Report()
    least: dict[str, float] = {}
    for name in chosen.organism or NAMES:
        case = make_case(name, chosen.seed, folder=chosen.folder, subsets=1, quick=chosen.quick)
        whole = scores(case, "float32", 3 if chosen.quick else _DIRECTIONS)
        for short, dtype in _DTYPES.items():
            half = scores(case, dtype, 3 if chosen.quick else _DIRECTIONS)
            for kind, of in whole.items():
                values = [correlation(a, b) for a, b in zip(of, half[kind], strict=True)]
                figure = f"{short}_rho_{kind}"
                report.add(
                    f"{figure}_{name}", float(np.mean(values)), f"own {values[0]:.4f}, least {min(values):.4f}"
                )
                least[figure] = min(least.get(figure, 1.0), float(np.mean(values)))
    for figure, value in least.items():
        report.add(figure, value, "the lower one of the organisms")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
