"""What it costs to append to an index, over building an index of the appended examples alone.

Both sides compute the same rows; curvature, eigenvectors and Jacobian are there before in both. What appending has
on top, finding out which examples are new, grows with what is there: that is what the ratio shows.
"""

import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.build import random_examples, random_model
from benchmarks.lab import Lab
from benchmarks.report import Report
from service import indexes, shards
from service.contracts import IndexRecord
from service.life import plan_append
from service.terms import IndexKind, JobKind
from service.work import SumSpec

_KINDS = (IndexKind.ACTIVATION, IndexKind.GRADIENT, IndexKind.INFLUENCE)
_SIZES = {False: (100_000, 1_000, 16), True: (300, 40, 12)}  # quick: there, appended, tokens
_LAYER, _ROUNDS = 2, 3


def append_vs_build(report: Report, *, quick: bool) -> None:
    """Add append_vs_build, and the seconds that it is made of."""
    there, added, length = _SIZES[quick]
    with TemporaryDirectory() as name, Lab(Path(name), threads=2, token_budget=8192) as lab:
        random_model(Path(name) / "model", width=64, blocks=_LAYER)
        lab.model("model", Path(name) / "model")
        lab.dataset("queries", random_examples(8, length, seed=1))
        lab.dataset("there", random_examples(there, length, seed=2))
        began = time.perf_counter()
        _build(lab, "big", "there")
        report.add("append_base_s", time.perf_counter() - began, f"building the index of {there:,} examples")
        ratios, appends = [], []
        for number in range(_ROUNDS):
            more = f"more{number}"
            lab.dataset(more, random_examples(added, length, seed=100 + number))
            _forget_rows(lab, _build(lab, f"alone{number}", more))
            began = time.perf_counter()
            again = _build(lab, f"again{number}", more)
            built = time.perf_counter() - began
            _forget_rows(lab, again)
            began = time.perf_counter()
            spec = plan_append("big@v1", more, lab.registry, lab.storage, lab.settings)
            lab.run(JobKind.APPEND_INDEX, spec)
            appends.append(time.perf_counter() - began)
            ratios.append(appends[-1] / built)
    report.add("append_s", statistics.median(appends), f"{added:,} examples to {there:,}")
    report.add("append_vs_build", statistics.median(ratios), "over building an index of those alone")


def _build(lab: Lab, name: str, dataset: str) -> IndexRecord:
    options = {"kinds": _KINDS, "query_sets": ("queries",), "curvature": _CURVATURE, "coordinates": 1024}
    return lab.build(name, "model", dataset, _LAYER, **options)[0]


_CURVATURE = {"examples": 256, "seed": 0, "labels": "sampled", "positions": "targets"}


def _forget_rows(lab: Lab, index: IndexRecord) -> None:
    """Remove the index's shards and what they were summed from: rows are computed again, and nothing else."""
    for section in indexes.read_manifest(lab.storage, index).sections:
        for reference in section.shards:
            work = shards.read_manifest(lab.storage, reference.key).work
            keys = (
                [reference.key, *(key for key, _ in work.sources)] if isinstance(work, SumSpec) else [reference.key]
            )
            for key in keys:
                shutil.rmtree(Path(lab.storage.root) / shards.folder(key), ignore_errors=True)
