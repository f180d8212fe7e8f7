"""How much an index costs over the model's own forward and backward pass, in one run on the same data.

The floor is a plain forward and backward with frozen weights over the same batches. ``gradient`` is the
whole pass of a worker (tokenising, masking, hooks, projection, rows); ``activation`` stops at the middle
layer. Rounds are interleaved and the median of their ratios is reported: absolute times mean little on a
shared machine.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import Report, parser
from service.contracts import (
    ActivationSpec,
    Example,
    GradientSpec,
    LongExamples,
    LossReduction,
    PassSpec,
    PlainText,
    Pooling,
)
from service.datasets import example_id
from workers import gradients, passes
from workers.batches import collate, plan
from workers.masks import tokenise
from workers.models import Loaded, load

_VOCABULARY = 2048


def random_model(folder: Path, *, width: int, blocks: int) -> None:
    """A randomly initialised Llama with a word-level tokenizer: speed does not depend on weights."""
    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, _VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_examples(count: int, length: int) -> list[Example]:
    """Texts of ``length`` words on average, uneven as real ones are."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        size = int(rng.integers(length // 2, length * 3 // 2))
        content = PlainText(" ".join(f"w{word}" for word in rng.integers(2, _VOCABULARY, size)))
        examples.append(Example(example_id(content), content, {}, ()))
    return examples


def floor(loaded: Loaded, examples: list[Example], token_budget: int) -> None:
    """Forward and backward over the same batches, weights frozen, nothing kept."""
    tokens = [tokenise(example.content, loaded.tokenizer) for example in examples]
    for group in plan([len(item) for item in tokens], token_budget):
        batch = collate(
            [tokens[i] for i in group], pooling=None, reduction=LossReduction.MEAN, device=loaded.device
        )
        with gradients.differentiable_inputs(loaded.model):
            logits = loaded.model(input_ids=batch.ids, use_cache=False).logits
            gradients.losses(logits, batch).sum().backward()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--width", type=int, default=256, help="width of the random model")
    options.add_argument("--blocks", type=int, default=6, help="blocks of the random model")
    options.add_argument("--examples", type=int, default=96, help="examples per round")
    options.add_argument("--length", type=int, default=128, help="mean tokens per example")
    options.add_argument("-p", type=int, default=16, help="projection: p × p numbers per module")
    options.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    options.add_argument("--threads", type=int, default=1, help="torch threads, as a worker has them")
    options.add_argument("--token-budget", type=int, default=8192, help="padded tokens per batch")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.width, chosen.blocks, chosen.examples, chosen.rounds = 64, 2, 16, 2
    torch.set_num_threads(chosen.threads)
    report = Report()
    with TemporaryDirectory() as folder:
        random_model(Path(folder), width=chosen.width, blocks=chosen.blocks)
        loaded = load(folder, "float32")
    examples = random_examples(chosen.examples, chosen.length)
    layer = (chosen.blocks + 1) // 2

    def spec(activation: bool) -> PassSpec:
        return PassSpec(
            model_fingerprint="benchmark",
            tokenizer_fingerprint="benchmark",
            activation=ActivationSpec((layer,), Pooling.RESPONSE_MEAN) if activation else None,
            gradient=None if activation else GradientSpec(chosen.blocks, chosen.p),
            objective=None,
            max_length=1024,
            long_examples=LongExamples.TRUNCATE_RIGHT,
            token_budget=chosen.token_budget,
            dtype="float32",
        )

    gradient, activation = spec(activation=False), spec(activation=True)
    sides = passes.tracked_sides(loaded, gradient)
    runs: dict[str, Callable[[], object]] = {
        "floor": lambda: floor(loaded, examples, chosen.token_budget),
        "gradient": lambda: passes.run(loaded, sides, gradient, examples),
        "activation": lambda: passes.run(loaded, {}, activation, examples),
    }
    for work in runs.values():
        work()  # warm up
    times = {name: [] for name in runs}
    for _ in range(chosen.rounds):
        for name, work in runs.items():
            times[name].append(seconds(work))

    def ratio(upper: str, lower: str) -> float:
        return statistics.median(a / b for a, b in zip(times[upper], times[lower], strict=True))

    k = sum(side.size for side in sides.values())
    rate = chosen.examples / statistics.median(times["floor"])
    report.add("gradient_vs_floor", ratio("gradient", "floor"), "time of a gradient build over forward + backward")
    report.add("activation_vs_gradient", ratio("activation", "gradient"), f"forward stopped at layer {layer}")
    report.add("activation_vs_floor", ratio("activation", "floor"))
    report.add("floor_examples_per_s", rate, f"{chosen.threads} thread(s), on this machine, now")
    report.add("gradient_dims", k, f"{len(sides)} modules, p = {chosen.p}")
    report.write(chosen.json)


if __name__ == "__main__":
    main()
