"""LoRA adapters from registration to scores: what is refused, and merging first is the same as merging here."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.lab import Lab
from service import adapters, indexes
from service.contracts import Completion, Example
from service.datasets import example_id
from service.errors import Conflict, Invalid
from service.terms import Checkpoints, FactorLabels, FactorPositions, IndexKind, Lora, Method
from tests import tiny
from workers.models import load

TOKENIZER = tiny.words()
WORDS = ["the", "cat", "sat", "on", "mat", "end", "of", "answer", "question"]
RNG = np.random.default_rng(1)


def example(length: int) -> Example:
    words = RNG.choice(WORDS, length).tolist()
    content = Completion(" ".join(words[:2]) + " ", " ".join(words[2:]))
    return Example(example_id(content), content, {}, ())


TRAIN, QUERIES = [example(int(n)) for n in RNG.integers(5, 14, 40)], [example(8) for _ in range(5)]
V = RNG.standard_normal(tiny.WIDTH).astype(np.float32)
FITTED = {"examples": 40, "seed": 0, "labels": FactorLabels.TRUE, "positions": FactorPositions.TARGETS}
BOTH = {"kinds": tuple(IndexKind), "query_sets": ("q",), "curvature": FITTED, "coordinates": 10**6}


def lora(base: Path, folder: Path, seed: int, scale: float = 0.2, **options) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**settings | options))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return folder


class World:
    """A base, a LoRA on it with two checkpoints, and the same models with the LoRAs merged by peft."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, Path(tiny.save(root / "base", "llama", TOKENIZER))
        self.adapters = [lora(self.base, root / f"lora{seed}", seed) for seed in range(3)]
        self.whole = []
        for number, adapter in enumerate(self.adapters):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter)
            folder = root / f"whole{number}"
            model.merge_and_unload().save_pretrained(folder)
            TOKENIZER.save_pretrained(folder)
            self.whole.append(folder)
        self.lab = Lab(root / "lab")
        self.lab.model("base", self.base)
        self.lab.model("lora", self.adapters[2], base="base", checkpoints=[(self.adapters[0], 0.5)])
        self.lab.model("alone", self.adapters[2], base="base")
        whole = self.lab.model("whole", self.whole[2], checkpoints=[(self.whole[0], 0.5)])
        self.lab.dataset("d", TRAIN)
        self.lab.dataset("q", QUERIES)
        self.lab.concept("v", whole, V, layer=2)
        self.lab.concept("w", self.lab.model("base", self.base), V, layer=2)

    def scores(self, index, concept: str, method=Method.CONCEPT_INFLUENCE, **query) -> np.ndarray:
        about = {} if method == Method.VECTOR_FILTER else {"query_set": "q"}
        return self.lab.scores(index, [one.id for one in TRAIN], concept=concept, method=method, **about, **query)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    made = World(tmp_path_factory.mktemp("adapters"))
    yield made
    made.lab.close()
    torch.set_num_threads(threads)


# --- scores ---------------------------------------------------------------------------------------------


def test_a_merged_lora_scores_as_the_model_that_was_merged_before(world):
    ours, _ = world.lab.build("ours", "lora", "d", 2, **BOTH)
    theirs, _ = world.lab.build("theirs", "whole", "d", 2, **BOTH)
    assert [point.weight for point in ours.points] == [point.weight for point in theirs.points] == [0.5, 1.0]
    for query in (
        {"through": IndexKind.INFLUENCE},
        {"through": IndexKind.GRADIENT},
        {"method": Method.VECTOR_FILTER},
    ):
        found, expected = world.scores(ours, "w", **query), world.scores(theirs, "v", **query)
        assert np.corrcoef(found, expected)[0, 1] > 0.9999
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_without_checkpoints_a_merged_lora_runs_from_its_base(world):
    index, _ = world.lab.build("from-base", "alone", "d", 2, **BOTH)
    assert [(point.name, point.adapter) for point in index.points] == [
        ("base", None),
        ("alone", str(world.adapters[2])),
    ]


def test_its_own_maps_are_tracked_when_asked_for(world):
    index, _ = world.lab.build("maps", "lora", "d", 2, lora=Lora.ADAPTER, **BOTH)
    manifest = indexes.read_manifest(world.lab.storage, index)
    (gradient,) = [array for array in index.arrays if array.kind == IndexKind.GRADIENT]
    width, r, up = tiny.WIDTH, 3, 24
    assert gradient.dims == 2 * (2 * width * r + width * r + up * r)  # two blocks, q_proj and up_proj, A and B each
    assert [point.adapter for point in manifest.points] == [str(world.adapters[0]), str(world.adapters[2])]
    assert np.isfinite(world.scores(index, "w")).all()
    assert np.ptp(world.scores(index, "w")) > 0


def test_the_base_has_no_lora_whose_maps_could_be_tracked(world):
    index, _ = world.lab.build("maps-alone", "alone", "d", 2, lora=Lora.ADAPTER, **BOTH)
    assert [point.name for point in index.points] == ["alone"]


def test_merged_and_beside_the_base_are_different_questions_with_different_rows(world):
    about = {"kinds": ("gradient",), "curvature": FITTED, "checkpoints": Checkpoints.END}
    merged, _ = world.lab.build("merged", "lora", "d", 2, **about)
    beside, _ = world.lab.build("beside", "lora", "d", 2, lora=Lora.ADAPTER, **about)
    keys = [
        {ref.key for section in indexes.read_manifest(world.lab.storage, index).sections for ref in section.shards}
        for index in (merged, beside)
    ]
    assert keys[0].isdisjoint(keys[1])


def test_a_whole_model_has_no_maps_of_its_own(world):
    with pytest.raises(Invalid) as refused:
        world.lab.build("none", "whole", "d", 2, lora=Lora.ADAPTER, **BOTH)
    assert (refused.value.code, refused.value.param) == ("not_an_adapter", "lora")


# --- registration -----------------------------------------------------------------------------------------


def test_an_adapter_takes_shape_lineage_and_tokenizer_from_its_base(world):
    base, record = world.lab.model("base", world.base), world.lab.model("alone", world.adapters[2], base="base")
    assert (record.path, record.adapter) == (str(world.base), str(world.adapters[2]))
    assert (record.n_layers, record.width, record.lineage) == (base.n_layers, base.width, base.lineage)
    assert record.tokenizer_path == str(world.base)
    assert record.tokenizer_fingerprint == base.tokenizer_fingerprint
    assert record.fingerprint != base.fingerprint


def test_an_adapter_with_a_tokenizer_of_its_own_is_read_with_it(world, tmp_path):
    folder = shutil.copytree(world.adapters[0], tmp_path / "own")
    tiny.words(tiny.PLAIN).save_pretrained(folder)
    record = world.lab.model("own", folder, base="base")
    assert record.tokenizer_path == str(folder)
    assert record.chat_template_sha256 is not None
    loaded = load(record.path, "float32", tokenizer_path=record.tokenizer_path, adapter=record.adapter)
    assert loaded.tokenizer.chat_template == tiny.PLAIN


def test_an_adapter_needs_a_registered_base(world):
    for base in (None, "alone"):
        with pytest.raises(Invalid) as refused:
            world.lab.model("orphan", world.adapters[0], base=base)
        assert (refused.value.code, refused.value.param) == ("adapter_needs_base", "base")


def test_checkpoints_of_an_adapter_are_adapters(world):
    with pytest.raises(Invalid) as refused:
        world.lab.model("mixed", world.adapters[0], base="base", checkpoints=[(world.whole[0], 1.0)])
    assert (refused.value.code, refused.value.param) == ("shape_mismatch", "checkpoints[0]")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_changed_after_registration_is_refused(world, tmp_path, file):
    folder = shutil.copytree(world.adapters[0], tmp_path / "moving")
    name = f"moving-{file.split('.')[0].replace('_', '-')}"
    world.lab.model(name, folder, base="base")
    lora(world.base, folder, 9, lora_alpha=7)
    if file == "adapter_model.safetensors":
        shutil.copy(world.adapters[0] / "adapter_config.json", folder)
    else:
        shutil.copy(world.adapters[0] / "adapter_model.safetensors", folder)
    with pytest.raises(Conflict) as refused:
        world.lab.build(name, name, "d", 2, kinds=("activation",))
    assert refused.value.code == "model_changed"


# --- what is refused, and by which name -------------------------------------------------------------------


def edited(world: World, folder: Path, **changes) -> Path:
    shutil.copytree(world.adapters[0], folder)
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"init_lora_weights": "pissa"},
        {"some_later_invention": {"on": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_a_plain_lora_is_refused_by_name(world, tmp_path, changes):
    folder = edited(world, tmp_path / "edited", **changes)
    with pytest.raises(Invalid, match=next(iter(changes))) as refused:
        adapters.check(folder, param="path")
    assert (refused.value.code, refused.value.param) == ("unsupported_adapter", "path")


def test_harmless_settings_are_accepted(world, tmp_path):
    changes = {
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "rank_pattern": {"q_proj": 3},
        "lora_dropout": 0.1,
    }
    adapters.check(edited(world, tmp_path / "edited", **changes), param="path")


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_accepted_and_merged(world, tmp_path, start):
    settings = {"init_lora_weights": "gaussian" if start == "eva" else start, "r": 4, "lora_alpha": 6}
    folder = lora(world.base, tmp_path / "lora", 5, **settings)  # eva would need data
    path = folder / adapters.CONFIG
    said = {"init_lora_weights": start} | ({"eva_config": asdict(EvaConfig())} if start == "eva" else {})
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    adapters.check(folder, param="path")
    held = load_file(folder / adapters.WEIGHTS)
    base = AutoModelForCausalLM.from_pretrained(world.base)
    with torch.no_grad():
        for name, A in held.items():
            if ".lora_A." in name:
                weight = base.get_submodule(name.split(".lora_A.")[0].removeprefix("base_model.model.")).weight
                weight += 6 / 4 * held[name.replace(".lora_A.", ".lora_B.")] @ A
    found = load(str(world.base), "float32", adapter=str(folder)).model.state_dict()
    for name, expected in base.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("start", "reason"), [("pissa_niter_4", "own weights"), ("mica", "frozen")])
def test_a_start_that_does_more_is_refused_for_what_it_does(world, tmp_path, start, reason):
    with pytest.raises(Invalid, match=reason):
        adapters.check(edited(world, tmp_path / "edited", init_lora_weights=start), param="path")


def test_another_kind_of_adapter_is_refused(world, tmp_path):
    with pytest.raises(Invalid, match="IA3"):
        adapters.check(edited(world, tmp_path / "edited", peft_type="IA3"), param="path")


def test_whole_layers_in_the_file_are_refused_by_name(world, tmp_path):
    folder = edited(world, tmp_path / "edited")
    path = folder / adapters.WEIGHTS
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(Invalid, match=r"lm_head\.weight") as refused:
        adapters.check(folder, param="path")
    assert refused.value.code == "unsupported_adapter"


def test_pickled_or_damaged_weights_are_refused(world, tmp_path):
    folder = edited(world, tmp_path / "edited")
    path = folder / adapters.WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Invalid, match="cannot be read"):
        adapters.check(folder, param="path")
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(Invalid, match=r"adapter_model\.bin") as refused:
        adapters.check(folder, param="path")
    assert refused.value.code == "no_safetensors"


def test_a_lora_that_does_not_fit_its_base_is_refused_rather_than_half_loaded(world, tmp_path):
    missing = edited(world, tmp_path / "missing")
    path = missing / adapters.WEIGHTS
    held = load_file(path)
    first = next(iter(held))
    save_file({name: value for name, value in held.items() if name != first}, path)
    wider = edited(world, tmp_path / "wider", r=5)
    for folder in (missing, wider):
        with pytest.raises(Invalid, match="does not fit its base") as refused:
            load(str(world.base), "float32", adapter=str(folder))
        assert refused.value.code == "model_does_not_load"
