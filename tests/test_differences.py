"""Kind `difference`: a_l(x, y) − a_l(x, y') against a loop over single examples, and what is set aside."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lab import Lab
from service import indexes, shards
from service.contracts import Completion, Example, PlainText
from service.datasets import example_id
from service.errors import Invalid
from service.tasks import Task
from service.terms import IndexKind, Method, Pooling
from service.work import AnswersWork, DifferenceSpec
from tests import tiny
from workers.curvature import uniforms
from workers.masks import tokenise
from workers.models import Loaded, load

TOKENIZER = tiny.words()
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"]
LIMIT, SEED = 6, 3
V = np.random.default_rng(0).standard_normal((2, tiny.WIDTH)).astype(np.float32)


def example(content) -> Example:
    return Example(example_id(content), content, {}, ())


def completion(number: int) -> Example:
    rng = np.random.default_rng(number)
    words = rng.choice(WORDS, rng.integers(4, 12)).tolist()
    cut = int(rng.integers(1, 3))
    return example(Completion(" ".join(words[:cut]) + " ", " ".join(words[cut:])))


TRAIN = [completion(number) for number in range(70)]
ANSWERS = {"temperature": 1.0, "max_new_tokens": LIMIT, "seed": SEED}


class World:
    def __init__(self, root: Path) -> None:
        self.base = Path(tiny.save(root / "base", "llama", TOKENIZER))
        self.tuned = root / "tuned"
        model = tiny.model("llama", vocab=len(TOKENIZER))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(self.tuned)
        TOKENIZER.save_pretrained(self.tuned)
        self.lab = Lab(root / "lab", shard_size=50)
        self.lab.model("base", self.base)
        tuned = self.lab.model("tuned", self.tuned, base="base")
        self.lab.dataset("d", TRAIN)
        for layer in (1, 2):
            self.lab.concept(f"v{layer}", tuned, V[layer - 1], layer=layer)
        self.tasks: list[Task] = []
        worker = self.lab.engine._pool._worker
        process = worker.process

        def counted(task: Task):
            self.tasks.append(task)
            return process(task)

        worker.process = counted

    def build(self, name: str, model: str = "tuned", dataset: str = "d", **options):
        about = {"kinds": ("difference",), "layers": (1, 2), "answers": ANSWERS} | options
        return self.lab.build(name, model, dataset, 2, **about)[0]

    def scores(self, index, layer: int, ids: Sequence[str]) -> np.ndarray:
        method = Method.PROJECTION_DIFFERENCE
        return self.lab.scores(index, ids, concept=f"v{layer}", method=method)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("differences"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(world):
    return world.build("x")


def answer(loaded: Loaded, one: Example, prompt: np.ndarray) -> np.ndarray:
    """Sampled token by token from the whole text, without batch or cache."""
    points, ids = uniforms(SEED, one.id, LIMIT), torch.from_numpy(prompt)[None]
    for step in range(LIMIT):
        with torch.no_grad():
            steps = loaded.model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1).double().cumsum(-1)
        token = int(torch.searchsorted(steps, points[step] * steps[-1], right=True))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == TOKENIZER.eos_token_id:
            break
    return ids[0].numpy()


def expected(world: World, answerer: Path, layer: int, pooling: Pooling) -> np.ndarray:
    """⟨v̂, a(y) − a(y')⟩ of every example."""
    tuned, other = load(str(world.tuned), "float32"), load(str(answerer), "float32")
    v = V[layer - 1] / np.linalg.norm(V[layer - 1])
    found = []
    for one in TRAIN:
        tokens = tokenise(one.content, TOKENIZER)
        begins = int(np.flatnonzero(tokens.target)[0])
        both = []
        for ids in (tokens.ids, answer(other, one, tokens.ids[:begins])):
            states = tiny.hidden_states(tuned.model, torch.from_numpy(ids)[None])[layer][0]
            chosen = {
                Pooling.RESPONSE_MEAN: states[begins:],
                Pooling.ALL_MEAN: states,
                Pooling.LAST_TOKEN: states[-1:],
            }
            both.append(chosen[pooling].mean(0).numpy())
        found.append((both[0] - both[1]) @ v)
    return np.array(found)


@pytest.mark.parametrize("layer", [1, 2])
def test_scores_are_those_of_a_loop_over_single_examples(world, index, layer):
    found = world.scores(index, layer, [one.id for one in TRAIN])
    truth = expected(world, world.base, layer, Pooling.RESPONSE_MEAN)
    np.testing.assert_allclose(found, truth, atol=2e-3 * np.abs(truth).max())


@pytest.mark.parametrize("pooling", [Pooling.ALL_MEAN, Pooling.LAST_TOKEN])
def test_other_poolings(world, pooling):
    index = world.build(f"pooled-{pooling.value.replace('_', '-')}", pooling=pooling, layers=(2,))
    manifest = indexes.read_manifest(world.lab.storage, index)
    section = manifest.sections[-1]
    rows = {}
    for reference in section.shards:
        shard = shards.read_manifest(world.lab.storage, reference.key)
        rows |= dict(zip(shard.ids, shards.read_rows(world.lab.storage, shard, section.arrays[0]), strict=True))
    unit = V[1] / np.linalg.norm(V[1])
    found = np.array([rows[one.id] @ unit for one in TRAIN])
    truth = expected(world, world.base, 2, pooling)
    np.testing.assert_allclose(found, truth, atol=2e-3 * np.abs(truth).max())


def test_activations_come_with_it(index):
    kinds = {(array.kind, array.layer) for array in index.arrays}
    assert kinds == {(kind, layer) for kind in (IndexKind.ACTIVATION, IndexKind.DIFFERENCE) for layer in (1, 2)}


def test_answers_are_computed_once_and_kept(world, index):
    world.tasks.clear()
    again = world.build("again")
    assert world.tasks == []
    assert [ref.key for s in indexes.read_manifest(world.lab.storage, again).sections for ref in s.shards] == [
        ref.key for s in indexes.read_manifest(world.lab.storage, index).sections for ref in s.shards
    ]
    world.build("other-pooling", pooling=Pooling.ALL_MEAN)
    assert not any(isinstance(task.work, AnswersWork) for task in world.tasks)
    world.tasks.clear()
    world.build("other-seed", answers=ANSWERS | {"seed": SEED + 1})
    assert (
        sum(isinstance(task.work, AnswersWork) for task in world.tasks) == 3
    )  # 32 + 18 of one shard, 20 of the next
    assert sum(isinstance(task.work, DifferenceSpec) for task in world.tasks) == 2


def test_a_stopped_build_goes_on_after_the_last_answers(world):
    class StoppedError(Exception): ...

    worker = world.lab.engine._pool._worker
    process, done = worker.process, []

    def stops(task: Task):
        if isinstance(task.work, AnswersWork) and len(done) == 2:
            raise StoppedError
        done.append(task)
        return process(task)

    about = {"answers": ANSWERS | {"seed": 77}, "kinds": ("difference",), "layers": (1,)}
    world.build("rows-first", layers=(1,), kinds=("activation",))  # so that only answers are new
    worker.process = stops
    with pytest.raises(StoppedError):
        world.build("stopped", **about)
    worker.process = process
    world.tasks.clear()
    world.build("stopped", **about)
    assert sum(isinstance(task.work, AnswersWork) for task in world.tasks) == 1


def test_a_model_without_a_base_answers_itself(world):
    world.lab.model("alone", world.tuned)
    index = world.build("alone", model="alone", layers=(2,))
    manifest = indexes.read_manifest(world.lab.storage, index)
    assert manifest.difference.answerer.name == "alone"
    truth = expected(world, world.tuned, 2, Pooling.RESPONSE_MEAN)
    found = world.lab.scores(index, [one.id for one in TRAIN], concept="v2", method=Method.PROJECTION_DIFFERENCE)
    np.testing.assert_allclose(found, truth, atol=2e-3 * np.abs(truth).max())


def test_what_cannot_be_answered_is_set_aside_by_name_and_everything_is_counted(world):
    long = example(Completion(" ".join(["the"] * 30) + " ", "cat"))
    cut = example(Completion(" ".join(["the"] * 15) + " ", "cat sat on"))
    odd = [example(PlainText("the cat sat")), example(Completion("", "the cat")), long, cut]
    world.lab.dataset("odd", [*TRAIN[:5], *odd])
    index = world.build("odd", dataset="odd", max_length=16, layers=(2,))
    assert dict(index.quarantine_reasons) == {"no_prompt": 2, "nothing_to_pool": 1}
    counts = index.counts
    assert (counts.lines, counts.indexed, counts.quarantined) == (9, 6, 3)
    assert counts.lines == counts.indexed + counts.duplicates + counts.quarantined


def test_pooling_before_the_answer_is_refused(world):
    with pytest.raises(Invalid) as refused:
        world.build("zero", pooling=Pooling.LAST_PROMPT_TOKEN)
    assert (refused.value.code, refused.value.param) == ("no_difference", "pooling")


def test_asking_an_index_without_it_says_what_it_has(world):
    index = world.build("plain", kinds=("activation",))
    with pytest.raises(Invalid, match="difference") as refused:
        world.scores(index, 2, [])
    assert refused.value.code == "kind_not_indexed"
