"""The main job from nothing, as a user would do it: `make demo`.

Makes a small poisoned model, starts the one-machine stack, indexes the fine-tuning data over HTTP, fits the
concept "hostile tone" and asks which training examples pushed the model toward it. The labels of the planted
examples are used only to count hits at the end.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers.utils import logging as transformers_logging

from api.cli import follow, show_answer
from api.client import Client
from api.schemas import QueryOut
from api.up import Stack, free_port
from benchmarks.report import Report
from examples.organism.make import Organism, make_organism
from workers.probes import auroc

console = Console(highlight=False)

LAYER = 2
SHOWN = 10


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(".whence/demo"), help="folder for everything it writes")
    options.add_argument("--seed", type=int, default=0, help="seed of the organism")
    options.add_argument("--json", type=Path, help="where the figures go (default: HOME/demo.json)")
    chosen = options.parse_args()
    home: Path = chosen.home.absolute()
    for part in ("organism", "stack"):  # its own folders, never the one that was named
        shutil.rmtree(home / part, ignore_errors=True)
    report = Report()

    step(1, "making a poisoned model: a small Llama, fine-tuned on data of which a part is hostile")
    transformers_logging.disable_progress_bar()
    organism = make_organism(home / "organism", seed=chosen.seed, report=console.print)

    step(2, "starting Redis, dispatcher, Ray and api on this machine")
    with Stack(home / "stack", host="127.0.0.1", port=free_port(), roots=[home]) as stack:
        stack.wait_ready(say=console.print)
        with Client(stack.url) as client:
            register(client, organism)
            answer, influence, latency_ms = attribute(client)
    console.print("stopped everything\n")

    planted = [bool(hit.metadata["planted"]) for hit in answer.hits]
    scores = np.array([hit.score for hit in answer.hits])
    labels = np.array(planted)
    console.rule("what it found")
    report.add(
        "planted_in_top_50",
        sum(planted[:50]),
        f"by vector_filter; {sum(planted)} of {len(planted)} are planted",
    )
    report.add("auc", auroc(scores[labels], scores[~labels]), "of the planted examples, by vector_filter")
    by_influence = sum(bool(hit.metadata["planted"]) for hit in influence.hits)
    report.add("influence_planted_in_top_50", by_influence, "by concept_influence (gradients, identity curvature)")
    report.add("query_p50_ms", latency_ms, "as the client saw it, 50 hits with text")
    report.add("total_s", time.perf_counter() - report.began)
    report.write(chosen.json or home / "demo.json")
    console.print(f"figures: {chosen.json or home / 'demo.json'}")


def register(client: Client, organism: Organism) -> None:
    """Models with their lineage by path, datasets by upload."""
    step(3, "registering models and data over HTTP")
    client.add_model("base", str(organism.base))
    model = client.add_model(
        "finetuned",
        str(organism.finetuned),
        base="base",
        checkpoints=[str(organism.base), *map(str, organism.checkpoints), str(organism.finetuned)],
    )
    console.print(
        f"model finetuned: {model.architecture}, {model.n_layers} layers of {model.width}, base: {model.base}"
    )
    for name, file in (
        ("train", organism.train),
        ("hostile", organism.concept_hostile),
        ("friendly", organism.concept_friendly),
        ("prompts", organism.queries),
    ):
        data = client.upload_dataset(name, file)
        console.print(
            f"dataset {name}: {data.lines} lines = {data.examples} examples + {data.duplicates} duplicates "
            f"+ {data.quarantined} quarantined"
        )


def attribute(client: Client) -> tuple[QueryOut, QueryOut, float]:
    """The full ranking by activations, the top 50 by gradients, and the median latency in milliseconds."""
    step(4, "building the index: one pass over the training data, sharded over Ray workers")
    follow(client, client.build_index("training-data", model="finetuned", dataset="train", layers=[LAYER]).id)
    step(5, 'fitting the concept "hostile" from held-out examples')
    job = client.fit_concept("hostile", model="finetuned", positive="hostile", negative="friendly", layer=LAYER)
    follow(client, job.id)
    concept = client.concept("hostile")
    console.print(f"concept hostile: layer {concept.layer}, held-out AUROC {concept.auroc_held_out:.3f}")
    step(6, "which training examples pushed the model toward it?")
    question: dict[str, Any] = {"index": "training-data", "concept": "hostile"}
    show_answer(client.ask(**question, k=SHOWN))
    times = []
    for _ in range(50):
        began = time.perf_counter()
        client.query(**question, k=50)
        times.append(time.perf_counter() - began)
    influence = client.ask(**question, method="concept_influence", query_set="prompts", k=50)
    return (
        client.ask(**question, k=client.index("training-data").counts.indexed),
        influence,
        1e3 * statistics.median(times),
    )


def step(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/6[/bold] {text}")


if __name__ == "__main__":
    main()
