"""Load a model and its tokenizer from a folder, safely: safetensors only, no remote code, nothing fetched."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from service.errors import Invalid

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A frozen model in eval mode, its tokenizer, and its blocks in order (layer l is ``blocks[l - 1]``)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks: the one ModuleList with as many entries as the model has layers."""
        n_layers = self.model.config.get_text_config().num_hidden_layers
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layers
        ]
        outermost = min((name.count(".") for name, _ in found), default=0)
        found = [entry for entry in found if entry[0].count(".") == outermost]
        if len(found) != 1:
            names = ", ".join(name for name, _ in found) or "none"
            raise Invalid(
                "unknown_architecture",
                f"Cannot tell the {n_layers} blocks of {type(self.model).__name__}: candidates {names}.",
                param="model",
            )
        return list(found[0][1])

    def linear_maps(self, blocks: int) -> dict[str, nn.Module]:
        """Linear maps with 2-D weights inside blocks 1..blocks, by their name in the model.

        nn.Linear and GPT-2's Conv1D; never embeddings, lm_head, norms or biases. Raises Invalid for
        weights of three or more dimensions (fused experts) rather than leave them out.
        """
        prefix = {id(module): name for name, module in self.model.named_modules()}
        found: dict[str, nn.Module] = {}
        for block in self.blocks[:blocks]:
            for name, module in block.named_modules(prefix=prefix[id(block)]):
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


def shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear map; Conv1D stores its weight transposed."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def load(path: str, dtype: str, *, tokenizer_path: str | None = None) -> Loaded:
    """Load from a local folder onto the GPU if this process has one; ``tokenizer_path``: where the tokenizer of a
    whole run lies. Raises Invalid with the reason.
    """
    texts = tokenizer_path or path
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(texts, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged folder makes transformers, safetensors or tokenizers raise
        detail = f"{path} cannot be loaded: {type(error).__name__}: {str(error)[:1000]}"
        raise Invalid("model_does_not_load", detail, param="model") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and say so in a log
        detail = f"{path} lacks {len(missing)} weights, the first is {missing[0]}."
        raise Invalid("model_does_not_load", detail, param="model")
    if not (tokenizer.is_fast and (Path(texts) / "tokenizer.json").is_file()):
        raise Invalid("no_tokenizer", f"{texts} has no fast tokenizer (tokenizer.json).", param="model")
    model.requires_grad_(False)
    model.eval()
    return Loaded(model.to(device), tokenizer, device)
