"""The documentation keeps up with the code: every setting, command, endpoint and error class is described."""

import re
from pathlib import Path

import typer

from api.cli import app as cli
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def test_every_setting_is_documented():
    missing = [name for name in Settings.model_fields if f"`WHENCE_{name.upper()}`" not in REFERENCE]
    assert missing == []


def test_every_documented_setting_exists():
    named = set(re.findall(r"`WHENCE_([A-Z_]+)`", REFERENCE)) - {"URL"}  # the client's own
    assert named <= {name.upper() for name in Settings.model_fields}


def test_every_command_is_documented():
    group = typer.main.get_command(cli)
    commands = []
    for name, command in group.commands.items():
        commands += [f"{name} {sub}" for sub in command.commands] if hasattr(command, "commands") else [name]
    assert len(commands) >= 15
    assert [name for name in commands if f"`whence {name}" not in REFERENCE] == []


def test_every_command_and_option_explains_itself():
    group = typer.main.get_command(cli)
    for name, command in group.commands.items():
        for sub in getattr(command, "commands", {name: command}).values():
            assert sub.help, name
            options = [parameter for parameter in sub.params if parameter.param_type_name == "option"]
            unexplained = [option.name for option in options if not getattr(option, "help", None)]
            assert unexplained == [], f"{name} {sub.name}"


def test_every_endpoint_is_documented(redis_server, tmp_path, monkeypatch):
    schema = openapi(redis_server, tmp_path, monkeypatch)
    for path, operations in schema["paths"].items():
        for method in operations:
            assert re.search(rf"`{method.upper()} {re.escape(path)}`", REFERENCE), f"{method} {path}"


def test_openapi_is_complete(redis_server, tmp_path, monkeypatch):
    schema = openapi(redis_server, tmp_path, monkeypatch)
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], f"{method} {path}"
            if path.startswith("/v1/") and method in {"post", "put"}:
                problems = [code for code in operation["responses"] if code.startswith("4")]
                assert problems, f"{method} {path} names no error"
                for code in problems:
                    assert "application/problem+json" in operation["responses"][code]["content"], f"{method} {path}"
    assert schema["components"]["schemas"]["Problem"]["properties"]["code"]


def openapi(redis_server, tmp_path, monkeypatch):
    from api.main import create_app

    monkeypatch.setenv("WHENCE_REDIS_URL", redis_server.url)
    settings = Settings(storage_url=str(tmp_path / "storage"))
    return create_app(settings).openapi()
