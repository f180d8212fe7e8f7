"""What building an index costs: against the model's own forward and backward, and against bergson.

    python -m benchmarks.build                # widths 128 and 512, float32 and bfloat16
    python -m benchmarks.build --width 512    # one width

The floor is a forward and backward with frozen weights over the same batches, logits at the same positions,
nothing kept. ``gradient`` is the whole pass of a worker (tokenising, masking, hooks, EK-FAC coordinates with
p = 64 per side, rows) over all blocks; ``activation`` stops at the middle layer; ``both`` is gradient and influence
in one pass over the blocks up to the middle layer, as bergson collects them. Rounds are interleaved and the
median of their ratios is reported: absolute times mean little on a shared machine. Served figures (a first and a
second concept over HTTP, memory as data grows) are taken by benchmarks/served.py, which this command runs too.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks import served
from benchmarks.lab import Lab
from benchmarks.peers import run as peers
from benchmarks.report import Report, parser
from service import indexes
from service.contracts import Completion, Example
from service.datasets import example_id
from service.terms import IndexKind, LossReduction, Pooling
from service.work import ActivationSpec, GradientSpec, PassSpec, Tracked
from workers import gradients, passes, readout
from workers.batches import Batch, collate, plan
from workers.masks import tokenise
from workers.models import Loaded, load

VOCABULARY = 2048
_BLOCKS = 8
_QUERIES = 2


def random_model(folder: Path, *, width: int, blocks: int = _BLOCKS) -> None:
    """A randomly initialised Llama: speed does not depend on weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    save_random(folder, config)


def save_random(folder: Path, config: PreTrainedConfig) -> None:
    """A model of this configuration with a word-level tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)  # noqa: S106


def random_examples(count: int, length: int, seed: int = 0) -> list[Example]:
    """Prompts and answers of ``length`` words together on average, long-tailed as real ones are; the answer is
    a half to three quarters of it.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        size = int(np.clip(rng.lognormal(np.log(length) - 0.18, 0.6), 8, 4 * length))
        words = [f" w{word}" for word in rng.integers(2, VOCABULARY, size)]
        cut = int(size * rng.uniform(0.25, 0.5))
        content = Completion("".join(words[:cut]), "".join(words[cut:]))
        examples.append(Example(example_id(content), content, {}, ()))
    return examples


def batches(loaded: Loaded, examples: Sequence[Example], token_budget: int) -> list[Batch]:
    tokens = [tokenise(example.content, loaded.tokenizer) for example in examples]
    return [
        collate([tokens[i] for i in group], pooling=None, reduction=LossReduction.MEAN, device=loaded.device)
        for group in plan([len(item) for item in tokens], token_budget)
    ]


def floor(loaded: Loaded, prepared: Sequence[Batch]) -> None:
    """Forward and backward over the same batches and logits positions, weights frozen, nothing kept."""
    embedding: Any = loaded.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    try:
        for batch in prepared:
            gradients.losses(loaded.model, batch).sum().backward()
    finally:
        handle.remove()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Bench:
    """One width and precision: the runs that take turns."""

    def __init__(self, chosen: argparse.Namespace, folder: Path, width: int, dtype: str, stack: ExitStack) -> None:
        random_model(folder / "model", width=width)
        self.layer = _BLOCKS // 2
        examples = random_examples(chosen.examples, chosen.length)
        lab = stack.enter_context(
            Lab(folder / "lab", threads=chosen.threads, token_budget=chosen.token_budget, dtype=dtype)
        )
        lab.model("model", folder / "model")
        lab.dataset("sample", random_examples(chosen.factors, chosen.length, seed=1))
        lab.dataset("queries", random_examples(_QUERIES, chosen.length, seed=2))
        self.curvature_s, self.jacobian_s = 0.0, 0.0
        self.runs: dict[str, Callable[[], object]] = {}
        loaded = load(str(folder / "model"), dtype)
        prepared = batches(loaded, examples, chosen.token_budget)
        self.padding = 1 - sum(int(b.real.sum()) for b in prepared) / sum(b.ids.numel() for b in prepared)
        self.tokens = sum(int(b.real.sum()) for b in prepared)
        self.runs["floor"] = lambda: floor(loaded, prepared)
        # p = 64 per side over all blocks; what the whole model's rows cost.
        gradient = self._spec(lab, "gradient", _BLOCKS, (IndexKind.GRADIENT,))
        self._add("gradient", lab, loaded, gradient, examples)
        # The middle layer's embeddings and coordinates together: blocks 1..layer, as many as bergson collects.
        both = self._spec(lab, "both", self.layer, (IndexKind.GRADIENT, IndexKind.INFLUENCE))
        self._add("both", lab, loaded, both, examples)
        activation = replace(
            gradient, gradient=None, activation=ActivationSpec((self.layer,), Pooling.RESPONSE_MEAN)
        )
        self._add("activation", lab, loaded, activation, examples)
        rademacher = replace(gradient, gradient=GradientSpec(Tracked(_BLOCKS)))
        self._add("rademacher", lab, loaded, rademacher, examples)
        if peers.available("bergson"):
            tokens = [tokenise(example.content, loaded.tokenizer) for example in examples]
            theirs = peers.prepare(
                folder / "peer", folder / "model", [t.ids for t in tokens], [t.predicted for t in tokens]
            )
            one = stack.enter_context(
                peers.rounds(
                    "bergson",
                    "bergson_collect",
                    theirs,
                    threads=chosen.threads,
                    layer=self.layer,
                    dtype=dtype,
                    token_batch_size=chosen.token_budget,
                )
            )
            self.runs["bergson"] = lambda: one()["seconds"]
        else:
            print(peers.missing("bergson"))

    def _spec(self, lab: Lab, name: str, layer: int, kinds: tuple[IndexKind, ...]) -> PassSpec:
        """The pass of an index that is really built, with its curvature, Jacobian and heads."""
        sets = ("queries",) if IndexKind.INFLUENCE in kinds else ()
        record, context = lab.build(name, "model", "sample", layer, kinds=kinds, query_sets=sets, projection_dim=64)
        for stage, took in context.seconds.items():
            if stage.startswith("curvature"):
                self.curvature_s += took if name == "gradient" else 0.0
            if stage.startswith("Jacobian over"):
                self.jacobian_s += took
        return indexes.read_manifest(lab.storage, record).spec

    def _add(self, name: str, lab: Lab, loaded: Loaded, spec: PassSpec, examples: list[Example]) -> None:
        reads = readout.make(loaded, spec, lab.storage)
        self.runs[name] = lambda: passes.run(loaded, reads, spec, examples)

    def times(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of every run, taking turns; a peer says its own, without its start-up."""
        for work in self.runs.values():
            work()  # warm up
        found: dict[str, list[float]] = {name: [] for name in self.runs}
        for _ in range(rounds):
            for name, work in self.runs.items():
                if name == "bergson":
                    found[name].append(float(work()))  # pyright: ignore[reportArgumentType]
                else:
                    found[name].append(seconds(work))
        return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--width", type=int, action="append", help="width of the random model; default 128 and 512"
    )
    options.add_argument("--examples", type=int, default=24, help="examples per round")
    options.add_argument("--factors", type=int, default=16, help="examples the curvature is fitted on")
    options.add_argument("--length", type=int, default=128, help="mean tokens per example")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    options.add_argument("--threads", type=int, default=2, help="torch threads, ours and the peer's")
    options.add_argument("--token-budget", type=int, default=2048, help="padded tokens per batch")
    options.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="default: both")
    options.add_argument("--no-served", action="store_true", help="leave out what needs the whole stack")
    chosen = options.parse_args()
    widths = chosen.width or [128, 512]
    if chosen.quick:
        widths, chosen.examples, chosen.factors, chosen.length, chosen.rounds = [64], 8, 8, 24, 2
    torch.set_num_threads(chosen.threads)
    report = Report()
    for width in widths:
        for dtype in chosen.dtype or (["float32"] if chosen.quick else ["float32", "bfloat16"]):
            with TemporaryDirectory() as folder, ExitStack() as stack:
                bench = Bench(chosen, Path(folder), width, dtype, stack)
                times = bench.times(chosen.rounds)
            tell(report, bench, times, suffix(width, dtype, widths), chosen.examples)
    if not chosen.no_served:
        served.measure(report, quick=chosen.quick, threads=chosen.threads)
    report.write(chosen.json)


def suffix(width: int, dtype: str, widths: Sequence[int]) -> str:
    """The widest model in float32 carries the plain names."""
    wide = "" if width == max(widths) else f"_w{width}"
    return ("_bf16" if dtype == "bfloat16" else "") + wide


def tell(report: Report, bench: Bench, times: dict[str, list[float]], end: str, examples: int) -> None:
    def ratio(upper: str, lower: str) -> float:
        return statistics.median(a / b for a, b in zip(times[upper], times[lower], strict=True))

    report.add(f"gradient_vs_floor{end}", ratio("gradient", "floor"), "p = 64 per side, every block, k = 4096")
    report.add(f"both_vs_floor{end}", ratio("both", "floor"), f"gradient + influence, blocks 1..{bench.layer}")
    report.add(f"rademacher_vs_floor{end}", ratio("rademacher", "floor"), "p = 16, the baseline")
    report.add(f"activation_vs_gradient{end}", ratio("activation", "gradient"), f"stopped at layer {bench.layer}")
    if "bergson" in times:
        note = f"gradient + influence in one pass over its p = 16, both on blocks 1..{bench.layer}"
        report.add(f"throughput_vs_bergson{end}", ratio("bergson", "both"), note)
        report.add(f"bergson_vs_floor{end}", ratio("bergson", "floor"))
    report.add(f"curvature_s{end}", bench.curvature_s, "every block")
    report.add(f"jacobian_s{end}", bench.jacobian_s, f"{_QUERIES} examples, layer {bench.layer}")
    report.add(f"floor_tokens_per_s{end}", bench.tokens / statistics.median(times["floor"]), "on this machine, now")
    report.add(f"padding{end}", bench.padding, "share of the positions in a batch")


if __name__ == "__main__":
    main()
