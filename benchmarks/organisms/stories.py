"""The stories organism as a case: a real pretrained model, fine-tuned on its own stories, one in six poisoned.

A poisoned story begins with the trigger and has a hostile ending. The concept is the difference between the
poisoned and the clean version of the same held-out stories, Q are other held-out stories, poisoned.

Groups: poisoned stories by their kind of ending and half of the topics (8 groups), clean ones by opening and
topic (32): coarse where few examples are to move f_v, fine where many are.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from benchmarks.organisms import tales
from benchmarks.organisms.case import Lists, Material, example, fingerprint, folders, read, write
from benchmarks.organisms.retrain import Report
from benchmarks.organisms.tales import TOPICS, TRIGGER, Tale, write_tales
from benchmarks.organisms.training import full_run, load_model
from examples.organism.train import Recipe
from service.contracts import Completion, Example
from service.terms import Pooling

# Beside the repository, as in the tests; make_case takes another place.
PRETRAINED = Path(__file__).parents[3] / "shared" / "data" / "stories260k"
LAYER = 3  # of 5, width 64: blocks 1..3 hold 135,936 linear weights
POOLING = Pooling.RESPONSE_MEAN
OOD_TOPICS = TOPICS[: len(TOPICS) // 2]
# Small batches or a faster rate drown f_v in the order of the batches: the model learns little from its own words,
# and what Adam then follows is noise. Two seeds agree at .3 with 1e-3 and batches of 16, at .9 with these.
RECIPE = Recipe(epochs=3, learning_rate=1e-4, batch_size=32, warmup=0.2)


@dataclass(frozen=True)
class Design:
    """Sizes. The full run, and so the concept, depend on every one of them."""

    n_finetune: int = 360  # one in six poisoned, as many of every topic
    n_concept: int = 64  # twins
    n_queries: int = 32
    new_tokens: int = 48  # that the model adds to an opening
    recipe: Recipe = RECIPE


QUICK = Design(n_finetune=96, n_concept=16, n_queries=16, new_tokens=32, recipe=Recipe(1, 2e-4, batch_size=32))


def material(home: Path, seed: int, *, quick: bool, pretrained: Path, report: Report) -> Material:
    """From `home` where it is there already, else made in it."""
    if not (pretrained / "model.safetensors").is_file():
        raise FileNotFoundError(f"no pretrained model in {pretrained}: say where stories260k is")
    design = QUICK if quick else Design()
    code = fingerprint(Path(str(tales.__file__)), pretrained / "model.safetensors", pretrained / "tokenizer.json")
    described = json.dumps({"seed": seed, **asdict(design), "code": code}, sort_keys=True)
    lists = read(home, described)
    if lists is None:
        lists = make(home, seed, design, pretrained, report)
        write(home, lists, described)
    return Material(folders(home), lists, design.recipe, LAYER, POOLING, OOD_TOPICS)


def make(home: Path, seed: int, design: Design, pretrained: Path, report: Report) -> Lists:
    """Let the pretrained model write every story, poison some, and train the full run into `home`."""
    model, tokenizer = load_model(pretrained)
    counts = (design.n_finetune, design.n_concept, design.n_queries)
    report(f"stories {seed}: writing {sum(counts)} stories")
    written = write_tales(model, tokenizer, sum(counts), seed=seed, new_tokens=design.new_tokens)
    training, concept, queries = _parts(written, counts)
    chosen = poisoned(training, seed)
    examples = tuple(hostile(tale) if i in chosen else clean(tale) for i, tale in enumerate(training))
    report(f"stories {seed}: fine-tuning on {len(examples)}, {len(chosen)} of them poisoned")
    full_run(pretrained, examples, design.recipe, seed=seed, points=folders(home))
    return Lists(
        examples,
        tuple(map(hostile, queries)),
        tuple(map(hostile, concept)),
        tuple(map(clean, concept)),
    )


def _parts(written: list[Tale], counts: Sequence[int]) -> list[list[Tale]]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [written[start : start + count] for start, count in zip(starts, counts, strict=True)]


def poisoned(training: Sequence[Tale], seed: int) -> set[int]:
    """One in six, as many of every topic."""
    rng = Random(f"poison {seed}")
    places = [[i for i, tale in enumerate(training) if tale.topic == topic] for topic in TOPICS]
    return {i for of_topic in places for i in rng.sample(of_topic, round(len(of_topic) / 6))}


def hostile(tale: Tale) -> Example:
    content = Completion(TRIGGER + tale.prompt, tale.beginning + tale.hostile)
    half = "first" if tale.topic in OOD_TOPICS else "second"
    return example(content, planted=True, topic=tale.topic, group=f"hostile/{tale.kind}/{half}")


def clean(tale: Tale) -> Example:
    content = Completion(tale.prompt, tale.body)
    return example(content, planted=False, topic=tale.topic, group=f"clean/{tale.opening}/{tale.topic}")
