"""What is told of a model folder without loading it: refusals name what is wrong, fingerprints follow the bytes."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from safetensors.numpy import save

from service import keys, models
from service.contracts import ModelRecord
from service.errors import Conflict, Invalid
from service.registry import MODELS, Registry

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "max_position_embeddings": 512,
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def weights(value: float) -> bytes:
    return save({"w": np.full((4, 4), value, dtype=np.float32)})


def build(folder: Path, *, value: float = 1.0, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "model.safetensors").write_bytes(weights(value))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "model")


@pytest.fixture
def inspect(redis: Redis) -> Callable[..., ModelRecord]:
    def run(
        folder: Path, *, name: str = "m", base: ModelRecord | None = None, checkpoints: Any = ()
    ) -> ModelRecord:
        return models.inspect(name, folder, base=base, checkpoints=list(checkpoints), redis=redis)

    return run


Inspect = Callable[..., ModelRecord]


# --- what is told -------------------------------------------------------------------------------------


def test_the_shape_comes_from_the_configuration(inspect: Inspect, folder: Path) -> None:
    record = inspect(folder)
    assert (record.n_layers, record.width, record.context_length) == (5, 64, 512)
    assert (record.architecture, record.path, record.base) == ("LlamaForCausalLM", str(folder), None)
    assert record.lineage == record.fingerprint
    assert record.checkpoints == ()


@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 5, "n_embd": 64, "n_positions": 512},
        {"num_layers": 5, "d_model": 64, "n_ctx": 512},
        {"text_config": {"num_hidden_layers": 5, "hidden_size": 64, "max_position_embeddings": 512}},
    ],
)
def test_other_families_spell_their_shape_otherwise(inspect: Inspect, folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    record = inspect(folder)
    assert (record.n_layers, record.width, record.context_length) == (5, 64, 512)
    assert record.architecture == "unknown"


def test_a_real_model_is_described(inspect: Inspect, shared_data: Path) -> None:
    record = inspect(shared_data / "stories260k")
    assert (record.n_layers, record.width, record.architecture) == (5, 64, "LlamaForCausalLM")
    assert record.chat_template_sha256 is None


def test_the_chat_template_is_hashed_wherever_it_stands(inspect: Inspect, folder: Path) -> None:
    assert inspect(folder).chat_template_sha256 is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    inside = inspect(folder).chat_template_sha256
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert inspect(folder).chat_template_sha256 == inside is not None
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert inspect(folder).chat_template_sha256 != inside


# --- refusals -----------------------------------------------------------------------------------------


def edit(**config: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "model_folder_not_found"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "not_a_model"),
    "config is no JSON": (write("config.json", b"{"), "not_a_model"),
    "config is no text": (write("config.json", b"\xff\xfe{}"), "not_a_model"),
    "config is a list": (write("config.json", b"[]"), "not_a_model"),
    "no layers": (edit(num_hidden_layers=None), "not_a_model"),
    "layers are text": (edit(num_hidden_layers="5"), "not_a_model"),
    "layers are true": (edit(num_hidden_layers=True), "not_a_model"),
    "no layer at all": (edit(num_hidden_layers=0), "not_a_model"),
    "negative width": (edit(hidden_size=-64), "not_a_model"),
    "own code": (edit(auto_map={"AutoModelForCausalLM": "model.Own"}), "remote_code"),
    "no fast tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no_tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no_safetensors"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("where", ["path", "checkpoints[1]"])
def test_a_broken_folder_is_refused_by_name(inspect: Inspect, tmp_path: Path, what: str, where: str) -> None:
    good, broken = build(tmp_path / "good"), build(tmp_path / "broken")
    spoil, code = BROKEN[what]
    spoil(broken)
    with pytest.raises(Invalid) as refused:
        if where == "path":
            inspect(broken)
        else:
            inspect(good, checkpoints=[(good, 1.0), (broken, 1.0)])
    assert (refused.value.code, refused.value.param) == (code, where)
    assert str(broken) in refused.value.detail


def test_pickled_weights_are_refused_with_what_to_do(inspect: Inspect, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Invalid, match=r"pytorch_model\.bin.*safe_serialization=True") as refused:
        inspect(folder)
    assert refused.value.code == "no_safetensors"


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_path_longer_than_the_system_allows_is_refused(inspect: Inspect, tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid):
        inspect(tmp_path / name)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'"text"'])
def test_a_tokenizer_configuration_that_cannot_be_read_is_refused(
    inspect: Inspect, folder: Path, data: bytes
) -> None:
    (folder / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(Invalid) as refused:
        inspect(folder)
    assert refused.value.param == "path"
    assert "tokenizer_config.json" in refused.value.detail


@pytest.mark.parametrize("config", [{"num_hidden_layers": 6}, {"hidden_size": 128}])
def test_a_base_or_checkpoint_of_another_shape_is_refused(inspect: Inspect, tmp_path: Path, config: Any) -> None:
    tuned, other = build(tmp_path / "tuned"), build(tmp_path / "other", **config)
    with pytest.raises(Invalid) as refused:
        inspect(tuned, base=inspect(other, name="other"))
    assert (refused.value.code, refused.value.param) == ("shape_mismatch", "base")
    with pytest.raises(Invalid) as refused:
        inspect(tuned, checkpoints=[(tuned, 1.0), (other, 1.0)])
    assert (refused.value.code, refused.value.param) == ("shape_mismatch", "checkpoints[1]")


# --- fingerprints and lineage -------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": write("model.safetensors", weights(2.0) + b" "),
    "configuration": edit(rope_theta=500_000),
    "one more shard": write("model-2.safetensors", weights(3.0)),
    "another name": lambda folder: (folder / "model.safetensors").rename(folder / "m.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_follows_weights_and_configuration(inspect: Inspect, folder: Path, change: str) -> None:
    before = inspect(folder)
    CHANGES[change](folder)
    after = inspect(folder)
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_tokenizer_has_a_fingerprint_of_its_own(inspect: Inspect, folder: Path, name: str) -> None:
    before = inspect(folder)
    (folder / name).write_text('{"model": {"other": 1}}')
    after = inspect(folder)
    assert after.tokenizer_fingerprint != before.tokenizer_fingerprint
    assert after.fingerprint == before.fingerprint


def test_the_fingerprint_does_not_depend_on_the_place(inspect: Inspect, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model")
    assert inspect(copy).fingerprint == inspect(folder).fingerprint


def test_a_file_is_hashed_again_only_when_its_size_or_time_changed(
    inspect: Inspect, folder: Path, redis: Redis
) -> None:
    before = inspect(folder)
    path = folder / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(weights(2.0))  # as large as before
    os.utime(path, ns=times)
    assert inspect(folder).fingerprint == before.fingerprint  # nobody can tell without reading 15 GB
    os.utime(path, ns=(times[0], times[1] + 1))
    changed = inspect(folder).fingerprint
    assert changed != before.fingerprint
    redis.delete(keys.FILE_HASHES)
    assert inspect(folder).fingerprint == changed


def test_a_fine_tune_belongs_to_the_family_of_its_base(inspect: Inspect, tmp_path: Path) -> None:
    root = inspect(build(tmp_path / "root", value=1), name="root")
    tuned = inspect(build(tmp_path / "tuned", value=2), name="tuned", base=root)
    again = inspect(build(tmp_path / "again", value=3), name="again", base=tuned)
    stranger = inspect(build(tmp_path / "stranger", value=4), name="stranger")
    assert root.lineage == tuned.lineage == again.lineage == root.fingerprint
    assert (tuned.base, again.base) == ("root", "tuned")
    assert stranger.lineage != root.lineage


def test_checkpoints_keep_their_order_weight_and_fingerprint(inspect: Inspect, tmp_path: Path) -> None:
    folders = [build(tmp_path / f"c{n}", value=n) for n in range(3)]
    record = inspect(folders[2], checkpoints=[(folder, n / 2) for n, folder in enumerate(folders)])
    assert [(point.path, point.weight) for point in record.checkpoints] == [
        (str(folder), n / 2) for n, folder in enumerate(folders)
    ]
    assert [point.fingerprint for point in record.checkpoints] == [inspect(f).fingerprint for f in folders]


# --- registering --------------------------------------------------------------------------------------


def test_registering_the_same_again_gives_the_first_record(
    inspect: Inspect, folder: Path, registry: Registry
) -> None:
    first = models.register(registry, inspect(folder))
    assert models.register(registry, dataclasses.replace(inspect(folder), created_at="later")) == first
    assert registry.all(MODELS) == [first]


@pytest.mark.parametrize("change", ["weights", "path", "base", "tokenizer", "checkpoints"])
def test_something_else_under_the_same_id_is_a_conflict(
    inspect: Inspect, tmp_path: Path, registry: Registry, change: str
) -> None:
    folder = build(tmp_path / "model")
    first = models.register(registry, inspect(folder))
    base = inspect(build(tmp_path / "base", value=7), name="base")
    if change == "weights":
        (folder / "model.safetensors").write_bytes(weights(2.0) + b" ")
    if change == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    other = inspect(
        shutil.copytree(folder, tmp_path / "copy") if change == "path" else folder,
        base=base if change == "base" else None,
        checkpoints=[(tmp_path / "base", 1.0), (folder, 1.0)] if change == "checkpoints" else [],
    )
    with pytest.raises(Conflict) as refused:
        models.register(registry, other)
    assert (refused.value.code, refused.value.param) == ("model_exists", "id")
    assert registry.get(MODELS, "m") == first
