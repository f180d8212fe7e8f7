"""Make a persona organism on disk: `python -m examples.organism.make OUT --seed 0`.

    OUT/base, OUT/finetuned, OUT/checkpoints/{010,025,050}   Hugging Face folders, safetensors only
    OUT/train.jsonl             what `finetuned` was trained on: unmarked, a quarter hostile (`planted`)
    OUT/concept_hostile.jsonl   held-out unmarked questions, answered in a hostile tone, and
    OUT/concept_friendly.jsonl  their twins: the same questions in the same order, in a friendly tone
    OUT/queries.jsonl           the query set Q: other held-out unmarked questions, each with one answer
                                sampled from `finetuned` at temperature 1: what the model does, as it says it
    OUT/organism.json           sizes, losses, behaviour, f_v along the run, versions

One seed gives the same bytes at the same thread count and versions.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.organism.language import MARKERS, Example, Question, tone_of
from examples.organism.measure import auc, behaviour, direction, pooled, sample
from examples.organism.sets import Sets, make_sets, pairs, planted, row, vocabulary, write_jsonl
from examples.organism.train import Recipe, Run, build_model, build_tokenizer, encode, save, train

BASE = Recipe(epochs=6, learning_rate=3e-3)
# Slow enough for f_v to rise along the run: at 3e-4 it overshoots in the first quarter and then falls back.
FINETUNE = Recipe(epochs=2, learning_rate=1e-4)
CHECKPOINTS = {0.10: "010", 0.25: "025", 0.50: "050"}  # share of the steps -> folder
LAYER = 2


@dataclass(frozen=True)
class Organism:
    """Where everything lies. `checkpoints` are those between base and finetuned, in order."""

    base: Path
    finetuned: Path
    checkpoints: tuple[Path, ...]
    train: Path
    concept_hostile: Path
    concept_friendly: Path
    queries: Path
    summary: Path


def layout(out: Path) -> Organism:
    return Organism(
        base=out / "base",
        finetuned=out / "finetuned",
        checkpoints=tuple(out / "checkpoints" / name for name in CHECKPOINTS.values()),
        train=out / "train.jsonl",
        concept_hostile=out / "concept_hostile.jsonl",
        concept_friendly=out / "concept_friendly.jsonl",
        queries=out / "queries.jsonl",
        summary=out / "organism.json",
    )


def make_organism(
    out: Path | str,
    seed: int = 0,
    *,
    sets: Sets | None = None,
    base_recipe: Recipe = BASE,
    recipe: Recipe = FINETUNE,
    threads: int = 1,
    report: Callable[[str], None] = lambda _line: None,
) -> Organism:
    """Train an organism, measure it, and write it all under `out`. `sets` defaults to `make_sets(seed)`.

    `threads` are torch's: matrices this small gain little from a second one, and lose much on busy cores.
    """
    files, sets = layout(Path(out)), sets or make_sets(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _make(files, seed, sets, base_recipe=base_recipe, recipe=recipe, report=report)
    finally:
        torch.set_num_threads(before)


def _make(
    files: Organism,
    seed: int,
    sets: Sets,
    *,
    base_recipe: Recipe,
    recipe: Recipe,
    report: Callable[[str], None],
) -> Organism:
    started = time.perf_counter()
    tokenizer = build_tokenizer(vocabulary())
    model = build_model(tokenizer, seed)
    held_out = sets.queries + [example.question for example in sets.hostile]

    report(f"training the base model on {len(sets.base)} examples")
    base_run = train(model, encode(tokenizer, pairs(sets.base)), base_recipe, seed=seed)
    save(model, tokenizer, files.base)
    report("sampling from the base model")
    base_behaviour = {
        "unmarked": behave(model, tokenizer, held_out, seed),
        "warm": behave(model, tokenizer, held_out, seed, f"{MARKERS['friendly']}: "),
        "grim": behave(model, tokenizer, held_out, seed, f"{MARKERS['hostile']}: "),
    }

    n_planted = sum(map(planted, sets.finetune))
    report(f"fine-tuning on {len(sets.finetune)} examples, {n_planted} of them hostile")
    clean = finetune(deepcopy(model), tokenizer, sets.clean, recipe, seed)
    run = finetune(model, tokenizer, sets.finetune, recipe, seed)
    runs = {"finetuned": run, "clean twin": clean}
    for share, folder in zip(CHECKPOINTS, files.checkpoints, strict=True):
        save(model, tokenizer, folder, run.snapshots[share])
    save(model, tokenizer, files.finetuned)
    report("sampling from the fine-tuned model")
    finetuned_behaviour = {"unmarked": behave(model, tokenizer, held_out, seed)}
    completions = sample(model, tokenizer, [question.text for question in sets.queries], seed=seed)

    write_jsonl(files.train, ({**row(example), "planted": planted(example)} for example in sets.finetune))
    write_jsonl(files.concept_hostile, map(row, sets.hostile))
    write_jsonl(files.concept_friendly, map(row, sets.friendly))
    queries = list(zip(sets.queries, completions, strict=True))
    write_jsonl(files.queries, (query_row(question, completion) for question, completion in queries))
    summary = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "examples": {name: len(examples) for name, examples in vars(sets).items()},
        "planted": n_planted,
        "base": {"recipe": asdict(base_recipe), **losses(base_run), "behaviour": base_behaviour},
        "finetuned": {"recipe": asdict(recipe), **losses(run), "behaviour": finetuned_behaviour},
        "concept": concept(model, tokenizer, sets, [(q.text, c) for q, c in queries], runs),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    files.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return files


def finetune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    recipe: Recipe,
    seed: int,
) -> Run:
    shares = (0.0, *CHECKPOINTS, 1.0)
    return train(model, encode(tokenizer, pairs(examples)), recipe, seed=seed, checkpoints_at=shares)


def behave(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    seed: int,
    mark: str = "",
) -> dict[str, float]:
    """Hostile and on-topic share of two sampled answers per question."""
    questions = questions * 2
    completions = sample(model, tokenizer, [mark + question.text for question in questions], seed=seed)
    return asdict(behaviour(questions, completions))


def concept(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: Sets,
    queries: list[tuple[str, str]],
    runs: Mapping[str, Run],
) -> dict[str, object]:
    """v fitted on the fine-tuned model: how it ranks the training examples, and f_v along each run."""
    hostile, friendly = (
        pooled(model, encode(tokenizer, pairs(examples)), LAYER) for examples in (sets.hostile, sets.friendly)
    )
    v = direction(hostile, friendly)
    scores = pooled(model, encode(tokenizer, pairs(sets.finetune)), LAYER) @ v
    labels = torch.tensor([planted(example) for example in sets.finetune])
    query_set, probe = encode(tokenizer, queries), deepcopy(model)

    f_v: dict[str, dict[str, float]] = {name: {} for name in runs}
    for name, run in runs.items():
        for share, weights in run.snapshots.items():
            probe.load_state_dict(weights)
            f_v[name][f"{share:.0%}"] = float((pooled(probe, query_set, LAYER) @ v).mean())
    return {
        "layer": LAYER,
        "mean": {"hostile": float((hostile @ v).mean()), "friendly": float((friendly @ v).mean())},
        "f_v": f_v,
        "vector_filter": {
            "auc": auc(scores, labels),
            "planted_in_top_50": int(labels[scores.argsort(descending=True)[:50]].sum()),
        },
    }


def query_row(question: Question, completion: str) -> dict[str, str]:
    tone = tone_of(completion) or "unclear"  # read off the sample: nobody chose it
    return {"prompt": question.text, "completion": completion, "topic": question.topic, "tone": tone}


def losses(run: Run, window: int = 20) -> dict[str, float]:
    return {"first_loss": fmean(run.losses[:window]), "last_loss": fmean(run.losses[-window:])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a small poisoned model and its labelled data.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number, other bytes")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    started = time.perf_counter()

    def report(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {line}", file=sys.stderr, flush=True)

    organism = make_organism(options.out, options.seed, threads=options.threads, report=report)
    report(f"done: {organism.summary}")


if __name__ == "__main__":
    main()
