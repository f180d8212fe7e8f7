"""What is stored of kronfluence's answers can be trusted, and a peer that is not installed says so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.peers import exchange, run

STORED = Path(__file__).parent / "data" / "kronfluence"

# --- the stored truth ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return exchange.read_json(STORED / exchange.RESULT)


@pytest.fixture(scope="module")
def tokens():
    return exchange.read_tokens(STORED / exchange.TOKENS)


@pytest.fixture(scope="module")
def queries():
    return exchange.read_tokens(STORED / exchange.QUERY_TOKENS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STORED / "model", dtype=torch.float64, attn_implementation="eager")


def test_stored_files_fit_together(result, tokens, queries):
    factors = load_file(STORED / "factors.safetensors")
    assert (len(tokens), len(queries)) == (24, 4)
    assert sorted(factors) == sorted(
        f"{name}.{kind}" for name in result["modules"] for kind in ("A", "S", "lambda")
    )
    for kind in ("loss", "concept"):
        scores = np.load(STORED / f"scores_{kind}.npy")
        assert scores.shape == (4, len(queries), len(tokens))
        assert np.isfinite(scores).all() and (scores.std(axis=2) > 0).all()
    for ids, target in (*tokens, *queries):
        assert len(ids) == len(target)
        assert not target[0] and target.any()  # each has a prompt
    assert sum(one.stat().st_size for one in STORED.rglob("*") if one.is_file()) < 400_000


def _loss(model, ids, target):
    log_p = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return -log_p.gather(1, ids[1:, None])[target[1:]].sum()


def _minus_concept(model, ids, target, v, layer):
    seen = []
    block = exchange.block_list(model)[1][layer - 1]
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model.base_model(input_ids=ids[None], use_cache=False)
    handle.remove()
    return -(seen[0][0, target] @ v).mean()


def _gradients(value, weights):
    return torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)


def _traced(model, names, ids, target):
    """Of one example's summed loss: inputs and output gradients of every module, (T, d), and weight gradients."""
    inputs, outputs, handles = {}, {}, []
    for name in names:

        def hook(_module, given, output, name=name):
            inputs[name], outputs[name] = given[0][0].detach(), output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    value = _loss(model, ids, target)
    for handle in handles:
        handle.remove()
    weights = [model.get_submodule(name).weight for name in names]
    found = _gradients(value, [*(outputs[name] for name in names), *weights])
    return {name: (inputs[name], found[i][0], found[len(names) + i]) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def gradients(result, tokens, queries, model):
    """Of every training example what ``_traced`` gives; of every query its weight gradients, loss and concept."""
    names = result["modules"]
    weights = [model.get_submodule(name).weight for name in names]
    v = torch.from_numpy(exchange.direction(STORED))
    train, asked = (
        [(torch.from_numpy(ids), torch.from_numpy(target)) for ids, target in batch] for batch in (tokens, queries)
    )
    return [_traced(model, names, *one) for one in train], {
        "loss": [_gradients(_loss(model, *one), weights) for one in asked],
        "concept": [_gradients(_minus_concept(model, *one, v, result["concept_layer"]), weights) for one in asked],
    }


def test_stored_scores_are_ek_fac_as_the_readme_says(result, tokens, gradients):
    """Everything from whole gradients, one example at a time."""
    names = result["modules"]
    factors = load_file(STORED / "factors.safetensors")
    traced, per_query = gradients

    dampings = [*((d, False) for d in result["absolute"]), *((d, True) for d in result["relative"])]
    scores = {kind: np.zeros((len(dampings), result["queries"], len(tokens))) for kind in per_query}
    for i, name in enumerate(names):
        A = sum(one[name][0].T @ one[name][0] for one in traced) / tokens.tokens
        S = sum(one[name][1].T @ one[name][1] for one in traced) / tokens.tokens
        torch.testing.assert_close(A, factors[f"{name}.A"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(S, factors[f"{name}.S"], rtol=1e-5, atol=1e-7)
        U_A, U_S = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
        C = torch.stack([U_S.T @ one[name][2] @ U_A for one in traced])
        lam = C.square().mean(0)
        torch.testing.assert_close(lam, factors[f"{name}.lambda"], rtol=1e-4, atol=1e-6 * lam.max().item())
        for kind, asked in per_query.items():
            c = torch.stack([U_S.T @ gradient[i] @ U_A for gradient in asked])
            for row, (damping, relative) in enumerate(dampings):
                delta = damping * lam.mean() if relative else damping
                scores[kind][row] += torch.einsum("qoi,noi->qn", c / (lam + delta), C).detach().numpy()

    for kind, ours in scores.items():
        theirs = np.load(STORED / f"scores_{kind}.npy")
        worst = np.abs(ours - theirs).max(axis=(1, 2)) / np.abs(theirs).max(axis=(1, 2))
        assert worst.max() < 1e-5, (kind, worst)


# --- exchange -----------------------------------------------------------------------------------------


def test_tokens_survive_the_exchange(tmp_path):
    generator = np.random.default_rng(0)
    lengths = (3, 1, 7)
    ids = [generator.integers(0, 9, n) for n in lengths]
    target = [generator.random(n) < 0.5 for n in lengths]
    exchange.write_tokens(tmp_path / exchange.TOKENS, ids, target)
    read = exchange.read_tokens(tmp_path / exchange.TOKENS)
    assert [len(one) for one in read.ids] == list(lengths)
    for before, after in zip((*ids, *target), (*read.ids, *read.target), strict=True):
        np.testing.assert_array_equal(before, after)
    for labels, one, mask in zip(read.labels(), ids, target, strict=True):
        np.testing.assert_array_equal(labels[mask], one[mask])
        assert (labels[~mask] == exchange.IGNORED).all()


def test_every_example_needs_a_flag_per_token(tmp_path):
    with pytest.raises(ValueError, match="one target flag per token"):
        exchange.write_tokens(tmp_path / exchange.TOKENS, [[1, 2]], [[True]])


def test_default_modules_are_the_blocks_up_to_the_layer(model):
    names = exchange.linear_names(model, layer=2)
    assert len(names) == 14 and {name.split(".")[2] for name in names} == {"0", "1"}
    assert exchange.linear_names(model, r".*\.down_proj") == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert len(exchange.linear_names(model)) == 21  # not the head
    with pytest.raises(ValueError, match="lm_head"):
        exchange.linear_names(model, ["lm_head"])
    with pytest.raises(ValueError, match="no linear map"):
        exchange.linear_names(model, "nothing")


# --- running ------------------------------------------------------------------------------------------


def test_an_absent_peer_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "HOME", tmp_path)
    for peer in run.PEERS:
        assert not run.available(peer)
        with pytest.raises(run.PeerMissing, match=rf"{peer} .*run `make peers`"):
            run.call(peer, f"{peer}_scores", tmp_path)
        with pytest.raises(run.PeerMissing, match="make peers"), run.rounds(peer, "bergson_collect", tmp_path):
            pass


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="no such peer"):
        run.available("dattri")


def _prepared(folder, tokens, queries):
    return run.prepare(
        folder,
        STORED / "model",
        tokens.ids,
        tokens.target,
        query_ids=queries.ids,
        query_target=queries.target,
        direction=np.load(STORED / exchange.DIRECTION),
    )


@pytest.mark.skipif(not run.available("kronfluence"), reason=run.missing("kronfluence"))
def test_kronfluence_still_says_what_is_stored(result, tokens, queries, tmp_path):
    folder = _prepared(tmp_path, tokens, queries)
    options = {"layer": result["concept_layer"], "modules": ".*", "labels": "true", "relative": [1.0]}
    assert run.call("kronfluence", "kronfluence_scores", folder, **options)["modules"] == result["modules"]
    for kind in result["kinds"]:
        stored = np.load(STORED / f"scores_{kind}.npy")[3:]
        again = np.load(folder / f"scores_{kind}.npy")
        np.testing.assert_allclose(again, stored, atol=1e-6 * np.abs(stored).max())


@pytest.mark.skipif(not run.available("bergson"), reason=run.missing("bergson"))
def test_bergson_is_the_plain_dot_product_where_nothing_is_projected(result, tokens, queries, gradients, tmp_path):
    """A damping so large that of R only each module's mean eigenvalue is left: sign, scale and order are pinned."""
    damping = 1e7
    folder = _prepared(tmp_path, tokens, queries)
    options = {"layer": result["concept_layer"], "modules": ".*", "projection_dim": 0, "damping": damping}
    run.call("bergson", "bergson_scores", folder, **options)
    traced, per_query = gradients
    for kind, asked in per_query.items():
        expected = torch.zeros(len(tokens), dtype=torch.float64)
        for i, name in enumerate(result["modules"]):
            G = torch.stack([one[name][2] for one in traced])
            mean = torch.stack([gradient[i] for gradient in asked]).mean(0)
            expected += torch.einsum("noi,oi->n", G, mean) / (damping * G.square().mean())
        scores = np.load(folder / f"scores_{kind}_train_dot.npy")
        np.testing.assert_allclose(scores, expected, atol=1e-5 * expected.abs().max())

    with run.rounds("bergson", "bergson_collect", folder, layer=2) as one:
        times = [one() for _ in range(2)]
    assert all(one["seconds"] > 0 and one["bytes_per_example"] == 14 * 256 * 4 for one in times)


@pytest.mark.skipif(not run.available("bergson"), reason=run.missing("bergson"))
def test_a_script_that_fails_shows_the_end_of_its_log(tokens, queries, tmp_path):
    folder = _prepared(tmp_path, tokens, queries)
    with pytest.raises(run.PeerFailed, match="no linear map matches 'nothing'"):
        run.call("bergson", "bergson_scores", folder, modules="nothing")
