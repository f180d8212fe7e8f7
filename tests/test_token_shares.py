"""Per-token attribution: shares sum to the score, and each is what its position alone has in the gradient."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from benchmarks.lab import Lab
from service import token_shares
from service.contracts import Completion, Example, PlainText
from service.datasets import example_id
from service.errors import Invalid
from service.specs import TokenSharesSpec
from service.terms import (
    ConceptFunction,
    FactorLabels,
    FactorPositions,
    IndexKind,
    JobKind,
    LongExamples,
    LossReduction,
    Method,
    Pooling,
    Projection,
)
from tests import tiny
from workers.batches import collate
from workers.gradients import Sides
from workers.masks import tokenise
from workers.works.token_shares import of_gradient

TOKENIZER = tiny.words(bos=True)
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"]
V = np.random.default_rng(0).standard_normal(tiny.WIDTH).astype(np.float32)
FITTED = {"examples": 40, "seed": 0, "labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}


def example(number: int, most: int = 12) -> Example:
    rng = np.random.default_rng(number)
    words = rng.choice(WORDS, rng.integers(5, most)).tolist()
    content = Completion(" ".join(words[:2]) + " ", " ".join(words[2:]))
    return Example(example_id(content), content, {}, ())


TRAIN, QUERIES = [example(number) for number in range(30)], [example(number) for number in range(100, 104)]
CHOSEN = [one.id for one in TRAIN[3:9]]


class World:
    def __init__(self, root: Path) -> None:
        folders = []
        for number in range(2):
            model = tiny.model("llama", vocab=len(TOKENIZER))
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(number)
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            folders.append(root / f"m{number}")
            model.save_pretrained(folders[-1])
            TOKENIZER.save_pretrained(folders[-1])
        self.lab = Lab(root / "lab")
        model = self.lab.model("m", folders[1], checkpoints=[(folders[0], 0.5)])
        self.lab.dataset("d", TRAIN)
        self.lab.dataset("q", QUERIES)
        self.lab.concept("v", model, V, layer=2)

    def build(self, name: str, **options):
        about = {"kinds": ("activation", "gradient", "influence"), "query_sets": ("q",), "curvature": FITTED}
        return self.lab.build(name, "m", "d", 2, **about | {"coordinates": 10**6} | options)[0]

    def shares(self, index, ids: Sequence[str] = CHOSEN, **query) -> list[token_shares.TokenShares]:
        method = query.pop("method", Method.CONCEPT_INFLUENCE)
        needs = method not in {Method.VECTOR_FILTER, Method.PROJECTION_DIFFERENCE}
        spec = TokenSharesSpec(
            key=f"{index.id} {method} {sorted(query.items())} {len(ids)}".replace("/", ""),
            index=index.id,
            method=method,
            concept=None if method == Method.INFLUENCE_FUNCTION else query.get("concept", "v"),
            query_set="q" if needs else None,
            function=ConceptFunction.DOT,
            damping=query.get("damping"),
            through=query.get("through"),
            examples=tuple(ids),
            shard_size=64,
        )
        result, _ = self.lab.run(JobKind.TOKEN_SHARES, spec)
        return token_shares.read(self.lab.storage, result["shares"])

    def scores(self, index, ids: Sequence[str] = CHOSEN, **query) -> np.ndarray:
        method = query.get("method", Method.CONCEPT_INFLUENCE)
        about = {} if method == Method.VECTOR_FILTER else {"query_set": "q"}
        concept = {} if method == Method.INFLUENCE_FUNCTION else {"concept": "v"}
        return self.lab.scores(index, ids, **concept | about | query)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("shares"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(world):
    return world.build("x", dampings=(0.3, 1.0))


QUERIES_ASKED = {
    "vector filter": {"method": Method.VECTOR_FILTER},
    "concept through coordinates": {"through": IndexKind.GRADIENT, "damping": 0.3},
    "concept through embeddings, along the run": {"through": IndexKind.INFLUENCE},
    "embeddings of another damping": {"through": IndexKind.INFLUENCE, "damping": 0.3},
    "loss": {"method": Method.INFLUENCE_FUNCTION},
}


@pytest.mark.parametrize("asked", QUERIES_ASKED)
def test_shares_sum_to_the_score(world, index, asked):
    query = QUERIES_ASKED[asked]
    found, scores = world.shares(index, **dict(query)), world.scores(index, **query)
    sums = np.array([one.score for one in found])
    # The rows are rounded, shares are not.
    np.testing.assert_allclose(sums, scores, atol=0.01 * np.abs(scores).max())
    assert np.ptp(sums) > 0.1 * np.abs(scores).max()


def test_tokens_are_told_with_what_was_predicted(world, index):
    for one, item in zip(world.shares(index, method=Method.VECTOR_FILTER), CHOSEN, strict=True):
        tokens = tokenise(next(each for each in TRAIN if each.id == item).content, TOKENIZER)
        assert "".join(one.texts) == TOKENIZER.decode(tokens.ids)
        assert len(one.texts) == len(tokens)
        assert list(one.predicted) == tokens.predicted.tolist()
        assert all(share == 0 for share, pooled in zip(one.shares, tokens.target, strict=True) if not pooled)


def test_nothing_after_the_last_prediction_has_a_share_of_the_gradient(world, index):
    for one in world.shares(index, through=IndexKind.GRADIENT):
        assert one.shares[-1] == 0  # the last token predicts nothing
        assert all(one.shares[:-1])


def test_random_projections_have_shares_too(world):
    index = world.build("r", kinds=("gradient",), query_sets=(), projection=Projection.RADEMACHER)
    found, scores = world.shares(index), world.scores(index)
    np.testing.assert_allclose([one.score for one in found], scores, atol=0.01 * np.abs(scores).max())


def test_chosen_coordinates_only_give_the_score_of_the_index_not_of_all_coordinates(world):
    index = world.build("few", kinds=("gradient",), query_sets=(), coordinates=50)
    found, scores = world.shares(index), world.scores(index)
    np.testing.assert_allclose([one.score for one in found], scores, atol=0.01 * np.abs(scores).max())


def test_windows_of_a_long_example_put_their_shares_in_its_places(world):
    long = example(7, 60)
    world.lab.dataset("long", [*TRAIN[:8], long])
    options = {"max_length": 9, "long_examples": LongExamples.SPLIT_AND_SUM}
    about = {"kinds": ("activation", "gradient"), "curvature": FITTED, "coordinates": 10**6, **options}
    index, _ = world.lab.build("split", "m", "long", 2, **about)
    for query in ({"method": Method.VECTOR_FILTER}, {}):
        (found,), scores = world.shares(index, [long.id], **dict(query)), world.scores(index, [long.id], **query)
        assert len(found.shares) == len(tokenise(long.content, TOKENIZER)) > 9
        assert found.score == pytest.approx(scores[0], rel=0.02)


def test_what_is_not_in_the_index_has_no_shares(world):
    silent = Completion("the cat ", "")
    odd = [Example(example_id(silent), silent, {}, ())]
    world.lab.dataset("silent", [*TRAIN[:8], *odd])
    index, _ = world.lab.build("silent", "m", "silent", 2, kinds=("gradient",), curvature=FITTED)
    ids = [TRAIN[0].id, odd[0].id, TRAIN[1].id]
    found = world.shares(index, ids)
    assert [len(one.texts) > 0 for one in found] == [True, False, True]
    assert found[0].score == pytest.approx(world.scores(index, ids)[0], rel=0.05)


def test_what_another_section_has_set_aside_has_no_shares_either(world):
    """Without an answer there is no loss, and damage leaves no finite state: neither is in the index."""
    model = tiny.model("llama", vocab=len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids("question")] = float("nan")
    folder = world.lab.storage.root + "-damaged"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    record = world.lab.model("damaged", Path(folder))
    world.lab.concept("w", record, V, layer=2)
    silent, damaged = Completion("the cat ", ""), Completion("the question ", "sat on mat")
    sane = [each for each in TRAIN if "question" not in str(each.content)][:8]
    odd = [Example(example_id(content), content, {}, ()) for content in (silent, damaged)]
    world.lab.dataset("odd", [*sane, *odd])
    about = {"kinds": ("activation", "gradient"), "projection": Projection.RADEMACHER, "pooling": Pooling.ALL_MEAN}
    index, _ = world.lab.build("odd", "damaged", "odd", 2, **about)
    assert set(index.quarantine_reasons) == {"no_target", "not_finite"}
    ids = [sane[0].id, odd[0].id, odd[1].id, sane[1].id]
    found = world.shares(index, ids, method=Method.VECTOR_FILTER, concept="w")
    assert [len(one.texts) > 0 for one in found] == [True, False, False, True]
    assert [one.score for one in found[1:3]] == [0, 0]
    expected = world.scores(index, [ids[0], ids[3]], method=Method.VECTOR_FILTER, concept="w")
    np.testing.assert_allclose([found[0].score, found[3].score], expected, rtol=0.01)


def test_a_projection_difference_has_none_and_says_what_has(world):
    about = {"kinds": ("difference",), "answers": {"temperature": 1.0, "max_new_tokens": 3, "seed": 0}}
    index = world.build("difference", query_sets=(), **about)
    with pytest.raises(Invalid, match="vector_filter") as refused:
        world.shares(index, method=Method.PROJECTION_DIFFERENCE)
    assert refused.value.code == "no_token_shares"


# --- the maths, against weights that differ by position ---------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_share_is_what_the_gradient_has_at_its_position_alone(family):
    """Every position gets a weight of its own, all equal in value: their gradients are the terms of the sum."""
    loaded = tiny.loaded(family)
    tokens = tiny.random_tokens(1, 11)
    batch = collate([tokens], pooling=None, reduction=LossReduction.MEAN, device=tiny.CPU)
    modules = loaded.linear_maps(2)
    generator = torch.Generator().manual_seed(0)
    sides, weights, changes, handles = {}, {}, {}, []
    for name, module in modules.items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        d_out, d_in = weight.shape
        sides[name] = Sides(torch.randn(d_out, 5, generator=generator), torch.randn(d_in, 4, generator=generator))
        weights[name] = torch.randn(5, 4, generator=generator)
        changes[name] = torch.zeros(len(tokens), d_out, d_in, requires_grad=True)

        def added(_module, inputs, output, change=changes[name]):
            return output + torch.einsum("toi,bti->bto", change, inputs[0])

        handles.append(module.register_forward_hook(added))
    ids = torch.from_numpy(tokens.ids)
    log_p = loaded.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    places = np.flatnonzero(tokens.predicted)
    (sum(-log_p[t - 1, ids[t]] for t in places) / len(places)).backward()
    for handle in handles:
        handle.remove()
    expected = sum(
        torch.einsum("toi,op,iq,pq->t", changes[name].grad, side.out, side.into, weights[name])
        for name, side in sides.items()
    )
    found = of_gradient(loaded, sides, weights, batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_plain_text_has_shares(world):
    content = PlainText("the cat sat on mat")
    text = Example(example_id(content), content, {}, ())
    world.lab.dataset("text", [*TRAIN[:5], text])
    index, _ = world.lab.build("text", "m", "text", 2, kinds=("gradient",), curvature=FITTED)
    (found,) = world.shares(index, [text.id])
    assert found.score == pytest.approx(world.scores(index, [text.id])[0], rel=0.05, abs=1e-6)
