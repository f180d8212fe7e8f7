"""A sparse autoencoder's maths in numpy, float32: which features fire on a row, and what they add up to.

Every architecture is SAELens' own (sae_lens 6.54, ``saes/*.py``), checked against the library's outputs in
tests/test_saelens.py: x̂ = decode(encode(x)), features z (n, d_sae) ≥ 0, directions the rows of ``W_dec``.

    standard   z = relu(x W + b)                        jumprelu   z = relu(p) where p = x W + b > threshold
    topk       the k largest of x W + b, through relu
    gated      z = relu((x W) e^r + b_mag) where x W + b_gate > 0
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from service.errors import Invalid
from service.rows import F32
from service.saelens import CONSTANT_NORM, LAYER_NORM, WEIGHTS, SaeConfig

I32, I64 = NDArray[np.int32], NDArray[np.int64]

_BLOCK_BYTES = 64 << 20  # of features of a block of rows, before the few that fire are kept
_EPSILON = np.float32(1e-5)  # SAELens' layer norm
_NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_SCALING = "finetuning_scaling_factor"


@dataclass(frozen=True)
class Sae:
    """``W_enc`` (d_in, d_sae), ``W_dec`` (d_sae, d_in), ``b_dec`` (d_in,), and the vectors (d_sae,) that the
    architecture has by their own names.
    """

    config: SaeConfig
    W_enc: F32
    W_dec: F32
    b_dec: F32
    vectors: Mapping[str, F32]

    @property
    def nbytes(self) -> int:
        return self.W_enc.nbytes + self.W_dec.nbytes + sum(each.nbytes for each in self.vectors.values())


@dataclass(frozen=True)
class Undo:
    """What turns a normalised row back: x = x' · ``scale`` + ``shift``, (n, 1) each."""

    shift: F32
    scale: F32


@dataclass(frozen=True)
class Firing:
    """The features that fire on each row, sparse: row i has those from ``starts[i]`` to ``starts[i + 1]``."""

    starts: I64  # (n + 1,)
    features: I32  # (m,) ascending within a row
    values: F32  # (m,) > 0

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def owners(self) -> I64:
        """(m,) the row of every entry."""
        return np.repeat(np.arange(self.rows), np.diff(self.starts))


# --- reading weights --------------------------------------------------------------------------------------


def load(config: SaeConfig, weights: bytes) -> Sae:
    """The SAE of a ``sae_weights.safetensors``. Raises Invalid naming the tensor that does not fit."""
    tensors = tensors_of(weights, WEIGHTS)
    if "log_threshold" in tensors:  # of older checkpoints
        tensors["threshold"] = np.exp(tensors.pop("log_threshold"))
    if "scaling_factor" in tensors:
        tensors[_SCALING] = tensors.pop("scaling_factor")
    scaling = tensors.pop(_SCALING, None)
    d, f = config.d_in, config.d_sae
    wanted = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,), **dict.fromkeys(_VECTORS[config.architecture], (f,))}
    if scaling is not None:
        tensors[_SCALING], wanted[_SCALING] = scaling, (f,)
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            said = "is missing" if found is None else f"has shape {found.shape}"
            detail = f"{WEIGHTS} of a {config.architecture} SAE: {name} {said}; it is to be {shape}."
            raise Invalid("sae_weights", detail, param=WEIGHTS)
        if not np.isfinite(found).all():
            raise Invalid("sae_weights", f"{WEIGHTS}: {name} holds NaN or infinity.", param=WEIGHTS)
    unknown = sorted(tensors.keys() - wanted.keys())
    if unknown:
        detail = f"{WEIGHTS} holds {', '.join(unknown)[:200]}, of which a {config.architecture} SAE has no use."
        raise Invalid("sae_weights", detail, param=WEIGHTS)
    if scaling is not None:
        plain = bool(np.allclose(scaling, 1.0))
        if not plain and not config.finetuned:
            detail = f"{WEIGHTS} holds a scaling_factor, and cfg.json says finetuning_scaling_factor: false."
            raise Invalid("sae_weights", detail, param=WEIGHTS)
        if plain:
            del wanted[_SCALING]
    vectors = {name: tensors[name] for name in wanted if name not in {"W_enc", "W_dec", "b_dec"}}
    return Sae(config, tensors["W_enc"], tensors["W_dec"], tensors["b_dec"], vectors)


def tensors_of(data: bytes, file: str) -> dict[str, F32]:
    """Every tensor of a safetensors file in float32; bfloat16 too, which numpy does not know. Raises Invalid."""
    try:
        found: Any = deserialize(data)
    except SafetensorError as error:
        raise Invalid("sae_weights", f"{file} is not a safetensors file: {error}.", param=file) from error
    tensors = {}
    for name, about in found:
        kind, raw = about["dtype"], about["data"]
        if kind == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in _NUMBERS:
            values = np.frombuffer(raw, _NUMBERS[kind]).astype(np.float32)
        else:
            detail = f"{file}: {name} is of type {kind}; floating point of 16, 32 or 64 bits can be read."
            raise Invalid("sae_weights", detail, param=file)
        tensors[name] = values.reshape(about["shape"])
    return tensors


_VECTORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


# --- encode, decode -----------------------------------------------------------------------------------------


def encode(sae: Sae, rows: F32) -> tuple[F32, Undo]:
    """(n, d_in) activations → (n, d_sae) features, and what ``decode`` needs to put them back at their place."""
    x, undo = _normalised(sae.config, rows)
    if sae.config.apply_b_dec_to_input:
        x = x - sae.b_dec
    pre, v = x @ sae.W_enc, sae.vectors
    match sae.config.architecture:
        case "gated":
            return np.where(
                pre + v["b_gate"] > 0, _relu(pre * np.exp(v["r_mag"]) + v["b_mag"]), np.float32(0)
            ), undo
        case "jumprelu":
            pre += v["b_enc"]
            return np.where(pre > v["threshold"], _relu(pre), np.float32(0)), undo
        case "topk":
            pre += v["b_enc"]
            if sae.config.rescale_by_decoder_norm:
                pre *= decoder_norms(sae)
            return _top(_relu(pre), sae.config.k or sae.config.d_sae), undo
    return _relu(pre + v["b_enc"]), undo


def decode(sae: Sae, features: F32, undo: Undo | None = None) -> F32:
    """(n, d_sae) → (n, d_in). Without ``undo`` in the space of the normalised input, where that is another one."""
    if _SCALING in sae.vectors:
        features = features * sae.vectors[_SCALING]
    if sae.config.rescale_by_decoder_norm:
        features = features / decoder_norms(sae)
    out = features @ sae.W_dec + sae.b_dec
    return out if undo is None else out * undo.scale + undo.shift


def narrowed(sae: Sae, features: Sequence[int]) -> Sae:
    """An SAE of these features alone, for the cost of them: ``encode`` gives their columns of what the whole gives.

    Of TopK it gives what they are before the k largest are taken: which k those are, the other features say.
    """
    chosen = np.asarray(features, dtype=np.int64)
    config = replace(sae.config, d_sae=len(chosen), k=None if sae.config.k is None else max(1, len(chosen)))
    vectors = {name: each[chosen] for name, each in sae.vectors.items()}
    return Sae(config, np.ascontiguousarray(sae.W_enc[:, chosen]), sae.W_dec[chosen], sae.b_dec, vectors)


def firing(sae: Sae, rows: F32) -> Firing:
    """The features of many rows, in blocks of bounded memory."""
    parts = [sparse(encode(sae, block)[0]) for block in blocks_of(rows, sae.config.d_sae)]
    return joined(parts)


def joined(parts: list[Firing]) -> Firing:
    """Rows of several, in order."""
    if not parts:
        return Firing(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    counts = np.concatenate([np.diff(part.starts) for part in parts])
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    features = np.concatenate([part.features for part in parts])
    return Firing(starts, features, np.concatenate([part.values for part in parts]))


def blocks_of(rows: F32, d_sae: int) -> Iterator[F32]:
    """The rows in blocks whose features are within 64 MiB."""
    size = max(1, _BLOCK_BYTES // (4 * d_sae))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def decoder_norms(sae: Sae) -> F32:
    """(d_sae,)."""
    return np.sqrt(np.einsum("ij,ij->i", sae.W_dec, sae.W_dec))


def explained_variance(rows: F32, rebuilt: F32) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over the rows; 0 is what their mean alone explains."""
    total = float(((rows - rows.mean(axis=0)) ** 2).sum(dtype=np.float64))
    left = float(((rows - rebuilt) ** 2).sum(dtype=np.float64))
    return 1.0 - left / total if total > 0 else 0.0


def _normalised(config: SaeConfig, rows: F32) -> tuple[F32, Undo]:
    shift = np.zeros((len(rows), 1), np.float32)
    scale = np.full((len(rows), 1), 1 / config.scale, np.float32)
    x = rows
    if config.centred:
        shift = x.mean(axis=1, keepdims=True)
        x = x - shift
    if config.scale != 1:
        x = x * np.float32(config.scale)
    if config.normalisation == CONSTANT_NORM:
        size = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None] / np.float32(config.d_in**0.5)
        x, scale = x / np.maximum(size, np.finfo(np.float32).tiny), size
    elif config.normalisation == LAYER_NORM:
        mean = x.mean(axis=1, keepdims=True)
        x = x - mean
        size = x.std(axis=1, keepdims=True, ddof=1)
        x, scale, shift = x / (size + _EPSILON), size, shift + mean
    return x, Undo(shift, scale)


def _relu(values: F32) -> F32:
    return np.maximum(values, np.float32(0))


def _top(values: F32, k: int) -> F32:
    """The k largest of each row; zeros elsewhere."""
    if k >= values.shape[1]:
        return values
    kept = np.argpartition(values, -k, axis=1)[:, -k:]
    out = np.zeros_like(values)
    np.put_along_axis(out, kept, np.take_along_axis(values, kept, axis=1), axis=1)
    return out


def sparse(features: F32) -> Firing:
    rows, columns = np.nonzero(features)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=len(features)))])
    return Firing(starts.astype(np.int64), columns.astype(np.int32), features[rows, columns])
