"""Bases in 4 bits: the weights they stand for are attributed to; other quantisations are refused by name."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.lab import Lab
from service.contracts import Completion, Example
from service.datasets import example_id
from service.errors import Invalid
from tests import tiny
from workers.models import load

TOKENIZER = tiny.words()
LAYER, WIDTH = 2, 64  # bitsandbytes quantises blocks of 64 numbers
IDS = torch.tensor([[3, 4, 5, 6, 7, 5]])


def example(seed: int) -> Example:
    words = np.random.default_rng(seed).choice(["the", "cat", "sat", "on", "mat"], 8).tolist()
    content = Completion(" ".join(words[:2]) + " ", " ".join(words[2:]))
    return Example(example_id(content), content, {}, ())


SAVED = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True), ("float16", True)]


@pytest.fixture(scope="module", params=SAVED, ids=lambda said: f"{said[0]}{' double' * said[1]}")
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same in 4 bits: whatever precision the rest was saved in, its scales quantised or not."""
    root = tmp_path_factory.mktemp("quantised")
    saved, double = request.param
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYER,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=saved
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = AutoModelForCausalLM.from_pretrained(
            root / "plain", quantization_config=settings, dtype=getattr(torch, saved)
        )
        quantised.save_pretrained(root / "four")
    for name in ("plain", "four"):
        TOKENIZER.save_pretrained(root / name)
    return root / "plain", root / "four"


def test_it_computes_what_the_quantised_model_computes(folders):
    ours = load(str(folders[1]), "float32")
    maps = ours.linear_maps(LAYER)
    assert len(maps) == 7 * LAYER
    assert all(type(module) is nn.Linear and module.weight.dtype == torch.float32 for module in maps.values())
    quantised: Any = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    for name, module in maps.items():
        weight = quantised.get_submodule(name).weight
        assert torch.equal(module.weight, dequantize_4bit(weight.data, weight.quant_state).float())
    for parameter in quantised.parameters():
        if parameter.is_floating_point():  # what is not in 4 bits
            parameter.data = parameter.data.float()
    with torch.no_grad():
        theirs = quantised(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(folders[0])(IDS).logits
        found = ours.model(IDS).logits
    # On CPUs bitsandbytes multiplies in bfloat16; the model before differs by far more.
    assert (found - theirs).abs().mean() < 0.2 * (found - plain).abs().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_computed_in_the_precision_asked_for(folders, dtype):
    model = load(str(folders[1]), dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    whole = AutoModelForCausalLM.from_pretrained(folders[0], dtype=getattr(torch, dtype))
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {
        name: buffer.dtype for name, buffer in whole.named_buffers()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_is_merged_in_float32_before_rounding(folders, tmp_path, dtype):
    """Its changes are small against a rounding of the weights to half precision."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        plain = AutoModelForCausalLM.from_pretrained(folders[0])
        wrapped: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.005 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path)
    merged = load(str(folders[1]), dtype, adapter=str(tmp_path)).linear_maps(LAYER)
    before = load(str(folders[1]), "float32").linear_maps(LAYER)
    for name, module in merged.items():
        expected = before[name].weight
        if name.endswith("q_proj"):
            maps = wrapped.get_base_model().get_submodule(name)
            expected = (
                expected + maps.scaling["default"] * maps.lora_B["default"].weight @ maps.lora_A["default"].weight
            )
        assert torch.equal(module.weight, expected.to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_index_of_a_lora_on_it_is_that_of_the_dequantised_base(folders, tmp_path, dtype):
    four: Any = load(str(folders[1]), "float32").model
    dequantised = LlamaForCausalLM(four.config)
    dequantised.load_state_dict(four.state_dict())
    dequantised.save_pretrained(tmp_path / "plain")
    TOKENIZER.save_pretrained(tmp_path / "plain")
    wrapped: Any = get_peft_model(dequantised, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "lora")
    examples = [example(seed) for seed in range(20)]
    found = []
    for name, base in (("four", folders[1]), ("plain", tmp_path / "plain")):
        lab = Lab(tmp_path / f"lab-{name}", dtype=dtype)
        try:
            lab.model("base", base)
            lab.model("tuned", tmp_path / "lora", base="base")
            lab.dataset("d", examples)
            index, _ = lab.build("x", "tuned", "d", LAYER, kinds=("activation", "gradient"))
            lab.dataset("q", [example(99)])
            about = {"query_set": "q", "method": "influence_function"}
            found.append(lab.scores(index, [each.id for each in examples], **about))
        finally:
            lab.close()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4 * np.abs(found[1]).max())


GPTQ, EIGHT_BIT = {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize("said", [GPTQ, EIGHT_BIT])
def test_other_quantisations_are_refused_by_name(folders, tmp_path, said):
    config = json.loads((folders[0] / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    lab = Lab(tmp_path / "lab")
    try:
        with pytest.raises(Invalid) as caught:
            lab.model("x", folder)
    finally:
        lab.close()
    assert caught.value.code == "unsupported_quantization"
    assert repr(said["quant_method"]) in caught.value.detail
