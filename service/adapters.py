"""LoRA adapters, told from their folder without loading anything: is it a plain one, in safetensors?"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from service.errors import Invalid

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What a plain LoRA may say. Anything else that is set changes what the adapter computes.
_KNOWN = frozenset(
    {
        *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
        *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "loftq_config"),
    }
)
_STARTS = frozenset({"gaussian", "eva", "orthogonal"})  # those that leave the base's weights as they are
_REASONS = {
    "use_dora": "DoRA rescales whole weights by a learnt magnitude: its gradient is not that of two linear maps",
    "modules_to_save": "whole layers were trained beside the LoRA, and embeddings and heads are never tracked",
    "bias": "biases were trained beside the LoRA, and are never tracked",
    "lora_bias": "biases were trained beside the LoRA, and are never tracked",
    "target_parameters": "weights that are not linear maps (fused experts) are not supported",
    "trainable_token_indices": "embeddings were trained beside the LoRA, and are never tracked",
    "layer_replication": "repeated layers share their weights, and a shared map has no EK-FAC",
}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no whole model."""
    try:
        return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))
    except OSError:  # a name longer than the system allows
        return False


def check(folder: Path, *, param: str) -> None:
    """Raise Invalid, naming what is set, unless this is a plain LoRA in safetensors."""
    config = _config(folder, param=param)
    kind = str(config.get("peft_type", "none")).upper()
    if kind != "LORA":
        detail = f"{folder} is an adapter of type {kind}; LoRA is what is supported."
        raise Invalid("unsupported_adapter", detail, param=param)
    for name, value in config.items():
        if name == "init_lora_weights" and isinstance(value, str) and value.lower() == "mica":
            why = (
                "half of its maps were frozen while it was trained (MiCA), and would be tracked as if they were not"
            )
        elif name == "init_lora_weights" and isinstance(value, str) and value not in _STARTS:
            why = f"its start ({value!r}) changed the base's own weights; convert it to a plain LoRA first"
        elif name in _KNOWN or name == "init_lora_weights" or not value or (name, value) == ("bias", "none"):
            continue
        else:
            why = _REASONS.get(name, "it changes what the adapter computes in a way that is not supported")
        raise Invalid("unsupported_adapter", f"{folder / CONFIG} sets {name!r}: {why}.", param=param)
    weights = folder / WEIGHTS
    if not weights.is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
        found = f" It has {', '.join(others[:3])}: save it again as safetensors." if others else ""
        raise Invalid("no_safetensors", f"{folder} has no {WEIGHTS}.{found}", param=param)
    try:
        with safe_open(weights, framework="np") as opened:
            names = list(opened.keys())
    except Exception as error:  # whatever a damaged file makes safetensors raise
        raise Invalid("no_safetensors", f"{weights} cannot be read: {error}.", param=param) from error
    more = [name for name in names if ".lora_A." not in name and ".lora_B." not in name]
    if more or not names:
        held = f"holds {more[0]!r} beside LoRA maps: {_REASONS['modules_to_save']}" if more else "holds no weights"
        raise Invalid("unsupported_adapter", f"{weights} {held}.", param=param)


def maps(folder: Path) -> tuple[str, ...]:
    """The linear maps that a checked adapter changes, by their names in the base."""
    with safe_open(folder / WEIGHTS, framework="np") as opened:
        names = {name.partition(".lora_A.")[0] for name in opened.keys() if ".lora_A." in name}  # noqa: SIM118
    return tuple(sorted(name.removeprefix("base_model.model.") for name in names))


def _config(folder: Path, *, param: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Invalid("not_a_model", f"{path} cannot be read: {error}.", param=param) from error
    if not isinstance(config, dict):
        raise Invalid("not_a_model", f"{path} is not a JSON object.", param=param)
    return config
