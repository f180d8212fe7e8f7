"""Whole builds and queries of ``gradient`` and ``influence`` kinds, against dense float64 EK-FAC from scratch.

One model, a run of three checkpoints (random weights, perturbed), 80 short examples. The oracle fits A, S and λ
from whole gradients of single examples, forms H as a matrix and solves. What it shares with the product is how
texts become tokens and masks, and the uniform numbers by which labels are drawn.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.lab import DEFAULTS, Lab, Quiet
from service import artifacts, codec, concepts, indexes, shards
from service.basis import SPECTRUM
from service.contracts import Completion, Example
from service.datasets import example_id
from service.errors import Conflict, Invalid
from service.loading import IndexLoader
from service.matching import Asked, Matched, Missing, match
from service.planning import ExtendRequest, IndexRequest, plan_extension, plan_index
from service.queries import Answer, QueryService
from service.questions import Query
from service.registry import CONCEPTS, DATASETS, INDEXES
from service.tasks import Task
from service.terms import (
    Checkpoints,
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    JobKind,
    LongExamples,
    LossReduction,
    Method,
    Order,
    Pooling,
)
from service.work import CurvatureSpec, Location, LossRowsWork, PassSpec, Reading, Tracked
from tests import exact, tiny
from tests.exact import spearman
from workers import curvature, passes, readout, works
from workers.batches import plan
from workers.masks import tokenise
from workers.models import Loaded, load
from workers.stages import Stages

LAYER, POOLING = 2, Pooling.RESPONSE_MEAN
WEIGHTS = (0.5, 2.0, 1.0)  # of the checkpoints, the model itself last
SAMPLE, SEED = 56, 5  # of the curvature
DAMPINGS = (0.3, 1.0)
ALL = 10**6  # coordinates: more than there are
DIRECTIONS = 32
TOKENIZER = tiny.words(bos=True)
FITTED = {"examples": SAMPLE, "seed": SEED, "labels": FactorLabels.SAMPLED, "positions": FactorPositions.ALL}


def make_example(prompt: str, answer: str) -> Example:
    content = Completion(prompt + " ", answer)
    return Example(example_id(content), content, {}, ())


def make_examples(seed: int, count: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "mat.", "end", "of", "answer", *"abcdefghi"]

    def text(least: int, most: int) -> str:
        return " ".join(generator.choice(words, generator.integers(least, most)))

    return [make_example(text(1, 5), text(2, 9)) for _ in range(count)]


TRAIN, QUERIES, OTHERS = make_examples(0, 80), make_examples(1, 6), make_examples(2, 5)
IDS = [example.id for example in TRAIN]
V = np.random.default_rng(9).standard_normal((DIRECTIONS, tiny.WIDTH))
V /= np.linalg.norm(V, axis=1, keepdims=True)


def save(folder: Path, checkpoint: int, damaged: Sequence[str] = ()) -> Path:
    model = tiny.model("llama", vocab=len(TOKENIZER))
    generator = torch.Generator().manual_seed(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * checkpoint * torch.randn(parameter.shape, generator=generator))
        for word in damaged:
            model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids(word)] = float("nan")
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


# --- the oracle -----------------------------------------------------------------------------------------


class Oracle:
    """Exact EK-FAC at one point of the run."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        exact.exact(model)
        self.loaded = Loaded(model, tokenizer, tiny.CPU)
        self.modules = self.loaded.linear_maps(LAYER)

    def tokens(self, examples: Sequence[Example]):
        return [tokenise(example.content, self.loaded.tokenizer) for example in examples]

    @cached_property
    def factors(self) -> dict[str, exact.Factors]:
        sample = sorted(TRAIN, key=lambda one: hashlib.sha256(f"{SEED}:{one.id}".encode()).digest())[:SAMPLE]
        tokens = self.tokens(sample)
        uniform = [
            curvature.uniforms(SEED, example.id, len(one)) for example, one in zip(sample, tokens, strict=True)
        ]
        return exact.fit_sample(self.loaded, self.modules, tokens, uniform)

    @cached_property
    def gradients(self) -> np.ndarray:
        """∇L(z), (80, P)."""
        return self.loss_gradients(TRAIN)

    def loss_gradients(self, examples: Sequence[Example]) -> np.ndarray:
        value = tiny.loss_of(self.loaded, LossReduction.MEAN)
        return exact.loss_rows(self.loaded, self.modules, self.tokens(examples), value)

    @cache  # noqa: B019  (lives as long as the tests)
    def jacobian(self, function: ConceptFunction, queries: str = "q", layer: int = LAYER) -> np.ndarray:
        tokens = self.tokens({"q": QUERIES, "other": OTHERS}[queries])
        return exact.jacobian_rows(self.loaded, self.modules, tokens, layer, POOLING, function)

    @cache  # noqa: B019
    def embeddings(
        self, function: ConceptFunction, damping: float, queries: str = "q", layer: int = LAYER
    ) -> np.ndarray:
        """m_z = −J H⁻¹ ∇L(z), (80, d)."""
        J = self.jacobian(function, queries, layer)
        return -self.gradients @ exact.solve(self.factors, J, damping).T

    def influence(self, queries: Sequence[Example], damping: float) -> np.ndarray:
        """∇L(Q)ᵀ H⁻¹ ∇L(z), (80,)."""
        mean = self.loss_gradients(queries).mean(axis=0, keepdims=True)
        return (self.gradients @ exact.solve(self.factors, mean, damping).T)[:, 0]


# --- the product ----------------------------------------------------------------------------------------


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = [save(root / f"m{number}", number) for number in range(3)]
        self.oracles = [Oracle(folder) for folder in self.folders]
        self.lab = make_lab(root / "lab", self.folders)
        self.tasks: list[Task] = []
        worker = self.lab.engine._pool._worker
        process = worker.process

        def counted(task: Task):
            self.tasks.append(task)
            return process(task)

        worker.process = counted

    def build(self, name: str, layer: int = LAYER, **options):
        options = {"curvature": FITTED} | options
        return self.lab.build(name, "m", "d", layer, **options)[0]

    def manifest(self, index):
        return indexes.read_manifest(self.lab.storage, index)

    def rows(self, index, array) -> dict[str, np.ndarray]:
        """Stored rows of one array by example id."""
        section = next(each for each in self.manifest(index).sections if array in each.arrays)
        found = {}
        for reference in section.shards:
            shard = shards.read_manifest(self.lab.storage, reference.key)
            found |= dict(zip(shard.ids, shards.read_rows(self.lab.storage, shard, array), strict=True))
        return found

    def matrix(self, index, array) -> np.ndarray:
        rows = self.rows(index, array)
        return np.stack([rows[item] for item in IDS]).astype(np.float64)

    def asked(self, concept=None, query_set=None, **options) -> Asked:
        lab = self.lab
        record = lab.registry.get(CONCEPTS, concept) if concept else None
        fields = {
            "method": Method.CONCEPT_INFLUENCE if concept else Method.INFLUENCE_FUNCTION,
            "concept": record,
            "vector": concepts.direction(lab.storage, record) if record else None,
            "query_set": lab.registry.get(DATASETS, query_set) if query_set else None,
            "function": ConceptFunction.DOT,
            "damping": None,
            "through": None,
        }
        return Asked(**fields | options)

    def match(self, index, **asked) -> Matched | Missing:
        return match(self.lab.storage, index, self.manifest(index), self.asked(**asked), shard_size=64)

    def ask(self, index, *, loader: IndexLoader, **options) -> Answer:
        """As the api asks."""
        lab = self.lab
        service = QueryService(lab.registry, lab.storage, lab.jobs, loader, shard_size=64)
        fields = {"concept": None, "method": Method.CONCEPT_INFLUENCE, "order": Order.MOST, "k": 3}
        answer = service.run(Query(index.id, **fields | options))
        assert isinstance(answer, Answer)
        return answer

    def concept_scores(self, index, **options) -> np.ndarray:
        """(80, 32): every random v, through the matcher."""
        return np.stack(
            [self.lab.scores(index, IDS, concept=f"v{number}", **options) for number in range(DIRECTIONS)], axis=1
        )

    def extend(self, index, **options):
        plain = {"layers": (LAYER,), "pooling": POOLING, "concept_functions": ("dot",), "dampings": (1.0,)}
        request = codec.from_plain(ExtendRequest, plain | options)
        lab = self.lab
        spec = plan_extension(index.id, request, lab.registry, lab.storage, lab.redis, lab.settings)
        result, _ = lab.run(JobKind.EXTEND_INDEX, spec)
        return lab.registry.get(INDEXES, result["index"])


def make_lab(home: Path, folders: Sequence[Path], **settings) -> Lab:
    lab = Lab(home, **settings)
    run = [(folder, weight) for folder, weight in zip(folders, WEIGHTS, strict=True)]
    model = lab.model("m", folders[-1], checkpoints=run)
    for name, examples in (("d", TRAIN), ("q", QUERIES), ("other", OTHERS), ("loss", QUERIES[:3])):
        lab.dataset(name, examples)
    for number, v in enumerate(V):
        lab.concept(f"v{number}", model, v.astype(np.float32), layer=LAYER)
    lab.concept("lower", model, V[0].astype(np.float32), layer=1)
    return lab


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("influence"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(world):
    """Everything at once, K = P = k, summed over the run."""
    return world.build(
        "run",
        kinds=("activation", "gradient", "influence"),
        coordinates=ALL,
        query_sets=("q",),
        dampings=DAMPINGS,
        concept_functions=tuple(ConceptFunction),
    )


@pytest.fixture(scope="module")
def end(world):
    """The same at the end of the run alone, one question."""
    return world.build(
        "end", kinds=("gradient", "influence"), coordinates=ALL, query_sets=("q",), checkpoints=Checkpoints.END
    )


@pytest.fixture(scope="module")
def gradient(world):
    return world.build("gradient", kinds=("gradient",), coordinates=ALL)


def embedding(index, function=ConceptFunction.DOT, damping=1.0, layer=LAYER):
    wanted = (function, damping, layer)
    return next(
        array
        for array in index.arrays
        if array.embedding and (array.embedding.function, array.embedding.damping, array.layer) == wanted
    )


def gradient_array(index):
    return next(array for array in index.arrays if array.kind == IndexKind.GRADIENT)


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of any entry, relative to the largest of its row."""
    return float((np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)).max())


INT8 = 1 / 254 + 2e-3  # of the largest of a row: half a step, and float16 at every checkpoint

# --- embeddings against the dense oracle ------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("function", ConceptFunction)
def test_embeddings_summed_over_the_run_are_those_of_dense_matrices(world, run, function, damping):
    each = [oracle.embeddings(function, damping) for oracle in world.oracles]
    expected = sum(weight * rows for weight, rows in zip(WEIGHTS, each, strict=True))
    array = embedding(run, function, damping)
    assert (array.dims, array.embedding.points) == (tiny.WIDTH, 3)
    assert off(world.matrix(run, array), expected) <= INT8
    scores = world.concept_scores(run, function=function, damping=damping)
    rho = spearman(scores, expected @ V.T)
    assert rho.mean() >= 0.999
    assert rho.min() >= 0.998
    # and it could have failed: neither the end alone nor equal weights would pass
    assert spearman(scores, each[-1] @ V.T).mean() < 0.95
    assert off(world.matrix(run, array), sum(each)) > 0.1


def test_embeddings_at_the_end_of_the_run_are_those_of_dense_matrices(world, end):
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0)
    array = embedding(end)
    assert array.embedding.points == 1
    assert off(world.matrix(end, array), expected) <= INT8
    assert spearman(world.concept_scores(end, through=IndexKind.INFLUENCE), expected @ V.T).mean() >= 0.999


def test_questions_of_one_index_have_different_answers(world, run):
    """Else a mix-up of functions or dampings would go unseen above."""
    rows = [world.matrix(run, embedding(run, f, d)) for f in ConceptFunction for d in DAMPINGS]
    for one in range(4):
        for other in range(one):
            assert spearman(rows[one] @ V.T, rows[other] @ V.T).mean() < 0.999


def test_gradient_and_influence_kinds_agree_where_both_keep_everything(world, end):
    ours = world.concept_scores(end, through=IndexKind.INFLUENCE)
    theirs = world.concept_scores(end, through=IndexKind.GRADIENT, query_set="q")
    assert spearman(ours, theirs).mean() >= 0.999
    assert np.abs(ours - theirs).max() <= 1e-2 * np.abs(theirs).max()
    assert off(theirs, world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0) @ V.T) <= 5e-3


def test_a_positive_score_raises_the_concept(world, end):
    """One small step of gradient descent on the best and on the worst example, H = I aside: f_v moves as said."""
    oracle, v = world.oracles[-1], V[0]
    H_inverse_gradient = exact.solve(oracle.factors, oracle.gradients, 1.0)
    moved = -H_inverse_gradient @ (oracle.jacobian(ConceptFunction.DOT).T @ v)
    scores = world.lab.scores(end, IDS, concept="v0", through=IndexKind.INFLUENCE)
    best, worst = int(scores.argmax()), int(scores.argmin())
    assert moved[best] > 0 > moved[worst]

    def value(step: np.ndarray) -> float:
        start, before = 0, {}
        for name, module in oracle.modules.items():
            size = module.weight.numel()
            before[name] = module.weight.clone()
            module.weight.add_(torch.from_numpy(step[start : start + size]).reshape(module.weight.shape))
            start += size
        with torch.no_grad():
            states = [
                exact.pooled(oracle.loaded, one, LAYER, POOLING, ConceptFunction.DOT)
                for one in oracle.tokens(QUERIES)
            ]
        for name, module in oracle.modules.items():
            module.weight.copy_(before[name])
        return float(torch.stack(states).mean(0) @ torch.from_numpy(v))

    now = value(np.zeros(oracle.gradients.shape[1]))
    for number in (best, worst):
        step = -1e-3 * H_inverse_gradient[number] / np.linalg.norm(H_inverse_gradient[number])
        assert np.sign(value(step) - now) == np.sign(scores[number])


SETTINGS = {
    "gpt2": (FactorLabels.TRUE, FactorPositions.TARGETS, LossReduction.SUM, Pooling.LAST_TOKEN, (2,)),
    "gpt_neox": (FactorLabels.SAMPLED, FactorPositions.TARGETS, LossReduction.MEAN, Pooling.ALL_MEAN, (2,)),
    "qwen2": (FactorLabels.TRUE, FactorPositions.ALL, LossReduction.SUM, Pooling.LAST_PROMPT_TOKEN, (1, 3)),
}


@pytest.mark.parametrize("family", SETTINGS)
def test_other_families_layers_and_settings_against_dense_matrices(world, family):
    labels, positions, reduction, pooling, layers = SETTINGS[family]
    folder = Path(tiny.save(world.root / family, family, TOKENIZER))
    world.lab.model(family, folder)
    fitted = {"examples": 30, "seed": 1, "labels": labels, "positions": positions}
    index, _ = world.lab.build(
        family,
        family,
        "d",
        0,
        layers=layers,
        kinds=("gradient", "influence"),
        coordinates=ALL,
        query_sets=("q",),
        curvature=fitted,
        loss_reduction=reduction,
        pooling=pooling,
    )
    oracle = Oracle(folder)
    modules = oracle.loaded.linear_maps(max(layers))
    sample = [next(one for one in TRAIN if one.id == item) for item in sample_of(IDS, 30, 1)]
    tokens = oracle.tokens(sample)
    uniform = [curvature.uniforms(1, example.id, len(one)) for example, one in zip(sample, tokens, strict=True)]
    factors = exact.fit_sample(oracle.loaded, modules, tokens, uniform, labels, positions)
    G = exact.loss_rows(oracle.loaded, modules, oracle.tokens(TRAIN), tiny.loss_of(oracle.loaded, reduction))
    dot = ConceptFunction.DOT
    for layer in layers:
        J = exact.jacobian_rows(oracle.loaded, modules, oracle.tokens(QUERIES), layer, pooling, dot)
        expected = -G @ exact.solve(factors, J, 1.0).T
        assert off(world.matrix(index, embedding(index, dot, 1.0, layer)), expected) <= INT8
    assert gradient_array(index).dims == sum(module.weight.numel() for module in modules.values())
    scores = world.lab.scores(index, IDS, query_set="loss", method=Method.INFLUENCE_FUNCTION, damping=0.1)
    mean = exact.loss_rows(
        oracle.loaded, modules, oracle.tokens(QUERIES[:3]), tiny.loss_of(oracle.loaded, reduction)
    ).mean(axis=0, keepdims=True)
    expected = (G @ exact.solve(factors, mean, 0.1).T)[:, 0]
    assert np.abs(scores - expected).max() <= 3e-3 * np.abs(expected).max()


# --- the gradient kind --------------------------------------------------------------------------------------


def test_any_v_is_answered_from_the_cached_jacobian_without_a_job(world, end):
    world.tasks.clear()
    for number in range(DIRECTIONS):
        found = world.match(end, concept=f"v{number}", query_set="q", through=IndexKind.GRADIENT)
        assert isinstance(found, Matched)
        assert found.array.kind == IndexKind.GRADIENT
        assert (found.examples, found.captured) == (len(QUERIES), pytest.approx(1, abs=1e-5))
    assert not world.tasks


@pytest.mark.parametrize(
    "about",
    [
        {"query_set": "other"},
        {"query_set": "q", "function": ConceptFunction.COSINE},
        {"query_set": "q", "concept": "lower"},
    ],
    ids=["another query set", "another function", "another layer"],
)
def test_another_question_needs_a_job_once_and_then_answers(world, end, about):
    about = {"concept": "v3"} | about
    assert isinstance(world.match(end, **about), Missing)
    layer, function = 1 if about["concept"] == "lower" else LAYER, about.get("function", ConceptFunction.DOT)
    v = V[0] if about["concept"] == "lower" else V[3]
    oracle = world.oracles[-1]
    for damping in (0.05, 1.0, 20.0):
        expected = oracle.embeddings(function, damping, about["query_set"], layer) @ v
        scores = world.lab.scores(end, IDS, damping=damping, **about)
        assert np.abs(scores - expected).max() <= 3e-3 * np.abs(expected).max()
        world.tasks.clear()
        assert isinstance(world.match(end, damping=damping, **about), Matched)
        assert not world.tasks


def test_influence_functions_are_those_of_dense_matrices_at_any_damping(world, gradient):
    found = {}
    for damping in (0.01, 0.3, 1.0, 100.0):
        scores = world.lab.scores(
            gradient, IDS, query_set="loss", method=Method.INFLUENCE_FUNCTION, damping=damping
        )
        expected = world.oracles[-1].influence(QUERIES[:3], damping)
        assert np.abs(scores - expected).max() <= 3e-3 * np.abs(expected).max()
        assert spearman(scores[:, None], expected[:, None])[0] >= 0.999
        found[damping] = scores[:, None]
    assert spearman(found[0.01], found[100.0])[0] < 0.97  # damping does change rankings here


def test_without_a_damping_the_default_is_used(world, gradient):
    about = {"query_set": "loss", "method": Method.INFLUENCE_FUNCTION}
    default = world.lab.scores(gradient, IDS, **about)
    np.testing.assert_array_equal(default, world.lab.scores(gradient, IDS, damping=1.0, **about))


@pytest.mark.parametrize("number", [0, 7, 33])
def test_an_example_helps_with_itself(world, gradient, number):
    world.lab.dataset(f"itself{number}", [TRAIN[number]])
    for damping in (0.01, 1.0, 100.0):
        about = {"query_set": f"itself{number}", "method": Method.INFLUENCE_FUNCTION, "damping": damping}
        scores = world.lab.scores(gradient, IDS, **about)
        assert scores[number] > 0


def test_a_smaller_k_keeps_the_largest_scores_of_lambda(world, gradient):
    few = world.build("few", kinds=("gradient",), coordinates=300)
    assert gradient_array(few).dims == 300
    factors = world.oracles[-1].factors
    share = np.concatenate([(each.square / each.mean).ravel() for each in factors.values()])
    kept = np.sort(share)[::-1][:300].sum() / share.sum()
    stored = world.matrix(few, gradient_array(few))
    whole = world.matrix(gradient, gradient_array(gradient))
    columns = {tuple(np.round(column / np.abs(whole).max(), 6)) for column in whole.T}
    assert all(tuple(np.round(column / np.abs(whole).max(), 6)) in columns for column in stored.T)
    spectrum = artifacts.read(
        world.lab.storage,
        artifacts.get(world.lab.storage, world.manifest(few).spec.gradient.projection.basis),
        "spectrum",
    )
    ours = (spectrum["square"] / spectrum["mean"]).sum() / share.sum()
    assert ours == pytest.approx(kept, rel=1e-4)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_damping_that_was_not_built_is_refused_with_those_that_were(world):
    index = world.build("fixed", kinds=("influence",), query_sets=("q",), dampings=DAMPINGS)
    with pytest.raises(Invalid) as refused:
        world.match(index, concept="v0", damping=0.5)
    assert (refused.value.code, refused.value.param) == ("damping_not_indexed", "damping")
    assert refused.value.context["available"] == ["0.3", "1.0"]
    assert "0.3, 1.0" in refused.value.detail
    for damping in DAMPINGS:
        assert world.match(index, concept="v0", damping=damping).damping == damping


@pytest.mark.parametrize(
    ("about", "code"),
    [
        ({"concept": "lower"}, "layer_not_indexed"),
        ({"concept": "v0", "query_set": "other"}, "query_set_not_indexed"),
        ({"concept": "v0", "function": ConceptFunction.COSINE}, "concept_function_not_indexed"),
        ({"query_set": "q"}, "kind_not_indexed"),
    ],
)
def test_questions_that_embeddings_do_not_answer_are_refused(world, about, code):
    index = world.build("only", kinds=("influence",), query_sets=("q",), checkpoints=Checkpoints.END)
    with pytest.raises(Invalid) as refused:
        world.match(index, **about)
    assert refused.value.code == code


def test_of_several_query_sets_one_has_to_be_named(world):
    about = {"kinds": ("influence",), "checkpoints": Checkpoints.END}
    index = world.build("several", query_sets=("q", "other"), **about)
    with pytest.raises(Invalid) as refused:
        world.match(index, concept="v0")
    assert (refused.value.code, refused.value.param) == ("query_set_needed", "query_set")
    assert refused.value.context["available"] == ["q", "other"]
    for name in ("q", "other"):
        assert world.match(index, concept="v0", query_set=name).query_set == name


def test_one_query_set_under_two_names_is_one_question(world, end):
    world.lab.dataset("namesake", QUERIES)
    about = {"kinds": ("influence",), "checkpoints": Checkpoints.END}
    index = world.build("namesakes", query_sets=("q", "namesake"), **about)
    assert {array.embedding.query_set for array in index.arrays} == {"q", "namesake"}
    found = world.match(index, concept="v0")
    np.testing.assert_array_equal(world.matrix(index, found.array), world.matrix(end, embedding(end)))


@pytest.mark.parametrize(
    ("about", "code", "param"),
    [
        ({"rank": 1, "directions": ("v0", "v1")}, "rank_too_small", "rank"),
        ({"rank": 3, "directions": ("v0", "v1", "v2", "v3")}, "rank_too_small", "rank"),
        ({"directions": ("lower",)}, "layer_not_indexed", "directions"),
        ({"rank": 4, "directions": ("v0", "lower")}, "layer_not_indexed", "directions"),
    ],
    ids=["two into one", "four into three", "of another layer alone", "of another layer too"],
)
def test_directions_that_cannot_be_kept_are_refused_before_there_is_a_job(world, about, code, param):
    lab, names = world.lab, {"name": "unkept", "model": "m", "dataset": "d", "layers": (LAYER,)}
    fields = DEFAULTS | names | {"kinds": ("influence",), "query_sets": ("q",)} | about
    with pytest.raises(Invalid) as refused:
        plan_index(codec.from_plain(IndexRequest, fields), lab.registry, lab.redis, lab.settings)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_a_rank_may_be_as_small_as_there_are_directions(world):
    about = {"kinds": ("influence",), "query_sets": ("q",), "checkpoints": Checkpoints.END}
    for rank in (2, None):
        index = world.build("just", rank=rank, directions=("v0", "v1"), **about)
        assert embedding(index).embedding.rank == 2
        for name in ("v0", "v1"):
            assert world.match(index, concept=name).captured == pytest.approx(1, abs=1e-5)


def test_ranks_are_by_layer_and_a_repeated_direction_counts_once(world):
    names = {"name": "by-layer", "model": "m", "dataset": "d", "layers": (1, LAYER), "kinds": ("influence",)}
    for directions in (("lower", "v0"), ("v0", "v0")):
        fields = DEFAULTS | names | {"query_sets": ("q",), "directions": directions, "rank": 1}
        request = codec.from_plain(IndexRequest, fields)
        spec = plan_index(request, world.lab.registry, world.lab.redis, world.lab.settings)
        assert (spec.influence.rank, spec.influence.directions) == (1, tuple(dict.fromkeys(directions)))


def test_one_query_set_under_two_names_is_cached_and_measured_once(world):
    world.lab.dataset("namesake", QUERIES)
    index = world.build(
        "twins", kinds=("gradient", "influence"), query_sets=("q", "namesake"), checkpoints=Checkpoints.END
    )
    manifest = world.manifest(index)
    assert len(set(manifest.jacobians)) == len(manifest.jacobians)
    told = [(each.array, each.query, each.query_set, each.damping) for each in manifest.fidelity]
    assert len(set(told)) == len(told)


def test_a_stride_that_passes_over_a_layer_is_refused(world):
    about = {"kinds": ("gradient",), "curvature": FITTED, "stride": 2, "coordinates": 64}
    with pytest.raises(Invalid, match="first tracked block is 2") as refused:
        influence = {"layers": (1, LAYER), "kinds": ("influence",), "query_sets": ("q",)}
        world.lab.build("strided", "m", "d", LAYER, **about | influence)
    assert (refused.value.code, refused.value.param) == ("nothing_tracked", "stride")
    index, _ = world.lab.build("strided", "m", "d", LAYER, **about)
    assert np.isfinite(world.lab.scores(index, [one.id for one in TRAIN], concept="v0", query_set="q")).all()
    with pytest.raises(Invalid, match="first block") as refused:
        world.lab.scores(index, [], concept="lower", query_set="q")
    assert (refused.value.code, refused.value.param) == ("layer_not_indexed", "concept")
    request = ExtendRequest(("q",), (1,), POOLING, (ConceptFunction.DOT,), (1.0,))
    with pytest.raises(Invalid, match="first block") as refused:
        plan_extension(
            index.id, request, world.lab.registry, world.lab.storage, world.lab.redis, world.lab.settings
        )
    assert (refused.value.code, refused.value.param) == ("layer_not_indexed", "layers")


def test_a_checkpoint_from_before_the_vocabulary_grew_is_refused_unless_it_is_left_out(world):
    highest = max(int(tokenise(one.content, TOKENIZER).ids.max()) for one in TRAIN)
    folder = world.root / "before"
    tiny.model("llama", vocab=highest).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    world.lab.model("grown", world.folders[-1], checkpoints=[(folder, 1.0)])
    about = {"kinds": ("influence",), "query_sets": ("q",), "curvature": FITTED}
    with pytest.raises(Invalid, match=f"knows {highest}:") as refused:
        world.lab.build("grown", "grown", "d", LAYER, **about)
    assert (refused.value.code, refused.value.param) == ("vocabulary_too_small", "checkpoints")
    index, _ = world.lab.build("grown", "grown", "d", LAYER, checkpoints=Checkpoints.END, **about)
    assert index.counts.indexed == len(TRAIN)


# --- extending ------------------------------------------------------------------------------------------------


def test_an_extension_reads_embeddings_off_stored_coordinates(world, gradient):
    world.tasks.clear()
    dampings = (0.3, 2.0)
    about = {"query_sets": ("other",), "concept_functions": tuple(ConceptFunction), "dampings": dampings}
    extended = world.extend(gradient, layers=(1, 2), **about)
    passes_run = [task for task in world.tasks if isinstance(task.work, PassSpec)]
    read = {row for task in passes_run for row in task.rows if task.dataset.id == "d"}
    sampled = {f.examples for f in extended.fidelity if f.array.embedding}
    assert len(sampled) == 1
    assert len(read) == sampled.pop() < len(TRAIN)
    done = {type(task.work).__name__ for task in world.tasks}
    assert {"JacobianWork", "GatherWork", "ReadOffSpec"} <= done
    assert not done & {"CovarianceWork", "EigenWork", "MomentWork", "LambdaWork", "BasisWork"}
    assert len([array for array in extended.arrays if array.embedding]) == 2 * 2 * 2
    for layer in (1, 2):
        for function in ConceptFunction:
            for damping in dampings:
                expected = world.oracles[-1].embeddings(function, damping, "other", layer)
                ours = world.matrix(extended, embedding(extended, function, damping, layer))
                assert off(ours, expected) <= INT8
    assert all(each.mean >= 0.999 for each in extended.fidelity)
    # what was there stays, and the new question needs no job any more
    assert set(gradient.arrays) < set(extended.arrays)
    assert isinstance(world.match(extended, concept="v1", query_set="other", through=IndexKind.GRADIENT), Matched)
    assert world.match(extended, concept="v1", query_set="other", damping=0.3).array.kind == IndexKind.INFLUENCE


def test_an_extension_equals_a_direct_build(world, gradient):
    extended = world.extend(gradient, query_sets=("q",))
    direct = world.build("direct", kinds=("influence",), query_sets=("q",), checkpoints=Checkpoints.END)
    ours, theirs = (world.matrix(index, embedding(index)) for index in (extended, direct))
    assert off(ours, theirs) <= 1 / 127 + 1e-4  # one step
    assert embedding(extended) == embedding(direct)


def test_an_extension_of_truncated_coordinates_says_how_good_it_is(world):
    few = world.build("coarse", kinds=("gradient",), coordinates=200)
    extended = world.extend(few, query_sets=("q",))
    (told,) = [each for each in extended.fidelity if each.array.embedding]
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0)
    measured = spearman(world.matrix(extended, embedding(extended)) @ V.T, expected @ V.T).mean()
    assert 0.2 < measured < 0.99
    assert abs(told.mean - measured) < 0.08


def test_an_index_with_directions_can_be_extended(world):
    index = world.build(
        "narrow", kinds=("gradient", "influence"), query_sets=("q",), rank=4, checkpoints=Checkpoints.END
    )
    world.extend(index, query_sets=("q",))


MORE = {
    "query set": ({"query_sets": ("q",)}, {"query_sets": ("q", "other")}),
    "query set, first": ({"query_sets": ("q",)}, {"query_sets": ("other", "q")}),
    "layer": ({"layers": (2,)}, {"layers": (1, 2)}),
    "function": ({"concept_functions": ("dot",)}, {"concept_functions": ("dot", "cosine")}),
    "damping": ({"dampings": (1.0,)}, {"dampings": (0.3, 1.0)}),
}


@pytest.mark.parametrize("more", MORE)
def test_an_extension_adds_what_is_new_in_it_and_leaves_what_is_there(world, gradient, more):
    first, second = ({"query_sets": ("q",)} | each for each in MORE[more])
    once = world.extend(gradient, **first)
    again = world.extend(once, **second)
    assert again.arrays[: len(once.arrays)] == once.arrays
    (array,) = again.arrays[len(once.arrays) :]
    about = array.embedding
    assert (array.layer, about.query_set, about.function, about.damping) != (LAYER, "q", "dot", 1.0)
    expected = world.oracles[-1].embeddings(about.function, about.damping, about.query_set, array.layer)
    assert off(world.matrix(again, array), expected) <= INT8
    np.testing.assert_array_equal(world.matrix(again, embedding(once)), world.matrix(once, embedding(once)))
    # every question was measured once, through both kinds
    assert again.fidelity[: len(once.fidelity)] == once.fidelity
    asked = Counter(
        (each.array.kind, each.query_set, each.layer, each.function, each.damping)
        for each in again.fidelity
        if each.query == "concept"
    )
    questions = [("q", LAYER, "dot", 1.0), (about.query_set, array.layer, about.function, about.damping)]
    assert asked == Counter((kind, *each) for kind in ("influence", "gradient") for each in questions)
    known = world.manifest(again).jacobians
    assert len(set(known)) == len(known) == (1 if more == "damping" else 2)


def test_all_directions_answer_rather_than_some(world):
    about = {"kinds": ("gradient", "influence"), "coordinates": ALL, "checkpoints": Checkpoints.END}
    narrow = world.build("some", query_sets=("q",), rank=4, **about)
    captured = world.match(narrow, concept="v5").captured
    assert captured < 0.8
    tiny = np.float32(1e-30) * V[5].astype(np.float32)  # a sum of concepts with weights whose squares float32 lacks
    assert world.match(narrow, concept="v5", vector=tiny).captured == pytest.approx(captured, rel=1e-5)
    assert world.match(narrow, concept="v5", query_set="q", through=IndexKind.GRADIENT).captured < 0.8
    extended = world.extend(narrow, query_sets=("q",))
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0) @ V[5]
    for through in (IndexKind.INFLUENCE, IndexKind.GRADIENT):
        question = {"concept": "v5", "query_set": "q", "through": through}
        assert world.match(extended, **question).captured == pytest.approx(1, abs=1e-5)
        scores = world.lab.scores(extended, IDS, **question)
        assert np.abs(scores - expected).max() <= 2e-2 * np.abs(expected).max()


def test_the_same_question_twice_is_refused(world, gradient):
    once = world.extend(gradient, query_sets=("q",))
    with pytest.raises(Invalid, match="already"):
        world.extend(once, query_sets=("q",))


# --- directions -------------------------------------------------------------------------------------------------


def test_a_lower_rank_answers_what_its_directions_span(world, end):
    index = world.build(
        "directions",
        kinds=("influence",),
        query_sets=("q",),
        rank=6,
        directions=("v0", "v1"),
        checkpoints=Checkpoints.END,
    )
    array = embedding(index)
    assert (array.dims, array.embedding.rank) == (6, 6)
    key = array.embedding.directions
    R = artifacts.read(world.lab.storage, artifacts.get(world.lab.storage, key), "directions")["rows"]
    np.testing.assert_allclose(R @ R.T, np.eye(6), atol=1e-6)
    whole = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0)
    assert off(world.matrix(index, array), whole @ R.T) <= INT8
    for number in range(DIRECTIONS):
        found = world.match(index, concept=f"v{number}")
        inside = R.T @ (R @ V[number])
        assert found.captured == pytest.approx(inside @ V[number], abs=1e-5)
        scores = world.lab.scores(index, IDS, concept=f"v{number}")
        assert np.abs(scores - whole @ inside).max() <= 2e-2 * np.abs(whole).max()
        if number < 2:  # spanned by name
            assert found.captured == pytest.approx(1, abs=1e-5)
            assert spearman(scores[:, None], (whole @ V[number])[:, None])[0] >= 0.998
    outside = [world.match(index, concept=f"v{number}").captured for number in range(2, DIRECTIONS)]
    assert 0.1 < np.mean(outside) < 0.7


def test_directions_span_the_activations(world):
    index = world.build(
        "components", kinds=("activation", "influence"), query_sets=("q",), rank=3, checkpoints=Checkpoints.END
    )
    array = next(array for array in index.arrays if array.embedding)
    key = array.embedding.directions
    R = artifacts.read(world.lab.storage, artifacts.get(world.lab.storage, key), "directions")["rows"]
    held = next(array for array in index.arrays if array.kind == IndexKind.ACTIVATION)
    sample = sorted(IDS, key=lambda item: hashlib.sha256(f"{SEED}:{item}".encode()).digest())[:SAMPLE]
    rows = world.rows(index, held)
    a = np.stack([rows[item] for item in sample]).astype(np.float64)
    a -= a.mean(axis=0)
    best = np.linalg.svd(a)[1]
    assert ((a @ R.T) ** 2).sum() == pytest.approx((best[:3] ** 2).sum(), rel=1e-3)


# --- truncation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "K"), [(8, None), (None, 150), (8, 150)])
def test_what_a_truncated_build_says_of_itself_is_what_the_oracle_says(world, p, K):
    index = world.build(
        "truncated",
        kinds=("influence",),
        query_sets=("q",),
        checkpoints=Checkpoints.END,
        projection_dim=p,
        embedding_coordinates=K,
    )
    (told,) = index.fidelity
    assert (told.query, told.queries, told.array) == ("concept", 32, embedding(index))
    assert ("16 eigenvectors" in told.against) == (p is not None)
    assert not told.held_out  # 24 examples would be too few
    expected = world.oracles[-1].embeddings(ConceptFunction.DOT, 1.0) @ V.T
    measured = spearman(world.matrix(index, embedding(index)) @ V.T, expected)
    assert 0.3 < measured.mean() < 0.99
    assert abs(told.mean - measured.mean()) < 0.08
    assert told.least <= told.mean


def test_more_coordinates_are_more_faithful(world):
    def fidelity(K: int) -> float:
        about = {"kinds": ("influence",), "query_sets": ("q",), "checkpoints": Checkpoints.END}
        return world.build("more", embedding_coordinates=K, **about).fidelity[0].mean

    found = [fidelity(K) for K in (50, 400, 3840)]
    assert found[0] < found[1] < found[2]
    assert found[2] >= 0.999


def test_fidelity_is_measured_on_examples_the_curvature_has_not_seen(world):
    few = FITTED | {"examples": 10}
    world.tasks.clear()
    index = world.build("held", kinds=("influence",), query_sets=("q",), checkpoints=Checkpoints.END, curvature=few)
    assert index.fidelity[0].held_out
    fitted = {row for task in world.tasks if type(task.work).__name__ == "CovarianceWork" for row in task.rows}
    measured = [
        set(task.rows) for task in world.tasks if isinstance(task.work, PassSpec) and len(task.rows) < len(TRAIN)
    ]
    assert len(fitted) == 10
    assert measured
    assert not any(rows & fitted for rows in measured)


@pytest.fixture(scope="module")
def coarse(world):
    """Many questions of few coordinates: each has a fidelity of its own."""
    return world.build(
        "many",
        layers=(1, LAYER),
        kinds=("gradient", "influence"),
        coordinates=200,
        query_sets=("q",),
        dampings=DAMPINGS,
        concept_functions=tuple(ConceptFunction),
        embedding_coordinates=150,
        checkpoints=Checkpoints.END,
    )


@pytest.mark.parametrize("through", [IndexKind.GRADIENT, IndexKind.INFLUENCE])
def test_an_answer_tells_the_fidelity_of_the_very_question_asked(world, coarse, through):
    loader, told = IndexLoader(world.lab.registry, world.lab.storage, threads=1), {}
    for concept, layer in (("v0", LAYER), ("lower", 1)):
        for function in ConceptFunction:
            for damping in DAMPINGS:
                about = {"query_set": "q", "concept_function": function, "damping": damping, "through": through}
                answer = world.ask(coarse, loader=loader, concept=concept, **about)
                each = answer.fidelity
                assert (each.array, each.query) == (answer.matched.array, "concept")
                assert each.array.kind == through
                assert (each.query_set, each.layer, each.function, each.damping) == ("q", layer, function, damping)
                told[layer, function, damping] = each.mean
    assert len(set(told.values())) == len(told) == 8  # a mix-up would be seen
    for function in ConceptFunction:
        for damping in DAMPINGS:
            expected = world.oracles[-1].embeddings(function, damping) @ V.T
            about = {"query_set": "q", "function": function, "damping": damping, "through": through}
            measured = spearman(world.concept_scores(coarse, **about), expected).mean()
            assert abs(told[LAYER, function, damping] - measured) < 0.08
    assert max(told.values()) - min(told.values()) > 0.02


def test_a_question_that_the_build_did_not_measure_has_no_fidelity(world, coarse):
    loader = IndexLoader(world.lab.registry, world.lab.storage, threads=1)
    about = {"concept": "v0", "query_set": "q", "through": IndexKind.GRADIENT}
    assert world.ask(coarse, loader=loader, **about).fidelity.damping == 1.0  # the default one
    assert world.ask(coarse, loader=loader, **about | {"damping": 5.0}).fidelity is None
    world.lab.scores(coarse, IDS, concept="v0", query_set="other")  # the job
    assert world.ask(coarse, loader=loader, **about | {"query_set": "other"}).fidelity is None


def test_a_loss_query_tells_the_fidelity_of_loss_queries_at_the_damping_it_was_measured_at(world, coarse):
    loader = IndexLoader(world.lab.registry, world.lab.storage, threads=1)
    about = {"query_set": "loss", "method": Method.INFLUENCE_FUNCTION}
    world.lab.scores(coarse, IDS, **about)  # the job
    (told,) = [each for each in coarse.fidelity if each.query == "loss"]
    for damping in (None, 1.0):
        assert world.ask(coarse, loader=loader, **about, damping=damping).fidelity == told
    assert (told.damping, told.query_set, told.layer, told.function) == (1.0, None, None, None)
    assert world.ask(coarse, loader=loader, **about, damping=0.3).fidelity is None


def test_an_activation_query_has_no_fidelity(world, run):
    loader = IndexLoader(world.lab.registry, world.lab.storage, threads=1)
    assert world.ask(run, loader=loader, concept="v0", method=Method.VECTOR_FILTER).fidelity is None


@pytest.mark.parametrize(("about", "expected"), [({"projection_dim": 8}, 8), ({}, None)])
def test_an_index_says_how_many_eigenvectors_it_kept(world, about, expected):
    index = world.build("kept", kinds=("gradient",), **about)
    assert world.manifest(index).p == expected


def test_an_index_without_curvature_kept_no_eigenvectors(world):
    index = world.build("plain", kinds=("activation",), projection_dim=8)
    assert world.manifest(index).p is None


@pytest.mark.parametrize("count", [1, 2, 20, 33])
def test_a_small_dataset_makes_an_index_that_can_be_read(world, count):
    world.lab.dataset(f"small{count}", TRAIN[:count])
    index, _ = world.lab.build(
        f"small{count}", "m", f"small{count}", LAYER, kinds=("gradient", "influence"), query_sets=("q",)
    )
    assert world.manifest(index).counts.indexed == count
    assert all(np.isfinite(each.mean) for each in index.fidelity)


# --- independence -----------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_batches_or_order(world, run):
    """One readout with gradients and every head, float32, before anything is rounded."""
    shard = shards.read_manifest(world.lab.storage, world.manifest(run).sections[0].shards[0].key)
    spec = shard.work
    assert spec.gradient is not None
    assert len(spec.influence.heads) == 4
    loaded = load(str(world.folders[-1]), "float32")
    reads = readout.make(loaded, spec, world.lab.storage)

    def rows(examples: Sequence[Example], budget: int) -> passes.PassResult:
        return passes.run(loaded, reads, replace(spec, token_budget=budget), examples)

    whole = rows(TRAIN, 4096)
    order = np.random.default_rng(0).permutation(len(TRAIN))
    others = {
        "small batches": rows(TRAIN, 40),
        "one at a time": rows(TRAIN, 1),
        "another order": rows([TRAIN[i] for i in order], 100),
    }
    lengths = [len(tokenise(one.content, TOKENIZER)) for one in TRAIN]
    assert len({len(plan(lengths, budget)) for budget in (4096, 100, 40, 1)}) == 4
    for name, other in others.items():
        place = {item: row for row, item in enumerate(other.ids)}
        assert set(place) == set(whole.ids)
        for info, values in whole.arrays.items():
            again = other.arrays[info][[place[item] for item in whole.ids]]
            change = np.linalg.norm(again - values, axis=1) / np.linalg.norm(values, axis=1)
            assert change.max() <= 1e-5, (name, info, change.max())


def test_a_build_does_not_depend_on_token_budget_or_shard_size(world, end, tmp_path):
    with make_lab(tmp_path, world.folders, token_budget=50, shard_size=17) as lab:
        about = {"kinds": ("gradient", "influence"), "coordinates": ALL, "query_sets": ("q",)}
        other, _ = lab.build("end", "m", "d", LAYER, checkpoints=Checkpoints.END, curvature=FITTED, **about)
        manifest = indexes.read_manifest(lab.storage, other)
        assert [len(section.shards) for section in manifest.sections] == [5, 5]
        section = next(each for each in manifest.sections if embedding(other) in each.arrays)
        codes, scales = {}, {}
        for storage, references in (
            (lab.storage, section.shards),
            (world.lab.storage, world.manifest(end).sections[1].shards),
        ):
            for reference in references:
                shard = shards.read_manifest(storage, reference.key)
                array = next(array for array in shard.arrays if array.info == embedding(other))
                assert array.encoding == "int8"
                packed, scale = shards._stored(storage, shard, array)
                for item, row, factor in zip(shard.ids, packed, scale, strict=True):
                    codes.setdefault(item, []).append(row.astype(int))
                    scales.setdefault(item, []).append(float(factor))
        assert len(codes) == len(TRAIN)
        for item, (one, two) in codes.items():
            assert np.abs(one - two).max() <= 1
            assert scales[item][0] == pytest.approx(scales[item][1], rel=1e-3)
        scores = lab.scores(other, IDS, concept="v0", query_set="q", through=IndexKind.GRADIENT)
        same = world.lab.scores(end, IDS, concept="v0", query_set="q", through=IndexKind.GRADIENT)
        assert np.abs(scores - same).max() <= 2e-3 * np.abs(same).max()


# --- quarantine -------------------------------------------------------------------------------------------------

EVERYWHERE, ONCE = "z", "y"  # words whose embedding is NaN: at every point of the run, at the second only


@pytest.fixture(scope="module")
def damaged(world):
    """A run with damaged embeddings, and a dataset of which some examples meet them or have nothing to predict."""
    lab = world.lab
    folders = [
        save(world.root / f"damaged{number}", number, [EVERYWHERE, ONCE] if number == 1 else [EVERYWHERE])
        for number in range(3)
    ]
    lab.model("damaged", folders[2], checkpoints=list(zip(folders, WEIGHTS, strict=True)))
    expected = [
        (make_example("the cat", "sat z mat."), "not_finite"),
        (make_example("the z", "sat on"), "not_finite"),
        (make_example("the cat y", "sat"), "not_finite"),
        (make_example("y", "the end of answer"), "not_finite"),
        (make_example("the cat", ""), "no_target"),
        (make_example("the cat sat on the mat. " * 3, "the end"), "target_cut_off"),
    ]
    bad = [example for example, _ in expected]
    examples = [*TRAIN[:30], *bad[:3], *TRAIN[30:60], *bad[3:], *TRAIN[60:]]
    lab.dataset("partly", [*examples, TRAIN[0]])  # one of them twice
    aside = {example.id for example in bad}
    ids = [example.id for example in examples]
    seed = next(s for s in range(1000) if not set(sample_of(ids, 12, s)) & aside)  # a sample without them
    about = {"examples": 12, "seed": seed, "labels": FactorLabels.SAMPLED, "positions": FactorPositions.ALL}
    fields = {
        "kinds": ("activation", "gradient", "influence"),
        "coordinates": 500,
        "query_sets": ("q",),
        "max_length": 14,
        "curvature": about,
    }
    return SimpleNamespace(expected={example.id: reason for example, reason in expected}, fields=fields)


def sample_of(ids: Sequence[str], count: int, seed: int) -> list[str]:
    return sorted(ids, key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())[:count]


@pytest.mark.parametrize("shard_size", [256, 9])
def test_what_cannot_be_stored_is_set_aside_once_with_its_reason(world, damaged, shard_size):
    lab = world.lab
    settings, lab.settings = lab.settings, lab.settings.model_copy(update={"shard_size": shard_size})
    index, _ = lab.build("partly", "damaged", "partly", LAYER, **damaged.fields)
    lab.settings = settings
    counts = index.counts
    assert counts.lines == counts.indexed + counts.duplicates + counts.quarantined == 87
    assert (counts.indexed, counts.duplicates, counts.quarantined) == (80, 1, 6)
    assert dict(index.quarantine_reasons) == dict(Counter(damaged.expected.values()))
    told = indexes.quarantined(lab.storage, lab.registry, index)
    assert {item.id: item.reason for item in told} == damaged.expected
    assert len(told) == 6
    assert all(item.places and item.detail for item in told)
    # every array answers for the same examples in the same order, with their own rows
    loader = IndexLoader(lab.registry, lab.storage, threads=1)
    manifest = world.manifest(index)
    assert len({len(section.shards) for section in manifest.sections}) == 1
    own = {item for reference in manifest.sections[0].shards for item in shard_ids(lab, reference)}
    assert len(own) == 82  # what is damaged at one checkpoint only has its row in the section of the end
    for array in index.arrays:
        found = loader.rows(index, array)
        assert [item.decode() for item in found.ids] == IDS
        stored = world.rows(index, array)
        for _ in range(3):
            u = np.random.default_rng(array.dims).standard_normal(array.dims).astype(np.float32)
            top = found.index.search(u, 80)
            expected = np.array([stored[found.ids[int(row)].decode()].astype(np.float64) @ u for row in top.rows])
            np.testing.assert_allclose(top.scores, expected, atol=2e-3 * np.abs(expected).max())


def test_sums_are_by_example_where_checkpoints_lost_different_ones(world, damaged):
    """The sum against rows of each checkpoint's own shards, put together by id."""
    lab = world.lab
    index, _ = lab.build("partly", "damaged", "partly", LAYER, **damaged.fields)
    array = embedding(index)
    section = next(each for each in world.manifest(index).sections if array in each.arrays)
    single = replace(array, embedding=replace(array.embedding, points=1))
    stored = world.rows(index, array)
    seen = []
    for reference in section.shards:
        shard = shards.read_manifest(lab.storage, reference.key)
        totals = dict.fromkeys(shard.ids, 0.0)
        held = []
        for key, weight in shard.work.sources:
            own = shards.read_manifest(lab.storage, key)
            held.append(set(own.ids))
            for item, row in zip(own.ids, shards.read_rows(lab.storage, own, single), strict=True):
                if item in totals:
                    totals[item] = totals[item] + weight * row.astype(np.float64)
        seen.append(len({frozenset(ids) for ids in held}))
        assert off(np.stack([stored[item] for item in shard.ids]), np.stack([*totals.values()])) <= 1 / 254 + 1e-5
    assert max(seen) == 2  # the second checkpoint has lost two examples more


def shard_ids(lab: Lab, reference) -> tuple[str, ...]:
    return shards.read_manifest(lab.storage, reference.key).ids


def test_every_stored_row_is_finite_and_none_is_zero(world, damaged):
    index, _ = world.lab.build("partly", "damaged", "partly", LAYER, **damaged.fields)
    for array in index.arrays:
        for row in world.rows(index, array).values():
            assert np.isfinite(row).all()
            assert row.any()


def test_a_damaged_example_in_the_sample_of_the_curvature_is_set_aside_too(world, damaged):
    fields = damaged.fields | {"curvature": FITTED | {"examples": 4096}}
    index, _ = world.lab.build("partly", "damaged", "partly", LAYER, **fields)
    assert index.counts.quarantined == 6


SILENT = [make_example(f"{one} {other}", "") for one in "abcdefgh" for other in "abcdefgh"]
PARTS = {"the last part": [*TRAIN[:64], SILENT[0]], "the first part": [*SILENT, *TRAIN[10:74]]}  # of 64 at most


@pytest.mark.parametrize("where", PARTS)
def test_a_part_of_the_sample_with_nothing_to_predict_changes_nothing(world, where):
    lab, examples = world.lab, PARTS[where]
    about = {"examples": 4096, "seed": SEED, "labels": FactorLabels.SAMPLED, "positions": FactorPositions.TARGETS}

    def build(name: str):
        index, _ = lab.build(name, "m", name, LAYER, kinds=("gradient",), coordinates=ALL, curvature=about)
        curvature = world.manifest(index).spec.gradient.projection.curvature
        return world.rows(index, gradient_array(index)), artifacts.get(lab.storage, curvature).facts["examples"]

    name = where.replace(" ", "-")
    lab.dataset(name, examples)
    lab.dataset(f"{name}-out", [one for one in examples if one not in SILENT])
    world.tasks.clear()
    ours, count = build(name)
    parts = [task.rows for task in world.tasks if type(task.work).__name__ == "CovarianceWork"]
    assert any(all(examples[row] in SILENT for row in rows) for rows in parts)  # a part of its own
    theirs, expected = build(f"{name}-out")
    assert count == expected == len(theirs) == 64
    assert list(ours) == list(theirs)
    assert off(np.stack([*ours.values()]), np.stack([*theirs.values()])) <= 1e-3


def test_an_example_whose_squared_gradient_overflows_is_left_out_of_the_eigenvalues_alone(world):
    """Its inputs and output gradients are finite, and so are their squares; those of their product are not.

    It makes a part of its own: covariances have it, moments are empty.
    """
    model, channel = tiny.model("llama", vocab=len(TOKENIZER)), 3
    first, words = model.base_model.layers[0], model.get_input_embeddings().weight.data
    words[:, channel] = 0
    words[TOKENIZER.convert_tokens_to_ids("x"), channel] = 2
    first.input_layernorm.weight.data[channel] = 4e18
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(first.self_attn, name).weight.data[:, channel] = 0  # the model itself does not use it
    model.get_output_embeddings().weight.data *= 1000  # steep losses
    model.save_pretrained(world.root / "steep")
    TOKENIZER.save_pretrained(world.root / "steep")
    world.lab.model("steep", world.root / "steep")
    world.lab.dataset("steep", [*TRAIN[:64], make_example("the x", "sat on the mat.")])
    about = {"examples": 4096, "seed": SEED, "labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}
    world.tasks.clear()
    index, _ = world.lab.build("steep", "steep", "steep", LAYER, kinds=("gradient",), curvature=about)
    storage, counts = world.lab.storage, {"CovarianceWork": [], "MomentWork": []}
    for task in world.tasks:
        if type(task.work).__name__ in counts:
            counts[type(task.work).__name__].append(artifacts.get(storage, task.key))
    told = {name: [each.facts["examples"] for each in found] for name, found in counts.items()}
    assert told == {"CovarianceWork": [64, 1], "MomentWork": [64, 0]}
    curvature = world.manifest(index).spec.gradient.projection.curvature
    assert artifacts.get(storage, curvature).facts["examples"] == 64


def test_a_sample_with_nothing_to_predict_at_all_is_refused(world):
    world.lab.dataset("silent", SILENT)
    about = FITTED | {"positions": FactorPositions.TARGETS}
    with pytest.raises(Invalid, match="'silent'") as refused:
        world.lab.build("silent", "m", "silent", LAYER, kinds=("gradient",), curvature=about)
    assert (refused.value.code, refused.value.param) == ("empty_sample", "dataset")


@pytest.fixture(scope="module")
def queried(world, damaged):
    """Rows of query losses over a damaged model: ``queried(examples, mean=…, budget=…)``, and what is said."""
    index, _ = world.lab.build("partly", "damaged", "partly", LAYER, **damaged.fields)
    spec = world.manifest(index).spec
    reading = Reading(**{name: getattr(spec, name) for name in Reading.__dataclass_fields__})
    loaded = load(str(world.root / "damaged2"), "float32")
    key = spec.gradient.projection.curvature

    def rows(examples, *, mean, budget=4096):
        work = LossRowsWork(replace(reading, token_budget=budget), key, LossReduction.MEAN, mean=mean)
        tensors, facts = works.compute(work, world.lab.storage, loaded, examples)
        return np.concatenate([each["rows"] for each in tensors.values()], axis=1), facts

    return rows


NOT_FINITE = [make_example("the z", "sat on"), make_example("the cat", "sat z mat.")]
MIXED = [NOT_FINITE[0], *QUERIES[:2], make_example("the cat", ""), *QUERIES[2:], NOT_FINITE[1]]


@pytest.mark.parametrize("budget", [4096, 40, 1], ids=["one batch", "some batches", "one by one"])
def test_a_damaged_query_leaves_the_mean_of_the_others_and_is_told(queried, budget):
    (expected,), facts = queried(QUERIES, mean=True)
    assert facts == {"rows": 1, "examples": 6, "quarantined": 0}
    (found,), facts = queried(MIXED, mean=True, budget=budget)
    assert facts == {"rows": 1, "examples": 6, "quarantined": 3}
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    every, _ = queried(QUERIES, mean=False)
    assert np.abs(every.mean(axis=0) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("budget", [4096, 40, 1], ids=["one batch", "some batches", "one by one"])
def test_a_damaged_query_has_no_row_and_the_others_keep_their_order(queried, budget):
    expected, _ = queried(QUERIES, mean=False)
    assert len({tuple(row) for row in expected}) == len(QUERIES)
    found, facts = queried(MIXED, mean=False, budget=budget)
    assert facts == {"rows": 6, "examples": 6, "quarantined": 3}
    assert off(found, expected) <= 1e-5


@pytest.mark.parametrize("left", [NOT_FINITE, SILENT[:3]], ids=["damaged", "silent"])
def test_queries_of_which_none_is_left_have_a_mean_of_nothing_and_no_rows(queried, left):
    (found,), facts = queried(left, mean=True)
    assert not found.any()
    assert facts == {"rows": 1, "examples": 0, "quarantined": len(left)}
    with pytest.raises(Invalid) as refused:
        queried(left, mean=False)
    assert (refused.value.code, refused.value.param) == ("empty_query_set", "query_set")


def chosen(world, index) -> set[tuple[str, int]]:
    """The coordinates that a gradient index keeps: module and position."""
    storage, key = world.lab.storage, world.manifest(index).spec.gradient.projection.basis
    basis = artifacts.get(storage, key)
    names = [name for name in artifacts.stems(basis) if name != SPECTRUM]
    return {(name, int(i)) for name in names for i in artifacts.read(storage, basis, name)["index"]}


def test_a_damaged_query_is_left_out_of_a_whole_build_and_told(world, damaged):
    world.lab.dataset("mixed", [*QUERIES[:3], NOT_FINITE[0], *QUERIES[3:]])
    fields = {"kinds": ("gradient", "influence"), "curvature": FITTED, "checkpoints": Checkpoints.END}
    shaken, whole = (
        world.lab.build("mixed", "damaged", "d", LAYER, query_sets=(name,), coordinates=400, **fields)[0]
        for name in ("mixed", "q")
    )
    assert len(chosen(world, shaken) & chosen(world, whole)) > 390  # half of them by ∇L(Q)
    ours, theirs = (world.matrix(index, embedding(index)) for index in (shaken, whole))
    assert off(ours, theirs) <= 1 / 127 + 1e-4  # one step
    found = world.match(shaken, concept="v0", query_set="mixed", through=IndexKind.GRADIENT)
    assert (found.examples, found.quarantined) == (len(QUERIES), 1)
    assert all(np.isfinite(each.mean) for each in shaken.fidelity)


def test_a_query_set_without_answers_still_chooses_coordinates(world):
    """Its loss says nothing, its activations do."""
    world.lab.dataset("prompts", SILENT[:5])
    index = world.build(
        "unanswered",
        kinds=("gradient", "influence"),
        coordinates=500,
        query_sets=("prompts",),
        pooling=Pooling.ALL_MEAN,
        checkpoints=Checkpoints.END,
    )
    oracle = world.oracles[-1]
    tokens = oracle.tokens(SILENT[:5])
    J = exact.jacobian_rows(oracle.loaded, oracle.modules, tokens, LAYER, Pooling.ALL_MEAN, ConceptFunction.DOT)
    expected = -oracle.gradients @ exact.solve(oracle.factors, J, 1.0).T
    assert off(world.matrix(index, embedding(index)), expected) <= INT8
    assert world.rows(index, gradient_array(index))
    assert all(np.isfinite(each.mean) for each in index.fidelity)


# --- resuming ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@dataclasses.dataclass
class Impatient(Quiet):
    """Stops the job at the n-th look."""

    left: int = 0

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted


def build_in_pieces(home: Path, folders: Sequence[Path], every: int | None, monkeypatch) -> tuple[bytes, list[str]]:
    """The bytes of the manifest, and the tasks that were computed, in order."""
    processed: list[str] = []
    with make_lab(home, folders) as lab:
        worker = lab.engine._pool._worker
        process = worker.process
        monkeypatch.setattr(worker, "process", lambda task: (processed.append(task.key), process(task))[1])
        run = lab.engine.run

        def again(job, context):
            for _ in range(200):
                try:
                    return run(job, context if every is None else Impatient(job, {}, left=every))
                except Interrupted:
                    continue
            raise AssertionError("it never ended")

        monkeypatch.setattr(lab.engine, "run", again)
        index, _ = lab.build(
            "resumed",
            "m",
            "d",
            1,
            kinds=("activation", "gradient", "influence"),
            coordinates=400,
            query_sets=("q",),
            curvature=FITTED,
        )
        return lab.storage.read(f"indexes/{index.id}/manifest.json"), processed


def test_a_build_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(world, tmp_path, monkeypatch):
    whole, tasks = build_in_pieces(tmp_path / "whole", world.folders, None, monkeypatch)
    assert len(set(tasks)) == len(tasks) > 60
    pieces, again = build_in_pieces(tmp_path / "pieces", world.folders, 7, monkeypatch)
    assert pieces == whole
    assert again == tasks  # every task once, none twice


# --- stale curvature --------------------------------------------------------------------------------------------


READING = Reading("weights", "tokenizer", 128, LongExamples.TRUNCATE_RIGHT, 4096, "float32")
BASE = CurvatureSpec(40, 0, FactorLabels.SAMPLED, FactorPositions.ALL)
CHANGES = {
    "weights": ({"model_fingerprint": "others"}, {}, {}),
    "tokenizer": ({"tokenizer_fingerprint": "another"}, {}, {}),
    "max_length": ({"max_length": 64}, {}, {}),
    "long_examples": ({"long_examples": LongExamples.TRUNCATE_LEFT}, {}, {}),
    "dtype": ({"dtype": "bfloat16"}, {}, {}),
    "seed": ({}, {"seed": 1}, {}),
    "sample size": ({}, {"examples": 41}, {}),
    "labels": ({}, {"labels": FactorLabels.TRUE}, {}),
    "positions": ({}, {"positions": FactorPositions.TARGETS}, {}),
    "blocks": ({}, {}, {"tracked": Tracked(1)}),
    "modules": ({}, {}, {"tracked": Tracked(2, "attn")}),
    "stride": ({}, {}, {"tracked": Tracked(2, stride=2)}),
    "dataset": ({}, {}, {"dataset": "q"}),
}


TRACKED = Tracked(2)


def curvature_key(world, monkeypatch, reading=READING, spec=BASE, tracked=TRACKED, dataset="d") -> str:
    asked: list[str] = []
    monkeypatch.setattr(artifacts, "made", lambda _storage, key: asked.append(key) or object())
    stages = Stages(world.lab.storage, None, None)
    record = world.lab.registry.get(DATASETS, dataset)
    found = stages.curvature(Location("anywhere", "anywhere"), reading, tracked, spec, record, most_bytes=1 << 30)
    monkeypatch.undo()
    assert asked == [found]
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_curvature_depends_on_is_in_its_key(world, monkeypatch, change):
    reading, spec, rest = CHANGES[change]
    base = curvature_key(world, monkeypatch)
    assert curvature_key(world, monkeypatch) == base
    changed = curvature_key(world, monkeypatch, replace(READING, **reading), replace(BASE, **spec), **rest)
    assert changed != base


def test_weights_that_changed_after_registration_are_refused(world):
    folder = save(world.root / "moving", 1)
    world.lab.model("moving", folder)
    save(folder, 2)
    with pytest.raises(Conflict) as refused:
        world.lab.build("moving", "moving", "d", LAYER, kinds=("gradient",), curvature=FITTED)
    assert refused.value.code == "model_changed"


def test_a_checkpoint_that_changed_after_registration_is_refused(world):
    folder = save(world.root / "moving checkpoint", 1)
    world.lab.model("moved", world.folders[2], checkpoints=[(folder, 1.0)])
    save(folder, 2)
    with pytest.raises(Conflict) as refused:
        world.lab.build("moved", "moved", "d", LAYER, kinds=("influence",), query_sets=("q",))
    assert refused.value.code == "model_changed"
