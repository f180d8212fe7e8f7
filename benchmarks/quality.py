"""Are the scores right, and do they predict what retraining does? Two organisms, several seeds, every method.

    python -m benchmarks.quality                          # both organisms, three seeds: under 50 minutes
    python -m benchmarks.quality --organism persona       # one of them

First the truth: the model is retrained on subsets of its data, groups dropped at random, with two training seeds
each (benchmarks/organisms). Their agreement is the ceiling. Then every method scores the training examples, and
the sum over a subset predicts f_v (concept-LDS) and −L (loss-LDS) of the query set after training on it.
Retrainings are kept in --folder and not repeated. Peers need `make peers`; without it they are left out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.organisms import NAMES, Case, ceiling, make_case
from benchmarks.report import Report, parser
from benchmarks.statistics import Judged, difference, mean_lds, predicted, retrieval

_METHODS = (
    "influence_function",
    "exact",
    "exact_cosine",
    "exact_trajectory",
    "exact_trajectory_cosine",
    "gradient",
    "influence",
    "influence_cosine",
    "influence_trajectory",
    "influence_trajectory_cosine",
    "rademacher_p16",
    "vector_filter",
    "bergson_trackstar_p16",
    "kronfluence_ekfac",
    "gradient_cosine",
    "bm25",
    "random",
    "labels",
)
_FACTS = (
    "rho_influence_trunc",
    "rho_gradient_concept",
    "rho_gradient_loss",
    "rho_gradient_blind_concept",
    "rho_gradient_blind_loss",
    "rho_random_concept",
    "rho_random_loss",
    "fidelity_trunc",
)
_OOD = ("influence_trajectory", "influence", "gradient", "influence_function", "vector_filter", "exact", "bm25")


def score(case: Case, oracle: bool, quick: bool) -> Any:
    """All methods on one case; runs in a process of its own."""
    import torch

    from benchmarks.methods import measure, oracle_agreement

    torch.set_num_threads(1)
    began = time.perf_counter()

    def say(line: str) -> None:
        told = f"{case.name} {case.seed} [{time.perf_counter() - began:5.0f} s] {line}"
        print(told, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        found = measure(case, Path(folder), report=say)
    if oracle:
        say("dense float64 oracle")
        with tempfile.TemporaryDirectory() as folder:
            found.facts["rho_influence_full"] = oracle_agreement(case, Path(folder), queries=4 if quick else 32)
    say("done")
    return found


def judge(report: Report, name: str, cases: Sequence[Case], scores: Sequence[Any]) -> None:
    """Figures of one organism, means over its seeds."""

    def judged(method: str, of: str) -> list[Judged]:
        found = []
        for case, each in zip(cases, scores, strict=True):
            by_method = each.concept if of == "concept" else each.loss
            truth = case.f_cosine if method.endswith("_cosine") and method != "gradient_cosine" else case.f_dot
            actual = truth.mean(axis=0) if of == "concept" else -case.loss.mean(axis=0)
            found.append(Judged(predicted(by_method[method], case.subsets), actual))
        return found

    for kind in ("f_dot", "f_cosine", "loss"):
        values = [ceiling(getattr(case, kind)) for case in cases]
        end = {"f_dot": "", "f_cosine": "_cosine", "loss": "_loss"}[kind]
        report.add(f"lds_ceiling{end}_{name}", float(np.mean(values)), f"by seed {np.round(values, 3).tolist()}")
    for fact in _FACTS:
        values = [each.facts[fact] for each in scores]
        report.add(f"{fact}_{name}", float(np.mean(values)), f"by seed {np.round(values, 3).tolist()}")
    held = {method for each in scores for method in each.concept}
    extra = sorted(held - set(_METHODS))
    for method in (*(m for m in _METHODS if m in held), *extra):
        for of in ("concept", "loss"):
            if all(method in (each.concept if of == "concept" else each.loss) for each in scores):
                lds, error = mean_lds(judged(method, of))
                report.add(f"lds_{of}_{method}_{name}", lds)
                report.add(f"lds_{of}_{method}_{name}_se", error)
        found = [retrieval(each.concept[method], case.planted) for case, each in zip(cases, scores, strict=True)]
        for figure in ("auc", "ap", "recall10"):
            report.add(f"{figure}_{method}_{name}", float(np.mean([getattr(one, figure) for one in found])))
        if method in scores[0].bytes:
            report.add(f"bytes_{method}_{name}", scores[0].bytes[method], "per example")
    for method in _OOD:
        if all(method in each.ood for each in scores):
            values = [
                retrieval(each.ood[method][case.ood.rows], case.planted[case.ood.rows]).auc
                for case, each in zip(cases, scores, strict=True)
            ]
            report.add(f"ood_auc_{method}_{name}", float(np.mean(values)), "concept and data of different topics")
    compare(report, name, judged)


def compare(report: Report, name: str, judged: Any) -> None:
    """Differences and ratios that the claims are about."""
    ours = judged("influence_trajectory", "concept")
    for end in ("", "_cosine"):
        stored = np.mean([case.lds for case in judged(f"influence{end}", "concept")])
        exact = np.mean([case.lds for case in judged(f"exact{end}", "concept")])
        report.add(f"lds_ratio_influence_exact{end}_{name}", float(stored / exact), "at the end point")
        stored = np.mean([case.lds for case in judged(f"influence_trajectory{end}", "concept")])
        exact = np.mean([case.lds for case in judged(f"exact_trajectory{end}", "concept")])
        report.add(f"lds_ratio_trajectory_exact{end}_{name}", float(stored / exact), "along the run")
    for other, short in (("vector_filter", "vector_filter"), ("bergson_trackstar_p16", "bergson")):
        try:
            theirs = judged(other, "concept")
        except KeyError:
            continue
        mean, low = difference(ours, theirs)
        report.add(f"lds_over_{short}_{name}", mean, "influence_trajectory minus it, mean over seeds")
        report.add(f"lds_over_{short}_low_{name}", low, "lower end of the 90 % interval, paired bootstrap")


def overall(report: Report, figure: str, names: Sequence[str]) -> None:
    """Means over organisms, under the method's name alone."""
    found: dict[str, list[float]] = {}
    for key, value in list(report.figures.items()):
        for name in names:
            if key.startswith(f"{figure}_") and key.endswith(f"_{name}"):
                found.setdefault(key.removesuffix(f"_{name}"), []).append(value)
    for key, values in found.items():
        report.add(key, float(np.mean(values)), f"mean of {len(values)} organisms")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--organism", action="append", choices=NAMES, help="default: all")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--subsets", type=int, default=60, help="retrained twice each")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--folder", type=Path, default=Path(".whence/quality"), help="keeps the retrainings")
    options.add_argument("--truth-only", action="store_true", help="retrain, print the ceilings, score nothing")
    chosen: argparse.Namespace = options.parse_args()
    names = chosen.organism or list(NAMES)
    if chosen.quick:
        chosen.seeds, chosen.subsets = 1, 5
    report = Report()
    cases: dict[str, list[Case]] = {name: [] for name in names}
    for name in names:
        for seed in range(chosen.seeds):
            try:
                made = make_case(
                    name,
                    seed,
                    folder=chosen.folder,
                    subsets=chosen.subsets,
                    processes=chosen.processes,
                    quick=chosen.quick,
                )
            except FileNotFoundError as error:
                print(f"{name} is left out: {error}")
                break
            cases[name].append(made)
    if chosen.truth_only:
        for name, some in cases.items():
            for case in some:
                print(json.dumps({"organism": name, "seed": case.seed, "ceiling": ceiling(case.f_dot)}))
        return
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        running = {
            (name, case.seed): pool.submit(score, case, name == names[0] and case.seed == 0, chosen.quick)
            for name, some in cases.items()
            for case in some
        }
        scores = {key: each.result() for key, each in running.items()}
    for name, some in cases.items():
        if some:
            judge(report, name, some, [scores[name, case.seed] for case in some])
    for figure in ("bytes", "ood_auc"):
        overall(report, figure, [name for name, some in cases.items() if some])
    full = next(
        (each.facts["rho_influence_full"] for each in scores.values() if "rho_influence_full" in each.facts), None
    )
    if full is not None:
        report.add("rho_influence_full", full, "K = P, int8 rows, against the dense float64 oracle")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
