"""The arrows between the layers: api → service ← workers, and what is light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("service", "api", "workers")
OUTSIDE = {"examples", "tests", "benchmarks", "deploy", "docs", "conftest"}

FORBIDDEN = {
    "service": {"api", "workers", "torch", "ray", "fastapi", "starlette", "uvicorn", "transformers"} | OUTSIDE,
    "api": {"workers", "torch", "ray", "transformers"} | OUTSIDE,
    "workers": {"api", "fastapi", "starlette", "uvicorn"} | OUTSIDE,
}

# api/up.py hands its own environment on to the processes it starts.
PASSES_ENVIRONMENT_ON = {"api/up.py": 1}
READERS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, in functions and behind TYPE_CHECKING too, and of those by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield node.lineno, module
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def crossings(package: str, text: str) -> list[str]:
    """Imports in a file of ``package`` that go against the arrows."""
    found = imported(ast.parse(text))
    return [f"{line}: {name}" for line, name in found if name.split(".")[0] in FORBIDDEN[package]]


def environment_reads(text: str) -> list[str]:
    """Every mention of the process environment but ``**os.environ``, which hands it on unread."""
    tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=str(name)) | ast.Name(id=str(name)) if name in READERS:
                found.append(f"{node.lineno}: {name}")
            case ast.ImportFrom(module="os", names=names):
                found += [f"{node.lineno}: {alias.name}" for alias in names if alias.name in READERS]
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                roots = {getattr(node, "module", None), *(alias.name for alias in names)}
                found += [f"{node.lineno}: {name}" for name in roots & {"dotenv", "pydantic_settings", "environs"}]
    return found


def handed_on(text: str) -> int:
    """How often a dictionary is begun with ``**os.environ``."""
    return sum(
        isinstance(value, ast.Attribute) and value.attr == "environ"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    )


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# --- the arrows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert crossings(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("service", "import torch"),
        ("service", "import torch.nn as nn"),
        ("service", "from ray.util import ActorPool"),
        ("service", "def f():\n    import api.client"),
        ("service", "if TYPE_CHECKING:\n    from workers.engine import RayEngine"),
        ("service", "import json, fastapi"),
        ("service", "import importlib\nimportlib.import_module('transformers.models')"),
        ("service", "from importlib import import_module\nimport_module('workers')"),
        ("service", "__import__('torch')"),
        ("service", "from examples import quickstart"),
        ("api", "from workers.main import main"),
        ("api", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("api", "from tests.conftest import free_port"),
        ("workers", "from api.schemas import QueryIn"),
        ("workers", "from fastapi import FastAPI"),
        ("workers", "from benchmarks.lds import run"),
    ],
)
def test_a_planted_crossing_is_found(package: str, text: str) -> None:
    assert len(crossings(package, text)) == 1


@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("api", "from service.jobs import Jobs"),
        ("workers", "import torch\nfrom service.jobs import Jobs\nfrom workers.pool import WorkerPool"),
        ("service", "from service import torchlike\nimport rayleigh"),
        ("service", "'import torch'  # from ray import init"),
    ],
)
def test_what_goes_with_the_arrows_is_not_reported(package: str, text: str) -> None:
    assert crossings(package, text) == []


def test_the_checker_sees_every_package_and_no_relative_import() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(PACKAGES)
    assert len(sources()) > 40
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []  # packages are imported by their literal names, which is what the checker reads


# --- what an import brings ----------------------------------------------------------------------------

HEAVY = {"torch", "ray", "faiss", "fastapi", "redis", "numpy", "pyarrow", "transformers", "fsspec", "uvicorn"}


@pytest.mark.parametrize("module", ["api.client", "api.cli"])
def test_the_client_is_light(module: str) -> None:
    assert loaded_by(f"import {module}") & (HEAVY | {"workers"}) == set()


def test_the_server_and_the_domain_bring_neither_torch_nor_ray() -> None:
    modules = [path.relative_to(ROOT).with_suffix("") for path in sources() if path.parts[-2] == "service"]
    names = ", ".join(".".join(module.parts) for module in modules if module.name != "__init__")
    loaded = loaded_by(f"import {names}, api.main")
    assert loaded & {"torch", "ray", "transformers", "workers"} == set()
    assert {"fastapi", "faiss", "redis"} <= loaded  # or the test looks at nothing


# --- the environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_settings_read_the_environment(path: Path) -> None:
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    if name == "service/settings.py":
        return
    reads = environment_reads(text)
    assert handed_on(text) == PASSES_ENVIRONMENT_ON.get(name, 0)
    assert len(reads) == handed_on(text), reads


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['X']",
        "import os\nos.environ.get('X')",
        "import os\nos.getenv('X', '')",
        "import os as system\nsystem.environ['X'] = '1'",
        "from os import environ",
        "from os import getenv as read",
        "import os\ndef f(x=os.environb): ...",
        "from pydantic_settings import BaseSettings",
        "import dotenv",
    ],
)
def test_a_planted_read_of_the_environment_is_found(text: str) -> None:
    assert len(environment_reads(text)) == 1
    assert handed_on(text) == 0


def test_handing_the_environment_on_is_told_from_reading_it() -> None:
    assert handed_on("import os\nrun(env={'A': '1', **os.environ, 'B': '2'})") == 1
