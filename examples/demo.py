"""The main job from nothing, as a user would do it: `make demo`.

Makes a small poisoned model, starts the one-machine stack, indexes the fine-tuning data over HTTP along the whole
training run, fits the concept "hostile tone" and asks which training examples pushed the model toward it: those
that look like it, and those whose training raised it. The labels of the planted examples are used only to count
hits at the end.
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

from api.client import Client
from api.schemas import QueryOut
from api.terminal import follow, show_answer
from api.up import Stack, free_port
from benchmarks.report import Report
from examples.organism.make import Organism, make_organism
from workers.probes import auroc

console = Console(highlight=False)

INDEX, LAYER = "training-data", 2
QUESTION: dict[str, Any] = {"index": INDEX, "concept": "hostile"}
SHOWN = 5


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
            look_alikes, influence = attribute(client)
            latency_ms = latency(client)
    console.print("stopped everything\n")

    console.rule("what it found")
    planted = sum(bool(hit.metadata["planted"]) for hit in look_alikes.hits)
    of_all = f"{planted} of {len(look_alikes.hits)} are planted"
    report.add("planted_in_top_50", planted_in(look_alikes, 50), f"by vector_filter; {of_all}")
    report.add("auc", auc(look_alikes), "of the planted examples, by vector_filter")
    found = influence.provenance
    how = f"by concept_influence (EK-FAC, {found.points} points of the run)"
    report.add("influence_planted_in_top_50", planted_in(influence, 50), how)
    report.add("influence_auc", auc(influence), "of the planted examples, by concept_influence")
    if (measured := found.fidelity) is not None:
        about = f"Spearman of stored embeddings against {measured.against}, {measured.queries} random concepts"
        report.add("fidelity", measured.mean, about)
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


def attribute(client: Client) -> tuple[QueryOut, QueryOut]:
    """The full rankings by activations and by influence embeddings."""
    step(4, "building the index: at five points of the run curvature, Jacobian and one pass over the training data")
    job = client.build_index(
        INDEX,
        model="finetuned",
        dataset="train",
        kinds=["activation", "influence"],
        layers=[LAYER],
        query_sets=["prompts"],
    )
    follow(client, job.id)
    step(5, 'fitting the concept "hostile" from held-out examples')
    job = client.fit_concept("hostile", model="finetuned", positive="hostile", negative="friendly", layer=LAYER)
    follow(client, job.id)
    concept = client.concept("hostile")
    console.print(f"concept hostile: layer {concept.layer}, held-out AUROC {concept.auroc_held_out:.3f}")
    step(6, "which training examples pushed the model toward it?")
    everything = client.index(INDEX).counts.indexed
    console.print("Those that look like it (vector_filter):")
    show_answer(client.ask(**QUESTION, k=SHOWN))
    console.print("\nThose whose training raised it (concept_influence):")
    influence = {**QUESTION, "method": "concept_influence"}
    show_answer(client.ask(**influence, k=SHOWN))
    return client.ask(**QUESTION, k=everything), client.ask(**influence, k=everything)


def latency(client: Client) -> float:
    """The median time of an influence query in milliseconds, as the client sees it; no two ask for the same k, so
    that none is answered from the cache.
    """
    times = []
    for more in range(50):
        began = time.perf_counter()
        client.query(**QUESTION, method="concept_influence", k=26 + more)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def planted_in(answer: QueryOut, k: int) -> int:
    return sum(bool(hit.metadata["planted"]) for hit in answer.hits[:k])


def auc(answer: QueryOut) -> float:
    """Of the planted examples against the others, in a full ranking."""
    scores = np.array([hit.score for hit in answer.hits])
    labels = np.array([bool(hit.metadata["planted"]) for hit in answer.hits])
    return auroc(scores[labels], scores[~labels])


def step(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/6[/bold] {text}")


if __name__ == "__main__":
    main()
