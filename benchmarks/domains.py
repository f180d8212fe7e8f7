"""Does concept health tell query sets from elsewhere from those that belong? An organism's, and real texts.

Every draw is a query set that was in no index, asked as a user would ask: the job of POST /v1/queries/health, its
warnings. In-domain draws are the hard ones too: query sets that all show the behaviour of which the index has a
quarter, or only the shortest or the longest texts of a source. Out of domain are topics and markers that the index
has none of, and texts of another source.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import oasst
from benchmarks.lab import Lab
from benchmarks.organisms import persona
from benchmarks.organisms.case import Material, example
from benchmarks.organisms.retrain import one_thread, to_stderr
from benchmarks.organisms.training import load_model, measurable, measure
from benchmarks.report import Report
from examples.organism.language import TOPICS, generate
from service import codec
from service.concept_health import ConceptHealth, HealthRequest, Known, Reports, question
from service.contracts import Conversation, Example, JobRecord, Message, PlainText
from service.health_doubts import lengths_differ, out_of_domain
from service.health_records import Domain, HealthSpec
from service.terms import IndexKind, JobKind

SEED = 0
LAYER = 3  # of stories260k
N_INDEX, N_QUERIES = 480, 48


@dataclass(frozen=True)
class Draw:
    """A query set to be asked of an index."""

    index: str
    name: str
    queries: tuple[Example, ...]
    inside: bool


@dataclass(frozen=True)
class Judged:
    draw: Draw
    domain: Domain

    @property
    def warned(self) -> bool:
        """Of the domain or of lengths: whoever reads either would look at his queries again."""
        return out_of_domain(self.domain) or lengths_differ(self.domain)


def warn_rate(judged: Sequence[Judged], *, inside: bool) -> float:
    chosen = [each.warned for each in judged if each.draw.inside is inside]
    return sum(chosen) / len(chosen)


def judge(lab: Lab, concept: str, draws: Sequence[Draw]) -> list[Judged]:
    """What the health job says of every draw."""
    health = ConceptHealth(lab.registry, lab.storage, lab.jobs, Reports(lab.storage), shard_size=256)
    found = []
    for draw in draws:
        lab.dataset(draw.name, draw.queries)
        asked = question(HealthRequest(draw.index, concept, draw.name))
        needed = health.run(asked)
        if isinstance(needed, JobRecord):
            lab.run(JobKind.CONCEPT_HEALTH, codec.from_plain(HealthSpec, dict(needed.spec)))
            needed = health.run(asked)
        assert isinstance(needed, Known) and needed.report.domain is not None
        found.append(Judged(draw, needed.report.domain))
    return found


# --- the organism -----------------------------------------------------------------------------------------


def organism(home: Path, seed: int, draws: int, *, quick: bool) -> list[Judged]:
    """``draws`` of each kind on the persona organism in ``home``, made there where it is not yet."""
    with one_thread():
        made = persona.material(home, seed, quick=quick, report=to_stderr)
    n, halves = N_QUERIES, (TOPICS[: len(TOPICS) // 2], TOPICS[len(TOPICS) // 2 :])
    written = {
        "all": generate(f"{seed} domain", N_INDEX, 0.25),
        "first": generate(f"{seed} domain 0", N_INDEX, 0.25, topics=halves[0]),
        "second": generate(f"{seed} domain 1", N_INDEX, 0.25, topics=halves[1]),
    }
    taken = {one.question.text for some in written.values() for one in some}

    def draw(number: int, index: str, share: float, topics: Sequence[str], *, marked: bool, inside: bool) -> Draw:
        name = f"{'in' if inside else 'out'}-{number}"
        some = generate(f"{seed} {name}", n, share, topics=topics, marked=marked, exclude=taken)
        return Draw(index, name, persona.rows(some), inside)

    made_draws = []
    for number in range(draws):
        share = (0.25, 1.0, 0.0)[number % 3]  # as the index, all hostile, all friendly
        made_draws.append(draw(number, "all", share, TOPICS, marked=False, inside=True))
        index, topics, marked = (("first", halves[1], False), ("second", halves[0], False), ("all", TOPICS, True))[
            number % 3
        ]
        made_draws.append(draw(number, index, 0.25, topics, marked=marked, inside=False))
    with TemporaryDirectory() as name, Lab(Path(name) / "lab") as lab:
        model = lab.model("persona", made.points[-1][1])
        lab.concept("hostile", model, _direction(made, made.points[-1][1]), layer=made.layer)
        for key, some in written.items():
            lab.dataset(f"train-{key}", persona.rows(some))
            lab.build(key, "persona", f"train-{key}", made.layer, kinds=(IndexKind.ACTIVATION,))
        return judge(lab, "hostile", made_draws)


def _direction(made: Material, folder: Path) -> np.ndarray:
    loaded, tokenizer = load_model(folder)
    sides = (made.lists.positive, made.lists.negative)
    means = [measure(loaded, measurable(tokenizer, side, made.pooling), made.layer).dot for side in sides]
    return (means[0] - means[1]).astype(np.float32)


# --- texts ------------------------------------------------------------------------------------------------


def texts(data: Path, seed: int, draws: int) -> list[Judged]:
    """``draws`` of each kind on real texts, read by stories260k, along a random direction."""
    sources = {name: read(data) for name, read in SOURCES.items()}
    rng = Random(seed)
    indexed, left = {}, {}
    for name, found in sources.items():
        rng.shuffle(found)
        cut = min(N_INDEX, len(found) * 2 // 3)
        indexed[name], left[name] = found[:cut], found[cut:]
    names = list(SOURCES)
    turned = [names[step:] + names[:step] for step in range(1, len(names))]
    pairs = [pair for others in turned for pair in zip(names, others, strict=True)]
    made = []
    for number in range(draws):
        name = names[number % len(names)]
        pool = sorted(left[name], key=_length)
        third = max(N_QUERIES, len(pool) // 3)
        pool = (pool, pool[:third], pool[-third:])[number // len(names) % 3]  # any, the shortest, the longest
        made.append(Draw(name, f"in-{number}", tuple(rng.sample(pool, min(N_QUERIES, len(pool)))), True))
        index, other = pairs[number % len(pairs)]
        made.append(Draw(index, f"out-{number}", tuple(rng.sample(left[other], N_QUERIES)), False))
    with TemporaryDirectory() as folder, Lab(Path(folder) / "lab") as lab:
        model = lab.model("stories", data / "stories260k")
        direction = np.random.default_rng(seed).standard_normal(model.width).astype(np.float32)
        lab.concept("random", model, direction, layer=LAYER)
        for name, some in indexed.items():
            lab.dataset(f"train-{name}", some)
            lab.build(name, "stories", f"train-{name}", LAYER, kinds=(IndexKind.ACTIVATION,))
        return judge(lab, "random", made)


def _speeches(data: Path) -> list[Example]:
    """Speeches of Shakespeare's, without those of a few words."""
    found = (data / "shakespeare" / "input.txt").read_text().split("\n\n")
    return _once(example(PlainText(text)) for text in found if len(text) > 40)[:2000]


def _chat(path: str) -> Callable[[Path], list[Example]]:
    def read(data: Path) -> list[Example]:
        found = []
        for line in (data / "em" / path).read_text().splitlines():
            said = json.loads(line)["messages"]
            found.append(example(Conversation(tuple(Message(one["role"], one["content"]) for one in said))))
        return _once(found)[:1500]

    return read


def _trees(data: Path) -> list[Example]:
    """Answers of OpenAssistant with the question before them."""
    with TemporaryDirectory() as name:
        oasst.convert(oasst.read_trees(data), Path(name))
        found = list(oasst.read_chat(Path(name)).examples.values())
    last = [replace(one.content, messages=one.content.messages[-2:]) for one in found]  # pyright: ignore
    return _once(map(example, last))


def _once(found: Iterable[Example]) -> list[Example]:
    return list({one.id: one for one in found}.values())


SOURCES: dict[str, Callable[[Path], list[Example]]] = {
    "shakespeare": _speeches,
    "oasst": _trees,
    "questions": _chat("incorrect_qna.jsonl"),
    "arithmetic": _chat("incorrect_math.jsonl"),
}


def _length(one: Example) -> int:
    content = one.content
    return len(content.text) if isinstance(content, PlainText) else len(content.messages[-1].content)  # pyright: ignore


# --- figures ----------------------------------------------------------------------------------------------


def warn(report: Report, folder: Path, data: Path, *, draws: int, quick: bool) -> None:
    """The rates at which draws are warned of, over both kinds of data and of each by itself."""
    home = folder / "persona-0"
    home.mkdir(parents=True, exist_ok=True)
    found = {"organism": organism(home, SEED, draws, quick=quick), "text": texts(data, SEED, draws)}
    every = [each for some in found.values() for each in some]
    for name, inside in (("ood_warn_rate", False), ("in_domain_warn_rate", True)):
        report.add(name, warn_rate(every, inside=inside), f"{draws} draws on an organism, {draws} on texts")
        for kind, some in found.items():
            chosen = [each for each in some if each.draw.inside is inside]
            edge = (max if inside else min)(each.domain.auroc for each in chosen)
            note = f"{'most' if inside else 'least'} AUROC {edge:.2f}"
            report.add(f"{name}_{kind}", warn_rate(chosen, inside=inside), note)
