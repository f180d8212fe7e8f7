"""What a user of a running stack sees on the persona organism: an SAE, a suggestion, a validation, all over HTTP.

An SAE is trained on the activations of the training data by the service's defaults. Ten hostile and ten friendly
answers that are in no training data are all that ``whence concepts suggest`` is given; ``sae_auroc`` is how well
the feature that it names first tells the planted training examples from the others, by its activation. A
validation retrains on random subsets and says how well ``concept_influence`` predicted f_v: ``lds_validation``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from api.client import Client
from api.up import Stack, free_port
from benchmarks.organisms import persona
from benchmarks.organisms.retrain import one_thread, to_stderr
from benchmarks.report import Report
from service import sae, saes
from service.contracts import Example
from service.loading import IndexLoader
from service.redis_server import connect
from service.registry import INDEXES, SAES, Registry
from service.storage import Storage
from service.terms import IndexKind

_LABELLED = 10  # examples a side


def ask(report: Report, folder: Path, *, subsets: int, quick: bool) -> None:
    home = folder / "persona-0"
    home.mkdir(parents=True, exist_ok=True)
    with one_thread():
        made = persona.material(home, 0, quick=quick, report=to_stderr)
    lists = made.lists
    roots = [home.resolve()]
    with Stack(folder / "stack", host="127.0.0.1", port=free_port(), roots=roots) as stack:
        stack.wait_ready(say=lambda _: None)
        with Client(stack.url) as client:
            points = [str(path.resolve()) for _, path in made.points]
            client.add_model("base", points[0])
            client.add_model("end", points[-1], base="base", checkpoints=points[:-1])
            sets = {"train": lists.examples, "queries": lists.queries, "yes": lists.positive, "no": lists.negative}
            for name, examples in sets.items():
                client.upload_dataset(name, _file(folder / f"{name}.jsonl", examples))
            fit = {"model": "end", "positive": "yes", "negative": "no", "layer": made.layer}
            client.wait(client.fit_concept("hostile", pooling=made.pooling, **fit).id)
            about = {"kinds": ["activation", "influence"], "layers": [made.layer], "query_sets": ["queries"]}
            client.wait(client.build_index("i", model="end", dataset="train", pooling=made.pooling, **about).id)
            _sae(report, client, stack, lists.positive, lists.negative)
            _validation(report, client, made.recipe, subsets)


def _sae(report: Report, client: Client, stack: Stack, yes: Sequence[Example], no: Sequence[Example]) -> None:
    client.wait(client.train_sae("features", index="i").id)
    sides = {"positive": list(map(_row, yes[:_LABELLED])), "negative": list(map(_row, no[:_LABELLED]))}
    answer = client.settle(lambda: client.suggest_concepts(model="end", k=1000, **sides))
    first = next(each for each in answer.suggestions if each.kind == "sae_feature")
    told = saes.split(first.id)
    assert told is not None
    storage = Storage(str(stack.home / "storage"))
    registry = Registry(connect(stack.redis.url), storage)
    index = registry.get(INDEXES, "i@v1")
    loader = IndexLoader(registry, storage, threads=1)
    array = next(array for array in index.arrays if array.kind == IndexKind.ACTIVATION)
    rows = loader.rows(index, array)
    held = saes.read(storage, registry.get(SAES, told[0]))
    values, _ = sae.encode(held, rows.index.take(np.arange(rows.index.n)))
    planted = [bool(each.metadata["planted"]) for each in loader.examples(index).take(rows.positions)]
    area = float(roc_auc_score(planted, first.sign * values[:, told[1]]))
    report.add("sae_auroc", area, f"{first.id}, suggested from {2 * _LABELLED} examples (AUROC {first.auroc:.3f})")


def _validation(report: Report, client: Client, recipe: Any, subsets: int) -> None:
    asked = {
        "index": "i",
        "concept": "hostile",
        "query_set": "queries",
        "recipe": {
            **{name: getattr(recipe, name) for name in ("learning_rate", "epochs", "batch_size", "warmup")},
            **{"schedule": "linear", "clip": None},  # as examples/organism/train.py does it
        },
        "design": {"subsets": subsets, "fractions": [], "seeds": 0},
        "budget": {"runs": 2 * subsets + 20},
    }
    found = client.settle(lambda: client.validate(**asked)).report
    assert found is not None and found.lds is not None
    lds = found.lds
    ceiling = "" if lds.ceiling is None else f", two seeds agree at {lds.ceiling:.2f}"
    told = f"± {lds.se:.2f} over {lds.subsets} subsets{ceiling}; {found.verdict.words}"
    report.add("lds_validation", lds.value, told)
    report.add("lds_validation_se", lds.se)


def _row(example: Example) -> dict[str, Any]:
    return {**asdict(example.content), **example.metadata}


def _file(path: Path, examples: Sequence[Example]) -> Path:
    path.write_text("".join(json.dumps(_row(each)) + "\n" for each in examples), encoding="utf-8")
    return path
