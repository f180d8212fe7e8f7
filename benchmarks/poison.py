"""Are the poisoned examples found? The stories organism, by the method and pooling that a validation split chose.

Half of the training examples are a validation split whose labels are known: each method with each pooling ranks
them; the one with the highest average precision is then asked about the other half, which alone is reported.
Concepts are fitted between twins that are in no training data, by difference of means and by LDA, pooled like the
index; ``influence_function`` asks for the loss on the query set.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from benchmarks.lab import Lab
from benchmarks.organisms import stories
from benchmarks.organisms.case import Material
from benchmarks.organisms.retrain import one_thread, to_stderr
from benchmarks.report import Report
from benchmarks.statistics import Retrieval, retrieval
from service.concept_planning import ConceptRequest, plan_concept
from service.registry import CONCEPTS
from service.terms import IndexKind, JobKind, Method, Pooling, ProbeMethod

POOLINGS = (Pooling.RESPONSE_MEAN, Pooling.ALL_MEAN, Pooling.LAST_PROMPT_TOKEN, Pooling.LAST_TOKEN)
PROBES = (ProbeMethod.DIFFERENCE_OF_MEANS, ProbeMethod.LDA)
F64 = NDArray[np.float64]


def find(report: Report, folder: Path, data: Path, *, seeds: int, processes: int, quick: bool) -> None:
    """Mean over organisms of average precision and recall@10 on the half that chose nothing; ``data`` holds
    stories260k.
    """
    one = partial(_organism, folder, data / "stories260k", quick=quick)
    if min(processes, seeds) <= 1:
        found = [one(seed) for seed in range(seeds)]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(one, range(seeds)))
    report.add("ap_poison", float(np.mean([each.ap for each in found])), f"mean of {seeds} organisms")
    note = "share of poisoned ones among the ten that rank highest"
    report.add("recall10_poison", float(np.mean([each.recall10 for each in found])), note)


def _organism(folder: Path, pretrained: Path, seed: int, *, quick: bool) -> Retrieval:
    logging.disable_progress_bar()
    home = folder / f"stories-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    with one_thread():
        made = stories.material(home, seed, quick=quick, pretrained=pretrained, report=to_stderr)
        scored = dict(_scores(made, home / "lab"))
    planted = np.array([bool(example.metadata["planted"]) for example in made.lists.examples])
    choosing = _half(planted, seed)
    known = {name: retrieval(scores[choosing], planted[choosing]) for name, scores in scored.items()}
    best = max(known, key=lambda name: (known[name].ap, known[name].auc))
    rest = retrieval(scored[best][~choosing], planted[~choosing])
    held = f"{planted[~choosing].sum()} of {(~choosing).sum()} poisoned"
    lines = [f"stories {seed}: chose {best} (AP {known[best].ap:.3f}); on the other half, {held}: AP {rest.ap:.3f}"]
    for name in sorted(known):
        other = retrieval(scored[name][~choosing], planted[~choosing])
        lines.append(f"  {name:56} AP {known[name].ap:.3f} chose, {other.ap:.3f} on the rest")
    print("\n".join(lines), flush=True)
    return rest


def _half(planted: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """A random half, with half of the poisoned ones."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(planted), dtype=bool)
    for kind in (True, False):
        rows = rng.permutation(np.flatnonzero(planted == kind))
        chosen[rows[: len(rows) // 2]] = True
    return chosen


def _scores(made: Material, folder: Path) -> Iterator[tuple[str, F64]]:
    """Every method and pooling, as indexes of the service answer them."""
    ids = [example.id for example in made.lists.examples]
    lists = made.lists
    with Lab(folder) as lab:
        end = made.points[-1][1]
        lab.model("model", end, checkpoints=[(path, 1.0) for _, path in made.points[:-1]])
        sets = {"train": lists.examples, "queries": lists.queries, "yes": lists.positive, "no": lists.negative}
        for name, examples in sets.items():
            lab.dataset(name, examples)
        kinds = (IndexKind.ACTIVATION, IndexKind.INFLUENCE)
        for pooling in POOLINGS:
            about: dict[str, Any] = {"kinds": kinds, "pooling": pooling, "query_sets": ("queries",)}
            index, _ = lab.build(f"i-{pooling}".replace("_", "-"), "model", "train", made.layer, **about)
            for probe in PROBES:
                concept = _fit(lab, made.layer, pooling, probe)
                told = f"{probe}, {pooling}"
                yield (
                    f"vector_filter by {told}",
                    lab.scores(index, ids, concept=concept, method=Method.VECTOR_FILTER),
                )
                yield f"concept_influence by {told}", lab.scores(index, ids, concept=concept, query_set="queries")
        index, _ = lab.build("g", "model", "train", made.layer)
        method = Method.INFLUENCE_FUNCTION
        yield "influence_function", lab.scores(index, ids, query_set="queries", method=method, damping=1.0)


def _fit(lab: Lab, layer: int, pooling: Pooling, probe: ProbeMethod) -> str:
    """A concept between the twins, as ``whence concepts fit`` makes it."""
    name = f"{probe}-{pooling}"
    if lab.registry.find(CONCEPTS, name) is None:
        request = ConceptRequest(name, "model", "yes", "no", None, None, layer, None, probe, (), pooling, None)
        lab.run(JobKind.FIT_CONCEPT, plan_concept(request, lab.registry, lab.storage, lab.settings))
    return name
