"""SAELens' configuration of a sparse autoencoder, read and written: what its weights mean, and where it sits.

Both of the library's formats are read: the nested one (version 6, what concerns the model under ``metadata``) and
the flat one before it, whose oldest files name neither an architecture nor a hook with its number. What would have
to be guessed is refused by name. Source: sae_lens 6.54, ``loading/pretrained_sae_loaders.py`` and ``saes/``.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from service.errors import Invalid

CONFIG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "activation_scaler.json",
)
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
NONE, LAYER_NORM, CONSTANT_NORM = "none", "layer_norm", "constant_norm_rescale"
_AVERAGE, _WHITENING = "expected_average_only_in", "covariance_whitening"
_HOOK = re.compile(r"blocks\.([0-9]{1,6})\.hook_resid_(pre|post)")
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
}
_LARGEST_SCALE = 1e30  # more leaves float32
_WRITTEN_AS = "6.0.0"  # the format that ``write`` follows


@dataclass(frozen=True)
class SaeConfig:
    """``layer``: Whence's, the output of block ``layer``. ``scale``: what inputs are multiplied with first."""

    architecture: str
    d_in: int
    d_sae: int
    hook_name: str
    layer: int
    k: int | None = None  # of topk
    apply_b_dec_to_input: bool = True
    normalisation: str = NONE
    rescale_by_decoder_norm: bool = False  # of topk: the k are chosen by what they add to the output
    scale: float = 1.0
    centred: bool = (
        False  # inputs less their mean over the d dimensions: TransformerLens centred the model's weights
    )
    model_name: str | None = None
    centring_unknown: bool = False  # an old file, which does not say
    finetuned: bool = False  # features are multiplied by ``scaling_factor`` before they are decoded


def parse(config: Any, scaler: Any = None) -> SaeConfig:
    """The meaning of ``cfg.json``, and of ``activation_scaler.json`` where there is one.

    Raises Invalid naming the setting that cannot be honoured exactly.
    """
    if not isinstance(config, dict):
        raise _not_an_sae("it is no JSON object")
    flat = _flat(config)
    architecture = flat.get("architecture") or "standard"
    k, activation = flat.get("k"), flat.get("activation_fn") or "relu"
    if _old(config) and activation == "topk":
        k = _object(flat.get("activation_fn_kwargs"), "activation_fn_kwargs").get("k")
        architecture = "topk"
    elif _old(config) and activation != "relu":
        detail = f"Its activation function is {str(activation)[:80]!r}; SAEs with relu or topk can be imported."
        raise Invalid("sae_activation", detail, param="activation_fn_str")
    if architecture not in ARCHITECTURES:
        detail = (
            f"Its architecture is {str(architecture)[:80]!r}; those that can be imported are "
            f"{', '.join(ARCHITECTURES)} (a trained batchtopk is saved as jumprelu by SAELens itself)."
        )
        raise Invalid("sae_architecture", detail, param="architecture")
    d_in, d_sae = _count(flat, "d_in"), _count(flat, "d_sae")
    if architecture == "topk" and not (isinstance(k, int) and _is_count(k) and k <= d_sae):
        raise _not_an_sae(f"a topk SAE of {d_sae} features needs its k, and has {k!r}", "k")
    name, layer = _hook(flat)
    normalisation, scale = _normalisation(flat.get("normalize_activations"), scaler)
    kwargs = _object(flat.get("model_from_pretrained_kwargs"), "model_from_pretrained_kwargs")
    return SaeConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        hook_name=name,
        layer=layer,
        k=k if architecture == "topk" else None,
        apply_b_dec_to_input=_flag(flat, "apply_b_dec_to_input", True),
        normalisation=normalisation,
        rescale_by_decoder_norm=architecture == "topk" and _flag(flat, "rescale_acts_by_decoder_norm", False),
        scale=scale,
        centred=_flag(kwargs, "center_writing_weights", False),
        model_name=flat.get("model_name") if isinstance(flat.get("model_name"), str) else None,
        centring_unknown=_old(config) and "center_writing_weights" not in kwargs,
        finetuned=_flag(flat, "finetuning_scaling_factor", False),
    )


def write(config: SaeConfig, metadata: Mapping[str, Any]) -> bytes:
    """``cfg.json`` of a topk SAE on raw activations, as the library reads it; ``metadata`` travels with it."""
    about = {"sae_lens_version": _WRITTEN_AS, "sae_lens_training_version": None, "model_name": config.model_name}
    plain = {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": config.normalisation,
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": config.rescale_by_decoder_norm,
        "metadata": {**about, "hook_name": config.hook_name, **metadata},
    }
    return json.dumps(plain, indent=2, ensure_ascii=False).encode()


def weights(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """``sae_weights.safetensors``; the same tensors give the same bytes."""
    return save_safetensors({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


def hook_of(layer: int) -> str:
    """The library's name for the output of block ``layer``, which it counts from 0."""
    return f"blocks.{layer - 1}.hook_resid_post"


# --- parts of a configuration ---------------------------------------------------------------------------


def _old(config: Mapping[str, Any]) -> bool:
    """Before version 6, by the library's own rule."""
    version = config.get("sae_lens_version") or _object(config.get("metadata"), "metadata").get("sae_lens_version")
    found = re.match(r"[0-9]{1,6}", str(version)) if version else None
    return found is None or int(found[0]) < 6


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings side by side under the names of today."""
    every = {**_object(config.get("metadata"), "metadata"), **{k: v for k, v in config.items() if k != "metadata"}}
    if "activation_fn_str" in every:
        every.setdefault("activation_fn", every["activation_fn_str"])
    for old, new in _OLD_NAMES.items():
        if old in every:
            every.setdefault(new, every[old])
    return every


def _hook(flat: Mapping[str, Any]) -> tuple[str, int]:
    """Hook name, its number filled in, and Whence's layer."""
    name, number = flat.get("hook_name"), flat.get("hook_layer")
    if not isinstance(name, str):
        raise _not_an_sae("it names no hook_name", "hook_name")
    name = name.replace("{layer}", str(number))
    found = _HOOK.fullmatch(name)
    if found is None or flat.get("hook_head_index") is not None:
        what = "one head" if found else f"{name[:120]!r}"
        detail = (
            f"It was trained on {what}; Whence knows the residual stream at the output of a block: "
            "blocks.N.hook_resid_post (its layer N + 1) or blocks.N.hook_resid_pre (layer N)."
        )
        raise Invalid("sae_hook", detail, param="hook_name")
    if isinstance(number, int) and number != int(found[1]):
        detail = f"Its hook is {name}, but it says that its layer is {number}: which is meant cannot be known."
        raise Invalid("sae_hook", detail, param="hook_layer")
    layer = int(found[1]) + (found[2] == "post")
    if layer == 0:
        detail = f"{name} is the embedding, before the first block; Whence's layers are outputs of blocks, from 1."
        raise Invalid("sae_hook", detail, param="hook_name")
    return name, layer


def _normalisation(given: Any, scaler: Any) -> tuple[str, float]:
    """How inputs are brought to size: at run time, and by a constant that was not folded into the weights."""
    if isinstance(given, bool):  # of the oldest files
        given = _AVERAGE if given else NONE
    given = NONE if given is None else given
    if given in (NONE, LAYER_NORM, CONSTANT_NORM):  # whatever JSON has: a set would want to hash it
        return str(given), 1.0
    if given == _AVERAGE:
        scale = _object(scaler, SCALER).get("scaling_factor")
        if isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < _LARGEST_SCALE:
            return NONE, float(scale)
        detail = (
            f"Its inputs are to be multiplied by a factor ({_AVERAGE}) that is neither in the weights nor in "
            f"{SCALER}. Fold it in first: sae.fold_activation_norm_scaling_factor(factor), sae.save_model(folder)."
        )
        raise Invalid("sae_normalisation", detail, param="normalize_activations")
    how = ", which SAELens folds into the weights before it saves one for use" if given == _WHITENING else ""
    detail = (
        f"Its inputs are normalised by {str(given)[:80]!r}{how}; {NONE}, {LAYER_NORM}, {CONSTANT_NORM} and "
        f"{_AVERAGE} can be imported."
    )
    raise Invalid("sae_normalisation", detail, param="normalize_activations")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _not_an_sae(f"{name} is no JSON object", name)
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(flat: Mapping[str, Any], name: str) -> int:
    value = flat.get(name)
    if not _is_count(value):
        raise _not_an_sae(f"{name} is {value!r}, not a number of dimensions", name)
    return int(value)  # pyright: ignore[reportArgumentType]


def _flag(flat: Mapping[str, Any], name: str, default: bool) -> bool:
    value = flat.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _not_an_sae(f"{name} is {value!r}, neither true nor false", name)
    return value


def _not_an_sae(why: str, param: str = CONFIG) -> Invalid:
    return Invalid("not_an_sae", f"{CONFIG} does not describe an SAE of SAELens: {why}.", param=param)
