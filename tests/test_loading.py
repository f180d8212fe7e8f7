"""A model loaded in half precision, with a LoRA or without: what the library itself loads, buffers included."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedConfig

from service.terms import Lora
from tests import tiny
from tests.test_families import CONFIGS, folders
from workers.models import load

HALF = ("bfloat16", "float16")
LENGTH = 1500  # positions at which rounded rotary frequencies are off by radians
TOKENIZER = tiny.byte_pairs()
_SIZES = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
_SIZES |= {"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048, "pad_token_id": None}
LONG: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(hidden_size=32, **_SIZES),
    "gemma": GemmaConfig(hidden_size=40, head_dim=20, **_SIZES),  # embeddings times √40, which is rounded
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loading")


def lora(model: Any, folder: Path, **options: Any) -> Path:
    """A LoRA that matters, saved."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped: Any = get_peft_model(model, LoraConfig(**settings | options))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return folder


def long_model(root: Path, family: str) -> Path:
    folder = root / f"{family} long"
    if not folder.exists():
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(LONG[family])
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mode", ["none", "merged", "adapter"])
@pytest.mark.parametrize("dtype", HALF)
def test_buffers_are_those_of_the_library(root, family, mode, dtype):
    """As it makes them for this precision, or before it rounds them; and every parameter is in it."""
    base, adapter = folders(root, family)
    about = {} if mode == "none" else {"adapter": str(adapter), "lora": Lora(mode)}
    ours = load(str(base), dtype, **about).model
    theirs = dict(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).named_buffers())
    found = dict(ours.named_buffers())
    assert set(found) == set(theirs)
    for name, buffer in theirs.items():
        assert found[name].dtype in {buffer.dtype, torch.float32}, name
        assert torch.equal(found[name].to(buffer.dtype), buffer), name
    assert {parameter.dtype for parameter in ours.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("family", LONG)
@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("dtype", HALF)
def test_far_into_the_context_a_lora_computes_what_the_whole_model_does(root, family, mode, dtype):
    base, exact = long_model(root, family), getattr(torch, dtype)
    adapter = lora(AutoModelForCausalLM.from_pretrained(base), root / f"{family} {mode} {dtype} lora")
    if mode == "merged":
        wrapped: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        wrapped.merge_and_unload().save_pretrained(root / f"{family} {dtype} whole")
        theirs: Any = AutoModelForCausalLM.from_pretrained(root / f"{family} {dtype} whole", dtype=exact)
    else:
        whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=exact)
        theirs = PeftModel.from_pretrained(whole, str(adapter), autocast_adapter_dtype=False)
    ours = load(str(base), dtype, adapter=str(adapter), lora=Lora(mode)).model
    ids = torch.from_numpy(tiny.random_tokens(0, LENGTH, vocab=300).ids)[None]
    with torch.no_grad():
        found, expected = ours(input_ids=ids).logits[0, -100:], theirs(input_ids=ids).logits[0, -100:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 6}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
    ],
)
def test_ranks_and_scales_by_module_compute_what_peft_computes(root, options):
    base = long_model(root, "llama")
    adapter = lora(AutoModelForCausalLM.from_pretrained(base), root / f"patterns {sorted(options)}", **options)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    ids = torch.from_numpy(tiny.random_tokens(0, 40, vocab=300).ids)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        for mode in (Lora.MERGED, Lora.ADAPTER):
            found = load(str(base), "float32", adapter=str(adapter), lora=mode).model(input_ids=ids).logits
            assert (found - expected).abs().max() < 1e-4 * (plain - expected).abs().max()
