"""EK-FAC against dense matrices: whole per-example gradients from autograd, one example at a time, in float64."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.errors import Invalid
from service.terms import FactorLabels, FactorPositions
from tests import exact, tiny
from workers import curvature
from workers.batches import collate
from workers.gradients import Sides
from workers.masks import Tokens
from workers.models import shape

LENGTHS = (9, 4, 14, 2, 1, 6)  # ragged; the fifth has nothing to predict
TOKENS = [tiny.random_tokens(seed=i, length=length) for i, length in enumerate(LENGTHS)]
IDS = [f"example {number}" for number in range(len(TOKENS))]
UNIFORM = [curvature.uniforms(3, name, len(one)) for name, one in zip(IDS, TOKENS, strict=True)]
LOSSES = [(labels, positions) for labels in FactorLabels for positions in FactorPositions]
losses = pytest.mark.parametrize(("labels", "positions"), LOSSES)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def loaded(request):
    return exact.loaded(request.param)


@pytest.fixture(scope="module")
def llama():
    return exact.loaded("llama")


def batch_of(tokens: Sequence[Tokens]):
    return collate(tokens, pooling=None, reduction="sum", device=tiny.CPU)


EVERY = tuple(range(len(TOKENS)))


def options(labels, positions, members=EVERY):
    return {"labels": labels, "positions": positions, "uniform": [UNIFORM[i] for i in members]}


_KNOWN = {}


def per_example(loaded, modules, labels=FactorLabels.SAMPLED, positions=FactorPositions.ALL):
    """Oracle: inputs, output gradients and weight gradients of each example by itself."""
    key = (type(loaded.model), tuple(modules), labels, positions)
    if key not in _KNOWN:
        _KNOWN[key] = _per_example(loaded, modules, labels, positions)
    return _KNOWN[key]


def _per_example(loaded, modules, labels, positions):
    found = []
    for one, points in zip(TOKENS, UNIFORM, strict=True):
        wanted = exact.labels_of(loaded.model, one, positions, points if labels == FactorLabels.SAMPLED else None)
        found.append(exact.traced(lambda one=one, w=wanted: exact.factor_loss(loaded.model, one, w), modules))
    return found


def covariances(loaded, modules, groups, **about):
    sums = {}
    for members in groups:
        batch = batch_of([TOKENS[i] for i in members])
        loss = options(about["labels"], about["positions"], members)
        curvature.add_covariances(sums, modules, loaded.model, batch, **loss)
    return sums


def moments(loaded, modules, sides, groups, **about):
    sums = {}
    for members in groups:
        batch = batch_of([TOKENS[i] for i in members])
        loss = options(about["labels"], about["positions"], members)
        curvature.add_moments(sums, modules, sides, loaded.model, batch, **loss)
    return sums


GROUPS = {"together": [range(6)], "alone": [[i] for i in range(6)], "mixed": [[2, 0], [5, 4, 3, 1]]}
groups = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)


def close(ours: torch.Tensor, theirs: object, tolerance: float = 1e-9) -> None:
    """To ``tolerance`` of the largest entry."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max() + 1e-300


def orthogonal(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def bases(modules) -> dict[str, Sides]:
    """Some orthogonal basis per side."""
    found = {}
    for number, (name, module) in enumerate(modules.items()):
        d_out, d_in = shape(module)
        found[name] = Sides(orthogonal(d_out, number), orthogonal(d_in, 100 + number))
    return found


# --- labels -------------------------------------------------------------------------------------------


def test_labels_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    n = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    counts = curvature.sample(p.log().expand(n, 5), uniform).bincount(minlength=5).double() / n
    assert counts[1] == 0
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_inversion_at_known_points():
    p = torch.tensor([0.25, 0.25, 0.0, 0.5], dtype=torch.float64)
    points = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999999], dtype=torch.float64)
    assert curvature.sample(p.log().expand(6, 4), points).tolist() == [0, 0, 1, 1, 3, 3]


@given(st.integers(0, 10**6), st.floats(0.01, 8))
def test_inversion_is_the_running_sum_passing_the_point(seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    uniform = torch.rand(7, generator=generator, dtype=torch.float64)
    expected = [exact.drawn(row, float(u)) for row, u in zip(logits.softmax(-1), uniform, strict=True)]
    assert curvature.sample(logits, uniform).tolist() == expected


def test_a_point_next_to_one_never_leaves_the_vocabulary():
    logits = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0))
    for point in (np.nextafter(1.0, 0.0), 1.0):
        found = curvature.sample(logits, torch.full((16,), point, dtype=torch.float64))
        assert ((found >= 0) & (found < 50_000)).all()


def test_chunks_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits, uniform = torch.randn(23, 9, generator=generator), torch.rand(23, generator=generator).double()
    whole = curvature.sample(logits, uniform)
    monkeypatch.setattr(curvature, "_ROWS", 5)
    assert torch.equal(curvature.sample(logits, uniform), whole)
    assert len(curvature.sample(logits[:0], uniform[:0])) == 0


def test_uniform_numbers_are_keyed_by_seed_example_and_position():
    found = curvature.uniforms(0, "a", 50)
    assert found.shape == (50,)
    assert ((found >= 0) & (found < 1)).all()
    np.testing.assert_array_equal(curvature.uniforms(0, "a", 20), found[:20])  # whatever the length
    assert len(set(found)) == 50
    for other in ((1, "a"), (0, "b"), (10, "a")):
        assert not np.isin(curvature.uniforms(*other, 50), found).any()
    many = np.concatenate([curvature.uniforms(0, str(i), 100) for i in range(200)])
    edges = np.histogram(many, bins=10, range=(0, 1))[0] / len(many)
    assert np.abs(edges - 0.1).max() < 5 * np.sqrt(0.09 / len(many))


def seen_labels(monkeypatch, loaded, members, positions):
    """Of each example the labels that its loss was given."""
    given = []
    real = nn.functional.cross_entropy
    monkeypatch.setattr(
        curvature.functional, "cross_entropy", lambda x, y, **k: given.append(y.clone()) or real(x, y, **k)
    )
    curvature.factor_loss(
        loaded.model, batch_of([TOKENS[i] for i in members]), **options(FactorLabels.SAMPLED, positions, members)
    )
    monkeypatch.undo()
    counts = [len(exact.labels_of(loaded.model, TOKENS[i], positions, UNIFORM[i])) for i in members]
    return dict(zip(members, given[0].split(counts), strict=True))


@pytest.mark.parametrize("positions", FactorPositions)
def test_labels_do_not_depend_on_batch_or_padding(monkeypatch, loaded, positions):
    together = seen_labels(monkeypatch, loaded, [0, 1, 2, 3, 4, 5], positions)
    shuffled = seen_labels(monkeypatch, loaded, [5, 2, 1], positions)
    for i, one in enumerate(TOKENS):
        expected = list(exact.labels_of(loaded.model, one, positions, UNIFORM[i]).values())
        assert together[i].tolist() == expected
        assert i not in shuffled or shuffled[i].tolist() == expected
    assert any(together[i].tolist() != TOKENS[i].ids[1:].tolist() for i in (0, 2))  # not the true ones


# --- the loss -----------------------------------------------------------------------------------------


@losses
def test_the_loss_is_the_sum_over_examples(loaded, labels, positions):
    found = curvature.factor_loss(loaded.model, batch_of(TOKENS), **options(labels, positions))
    expected = 0
    for one, points in zip(TOKENS, UNIFORM, strict=True):
        wanted = exact.labels_of(loaded.model, one, positions, points if labels == "sampled" else None)
        expected += exact.factor_loss(loaded.model, one, wanted)
    assert found.ndim == 0
    close(found.detach(), expected.detach())


def test_labels_and_positions_are_four_different_losses(llama):
    found = {float(curvature.factor_loss(llama.model, batch_of(TOKENS), **options(*each))) for each in LOSSES}
    assert len(found) == 4


# --- covariances and moments ------------------------------------------------------------------------------


@groups
@losses
def test_covariances_are_sums_over_positions(loaded, labels, positions, groups):
    modules = loaded.linear_maps(tiny.BLOCKS)
    found = covariances(loaded, modules, groups, labels=labels, positions=positions)
    assert list(found) == list(modules)
    expected = per_example(loaded, modules, labels, positions)
    for name in modules:
        close(found[name].into, sum(one[name].a.T @ one[name].a for one in expected))
        close(found[name].out, sum(one[name].g.T @ one[name].g for one in expected))


def test_the_oracle_itself_a_gradient_is_the_sum_of_outer_products(loaded):
    modules = loaded.linear_maps(tiny.BLOCKS)
    for one in per_example(loaded, modules):
        for name, module in modules.items():
            assert one[name].G.shape == shape(module)
            close(one[name].G, one[name].g.T @ one[name].a)


@groups
@losses
def test_moments_are_sums_of_squared_coordinates_of_whole_gradients(loaded, labels, positions, groups):
    modules = loaded.linear_maps(tiny.BLOCKS)
    sides = bases(modules)
    found = moments(loaded, modules, sides, groups, labels=labels, positions=positions)
    expected = per_example(loaded, modules, labels, positions)
    for name, side in sides.items():
        close(found[name], sum((side.out.T @ one[name].G @ side.into).square() for one in expected))


def test_identity_sides_give_the_diagonal_of_the_empirical_fisher(llama):
    modules = llama.linear_maps(1)
    sides = {
        name: Sides(*(torch.eye(d, dtype=torch.float64) for d in shape(module))) for name, module in modules.items()
    }
    found = moments(llama, modules, sides, [range(6)], labels=FactorLabels.TRUE, positions=FactorPositions.TARGETS)
    expected = per_example(llama, modules, FactorLabels.TRUE, FactorPositions.TARGETS)
    for name in modules:
        close(found[name], sum(one[name].G.square() for one in expected))


def test_float32_models_are_summed_in_float32_and_stay_close():
    single, double = tiny.loaded("gpt2"), exact.loaded("gpt2")
    about = {"labels": FactorLabels.TRUE, "positions": FactorPositions.ALL}
    ours = covariances(single, single.linear_maps(3), [range(6)], **about)
    theirs = covariances(double, double.linear_maps(3), [range(6)], **about)
    for name, each in ours.items():
        assert each.into.dtype == each.out.dtype == torch.float32
        close(each.into, theirs[name].into, 1e-4)
        close(each.out, theirs[name].out, 1e-4)


def test_half_precision_models_are_summed_in_float32():
    loaded = tiny.loaded("llama", dtype=torch.bfloat16)
    about = {"labels": FactorLabels.SAMPLED, "positions": FactorPositions.ALL}
    for each in covariances(loaded, loaded.linear_maps(1), [range(6)], **about).values():
        assert each.into.dtype == each.out.dtype == torch.float32
        assert torch.isfinite(each.into).all()
    sides = {
        name: Sides(side.out.float(), side.into.float()) for name, side in bases(loaded.linear_maps(1)).items()
    }
    for each in moments(loaded, loaded.linear_maps(1), sides, [range(6)], **about).values():
        assert torch.isfinite(each).all()


def test_a_map_that_runs_twice_is_refused_by_name():
    loaded = exact.loaded("llama")
    block = loaded.blocks[1].mlp
    block.up_proj = block.gate_proj
    modules = loaded.linear_maps(tiny.BLOCKS)
    about = {"labels": FactorLabels.TRUE, "positions": FactorPositions.ALL}
    with pytest.raises(Invalid, match=r"layers\.1\.mlp\.gate_proj") as refused:
        moments(loaded, modules, bases(modules), [range(6)], **about)
    assert refused.value.code == "module_reused"


class Flattened(nn.Module):
    """A linear map that sees (batch · tokens, width), as in routers of experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def test_a_map_whose_inputs_are_not_batch_by_tokens_is_refused_by_name():
    loaded = exact.loaded("llama")
    loaded.blocks[1].mlp.up_proj = Flattened(loaded.blocks[1].mlp.up_proj)
    modules = loaded.linear_maps(tiny.BLOCKS)
    about = {"labels": FactorLabels.TRUE, "positions": FactorPositions.ALL}
    for ask in (
        lambda: covariances(loaded, modules, [range(6)], **about),
        lambda: moments(loaded, modules, bases(modules), [range(6)], **about),
    ):
        with pytest.raises(Invalid, match=r"layers\.1\.mlp\.up_proj\.inner") as refused:
            ask()
        assert (refused.value.code, refused.value.param) == ("unsupported_module", "model")


@losses
def test_a_batch_with_nothing_to_predict_adds_inputs_only(llama, labels, positions):
    modules = llama.linear_maps(tiny.BLOCKS)
    found = covariances(llama, modules, [[4]], labels=labels, positions=positions)
    assert all(each.into.any() and not each.out.any() for each in found.values())
    squares = moments(llama, modules, bases(modules), [[4]], labels=labels, positions=positions)
    assert not any(each.any() for each in squares.values())


# --- eigenvectors -----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_eigenvectors(seed, d):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((d + 3, d)) * np.exp(2 * generator.standard_normal(d))
    matrix = values.T @ values
    U, found = curvature.eigenvectors(matrix)
    assert (U.shape, found.shape, U.dtype) == ((d, d), (d,), np.float64)
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(U.T @ U, np.eye(d), atol=1e-12)
    np.testing.assert_allclose(matrix @ U, U * found, atol=1e-10 * found[0])
    assert (U[np.abs(U).argmax(axis=0), np.arange(d)] > 0).all()
    np.testing.assert_allclose(found, np.linalg.svd(values)[1] ** 2, rtol=1e-6, atol=1e-10 * found[0])


def test_only_the_symmetric_part_counts():
    matrix = np.array([[3.0, 1.0], [0.0, 2.0]])
    U, values = curvature.eigenvectors(matrix)
    np.testing.assert_allclose((U * values) @ U.T, [[3, 0.5], [0.5, 2]], atol=1e-12)


def test_a_covariance_of_nothing_has_a_basis_all_the_same():
    U, values = curvature.eigenvectors(np.zeros((4, 4)))
    np.testing.assert_allclose(U.T @ U, np.eye(4))
    assert not values.any()


# --- H⁻¹ --------------------------------------------------------------------------------------------------


def fitted(loaded, modules, groups, **about):
    """Everything of ours: covariances, eigenvectors, λ, in the order that a build goes."""
    found = {}
    sums = covariances(loaded, modules, groups, **about)
    for name, each in sums.items():
        U_S, _ = curvature.eigenvectors(each.out.numpy())
        U_A, _ = curvature.eigenvectors(each.into.numpy())
        found[name] = Sides(*(torch.from_numpy(U.copy()) for U in (U_S, U_A)))
    squares = moments(loaded, modules, found, groups, **about)
    return found, {name: each / len(TOKENS) for name, each in squares.items()}


def test_products_with_the_inverse_are_those_of_the_dense_matrix(loaded):
    modules = loaded.linear_maps(1)
    about = {"labels": FactorLabels.SAMPLED, "positions": FactorPositions.ALL}
    sides, square = fitted(loaded, modules, GROUPS["mixed"], **about)
    traced = per_example(loaded, modules)
    dense = exact.fit(traced)
    for name, side in sides.items():
        G = torch.stack([one[name].G for one in traced])
        for damping in (0.01, 1.0, 100.0):
            C = side.out.T @ G @ side.into
            ours = side.out @ (C / (square[name] + damping * square[name].mean())) @ side.into.T
            theirs = np.linalg.solve(dense[name].dense(damping), G.flatten(1).numpy().T).T
            close(ours.flatten(1), theirs, 1e-6)


def test_strong_damping_makes_h_the_identity(llama):
    modules = llama.linear_maps(1)
    about = {"labels": FactorLabels.SAMPLED, "positions": FactorPositions.ALL}
    sides, square = fitted(llama, modules, GROUPS["together"], **about)
    G = per_example(llama, modules)[0]
    for name, side in sides.items():
        delta = 1e9 * square[name].mean()
        C = side.out.T @ G[name].G @ side.into
        close(side.out @ (C * delta / (square[name] + delta)) @ side.into.T, G[name].G, 1e-7)


# --- against the true Fisher ------------------------------------------------------------------------------


class OneMap(nn.Module):
    """logits = M W a for the token's own vector a: one tracked map, no attention, no loss but the first token's."""

    def __init__(self, vectors: torch.Tensor, W: torch.Tensor, M: torch.Tensor) -> None:
        super().__init__()
        self.vectors = vectors
        self.map = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float64)
        self.head = nn.Linear(M.shape[1], M.shape[0], bias=False, dtype=torch.float64)
        self.map.weight.data, self.head.weight.data = W, M
        self.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.map(self.vectors[input_ids])))


INPUTS, OUTPUTS, V, N = 4, 3, 5, 6


def every_label(W: torch.Tensor):
    """A model, and one example (input, label) for each of N inputs and V labels: uniform labels without noise.

    Labels' own vectors are zero, so that position 1 adds nothing to A.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, INPUTS, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.5, 1.0, 0.3])
    M = torch.randn(V, OUTPUTS, generator=generator, dtype=torch.float64)
    model = OneMap(torch.cat([torch.zeros(V, INPUTS, dtype=torch.float64), inputs]), W, M)
    target = np.array([False, True])
    tokens = [
        Tokens(np.array([V + i, label]), target, bos=False, has_prompt=True) for i in range(N) for label in range(V)
    ]
    return model, tokens, inputs, M


def ek_fac(model, tokens):
    loss = {"labels": FactorLabels.TRUE, "positions": FactorPositions.ALL}
    sums, squares, modules = {}, {}, {"map": model.map}
    curvature.add_covariances(sums, modules, model, batch_of(tokens), **loss)
    U_S, values_S = curvature.eigenvectors(sums["map"].out.numpy())
    U_A, values_A = curvature.eigenvectors(sums["map"].into.numpy())
    sides = {"map": Sides(torch.from_numpy(U_S.copy()), torch.from_numpy(U_A.copy()))}
    curvature.add_moments(squares, modules, sides, model, batch_of(tokens), **loss)
    square = (squares["map"] / len(tokens)).numpy()
    kfac = np.outer(values_S, values_A) / len(tokens) ** 2
    Q = np.kron(U_S, U_A)
    return Q, square, kfac


def test_ek_fac_is_the_fisher_where_that_is_a_kronecker_product():
    """W = 0: the model's labels are uniform whatever the input, so the true Fisher is A ⊗ S exactly."""
    model, tokens, inputs, M = every_label(torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64))
    A = inputs.T @ inputs / N
    S = M.T @ (torch.eye(V, dtype=torch.float64) / V - torch.full((V, V), V**-2, dtype=torch.float64)) @ M
    fisher = np.kron(S, A)
    Q, square, kfac = ek_fac(model, tokens)
    close((Q * square.ravel()) @ Q.T, fisher)
    close(kfac, square)  # and so is K-FAC
    G = np.random.default_rng(0).standard_normal(OUTPUTS * INPUTS)
    close(Q @ ((Q.T @ G) / (square.ravel() + 0.1)), np.linalg.solve(fisher + 0.1 * np.eye(OUTPUTS * INPUTS), G))


def test_elsewhere_ek_fac_is_the_best_diagonal_in_its_basis_and_k_fac_is_not():
    """George et al. 2018: λ is the Fisher's own diagonal in the Kronecker eigenbasis."""
    model, tokens, _, M = every_label(torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64))
    generator = np.random.default_rng(1)
    tokens = [tokens[i] for i in generator.permutation(len(tokens))[:17]]  # inputs and labels no longer independent
    rows = []
    for one in tokens:
        a = model.vectors[one.ids[0]]
        g = M.T @ (torch.full((V,), 1 / V, dtype=torch.float64) - torch.eye(V, dtype=torch.float64)[one.ids[1]])
        rows.append(torch.outer(g, a).flatten())
    fisher = (torch.stack(rows).T @ torch.stack(rows) / len(rows)).numpy()
    Q, square, kfac = ek_fac(model, tokens)
    close(square.ravel(), np.diag(Q.T @ fisher @ Q))
    errors = [np.linalg.norm((Q * each.ravel()) @ Q.T - fisher) for each in (square, kfac)]
    assert 1e-3 < errors[0] < 0.99 * errors[1]
