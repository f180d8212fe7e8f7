"""Tiny SAEs in SAELens' own folders, with the library's features and reconstructions of some inputs.

    PYTHON_WITH_SAE_LENS tests/data/make_saelens.py tests/data/saelens [FOLDER…]

Made by sae-lens 6.54.12 (benchmarks/peers/saelens.txt). ``expected.safetensors`` of a folder holds ``inputs``
(n, 8), ``features`` (n, 16) and ``rebuilt`` (n, 8): what ``SAE.load_from_disk`` of that very folder says. Old
formats, which this version of the library reads and no longer writes, are its own weights under an old cfg.json.
Further folders, whoever made them, are loaded and get an ``expected.safetensors`` too.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D, F, N = 8, 16, 24
HOOK = "blocks.1.hook_resid_post"


def config(architecture: str, **about: Any) -> dict[str, Any]:
    metadata = {"model_name": "tiny", "hook_name": HOOK, "prepend_bos": True}
    return {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": metadata, **about}


def old(**about: Any) -> dict[str, Any]:
    return {"model_name": "tiny", "d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu", **about}


CASES: dict[str, dict[str, Any]] = {
    "standard": config("standard"),
    "layer_norm": config("standard", normalize_activations="layer_norm"),
    "constant_norm": config("jumprelu", normalize_activations="constant_norm_rescale", apply_b_dec_to_input=False),
    "jumprelu": config("jumprelu"),
    "topk": config("topk", k=3),
    "topk_rescaled": config("topk", k=3, rescale_acts_by_decoder_norm=True),
    "gated": config("gated"),
}
OLD: dict[str, tuple[str, dict[str, Any]]] = {  # whose weights, under which cfg.json
    "old_standard": (
        "standard",
        old(hook_point="blocks.1.hook_resid_pre", hook_point_layer=1, normalize_activations=False),
    ),
    "old_topk": (
        "topk",
        old(hook_name=HOOK, hook_layer=1, activation_fn_str="topk", activation_fn_kwargs={"k": 5}),
    ),
    "old_gated": ("gated", old(architecture="gated", hook_name=HOOK, hook_layer=1, apply_b_dec_to_input=False)),
    "old_jumprelu": ("jumprelu", old(architecture="jumprelu", hook_name=HOOK, normalize_activations="layer_norm")),
}


def make(out: Path, others: list[Path]) -> None:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEConfig

    generator = torch.Generator().manual_seed(0)
    for name, about in CASES.items():
        class_ = SAE.get_sae_class_for_architecture(about["architecture"])
        sae = class_(SAEConfig.from_dict(about))
        with torch.no_grad():
            for parameter in sae.parameters():
                spread = 0.3 if parameter.ndim == 1 else 1.0
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if hasattr(sae, "threshold"):
                sae.threshold.abs_()
        sae.save_model(out / name)
        expect(SAE, out / name, generator)
    for name, (of, about) in OLD.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        weights = load_file(out / of / "sae_weights.safetensors")
        if name == "old_standard":  # for a while the library saved one that does nothing
            weights["scaling_factor"] = torch.ones(F)
        save_file(weights, out / name / "sae_weights.safetensors")
        (out / name / "cfg.json").write_text(json.dumps(about))
        expect(SAE, out / name, generator)
    for folder in others:
        expect(SAE, folder, generator)
    save_file({"sparsity": torch.linspace(-4, 0, F)}, out / "standard" / "sparsity.safetensors")


def expect(library: Any, folder: Path, generator: torch.Generator) -> None:
    sae = library.load_from_disk(folder)
    inputs = 2 * torch.randn(N, sae.cfg.d_in, generator=generator) + 0.5
    with torch.no_grad():
        features = sae.encode(inputs)
        rebuilt = sae.decode(features)
    tensors = {"inputs": inputs, "features": features, "rebuilt": rebuilt}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
