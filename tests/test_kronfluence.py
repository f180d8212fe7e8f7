"""Our EK-FAC gives the scores that kronfluence 1.0.1 gave: see data/kronfluence/README.md for its conventions.

True labels, the training targets, summed loss, every nn.Linear of the blocks. Our A and S are sums over positions
where kronfluence stores means, our eigenvectors stand largest first: neither changes a score.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.peers import exchange
from service.terms import FactorLabels, FactorPositions, LossReduction, Pooling
from tests import tiny
from tests.exact import spearman
from workers import curvature
from workers.batches import collate, plan
from workers.gradients import Sides, concept_coordinates, loss_coordinates
from workers.jacobian import jacobian
from workers.masks import Tokens
from workers.models import Loaded

STORED = Path(__file__).parent / "data" / "kronfluence"
LOSS = {"labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}
BUDGET = 90  # several batches, most with padding


def read(name):
    return [Tokens(ids, target, bos=False, has_prompt=True) for ids, target in exchange.read_tokens(STORED / name)]


def batches(tokens, *, pooling=None):
    for members in plan([len(one) for one in tokens], BUDGET):
        chosen = [tokens[i] for i in members]
        yield members, collate(chosen, pooling=pooling, reduction=LossReduction.SUM, device=tiny.CPU)


@pytest.fixture(scope="module")
def result():
    return exchange.read_json(STORED / exchange.RESULT)


@pytest.fixture(scope="module")
def stored():
    return load_file(STORED / "factors.safetensors")


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForCausalLM.from_pretrained(STORED / "model", dtype=torch.float64)
    return Loaded(model.eval().requires_grad_(False), tiny.byte_pairs(), tiny.CPU)


@pytest.fixture(scope="module")
def train():
    return read(exchange.TOKENS)


@pytest.fixture(scope="module")
def fitted(loaded, train):
    """Ours, in the order of a build: covariances, eigenvectors (sides), λ."""
    modules, covariances, moments = loaded.linear_maps(3), {}, {}
    for _, batch in batches(train):
        curvature.add_covariances(covariances, modules, loaded.model, batch, **LOSS)
    sides = {}
    for name, each in covariances.items():
        U_S, U_A = (curvature.eigenvectors(side.numpy())[0] for side in (each.out, each.into))
        sides[name] = Sides(torch.from_numpy(U_S.copy()), torch.from_numpy(U_A.copy()))
    for _, batch in batches(train):
        curvature.add_moments(moments, modules, sides, loaded.model, batch, **LOSS)
    return covariances, sides, moments


@pytest.fixture(scope="module")
def coordinates(loaded, train, fitted):
    """Of ∇L of training examples and queries, and of ∇f_v of queries, by module: (n, d_out, d_in)."""
    _, sides, _ = fitted
    modules, queries = loaded.linear_maps(3), read(exchange.QUERY_TOKENS)
    v = torch.from_numpy(exchange.direction(STORED))

    def rows(tokens, compute, pooling=None):
        found = [None] * len(tokens)
        for members, batch in batches(tokens, pooling=pooling):
            for i, row in zip(members, compute(batch), strict=True):
                found[i] = row
        parts = torch.stack(found).split([side.size for side in sides.values()], dim=1)
        return {
            name: part.unflatten(1, side.shape) for (name, side), part in zip(sides.items(), parts, strict=True)
        }

    def concept(batch):
        about = {"layer": 2, "direction": v}
        return concept_coordinates(loaded.model, loaded.blocks, modules, sides, batch, **about)[0]

    def loss(batch):
        return loss_coordinates(loaded.model, modules, sides, batch)[0]

    return rows(train, loss), {
        "loss": rows(queries, loss),
        "concept": rows(queries, concept, Pooling.RESPONSE_MEAN),
    }


def dampings(result):
    return [*((d, False) for d in result["absolute"]), *((d, True) for d in result["relative"])]


def test_the_same_modules_in_the_same_order(loaded, result):
    assert list(loaded.linear_maps(3)) == result["modules"]


def test_covariances_are_the_same_up_to_the_count(fitted, stored, train):
    covariances, _, _ = fitted
    n = sum(len(one) for one in train)
    assert n == 495
    for name, each in covariances.items():
        for ours, kind in ((each.into, "A"), (each.out, "S")):
            theirs = stored[f"{name}.{kind}"]
            assert (ours / n - theirs).norm() <= 1e-5 * theirs.norm()


def test_eigenspaces_are_the_same(fitted, stored):
    """Projectors on the leading eigenvectors, where a gap sets them apart from the rest."""
    _, sides, _ = fitted
    compared = 0
    for name, side in sides.items():
        for U, kind in ((side.out, "S"), (side.into, "A")):
            values, V = torch.linalg.eigh(stored[f"{name}.{kind}"])
            values, V = values.flip(0), V.flip(1)
            for count in range(1, len(values)):
                if values[count] < 0.8 * values[count - 1] and values[count - 1] > 1e-4 * values[0]:
                    mine, theirs = (each[:, :count] @ each[:, :count].T for each in (U, V))
                    assert (mine - theirs).norm() <= 1e-3
                    compared += 1
    assert compared > 100


def test_lambda_is_the_same(fitted, stored, result, train):
    _, _, moments = fitted
    for name, each in moments.items():
        ours, theirs = each / len(train), stored[f"{name}.lambda"].flip(0, 1)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
        assert float(each.sum()) / len(train) == pytest.approx(result["lambda"][name]["trace"], rel=1e-4)
        assert ours.mean() == pytest.approx(result["lambda"][name]["mean"], rel=1e-4)


@pytest.mark.parametrize("kind", ["loss", "concept"])
@pytest.mark.parametrize("row", range(4))
def test_scores_are_the_same_at_every_damping(fitted, coordinates, result, train, row, kind):
    _, _, moments = fitted
    examples, queries = coordinates
    damping, relative = dampings(result)[row]
    sign = -1 if kind == "concept" else 1  # positive: training on it raises f_v, or lowers the loss
    ours = torch.zeros(result["queries"], len(train), dtype=torch.float64)
    for name, each in moments.items():
        square = each / len(train)
        delta = damping * square.mean() if relative else damping
        ours += sign * torch.einsum("qoi,noi->qn", queries[kind][name] / (square + delta), examples[name])
    theirs = np.load(STORED / f"scores_{kind}.npy")[row]
    assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert spearman(ours.numpy().T, theirs.T).min() >= 0.999


def test_the_jacobian_gives_the_same_concept_scores(loaded, fitted, coordinates, result, train):
    """As an influence embedding does: J summed over queries, applied to v̂ at the end."""
    _, sides, moments = fitted
    examples, _ = coordinates
    queries, v = read(exchange.QUERY_TOKENS), torch.from_numpy(exchange.direction(STORED))
    J = {}
    for _, batch in batches(queries, pooling=Pooling.RESPONSE_MEAN):
        rows = torch.eye(len(v), dtype=torch.float64)
        found = jacobian(
            loaded.model,
            loaded.blocks,
            loaded.linear_maps(3),
            sides,
            batch,
            layer=2,
            directions=rows,
            token_budget=200,
        )
        J = {name: J.get(name, 0) + each for name, each in found.items()}
    assert len(J) == 14  # blocks 1 and 2
    embeddings = 0
    for name, rows in J.items():
        square = (moments[name] / len(train)).flatten()
        embeddings -= examples[name].flatten(1) @ (rows / len(queries) / (square + square.mean())).T
    theirs = np.load(STORED / "scores_concept.npy")[3].mean(axis=0)
    assert np.abs((embeddings @ v).numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()
