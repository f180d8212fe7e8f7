"""The README's session is run as it stands there, against a real stack."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.up import Stack, free_port
from examples.organism.make import make_organism
from examples.organism.train import Recipe

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: the README's names are short, and other tests use them too."""
    home = tmp_path_factory.mktemp("readme-stack")
    with Stack(home, host="127.0.0.1", port=free_port(), roots=[tmp_path_factory.getbasetemp()]) as running:
        running.wait_ready()
        yield running


def commands() -> list[str]:
    """Lines that start with a prompt in the console blocks, those of the second terminal."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    first_terminal = ["source .venv/bin/activate", "python -m examples.organism.make organism", "whence up"]
    assert lines[:3] == first_terminal
    return lines[3:]


def test_the_session_of_the_readme_runs(fresh: Stack, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("readme")
    make_organism(folder / "organism", seed=0, base_recipe=Recipe(1, 3e-3), recipe=Recipe(1, 1e-4))
    environment = os.environ | {"WHENCE_URL": fresh.url, "COLUMNS": "120"}
    outputs = {}
    for command in commands():
        arguments = shlex.split(command)
        assert arguments[0] == "whence"
        ran = subprocess.run(
            [sys.executable, "-m", "api.cli", *arguments[1:]],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        outputs[command] = ran.stdout
    assert len(outputs) >= 9
    assert "480 lines = 480 examples" in outputs["whence datasets add organism/train.jsonl"]
    assert "tone=hostile" in outputs["whence query --index train --concept hostile -k 3"]


def test_the_client_example_of_the_readme_runs(fresh: Stack):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("http://127.0.0.1:8311", fresh.url)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[(")


def test_every_file_the_readme_points_to_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
