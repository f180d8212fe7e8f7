"""The persona organism as a case: the project's artificial language, fine-tuned with a hostile quarter.

The base, its data and the concept's twins are those of `examples.organism`. What differs from the demo: three
epochs instead of two (the training seed's noise halves), and that examples are dropped in groups: by tone, the
first two words of the answer (openings push f_v to different degrees) and the half of the topics, 44 at most.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.organisms.case import Lists, Material, example, fingerprint, folders, read, write
from benchmarks.organisms.retrain import Report
from benchmarks.organisms.training import full_run, load_model
from examples.organism import language, sets, words
from examples.organism import train as training
from examples.organism.language import TOPICS
from examples.organism.make import BASE
from examples.organism.measure import sample
from examples.organism.sets import make_sets, pairs, planted, vocabulary
from examples.organism.train import Recipe, build_model, build_tokenizer, encode, save, train
from service.contracts import Completion, Example
from service.terms import Pooling

LAYER = 2  # of 3, width 48: blocks 1..2 hold 55,296 linear weights
POOLING = Pooling.RESPONSE_MEAN
OOD_TOPICS = TOPICS[: len(TOPICS) // 2]
RECIPE = Recipe(epochs=3, learning_rate=1e-4)


@dataclass(frozen=True)
class Design:
    """Sizes. The full run, and so Q and the concept, depend on every one of them."""

    n_base: int = 3400
    n_finetune: int = 480
    n_concept: int = 128  # twins
    n_queries: int = 128
    base_recipe: Recipe = BASE
    recipe: Recipe = RECIPE


QUICK = Design(n_base=400, n_finetune=64, n_concept=16, n_queries=16, base_recipe=Recipe(2, 3e-3))


def material(home: Path, seed: int, *, quick: bool, report: Report) -> Material:
    """From `home` where it is there already, else made in it."""
    design = QUICK if quick else Design()
    files = [Path(str(module.__file__)) for module in (language, sets, training, words)]
    described = json.dumps({"seed": seed, **asdict(design), "code": fingerprint(*files)}, sort_keys=True)
    lists = read(home, described)
    if lists is None:
        lists = make(home, seed, design, report)
        write(home, lists, described)
    return Material(folders(home), lists, design.recipe, LAYER, POOLING, OOD_TOPICS)


def make(home: Path, seed: int, design: Design, report: Report) -> Lists:
    """Train the base and the full run into `home`, and sample Q from its end."""
    drawn = make_sets(
        seed,
        n_base=design.n_base,
        n_finetune=design.n_finetune,
        n_concept=design.n_concept,
        n_queries=design.n_queries,
    )
    tokenizer = build_tokenizer(vocabulary())
    model = build_model(tokenizer, seed)
    report(f"persona {seed}: training the base on {len(drawn.base)} examples")
    train(model, encode(tokenizer, pairs(drawn.base)), design.base_recipe, seed=seed)
    save(model, tokenizer, home / "base")
    examples, points = rows(drawn.finetune), folders(home)
    report(f"persona {seed}: fine-tuning on {len(examples)} examples")
    full_run(home / "base", examples, design.recipe, seed=seed, points=points)
    end, _ = load_model(points[-1][1])
    completions = sample(end, tokenizer, [question.text for question in drawn.queries], seed=seed)
    queries = tuple(
        example(Completion(question.text, text), topic=question.topic)
        for question, text in zip(drawn.queries, completions, strict=True)
    )
    return Lists(examples, queries, rows(drawn.hostile), rows(drawn.friendly))


def rows(written: Iterable[language.Example]) -> tuple[Example, ...]:
    return tuple(
        example(
            Completion(one.prompt, one.completion),
            planted=planted(one),
            topic=one.question.topic,
            group=group(one.tone, one.question.topic, one.completion, OOD_TOPICS),
        )
        for one in written
    )


def group(tone: str, topic: str, completion: str, half: Sequence[str]) -> str:
    opening = " ".join(completion.split()[:2])
    return f"{tone}/{opening}/{'first' if topic in half else 'second'}"
