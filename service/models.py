"""What can be told of a model folder without loading it: shape, fingerprints, lineage, and whether it is safe."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from redis import Redis

from service import adapters, codec, keys
from service.contracts import Checkpoint, ModelRecord, Point
from service.errors import Conflict, Invalid
from service.registry import MODELS, Registry
from service.storage import sha256_bytes, sha256_file
from service.work import Location, Reading

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")


def inspect(
    model_id: str,
    folder: Path,
    *,
    base: ModelRecord | None,
    checkpoints: list[tuple[Path, float]],
    redis: Redis,
) -> ModelRecord:
    """Describe the Hugging Face folder, or the LoRA of ``base`` in it. Raises Invalid naming what is missing or not
    allowed in it.
    """
    if adapters.is_adapter(folder):
        return _adapter(model_id, folder, base=base, checkpoints=checkpoints, redis=redis)
    config = _config(folder, param="path")
    fingerprint = weights_fingerprint(folder, redis, param="path")
    for number, (path, _) in enumerate(checkpoints):
        param = f"checkpoints[{number}]"
        if _shape(_config(path, param=param)) != _shape(config):
            raise Invalid("shape_mismatch", f"{path} has another shape than {folder}.", param=param)
    if base is not None and (base.n_layers, base.width) != (_first(config, _LAYERS), _first(config, _WIDTH)):
        raise Invalid(
            "shape_mismatch",
            f"The declared base {base.id!r} has {base.n_layers} layers of width {base.width}; {folder} has "
            f"{_first(config, _LAYERS)} of {_first(config, _WIDTH)}. A fine-tune has the shape of its base.",
            param="base",
        )
    template = _chat_template(folder)
    return ModelRecord(
        id=model_id,
        path=str(folder),
        fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        chat_template_sha256=sha256_bytes(template.encode()) if template else None,
        architecture=(config.get("architectures") or ["unknown"])[0],
        n_layers=_first(config, _LAYERS),
        width=_first(config, _WIDTH),
        context_length=_find(config, _CONTEXT),
        base=base.id if base else None,
        lineage=base.lineage if base else fingerprint,
        checkpoints=tuple(
            Checkpoint(str(path), weights_fingerprint(path, redis, param=f"checkpoints[{number}]"), weight)
            for number, (path, weight) in enumerate(checkpoints)
        ),
        created_at=codec.now(),
    )


def _adapter(
    model_id: str,
    folder: Path,
    *,
    base: ModelRecord | None,
    checkpoints: list[tuple[Path, float]],
    redis: Redis,
) -> ModelRecord:
    """A LoRA on the registered ``base``; its checkpoints are LoRAs as well."""
    if base is None or base.adapter is not None:
        what = "on nothing" if base is None else f"on {base.id!r}, an adapter itself"
        detail = f"{folder} is a LoRA {what}. Register the folder of its base first, and name its id as 'base'."
        raise Invalid("adapter_needs_base", detail, param="base")
    for number, (path, _) in enumerate(checkpoints):
        if str(path) != base.path and not adapters.is_adapter(path):
            detail = f"{path} is no adapter folder; the checkpoints of a LoRA are LoRAs on its base, or the base."
            raise Invalid("shape_mismatch", detail, param=f"checkpoints[{number}]")
    run = [("path", folder), *((f"checkpoints[{number}]", path) for number, (path, _) in enumerate(checkpoints))]
    found = [
        base.fingerprint
        if str(path) == base.path
        else _adapted_fingerprint(base.fingerprint, path, redis, param=param)
        for param, path in run
    ]
    tokenizer = folder if (folder / "tokenizer.json").is_file() else Path(base.tokenizer_path or base.path)
    template = _chat_template(tokenizer)
    return replace(
        base,
        id=model_id,
        fingerprint=found[0],
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        chat_template_sha256=sha256_bytes(template.encode()) if template else None,
        base=base.id,
        checkpoints=tuple(
            Checkpoint(str(path), fingerprint, weight)
            for (path, weight), fingerprint in zip(checkpoints, found[1:], strict=True)
        ),
        created_at=codec.now(),
        adapter=str(folder),
        tokenizer_path=str(tokenizer),
    )


def end_point(model: ModelRecord) -> Point:
    """The model itself as the last point of its run."""
    return Point(model.id, model.path, model.fingerprint, adapter=model.adapter)


def location(model: ModelRecord, point: Point | None = None) -> Location:
    """Where a point of the model's run lies; None: the model itself. A run has one tokenizer."""
    point = point or end_point(model)
    return Location(point.path, model.tokenizer_path or model.path, point.adapter)


def register(registry: Registry, record: ModelRecord) -> ModelRecord:
    """Add the model; the same folder with the same weights under the same id is not an error."""
    known = registry.find(MODELS, record.id)
    if known is None:
        registry.add(MODELS, record.id, record)
        return record
    if replace(record, created_at=known.created_at) == known:
        return known
    raise Conflict(
        "model_exists",
        f"There is a model {record.id!r} with another path, weights, tokenizer or lineage. Choose another id.",
        param="id",
    )


def check_fingerprints(location: Location, reading: Reading, redis: Redis | None = None) -> None:
    """Raise Conflict unless the folders still hold the weights and the tokenizer that were registered."""
    folder, texts = Path(location.model_path), Path(location.tokenizer_path)
    _config(folder, param="model")  # says so when the folder or a file of it is gone
    if not (texts / "tokenizer.json").is_file():
        raise Invalid("no_tokenizer", f"{texts} has no tokenizer.json.", param="model")
    weights = weights_fingerprint(folder, redis, param="model")
    if location.adapter is not None:
        weights = _adapted_fingerprint(weights, Path(location.adapter), redis, param="model")
    found = weights, tokenizer_fingerprint(texts)
    if found != (reading.model_fingerprint, reading.tokenizer_fingerprint):
        raise Conflict(
            "model_changed",
            f"The weights or the tokenizer in {folder} are not those that were registered. Put them back, or "
            "register them under a new id.",
            param="model",
        )


def weights_fingerprint(folder: Path, redis: Redis | None, *, param: str) -> str:
    """sha256 over the names and hashes of all weight files and config.json; ``redis`` caches them.

    The configuration is part of it: the same weights under another rope base or activation function are
    another model.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        found = f" It has {', '.join(others[:3])}: save it again with safe_serialization=True." if others else ""
        raise Invalid("no_safetensors", f"{folder} has no *.safetensors file.{found}", param=param)
    return codec.digest([[path.name, _hash(path, redis)] for path in [*files, folder / "config.json"]])


def _adapted_fingerprint(weights: str, folder: Path, redis: Redis | None, *, param: str) -> str:
    """Of a LoRA on weights of that fingerprint. Raises Invalid for what is not a plain LoRA."""
    adapters.check(folder, param=param)
    files = (folder / adapters.WEIGHTS, folder / adapters.CONFIG)
    return codec.digest([weights, [[path.name, _hash(path, redis)] for path in files]])


def _hash(path: Path, redis: Redis | None) -> str:
    if redis is None:
        return sha256_file(path)
    status = path.stat()
    key = json.dumps([str(path), status.st_size, status.st_mtime_ns])
    known: Any = redis.hget(keys.FILE_HASHES, key)
    if known is None:
        known = sha256_file(path)
        redis.hset(keys.FILE_HASHES, key, known)
    return known


def is_four_bit(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration says that its weights are stored in 4 bits by bitsandbytes."""
    said = config.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "bitsandbytes" and bool(said.get("load_in_4bit"))


def _config(folder: Path, *, param: str) -> dict[str, Any]:
    try:
        there = folder.is_dir()
    except OSError:  # a name longer than the system allows
        there = False
    if not there:
        raise Invalid("model_folder_not_found", f"There is no folder {folder}.", param=param)
    if (folder / adapters.CONFIG).is_file():
        detail = f"{folder} holds an adapter ({adapters.CONFIG}) beside a model. Give each a folder of its own."
        raise Invalid("adapter_in_model_folder", detail, param=param)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Invalid(
            "not_a_model", f"{folder} has no config.json: not a Hugging Face model.", param=param
        ) from error
    except ValueError as error:
        raise Invalid("not_a_model", f"{path} is not valid JSON: {error}.", param=param) from error
    if not isinstance(config, dict):
        raise Invalid("not_a_model", f"{path} is not a JSON object.", param=param)
    if "auto_map" in config:
        raise Invalid(
            "remote_code", f"{folder} needs its own Python code (auto_map); Whence runs none.", param=param
        )
    quantized = config.get("quantization_config")
    if quantized and not is_four_bit(config):
        named = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise Invalid(
            "unsupported_quantization",
            f"{path} is quantised by {named!r}: only bitsandbytes in 4 bits is supported (its weights are put "
            "back into floating point). Register the model it was made from, or a dequantised copy.",
            param=param,
        )
    if not (folder / "tokenizer.json").is_file():
        raise Invalid("no_tokenizer", f"{folder} has no tokenizer.json (a fast tokenizer is needed).", param=param)
    for wanted in (_LAYERS, _WIDTH):
        if not isinstance(_find(config, wanted), int):
            raise Invalid("not_a_model", f"{path} names none of {', '.join(wanted)}.", param=param)
    return config


def _shape(config: dict[str, Any]) -> tuple[int, int]:
    return _first(config, _LAYERS), _first(config, _WIDTH)


def _find(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    nested = config.get("text_config")
    for level in (config, nested if isinstance(nested, dict) else {}):
        for name in names:
            value = level.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = _find(config, names)
    assert value is not None  # noqa: S101  (_config has checked it)
    return value


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer, as generation_config.json says, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        several = told if isinstance(told, list) else [told]
        if found := tuple(each for each in several if isinstance(each, int)):
            return found
    return ()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the tokenizer's files, chat template included: another one gives other tokens and masks."""
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return codec.digest([[path.name, sha256_file(path)] for path in present])


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    except (ValueError, AttributeError) as error:
        raise Invalid("no_tokenizer", f"{path} or {config} cannot be read: {error}.", param="path") from error
    return template if isinstance(template, str) else None
