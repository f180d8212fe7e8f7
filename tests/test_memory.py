"""Running out of memory, really: the process may not allocate more, and torch says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]

# Under an address-space limit that the model fits into and the planned batch does not. Prints ids, rows and budget.
SCRIPT = """
import json, resource, sys
import numpy as np, torch
torch.set_num_threads(1)
from service.contracts import Completion, Example
from service.datasets import example_id
from service.errors import Invalid
from service.terms import LongExamples, Pooling
from service.work import ActivationSpec, GradientSpec, PassSpec, Rademacher, Tracked
from workers import passes, readout
from workers.models import load

folder, room, lengths, budget = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
examples = []
for number, length in enumerate(lengths):
    content = Completion("the cat ", " ".join(np.random.default_rng(number).choice(["sat", "on", "mat."], length)))
    examples.append(Example(example_id(content), content, {}, ()))
spec = PassSpec(
    model_fingerprint="m", tokenizer_fingerprint="t", activation=ActivationSpec((2,), Pooling.RESPONSE_MEAN),
    gradient=GradientSpec(Tracked(2), Rademacher(p=4)), objective=None, max_length=100_000,
    long_examples=LongExamples.QUARANTINE, token_budget=budget, dtype="float32",
)
loaded = load(folder, "float32")
reads = readout.make(loaded, spec, None)
passes.run(loaded, reads, spec, examples[-1:])  # warm: libraries allocate on first use
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
try:
    result = passes.run(loaded, reads, spec, examples)
except Invalid as error:
    ids = [example.id for example in examples]
    print("TOLD " + json.dumps({"error": error.code, "ids": ids, "example": error.context["example"]}))
    raise SystemExit(0) from None
told = {
    "ids": [example.id for example in examples], "kept": list(result.ids), "budget": loaded.memory.tokens,
    "aside": [(item.id, item.reason) for item in result.quarantined],
    "rows": [float(np.abs(rows).sum()) for rows in result.arrays.values()],
}
print("TOLD " + json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model"
    tiny.model("llama", vocab=len(tiny.words())).save_pretrained(path)
    tiny.words().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return path


def told(folder: Path, room: int, lengths: list[int], budget: int) -> dict:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(room), json.dumps(lengths), str(budget)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])


PLENTY, LITTLE = 8 << 30, 40 << 20  # bytes: far below what the planned batch needs, far above one example
LENGTHS = [300] * 400 + [20]


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_that_is_remembered(folder):
    whole = told(folder, PLENTY, LENGTHS, 200_000)
    little = told(folder, LITTLE, LENGTHS, 200_000)
    assert whole["budget"] is None
    assert 300 <= little["budget"] < 200_000
    assert little["kept"] == whole["kept"] == whole["ids"]
    assert little["aside"] == []
    assert little["rows"] == pytest.approx(whole["rows"], rel=1e-4)


def test_an_example_that_does_not_fit_alone_fails_the_task_by_name(folder):
    """Set aside, the result would depend on who else used the memory."""
    found = told(folder, 8 << 20, [24_000, 300, 300, 20], 4096)
    assert found["error"] == "out_of_memory"
    assert found["example"] == found["ids"][0]
