"""Running out of memory, really: the process may not allocate more, and torch says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


# --- tables that do not fit -------------------------------------------------------------------------------

# Eigenvectors of every module of a model, and scouts over some of them under an address-space limit. Prints what
# they found, or the error.
SCOUT = """
import json, resource, sys
import numpy as np, torch
from service import artifacts, datasets, models
from service.contracts import Completion, Example, Place
from service.datasets import Parsed, example_id
from service.errors import Invalid
from service.storage import Storage
from service.terms import ConceptFunction, LongExamples, Pooling
from service.tasks import (Task)
from service.work import (Location, Reading, ScoutWork, Tracked)
from workers.actor import Worker
from workers.models import load
from workers.works.choice import HELD
from workers.works.factors import shapes_of
from workers.stages import grouped
from pathlib import Path

folder, root, room, most = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
storage, path = Storage(root), Path(folder)
reading = Reading(
    model_fingerprint=models.weights_fingerprint(path, None, param="path"),
    tokenizer_fingerprint=models.tokenizer_fingerprint(path),
    max_length=64, long_examples=LongExamples.QUARANTINE, token_budget=8, dtype="float32",
)
shapes = {name: size[:2] for name, size in shapes_of(load(folder, "float32"), Tracked(4)).items()}
if artifacts.find(storage, "whole") is None:
    rng, facts = np.random.default_rng(0), {}
    for name, (d_out, d_in) in shapes.items():
        out, into = (rng.standard_normal((d, d)).astype(np.float32) / d**0.5 for d in (d_out, d_in))
        square = rng.exponential(size=(d_out, d_in)).astype(np.float32)
        artifacts.publish(storage, f"e-{name}", {"eigen": {"out": out, "into": into}})
        facts_of = {"mean": float(square.mean())}
        artifacts.publish(storage, f"l-{name}", {"lambda": {"square": square}}, facts=facts_of)
        facts |= {f"eigen:{name}": f"e-{name}", f"lambda:{name}": f"l-{name}"}
    artifacts.publish(storage, "whole", {}, facts=facts)
parsed = Parsed("d.jsonl", lines=3)
for line, answer in enumerate(["sat on the mat.", "sat on mat.", "on the cat sat."], start=1):  # a batch each
    content = Completion("the cat ", answer)
    item = example_id(content)
    parsed.examples[item] = Example(item, content, {}, (Place("d.jsonl", line),))
record = datasets.publish(storage, "d", parsed)
worker = Worker(root, 1)

def scout(key, modules):
    about = (4, Pooling.RESPONSE_MEAN, ConceptFunction.DOT, 1.0)
    work = ScoutWork(reading, "whole", modules, *about)
    return worker.process(Task(key, "scouting", work, Location(folder, folder), record, (0, 1, 2)))

scout(f"warm {room} {most}", tuple(shapes)[-1:])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
groups = grouped(shapes, most, HELD)
try:
    made = [scout(f"{most}-{number}", group) for number, group in enumerate(groups)]
except Invalid as error:
    print("TOLD " + json.dumps({"groups": len(groups), "error": [error.code, error.detail]}))
    raise SystemExit(0) from None
best = {}
for artifact in made:
    for name in artifacts.stems(artifact):
        sides = artifacts.read(storage, artifact, name)
        best[name] = [np.argsort(-sides[side], kind="stable")[:9].tolist() for side in ("out", "into")]
total = sum(artifact.facts["total"] for artifact in made)
print("TOLD " + json.dumps({"groups": len(groups), "best": best, "total": total}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 maps: 100 MiB of eigenvectors, and five times 40 MiB beside them."""
    path = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.words()), **sizes)).save_pretrained(path)
    tiny.words().save_pretrained(path)
    return path


def scouted(model: Path, root: Path, room: int, most: int) -> dict:
    command = [sys.executable, "-c", SCOUT, str(model), str(root), str(room), str(most)]
    one_heap = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed is free
    about = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, "env": one_heap}
    done = subprocess.run(command, check=False, **about)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])


def test_scouts_keep_within_the_bytes_for_curvature_and_find_the_same(wide, tmp_path):
    """Eigenvectors and rows of J in groups of modules: within a memory that all of them do not fit into."""
    room, budget = 120 << 20, 60 << 20
    whole = scouted(wide, tmp_path, PLENTY, 1 << 40)
    assert whole["groups"] == 1
    refused = scouted(wide, tmp_path, room, 1 << 39)
    assert refused["error"][0] == "out_of_memory"
    assert "WHENCE_CURVATURE_BYTES" in refused["error"][1]
    parts = scouted(wide, tmp_path, room, budget)
    assert parts["groups"] >= 5
    assert parts["best"] == whole["best"]
    assert len(parts["best"]) == 28
    assert parts["total"] == pytest.approx(whole["total"], rel=1e-4)
