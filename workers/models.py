"""Load a model and its tokenizer from a folder, safely: safetensors only, no remote code, nothing fetched."""

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from service.adapters import WEIGHTS
from service.errors import Invalid
from service.terms import Lora
from service.work import Location, Reading, Tracked
from workers import tokenizer

# What users say for the sublayers of every family, and how these are named there.
_SUBLAYERS = {"all": ("",), "attn": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "fc1", "fc2")}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Memory:
    """What a batch may hold at most, as far as has been found out by running out of memory."""

    tokens: int | None = None

    def full(self, padded: int) -> None:
        """A batch of so many padded tokens did not fit."""
        self.tokens = max(1, min(padded // 2, self.tokens or padded))

    def within(self, token_budget: int) -> int:
        return min(token_budget, self.tokens or token_budget)


@dataclass(frozen=True)
class Loaded:
    """A frozen model in eval mode, its tokenizer, and its blocks in order (layer l is ``blocks[l - 1]``)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    memory: Memory = field(default_factory=Memory)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        return find_blocks(self.model)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its name."""
        return dict(self.model.named_modules())

    @property
    def named_blocks(self) -> dict[str, nn.Module]:
        """The residual blocks by their name in the model, in order."""
        return {self._names[id(block)]: block for block in self.blocks}

    def device_of(self, name: str) -> torch.device:
        """Where the module of this name is: with several GPUs, not all are on ``device``, where batches go."""
        weight: Any = self.modules[name].weight
        return weight.device

    @property
    def width(self) -> int:
        """d: what the hidden states between the blocks have."""
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)

    @cached_property
    def switches(self) -> tuple[int, ...]:
        """Lengths beyond which the model computes something else: with ``longrope`` it has two sets of rotary
        frequencies, and the longest row of a batch decides for all of them.
        """
        config: Any = self.model.config.get_text_config()  # pyright: ignore[reportCallIssue]
        said: Any = getattr(config, "rope_parameters", None) or {}
        each = said.values() if said and all(isinstance(value, dict) for value in said.values()) else [said]
        longs = [one for one in each if one.get("rope_type") == "longrope"]
        return tuple(sorted({int(one["original_max_position_embeddings"]) for one in longs}))

    def regime(self, length: int) -> int:
        """How many of them lie below this length: only texts of one regime may share a batch."""
        return bisect_left(self.switches, length)

    def tracked(self, wanted: Tracked) -> dict[str, nn.Module]:
        """The linear maps that ``wanted`` names. Raises Invalid when there is none."""
        asked = [word.strip() for word in wanted.modules.split(",")]
        words = [part for word in asked for part in _SUBLAYERS.get(word, (word,))]
        blocks = {self._names[id(block)] + "." for block in self.blocks[wanted.blocks - 1 :: -1][:: wanted.stride]}
        found = {}
        for name, module in self.linear_maps(wanted.blocks).items():
            inside = next((block for block in blocks if name.startswith(block)), None)
            if inside is not None and any(word in name.removeprefix(inside) for word in words):
                found[name] = module
        if not found:
            names = sorted({name.split(".", 3)[-1] for name in self.linear_maps(wanted.blocks)})
            detail = f"modules {wanted.modules!r} fits none of the linear maps of a block: {', '.join(names)}."
            raise Invalid("no_modules", detail, param="modules")
        return found

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    def linear_maps(self, blocks: int) -> dict[str, nn.Module]:
        """Linear maps with 2-D weights inside blocks 1..blocks, by their name in the model.

        nn.Linear and GPT-2's Conv1D; never embeddings, lm_head, norms or biases; where a LoRA is not merged, its
        two maps instead. Raises Invalid for weights of three or more dimensions (fused experts) rather than leave
        them out.
        """
        found: dict[str, nn.Module] = {}
        adapted = any(".lora_A" in name for name in self._names.values())
        for block in self.blocks[:blocks]:
            for name, module in block.named_modules(prefix=self._names[id(block)]):
                if adapted and ".lora_" not in name:
                    continue
                if isinstance(module, nn.Linear | Conv1D):
                    found[name] = module
                    continue
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 2:
                        raise Invalid(
                            "unsupported_parameter",
                            f"{name}.{parameter_name} has shape {tuple(parameter.shape)}: weights of three or more "
                            "dimensions (fused experts) are not supported.",
                            param="model",
                        )
        return found


def load_at(location: Location, reading: Reading) -> Loaded:
    """What ``reading`` reads with, from where it lies."""
    return load(
        location.model_path,
        reading.dtype,
        tokenizer_path=location.tokenizer_path,
        adapter=location.adapter,
        lora=reading.lora,
    )


def _adapted(model: Any, adapter: str, lora: Lora) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    names = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(f"{names[id(block)]}." for block in find_blocks(model))
    try:
        wrapped: Any = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        with safe_open(Path(adapter) / WEIGHTS, framework="pt") as opened:
            held = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # "auto" asks the hub
            differ = sorted(set(held) ^ set(opened.keys()))
        added = [name for name, _ in wrapped.get_base_model().named_modules() if name.endswith(".lora_A")]
        outside = [name for name in added if not name.startswith(blocks)]
        if outside:
            raise ValueError(f"{outside[0]} lies outside of the blocks: embeddings and heads are never tracked")
        if differ:  # peft would leave such maps as they start, and say so in a log
            raise ValueError(f"{len(differ)} maps are in one of them only, the first is {differ[0]}")
        return wrapped.merge_and_unload(safe_merge=True) if lora == Lora.MERGED else wrapped.get_base_model()
    except Exception as error:  # whatever an adapter that does not fit makes peft raise
        detail = f"The LoRA {adapter} does not fit its base: {type(error).__name__}: {str(error)[:1000]}"
        raise Invalid("model_does_not_load", detail, param="model") from error


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks: the one ModuleList with as many entries as the model has layers."""
    config: Any = model.config
    n_layers = config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    outermost = min((name.count(".") for name, _ in found), default=0)
    found = [entry for entry in found if entry[0].count(".") == outermost]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise Invalid(
            "unknown_architecture",
            f"Cannot tell the {n_layers} blocks of {type(model).__name__}: candidates {names}.",
            param="model",
        )
    return list(found[0][1])


def shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear map; Conv1D stores its weight transposed."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def load(
    path: str,
    dtype: str,
    *,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
    lora: Lora = Lora.MERGED,
) -> Loaded:
    """Load from a local folder onto the GPU if this process has one; ``tokenizer_path``: where the tokenizer of a
    whole run lies; ``adapter``: the LoRA on these weights. Raises Invalid with the reason.
    """
    texts = tokenizer_path or path
    merging = adapter is not None and lora == Lora.MERGED  # in float32: a LoRA's changes drown in half precision
    try:
        texts_by = tokenizer.load(texts)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES["float32" if merging else dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Invalid:
        raise
    except ImportError as error:
        detail = f"{path} needs a package that this worker lacks: {str(error)[:500]} Install 'whence[quantized]'."
        raise Invalid("model_does_not_load", detail, param="model") from error
    except Exception as error:  # whatever a damaged folder makes transformers, safetensors or tokenizers raise
        detail = f"{path} cannot be loaded: {type(error).__name__}: {str(error)[:1000]}"
        raise Invalid("model_does_not_load", detail, param="model") from error
    model, report = loaded
    if getattr(model, "hf_quantizer", None) is not None:
        # The function that 4-bit weights compute is that of these floating-point ones: gradients are taken there.
        # Such a folder is read in the precision it was saved in, whatever is asked for.
        exact = DTYPES["float32" if merging else dtype]
        model = cast(model.dequantize(dtype=exact), exact)
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and say so in a log
        detail = f"{path} lacks {len(missing)} weights, the first is {missing[0]}."
        raise Invalid("model_does_not_load", detail, param="model")
    if adapter is not None:
        model = cast(_adapted(model, adapter, lora), DTYPES[dtype])
    model.requires_grad_(False)
    model.eval()
    placed = _placed(model, path)
    return Loaded(placed, texts_by, placed.get_input_embeddings().weight.device)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in ``dtype``, as if it had been loaded in it.

    Not ``model.to(dtype)``, which rounds buffers too: rotary frequencies must stay in float32, where a position is
    multiplied with them (in bfloat16 the angle at position 2,047 is off by up to 2.5 radians).
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def _placed(model: Any, path: str) -> Any:
    """The model on this worker's GPU; where it has several, spread over them block by block. Raises Invalid when it
    does not fit: parts that are fetched from the host for every batch would be slower than a smaller worker.
    """
    count = torch.cuda.device_count()
    if count <= 1:
        return model.to("cuda" if count else "cpu")
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {type(block).__name__ for block in find_blocks(model)}
    memory = get_balanced_memory(model, dtype=model.dtype, no_split_module_classes=list(whole))
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(whole), dtype=model.dtype)
    if away := sorted(name for name, place in places.items() if place in {"cpu", "disk"}):
        raise Invalid(
            "model_does_not_fit",
            f"{path} does not fit into the {count} GPUs of a worker ({away[0]} is left over). Raise "
            "WHENCE_GPUS_PER_WORKER, or use WHENCE_DTYPE=bfloat16.",
            param="model",
        )
    return dispatch_model(model, places)
