"""What a build costs in every family of models, each over its own floor.

    python -m benchmarks.families                    # eleven families at width 256, about 10 minutes
    python -m benchmarks.families --family gpt_neox  # one of them

The floor is a forward and backward with frozen weights over the same batches and logits positions; the build is a
worker's whole pass with EK-FAC coordinates, p = 64 per side, every block. Randomly initialised models of four
blocks: speed does not depend on weights. Rounds take turns, medians of their ratios.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.build import VOCABULARY, batches, floor, random_examples, save_random, seconds
from benchmarks.lab import Lab
from benchmarks.report import Report, parser
from service import indexes
from workers import passes, readout
from workers.models import load

_BLOCKS = 4
KINDS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "gpt_neox": GPTNeoXConfig,
    "phi": PhiConfig,
    "phi3": Phi3Config,
    "gpt2": GPT2Config,
}


def config(family: str, width: int) -> PreTrainedConfig:
    """Three to four times as wide inside, heads of 64, half as many for keys and values where there are groups."""
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    heads = max(2, width // 64)
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=_BLOCKS, n_head=heads, n_positions=1024, **ids)
    sizes = {"hidden_size": width, "num_hidden_layers": _BLOCKS, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width if family in {"gpt_neox", "phi"} else 3 * width}
    if family != "gpt_neox":
        sizes |= {"num_key_value_heads": heads // 2}
    if family.startswith(("gemma", "qwen3")):
        sizes |= {"head_dim": width // heads}
    sizes |= {"max_position_embeddings": 1024}
    return KINDS[family](**sizes, **ids)


def ratio(family: str, chosen: argparse.Namespace) -> float:
    """Median over rounds of the pass's time over the floor's."""
    examples = random_examples(chosen.examples, chosen.length)
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder / "model", config(family, chosen.width))
        with Lab(folder / "lab", threads=chosen.threads, token_budget=chosen.token_budget) as lab:
            lab.model("model", folder / "model")
            lab.dataset("sample", random_examples(chosen.factors, chosen.length, seed=1))
            record, _ = lab.build("x", "model", "sample", _BLOCKS, projection_dim=64)
            spec = indexes.read_manifest(lab.storage, record).spec
            loaded = load(str(folder / "model"), "float32")
            torch.set_num_threads(chosen.threads)
            reads = readout.make(loaded, spec, lab.storage)
            prepared = batches(loaded, examples, chosen.token_budget)
            found = []
            for number in range(chosen.rounds + 1):
                below = seconds(lambda: floor(loaded, prepared))
                above = seconds(lambda: passes.run(loaded, reads, spec, examples))
                if number:  # the first warms up
                    found.append(above / below)
    return statistics.median(found)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--family", action="append", choices=list(KINDS), help="default: all")
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--examples", type=int, default=24, help="examples per round")
    options.add_argument("--factors", type=int, default=16, help="examples the curvature is fitted on")
    options.add_argument("--length", type=int, default=128, help="mean tokens per example")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    options.add_argument("--threads", type=int, default=2, help="torch threads")
    options.add_argument("--token-budget", type=int, default=2048, help="padded tokens per batch")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.width, chosen.examples, chosen.factors, chosen.length, chosen.rounds = 128, 4, 4, 24, 1
    report = Report()
    found = {}
    for family in chosen.family or KINDS:
        found[family] = ratio(family, chosen)
        report.add(f"{family}_vs_floor", found[family], f"width {chosen.width}, {_BLOCKS} blocks, float32")
    report.add("worst_vs_floor", max(found.values()), max(found, key=lambda family: found[family]))
    report.add("spread", max(found.values()) / min(found.values()), "the worst over the best")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
