"""Every family of models, whole, with a LoRA merged and with a LoRA beside it: gradients, λ and J against autograd.

The oracles see no hooks: weights require gradients, one example at a time, one ``torch.autograd.grad`` each. What a
merged LoRA computes is added up from its file by hand.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from service.terms import FactorLabels, FactorPositions, Lora, LossReduction, Pooling
from tests import tiny
from workers import curvature
from workers.batches import Batch, collate
from workers.gradients import Sides, loss_coordinates
from workers.jacobian import jacobian
from workers.masks import Tokens
from workers.models import Loaded, load, shape

BLOCKS, LAYER, WIDTH = 2, 1, 16
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
_SLIDING = {"sliding_window": 4}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 64}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, _SIZES | {"num_key_value_heads": 2} | _IDS),
    "llama, tied and with biases": (
        LlamaConfig,
        _SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True} | _IDS,
    ),
    "mistral": (MistralConfig, _SIZES | _GROUPED | _SLIDING | _IDS),
    "qwen2": (Qwen2Config, _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True} | _IDS),
    "qwen3": (Qwen3Config, _SIZES | _GROUPED | _IDS),
    "gemma": (GemmaConfig, _SIZES | _GROUPED | _IDS),
    "gemma2": (Gemma2Config, _SIZES | _GROUPED | _SLIDING | {"query_pre_attn_scalar": 4} | _IDS),
    "gemma3": (Gemma3TextConfig, _SIZES | _GROUPED | _SLIDING | {"query_pre_attn_scalar": 4} | _IDS),
    "gpt_neox": (GPTNeoXConfig, _SIZES | _IDS),
    "phi": (PhiConfig, _SIZES | {"num_key_value_heads": 2} | _IDS),
    "phi3": (Phi3Config, _SIZES | {"num_key_value_heads": 2} | _IDS),
    "olmo, clipped in place": (OlmoConfig, _SIZES | {"num_key_value_heads": 2, "clip_qkv": 0.5} | _IDS),
    "gpt2": (
        GPT2Config,
        {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
    ),
}
# q, k, v or what they are fused into, and what follows the activation: both sides of a block.
TARGETS = {"gpt_neox": ["query_key_value", "dense_4h_to_h"], "gpt2": ["c_attn", "c_proj"]}
TARGETS |= {"phi": ["q_proj", "fc2"], "phi3": ["qkv_proj", "gate_up_proj"]}
MODES = ("none", "merged", "adapter")

families = pytest.mark.parametrize("family", CONFIGS)
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@cache
def folders(root: Path, family: str) -> tuple[Path, Path]:
    """A base and a LoRA on it: random weights in which every path matters."""
    kind, sizes = CONFIGS[family]
    tokenizer = tiny.byte_pairs()
    base, adapter = root / family, root / f"{family} lora"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **sizes))
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        targets = TARGETS.get(family, ["q_proj", "v_proj", "down_proj"])
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        config.fan_in_fan_out = family == "gpt2"
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        wrapped.save_pretrained(adapter)
    return base, adapter


def opened(root: Path, family: str, mode: str, dtype: str = "float32") -> Loaded:
    base, adapter = folders(root, family)
    if mode == "none":
        return load(str(base), dtype)
    return load(str(base), dtype, adapter=str(adapter), lora=Lora(mode))


@dataclass(frozen=True)
class Oracle:
    """The gradients of single examples, as autograd has them."""

    model: torch.nn.Module
    weights: dict[str, torch.nn.Parameter]
    transposed: set[str]

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """Module → G (d_out, d_in)."""
        found = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros_like(weight) if G is None else G.T if name in self.transposed else G
            for (name, weight), G in zip(self.weights.items(), found, strict=True)
        }

    def loss(self, one: Tokens, reduction: LossReduction) -> Tensor:
        ids = torch.from_numpy(one.ids)
        log_p = self.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        terms = [-log_p[t - 1, ids[t]] for t in range(1, len(ids)) if one.target[t]]
        return sum(terms) / (len(terms) if reduction == LossReduction.MEAN else 1)

    def pooled(self, one: Tokens, layer: int) -> Tensor:
        """(d,) mean of h_l over the targets: an entry below the last is the output of a block."""
        ids = torch.from_numpy(one.ids)
        states = self.model(input_ids=ids[None], use_cache=False, output_hidden_states=True).hidden_states[layer]
        return states[0, torch.from_numpy(one.target)].float().mean(0)


def oracle(root: Path, family: str, mode: str, dtype: str = "float32") -> Oracle:
    """The same model by other means; of a merged LoRA W + α/r · B A from its file."""
    base, adapter = folders(root, family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = load_file(adapter / "adapter_model.safetensors")
    told = json.loads((adapter / "adapter_config.json").read_text())
    scale = told["lora_alpha"] / told["r"]
    if mode == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).get_base_model()
    modules = dict(model.named_modules())
    blocks = [
        name for name, each in modules.items() if isinstance(each, torch.nn.ModuleList) and len(each) == BLOCKS
    ]
    (blocks,) = [name for name in blocks if name.count(".") == min(each.count(".") for each in blocks)]
    if mode == "merged":
        with torch.no_grad():
            for name, A in held.items():
                if ".lora_A." not in name:
                    continue
                change = scale * held[name.replace(".lora_A.", ".lora_B.")] @ A
                weight = modules[name.split(".lora_A.")[0].removeprefix("base_model.model.")].weight
                weight += change.T if family == "gpt2" else change
    for parameter in model.parameters():  # and no buffer: rotary frequencies stay in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    weights = {
        name.removesuffix(".weight"): parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and name.startswith(f"{blocks}.") and (mode != "adapter" or ".lora_" in name)
    }
    transposed = {name for name in weights if family == "gpt2" and ".lora_" not in name}
    return Oracle(model, weights, transposed)


TOKENS = [tiny.random_tokens(seed, length, vocab=300) for seed, length in ((1, 12), (2, 7), (3, 19))]


def batch(reduction: LossReduction) -> Batch:
    return collate(TOKENS, pooling=Pooling.RESPONSE_MEAN, reduction=reduction, device=tiny.CPU)


def bases(loaded: Loaded, modules: dict[str, torch.nn.Module]) -> dict[str, Sides]:
    """Some orthogonal basis for either side of every map."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        sides = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in shape(module)]
        found[name] = Sides(*sides)
    return found


def in_basis(side: Sides, G: Tensor) -> Tensor:
    return side.out.T @ G.float() @ side.into


def close(found: Tensor, expected: Tensor, within: float) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error <= within, f"relative error {error:.2e}"


@families
@modes
def test_the_tracked_maps_are_all_that_autograd_sees(root, family, mode):
    loaded = opened(root, family, mode)
    modules, expected = loaded.linear_maps(BLOCKS), oracle(root, family, mode)
    assert set(modules) == set(expected.weights)
    for name, module in modules.items():
        rows, columns = expected.weights[name].shape
        assert shape(module) == ((columns, rows) if name in expected.transposed else (rows, columns))
        torch.testing.assert_close(module.weight, expected.weights[name].data, rtol=1e-6, atol=1e-6)


@families
@modes
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_gradients_of_the_loss(root, family, mode, dtype, within):
    loaded, expected = opened(root, family, mode, dtype), oracle(root, family, mode, dtype)
    modules = loaded.linear_maps(BLOCKS)
    sides = bases(loaded, modules)
    rows, _ = loss_coordinates(loaded.model, modules, sides, batch(LossReduction.MEAN))
    for one, row in zip(TOKENS, rows, strict=True):
        gradients = expected.gradients(expected.loss(one, LossReduction.MEAN))
        close(row, torch.cat([in_basis(side, gradients[name]).flatten() for name, side in sides.items()]), within)


@families
@modes
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_eigenvalues(root, family, mode, dtype, within):
    loaded, expected = opened(root, family, mode, dtype), oracle(root, family, mode, dtype)
    modules = loaded.linear_maps(BLOCKS)
    sides = bases(loaded, modules)
    found: dict[str, Tensor] = {}
    about = {"labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}
    curvature.add_moments(found, modules, sides, loaded.model, batch(LossReduction.SUM), **about)
    each = [expected.gradients(expected.loss(one, LossReduction.SUM)) for one in TOKENS]
    for name, side in sides.items():
        close(found[name], sum(in_basis(side, G[name]).square() for G in each), within)


@families
@modes
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 6e-2)])
def test_jacobians(root, family, mode, dtype, within):
    loaded, expected = opened(root, family, mode, dtype), oracle(root, family, mode, dtype)
    modules = loaded.linear_maps(LAYER)
    sides = bases(loaded, modules)
    chosen = torch.eye(WIDTH)[[0, 5, 11]]
    found = jacobian(
        loaded.model, loaded.blocks, modules, sides, batch(LossReduction.MEAN), layer=LAYER, directions=chosen
    )
    states = [expected.pooled(one, LAYER) for one in TOKENS]
    for row, direction in enumerate(chosen):
        gradients = expected.gradients(sum(state @ direction for state in states))
        ours = torch.cat([found[name][row] for name in modules])
        close(ours, torch.cat([in_basis(sides[name], gradients[name]).flatten() for name in modules]), within)


def test_merging_happens_in_float32_before_rounding(root):
    """Rounded first, the LoRA's small changes would be lost against the weights."""
    base, adapter = folders(root, "llama")
    found = load(str(base), "bfloat16", adapter=str(adapter)).linear_maps(1)
    expected = oracle(root, "llama", "merged", "float32").weights
    for name, module in found.items():
        assert torch.equal(module.weight, expected[name].to(torch.bfloat16)), name
    assert np.mean([module.weight.dtype == torch.bfloat16 for module in found.values()]) == 1
