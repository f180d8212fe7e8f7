"""Settings: every variable is read in one place, and a bad value is refused under its name."""

import os
from pathlib import Path

import pytest

from service.errors import Invalid
from service.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours is set, and the current folder is empty."""
    for name in list(os.environ):
        if name.startswith("WHENCE_") or name == "REDIS_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def with_env(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_without_variables_the_defaults_hold(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == ""
    assert settings.storage_root == str(tmp_path / ".whence" / "storage")
    assert settings.allowed_roots == ()
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("WHENCE_PORT", "9000", "port", 9000),
        ("WHENCE_HOME", "/data/whence", "home", Path("/data/whence")),
        ("WHENCE_STORAGE_URL", "s3://bucket/prefix", "storage_root", "s3://bucket/prefix"),
        ("WHENCE_HOME", "/data/whence", "storage_root", "/data/whence/storage"),
        ("WHENCE_DTYPE", "bfloat16", "dtype", "bfloat16"),
        ("WHENCE_LEASE_S", "1.5", "lease_s", 1.5),
        ("whence_workers", "3", "workers", 3),
    ],
)
def test_each_field_is_read_from_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str, expected: object
) -> None:
    assert getattr(with_env(monkeypatch, **{name: value}), field) == expected


@pytest.mark.parametrize("name", ["PORT", "HOST", "HOME", "STORAGE_URL", "WORKERS"])
def test_a_variable_without_the_prefix_is_somebody_elses(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = load_settings()
    assert with_env(monkeypatch, **{name: "1234"}) == before


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"REDIS_URL": "redis://a"}, "redis://a"),
        ({"WHENCE_REDIS_URL": "redis://b"}, "redis://b"),
        ({"REDIS_URL": "redis://a", "WHENCE_REDIS_URL": "redis://b"}, "redis://b"),
    ],
)
def test_the_redis_address_has_two_names_and_ours_wins(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: str
) -> None:
    assert with_env(monkeypatch, **values).redis_url.get_secret_value() == expected


def test_a_password_in_the_redis_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_env(monkeypatch, WHENCE_REDIS_URL="rediss://user:hunter2@host/0")
    shown = (repr(settings), str(settings), settings.model_dump_json())
    assert not any("hunter2" in text for text in shown)


def test_roots_are_split_expanded_and_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    roots = [str(tmp_path / "link"), "", "/a/../b/", "~/models", "relative"]
    settings = with_env(monkeypatch, WHENCE_ROOTS=os.pathsep.join(roots))
    assert settings.allowed_roots == (
        tmp_path / "real",
        Path("/b"),
        tmp_path / "me" / "models",
        tmp_path / "relative",
    )


BAD = [
    ("PORT", "abc"),
    ("PORT", "65536"),
    ("PORT", "-1"),
    ("PORT", ""),
    ("DTYPE", "int8"),
    ("DTYPE", "float32\n"),
    ("LEASE_S", "0.3"),
    ("LEASE_S", "nan"),
    ("LEASE_S", "inf"),
    ("WORKER_CPUS", "0"),
    ("WORKER_CPUS", "inf"),
    ("WORKERS", "-1"),
    ("WORKERS", "1.5"),
    ("SHARD_SIZE", "0"),
    ("TOKEN_BUDGET", "15"),
    ("MAX_UPLOAD_BYTES", "8G"),
    ("MAX_LINE_BYTES", "0"),
    ("MAX_ATTEMPTS", "0"),
    ("SHARD_ATTEMPTS", "0"),
    ("SEARCH_THREADS", "0"),
    ("MAX_K", "0"),
    ("CACHE_BYTES", "-1"),
    ("CACHE_BYTES", "8G"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_under_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(Invalid) as refused:
        with_env(monkeypatch, **{f"WHENCE_{name}": value})
    assert refused.value.code == "bad_settings"
    assert f"WHENCE_{name}: " in refused.value.detail


def test_every_field_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_default_is_within_its_own_bounds() -> None:
    values = load_settings().model_dump()
    assert Settings.model_validate(values).model_dump() == values
