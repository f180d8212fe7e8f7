"""SAELens' own folders give its own features and reconstructions, and what cannot be honoured is refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from service import sae, saelens
from service.errors import Invalid
from service.sae_tally import weakest
from service.saelens import parse

STORED = Path(__file__).parent / "data" / "saelens"
FOLDERS = sorted(path.name for path in STORED.iterdir() if path.is_dir())
HOOK = "blocks.1.hook_resid_post"


def read(folder: Path) -> sae.Sae:
    config = parse(json.loads((folder / saelens.CONFIG).read_text()))
    return sae.load(config, (folder / saelens.WEIGHTS).read_bytes())


def agrees(folder: Path) -> None:
    held, expected = read(folder), load_file(folder / "expected.safetensors")
    features, undo = sae.encode(held, expected["inputs"])
    np.testing.assert_allclose(features, expected["features"], atol=1e-4)
    np.testing.assert_allclose(sae.decode(held, features, undo), expected["rebuilt"], atol=1e-4)
    share = (features > 0).mean()
    assert 0.02 < share < 0.98  # neither nothing nor everything: the activation function has had its say


@pytest.mark.parametrize("name", FOLDERS)
def test_the_librarys_own_folders_encode_and_decode_as_it_does(name):
    agrees(STORED / name)


@pytest.mark.parametrize("name", FOLDERS)
def test_some_features_alone_are_columns_of_the_whole(name):
    held, x = read(STORED / name), load_file(STORED / name / "expected.safetensors")["inputs"]
    whole, some = sae.encode(held, x)[0], [5, 0, 11]
    found, _ = sae.encode(sae.narrowed(held, some), x)
    if held.config.k is not None:  # those beyond the k largest are there as well
        least = weakest(sae.sparse(whole))
        found[found < least[:, None] * (1 - 1e-5)] = 0
    np.testing.assert_allclose(found, whole[:, some], rtol=1e-4, atol=1e-6)
    assert found.any()


def test_every_architecture_and_format_is_among_them():
    configs = [json.loads((STORED / name / saelens.CONFIG).read_text()) for name in FOLDERS]
    assert {parse(each).architecture for each in configs} == set(saelens.ARCHITECTURES)
    assert {"metadata" in each for each in configs} == {True, False}
    assert sum(path.stat().st_size for path in STORED.rglob("*")) < 200_000


def test_the_live_library_agrees(tmp_path):
    """Opt-in: the library makes the folders anew, and loads one of ours (`make peers`, or SAELENS_PYTHON)."""
    python = Path(os.environ.get("SAELENS_PYTHON", ".peers/saelens/bin/python"))
    if not python.exists():
        pytest.skip(f"no {python}: `make peers` installs SAELens in an environment of its own")
    rng, ours, theirs = np.random.default_rng(0), tmp_path / "ours", tmp_path / "theirs"
    config = saelens.SaeConfig("topk", 12, 20, saelens.hook_of(3), 3, k=4, model_name="m")
    shapes = {"W_enc": (12, 20), "W_dec": (20, 12), "b_enc": 20, "b_dec": 12}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    ours.mkdir()
    (ours / saelens.CONFIG).write_bytes(saelens.write(config, {"whence": {"pooling": "response_mean"}}))
    (ours / saelens.WEIGHTS).write_bytes(saelens.weights(weights))
    command = [python, STORED.parent / "make_saelens.py", theirs, ours]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in theirs.iterdir()) == FOLDERS
    for folder in (ours, *theirs.iterdir()):
        agrees(folder)


# --- where it sits ----------------------------------------------------------------------------------------


def new(**about):
    metadata = {"sae_lens_version": "6.1.0", "hook_name": HOOK} | about.pop("metadata", {})
    return {"architecture": "topk", "k": 2, "d_in": 8, "d_sae": 16, "metadata": metadata} | about


def old(**about):
    return {"d_in": 8, "d_sae": 16, "hook_point": HOOK} | about


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.0.hook_resid_post", 1), ("blocks.11.hook_resid_post", 12), ("blocks.7.hook_resid_pre", 7)],
)
def test_hooks_are_outputs_of_blocks(hook, layer):
    assert parse(new(metadata={"hook_name": hook})).layer == layer
    assert parse(old(hook_point=hook)).layer == layer
    if "post" in hook:
        assert saelens.hook_of(layer) == hook


def test_old_files_name_their_layer_apart():
    config = parse(old(hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer=4))
    assert (config.layer, config.hook_name) == (4, "blocks.4.hook_resid_pre")
    assert config.centring_unknown


@pytest.mark.parametrize(
    ("config", "code", "says"),
    [
        ([], "not_an_sae", "no JSON object"),
        (new(d_in="8"), "not_an_sae", "d_in"),
        (new(k=17), "not_an_sae", "k"),
        (new(apply_b_dec_to_input="yes"), "not_an_sae", "apply_b_dec_to_input"),
        (new(architecture="temporal"), "sae_architecture", "temporal"),
        (new(architecture="skip_transcoder"), "sae_architecture", "standard, jumprelu, topk, gated"),
        (new(metadata={"hook_name": "blocks.3.hook_mlp_out"}), "sae_hook", "hook_mlp_out"),
        (new(metadata={"hook_name": "blocks.3.attn.hook_z"}), "sae_hook", "hook_z"),
        (new(metadata={"hook_name": "blocks.0.hook_resid_pre"}), "sae_hook", "embedding"),
        (new(metadata={"hook_head_index": 3}), "sae_hook", "one head"),
        (old(hook_point_layer=2), "sae_hook", "layer is 2"),
        (new(metadata={"hook_name": None}), "not_an_sae", "hook_name"),
        (old(activation_fn_str="tanh-relu"), "sae_activation", "tanh-relu"),
        (old(activation_fn_str="topk", activation_fn_kwargs={}), "not_an_sae", "k"),
        (new(normalize_activations="expected_average_only_in"), "sae_normalisation", "fold_activation_norm"),
        (old(normalize_activations=True), "sae_normalisation", "expected_average_only_in"),
        (new(normalize_activations="covariance_whitening"), "sae_normalisation", "covariance_whitening"),
        (new(normalize_activations={}), "sae_normalisation", "{}"),
        (new(metadata={"hook_name": f"blocks.{'9' * 5000}.hook_resid_post"}), "sae_hook", "999"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(config, code, says):
    with pytest.raises(Invalid) as caught:
        parse(config)
    assert caught.value.code == code
    assert says in caught.value.detail


# --- normalisation ----------------------------------------------------------------------------------------


def test_an_average_norm_is_applied_where_its_factor_is_known():
    """As if the library had folded it: W_enc times the factor, W_dec and b_dec over it."""
    factor, folder = 2.5, STORED / "standard"
    folded = read(folder)
    config = parse(
        new(architecture="standard", normalize_activations="expected_average_only_in"), {"scaling_factor": 2.5}
    )
    weights = load_file(folder / saelens.WEIGHTS)
    weights["W_enc"] = weights["W_enc"] / np.float32(factor)
    weights["W_dec"], weights["b_dec"] = (
        weights["W_dec"] * np.float32(factor),
        weights["b_dec"] * np.float32(factor),
    )
    held = sae.load(config, save(weights))
    rows = load_file(folder / "expected.safetensors")["inputs"]
    ours, undo = sae.encode(held, rows)
    theirs, _ = sae.encode(folded, rows)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(sae.decode(held, ours, undo), sae.decode(folded, theirs), atol=1e-4)


def test_centred_weights_see_rows_less_their_mean():
    centred = parse(new(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}, k=3))
    held = sae.load(centred, (STORED / "topk" / saelens.WEIGHTS).read_bytes())
    rows = load_file(STORED / "topk" / "expected.safetensors")["inputs"]
    ours, undo = sae.encode(held, rows)
    plain, _ = sae.encode(read(STORED / "topk"), rows - rows.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    np.testing.assert_allclose(undo.shift[:, 0], rows.mean(axis=1), atol=1e-6)


# --- weights ----------------------------------------------------------------------------------------------


def weights_of(name="standard", **changes) -> bytes:
    held = load_file(STORED / name / saelens.WEIGHTS) | changes
    return save({key: value for key, value in held.items() if value is not None})


def vector(value=1.0):
    return np.full(16, value, np.float32)


def test_finetuned_scales_multiply_what_is_decoded():
    config = parse(old(finetuning_scaling_factor=True))
    held = sae.load(config, weights_of(scaling_factor=vector(2.0)))
    features = np.eye(16, dtype=np.float32)
    np.testing.assert_allclose(sae.decode(held, features), 2 * held.W_dec + held.b_dec, rtol=1e-6)


def test_sixteen_bits_are_read_bfloat16_too():
    rows = np.array([[1.0, -2.5, 3.140625]], np.float32)
    header = {"x": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]}}
    text = json.dumps(header).encode()
    raw = (rows.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    found = sae.tensors_of(len(text).to_bytes(8, "little") + text + raw, "x")
    np.testing.assert_array_equal(found["x"], rows)
    half = sae.tensors_of(save({"x": rows.astype(np.float16)}), "x")
    np.testing.assert_allclose(half["x"], rows)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"not safetensors at all", "not a safetensors file"),
        (weights_of(b_enc=None), "b_enc is missing"),
        (weights_of(b_dec=np.zeros(9, np.float32)), "b_dec has shape (9,)"),
        (weights_of(b_enc=vector(np.nan)), "NaN"),
        (weights_of(threshold=vector()), "threshold"),
        (weights_of(scaling_factor=vector(2.0)), "finetuning_scaling_factor"),
        (weights_of(b_enc=np.zeros(16, np.int32)), "I32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data, says):
    with pytest.raises(Invalid) as caught:
        sae.load(parse(old()), data)
    assert caught.value.code == "sae_weights"
    assert says in caught.value.detail


def test_many_rows_are_encoded_in_blocks_and_come_out_the_same(monkeypatch):
    held = read(STORED / "topk")
    rows = load_file(STORED / "topk" / "expected.safetensors")["inputs"]
    whole, _ = sae.encode(held, rows)
    monkeypatch.setattr(sae, "_BLOCK_BYTES", 5 * 4 * 16)
    found = sae.firing(held, rows)
    assert len(list(sae.blocks_of(rows, 16))) == 5
    dense = np.zeros_like(whole)
    dense[found.owners(), found.features] = found.values
    np.testing.assert_allclose(dense, whole, atol=1e-6)
    assert (found.values > 0).all()
