"""Sparse autoencoders at rest: imported and published folders, labels, and features as concepts.

A feature is the concept ``sae:ID/N`` without anybody making it one: its direction is row N of the decoder.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from service import codec, keys, results, sae, saelens
from service.cache import LoadingCache
from service.contracts import ConceptRecord, ModelRecord
from service.errors import Conflict, Damaged, Invalid, NotFound, TooLarge
from service.registry import SAES, Registry, check_id
from service.rows import F32
from service.sae import Sae
from service.sae_records import Label, Labels, SaeRecord, SaeTraining
from service.saelens import CONFIG, SCALER, SPARSITY, WEIGHTS, SaeConfig
from service.storage import Storage, sha256_bytes
from service.terms import Pooling

METHOD = "sae_feature"
MOST_BYTES = 4 << 30  # of weights
_MOST_JSON = 16 << 20
_KEPT_BYTES = 1 << 30  # of SAEs in this process; the newest one stays, however large
_CONCEPT = re.compile(r"sae:([^/]{1,140})/([0-9]{1,9})")
_LABELS = "labels.json"

_kept: LoadingCache[Sae] = LoadingCache(_KEPT_BYTES, lambda held: held.nbytes)  # by their hash, which says it all


# --- importing ------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a SAELens folder that are used. Raises Invalid naming what is missing, TooLarge."""
    if not folder.is_dir():
        raise Invalid("sae_folder_not_found", f"There is no folder {folder}.", param="path")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".pt", ".pth", ".bin", ".pkl"})
        found = f" It has {', '.join(pickled[:3])}, which is not read: it may run code." if pickled else ""
        detail = (
            f"{folder} has no {' and no '.join(missing)}: not a folder of SAELens.{found} Save it with "
            "sae.save_model(folder)."
        )
        raise Invalid("not_an_sae", detail, param="path")
    files = {}
    for name in (CONFIG, WEIGHTS, SPARSITY, SCALER):
        path, most = folder / name, _MOST_JSON if name.endswith(".json") else MOST_BYTES
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > most:
            raise TooLarge("sae_too_large", f"{path} has {size} bytes; {most} are the most.", param="path")
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise Invalid("file_not_readable", f"{path}: {error.strerror}.", param="path") from error
    return files


def describe(
    sae_id: str,
    files: Mapping[str, bytes],
    model: ModelRecord,
    *,
    source: str,
    centred: bool | None = None,
    pooling: Pooling | None = None,
    training: SaeTraining | None = None,
) -> SaeRecord:
    """The record of an SAE for ``model``, its weights read and checked. Raises Invalid naming what does not fit.

    ``centred``: whether rows lose their mean over the d dimensions first, where the configuration does not say so
    or says it of a model that has no such mean to lose.
    """
    check_id(sae_id, param="id")
    config = _config(files)
    if config.d_in != model.width:
        detail = f"It reads {config.d_in} dimensions; model {model.id!r} has {model.width}."
        raise Invalid("sae_of_other_width", detail, param="model", context={"width": model.width})
    if config.layer > model.n_layers:
        detail = (
            f"It sits at {config.hook_name}; model {model.id!r} has {model.n_layers} blocks, counted from 0 there."
        )
        raise Invalid("sae_hook", detail, param="model", context={"n_layers": model.n_layers})
    means = _has_means(model)
    centred = config.centred and means if centred is None else centred
    config = replace(config, centred=centred)
    sae.load(config, files[WEIGHTS])
    if SPARSITY in files and log_sparsity(files[SPARSITY]).shape != (config.d_sae,):
        detail = f"{SPARSITY} does not hold a number for each of {config.d_sae} features."
        raise Invalid("sae_weights", detail, param=SPARSITY)
    notes = []
    if config.centring_unknown and means and not centred and training is None:
        notes.append(
            "Its old configuration does not say whether the model's writing weights were centred, as "
            "TransformerLens does by default; rows are taken as they are. If they were, import it with 'centred'."
        )
    hashes = {name: sha256_bytes(data) for name, data in files.items()}
    return SaeRecord(
        id=sae_id,
        model=model.id,
        model_fingerprint=model.fingerprint,
        lineage=model.lineage,
        layer=config.layer,
        width=config.d_in,
        features=config.d_sae,
        architecture=config.architecture,
        k=config.k,
        pooling=pooling,
        hook_name=config.hook_name,
        normalisation=config.normalisation,
        centred=centred,
        source=source,
        training=training,
        notes=tuple(notes),
        files=hashes,
        sha256=codec.digest(["sae", hashes, centred]),
        created_at=codec.now(),
    )


def publish(registry: Registry, record: SaeRecord, files: Mapping[str, bytes]) -> SaeRecord:
    """Store the folder, then the record. The same SAE of the same model under the same id is no error, and puts
    files back that are damaged or gone.

    Raises Conflict.
    """
    known = registry.find(SAES, record.id)
    if known is not None and (known.sha256, known.model) == (record.sha256, record.model):
        _mend(registry.storage, known, files)
    if known is None:
        registry.storage.publish(
            folder(record), {k: v for k, v in files.items() if k != CONFIG}, (CONFIG, files[CONFIG])
        )
        try:
            registry.add(SAES, record.id, record)
        except Conflict:  # at the same moment by somebody else
            known = registry.get(SAES, record.id)
    if known is not None and (known.sha256, known.model) != (record.sha256, record.model):
        detail = f"There is another SAE {record.id!r}. Choose another id."
        raise Conflict("sae_exists", detail, param="id")
    return known or record


def _mend(storage: Storage, record: SaeRecord, files: Mapping[str, bytes]) -> None:
    for name, sha256 in record.files.items():
        path = f"{folder(record)}/{name}"
        try:
            storage.read(path, sha256=sha256, cached=False)
        except (NotFound, Damaged):
            storage.write(path, files[name])


def _config(files: Mapping[str, bytes]) -> SaeConfig:
    return saelens.parse(*(_json(files, name) for name in (CONFIG, SCALER)))


def _json(files: Mapping[str, bytes], name: str) -> Any:
    try:
        return json.loads(files[name]) if name in files else None
    except (ValueError, RecursionError) as error:
        raise Invalid("not_an_sae", f"{name} is not valid JSON: {str(error)[:200]}.", param=name) from error


def _has_means(model: ModelRecord) -> bool:
    """Whether centring says anything: TransformerLens does it where norms subtract the mean, not with RMSNorm."""
    try:
        config = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    nested = config.get("text_config")
    return not any("rms_norm_eps" in each for each in (config, nested) if isinstance(each, dict))


def log_sparsity(data: bytes) -> F32:
    """(d_sae,) log10 of how often each feature fired while the SAE was trained, as SAELens saves it."""
    return sae.tensors_of(data, SPARSITY).get("sparsity", np.zeros(0, np.float32))


# --- reading --------------------------------------------------------------------------------------------


def folder(record: SaeRecord) -> str:
    """Where its files lie: a folder that SAELens loads."""
    return f"saes/{record.id}/{record.sha256[:16]}"


def file(storage: Storage, record: SaeRecord, name: str) -> bytes:
    """One of its files, checked. Raises Damaged, NotFound."""
    return storage.read(f"{folder(record)}/{name}", sha256=record.files[name])


def read(storage: Storage, record: SaeRecord) -> Sae:
    """The SAE, kept in memory while it is used. Raises Damaged."""

    def load() -> Sae:
        files = {name: file(storage, record, name) for name in record.files if name != SPARSITY}
        return sae.load(replace(_config(files), centred=record.centred), files[WEIGHTS])

    return _kept.get(record.sha256, load)


def directions(held: Sae) -> F32:
    """(d_sae, d_in) rows of the decoder with unit norm; those that are zero stay so."""
    norms = sae.decoder_norms(held)
    return (held.W_dec / np.where(norms > 0, norms, np.float32(1))[:, None]).astype(np.float32)


# --- features as concepts -------------------------------------------------------------------------------


def split(concept_id: str) -> tuple[str, int] | None:
    """SAE and feature of ``sae:ID/N``; None for the id of a registered concept."""
    found = _CONCEPT.fullmatch(concept_id)
    return (found[1], int(found[2])) if found else None


def concept_id(sae_id: str, feature: int) -> str:
    return f"sae:{sae_id}/{feature}"


def check_feature(record: SaeRecord, feature: int, *, param: str) -> int:
    """``feature`` if the SAE has it, else NotFound."""
    if not 0 <= feature < record.features:
        detail = f"SAE {record.id!r} has features 0 to {record.features - 1}, and no {feature}."
        raise NotFound("feature_not_found", detail, param=param)
    return feature


def concept(
    registry: Registry, sae_id: str, feature: int, *, param: str = "concept", pooling: Pooling | None = None
) -> ConceptRecord:
    """The feature as a concept, registered or not; ``pooling`` where the SAE has none of its own.

    Raises NotFound, and Invalid for a feature whose decoder row is zero.
    """
    record = registry.get(SAES, sae_id, param=param)
    check_feature(record, feature, param=param)
    norm = float(np.linalg.norm(read(registry.storage, record).W_dec[feature]))
    if norm == 0:
        detail = f"Feature {feature} of SAE {sae_id!r} has a decoder row of zeros: it has no direction."
        raise Invalid("zero_direction", detail, param=param)
    return ConceptRecord(
        id=concept_id(sae_id, feature),
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        lineage=record.lineage,
        layer=record.layer,
        pooling=record.pooling or pooling or Pooling.RESPONSE_MEAN,
        width=record.width,
        method=METHOD,
        norm=norm,
        auroc_held_out=None,
        n_positive=0,
        n_negative=0,
        provenance={"sae": sae_id, "sae_sha256": record.sha256, "feature": feature},
        sha256=codec.digest([METHOD, record.sha256, feature]),
        created_at=record.created_at,
    )


def direction(storage: Storage, concept: ConceptRecord) -> F32:
    """v̂ of such a concept, read off the decoder."""
    sae_id, feature = concept.provenance["sae"], int(concept.provenance["feature"])
    stored = results.read_sealed(storage, f"saes/{sae_id}/record.json", SaeRecord)
    row = read(storage, stored).W_dec[feature].astype(np.float64)
    return (row / np.linalg.norm(row)).astype(np.float32)


# --- labels ---------------------------------------------------------------------------------------------


def labels(storage: Storage, record: SaeRecord) -> Labels:
    """What has been said of its features. Raises Damaged."""
    try:
        return results.read_sealed(storage, _labels_file(record), Labels)
    except NotFound:
        return Labels()


def label(
    redis: Redis, storage: Storage, record: SaeRecord, said: list[tuple[int, str]], author: str | None
) -> Labels:
    """Attach labels to features; what was said before stays, and what is said again is not repeated."""
    at = codec.now()
    new = [Label(check_feature(record, each, param="feature"), text, author, at) for each, text in said]
    with redis.lock(keys.lock(f"saes:{record.id}:labels"), timeout=keys.LOCK_TTL_S):
        held = labels(storage, record)
        latest = {each.feature: (each.text, each.author) for each in held.labels}
        fresh = tuple(each for each in new if latest.get(each.feature) != (each.text, each.author))
        if fresh:
            held = Labels((*held.labels, *fresh))
            storage.write(_labels_file(record), results.sealed(held))
    return held


def _labels_file(record: SaeRecord) -> str:
    return labels_file(record.id)


def labels_file(sae_id: str) -> str:
    return f"saes/{sae_id}/{_LABELS}"
