# pyright: reportMissingImports=false
"""EK-FAC scores with kronfluence 1.0.1; runs in its environment (see ``run.call``).

Options (options.json): ``modules`` (names or a regular expression) and ``layer`` (default: every nn.Linear of
blocks 1 … layer); ``labels`` ``true`` | ``sampled`` for the factors; ``factor_positions`` ``all`` |
``predicting``; ``absolute`` and ``relative``, two lists of dampings; ``dtype`` float64 | float32; ``queries``,
some of ``loss`` and ``concept`` (default: what the folder allows); ``per_query`` (default true); ``batch``,
``query_batch``; ``seed``; ``dump`` (write A, S and λ to factors.safetensors).

Writes ``scores_loss.npy`` and ``scores_concept.npy``, float64 (dampings, queries, N) with dampings in the order
of result.json (absolute ones first); with ``per_query`` false there is one row, the score of the mean over Q.
The mean over queries of the rows is the score of the mean, because a score is linear in the query's gradient.

Sign: positive means that training on z pushes toward the query. The score is ∇m(Q)ᵀ H⁻¹ ∇L(z), with L the
loss **summed** over targets, and the measurement m is
* ``loss``: L(q), summed over q's targets as well: positive lowers the loss on q;
* ``concept``: −f_v(q) = −<v̂, mean over q's target positions of h_l>, h_l the output of block l (no shift, before
  the final norm): positive raises f_v.

What kronfluence computes, from its source
------------------------------------------
Order of a gradient: (d_out, d_in), G = Σ_t g_t a_tᵀ. A module with a bias gets a column of ones on its inputs,
so A is (d_in + 1)² and G includes the bias' gradient (module/linear.py); the models here have none.

A = (1/n) Σ a_t a_tᵀ and S = (1/n) Σ g_t g_tᵀ over examples and positions. Both divide by the same n, the sum of
``Task.get_attention_mask`` over the data (all positions, padding too, if that returns None). The mask zeroes
**inputs only**: output gradients enter S at every position, which on the right of an example are zeros anyway
(module/linear.py, module/tracker/factor.py). Here ``all`` masks padding, so prompt and last token are in A, S and
n; ``predicting`` leaves in A, and counts in n, only positions whose next token is a target. A and S are
second moments, nothing is centred; g_t is the gradient of the summed loss, so S does not depend on batches.
Divided by n, symmetrised, then eigh in float64; eigenvalues ascend, eigenvectors are columns (factor/eigen.py).
Whether A and S are divided changes nothing but the eigenvalues, which EK-FAC does not use again.

λ = (1/N) Σ_z C_z², C_z = U_Sᵀ G_z U_A per example (not per token), over the same examples and, with sampled
labels, a second draw (factor/eigen.py, module/tracker/factor.py). The labels of A and S are the first draw; each is
drawn at target positions, where the model predicts them. λ is stored as a sum and divided by N at scoring time.

Damping (factor/config.py): H⁻¹ in the eigenbasis is 1/(λ + δ), computed in float64. ``ScoreArguments.
damping_factor`` is absolute: the same δ is added to every module's λ/N (default 1e-8). None means
δ = 0.1 × mean(λ/N) of each module; other relative values are had by setting that constant, as done here.

Scores sum over modules; nothing is normalised (module/tracker/precondition.py, pairwise_score.py).
"""

import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kronfluence.factor.config as kronfluence_config
import numpy as np
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.peers import exchange


class Examples(Dataset):
    """One example at a time; ``pad`` makes them a batch."""

    def __init__(self, batch: exchange.Batch) -> None:
        self.rows = [
            {"ids": torch.from_numpy(ids.copy()), "labels": torch.from_numpy(labels)}
            for ids, labels in zip(batch.ids, batch.labels(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """On the right, which a causal model never sees."""

    def one(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    mask = torch.zeros(one("ids", 0).shape, dtype=torch.long)
    for i, row in enumerate(rows):
        mask[i, : len(row["ids"])] = 1
    return {"ids": one("ids", 0), "labels": one("labels", exchange.IGNORED), "mask": mask}


@dataclass
class Attribution(Task):
    """Summed loss over targets, and one of two measurements."""

    modules: list[str]
    block: str
    factor_positions: str = "all"
    measurement: str = "loss"
    direction: torch.Tensor | None = None
    divisor: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[:, :-1]
        logits = logits.flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self.generator)[:, 0]
            labels = torch.where(labels == exchange.IGNORED, labels, drawn)
        return functional.cross_entropy(logits, labels, ignore_index=exchange.IGNORED, reduction="sum")

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        if self.measurement == "loss":
            return self.compute_train_loss(batch, model) / self.divisor
        return -self.concept(batch, model).sum() / self.divisor

    def concept(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        """f_v of each example."""
        assert self.direction is not None
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(self.block).register_forward_hook(
            lambda _module, _inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        try:
            logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits
        finally:
            handle.remove()
        along = seen[0] @ self.direction.to(seen[0].dtype)
        target = batch["labels"] != exchange.IGNORED
        pooled = (along * target).sum(1) / target.sum(1).clamp(min=1)
        return pooled + 0.0 * logits.sum()  # so that modules past block l get a gradient, of zero

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules

    def get_attention_mask(self, batch: Any) -> torch.Tensor:
        if self.factor_positions == "all":
            return batch["mask"]
        predicting = torch.zeros_like(batch["mask"])
        predicting[:, :-1] = batch["labels"][:, 1:] != exchange.IGNORED
        return predicting


def score(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fit the factors, score every query at every damping, write the arrays; the content of result.json."""
    dtype = {"float64": torch.float64, "float32": torch.float32}[options.get("dtype", "float64")]
    train = exchange.read_tokens(folder / exchange.TOKENS)
    queries = exchange.read_tokens(folder / exchange.QUERY_TOKENS)
    layer = options.get("layer")
    kinds = options.get("queries") or ["loss", *(["concept"] if (folder / exchange.DIRECTION).exists() else [])]
    per_query = bool(options.get("per_query", True))
    relative = options.get("relative", [])
    absolute = options.get("absolute", [] if relative else [1e-8])

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="eager")
    names = exchange.linear_names(model, options.get("modules"), layer)
    prefix, blocks = exchange.block_list(model)
    task = Attribution(
        modules=names,
        block=f"{prefix}.{(layer or len(blocks)) - 1}",
        factor_positions=options.get("factor_positions", "all"),
        generator=torch.Generator().manual_seed(int(options.get("seed", 0))),
    )
    model = prepare_model(model, task)
    factor_args = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=options.get("labels", "sampled") == "true",
        covariance_max_examples=None,
        lambda_max_examples=None,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as output:
        analyzer = Analyzer("whence", model, task, cpu=True, output_dir=output, disable_tqdm=True)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=pad))
        data, asked = Examples(train), Examples(queries)
        batch = int(options.get("batch", 8))
        began = time.perf_counter()
        analyzer.fit_all_factors("ekfac", data, per_device_batch_size=batch, factor_args=factor_args)
        seconds["factors"] = time.perf_counter() - began
        factors = {
            **analyzer.load_covariance_matrices("ekfac"),
            **analyzer.load_lambda_matrices("ekfac"),
        }
        if options.get("dump"):
            save_file(dump(factors, names), folder / "factors.safetensors")

        began = time.perf_counter()
        for kind in kinds:
            task.measurement = kind
            task.direction = torch.from_numpy(exchange.direction(folder)) if kind == "concept" else None
            task.divisor = 1.0 if per_query else float(len(queries))
            rows = []
            for number, (damping, is_relative) in enumerate(
                [(value, False) for value in absolute] + [(value, True) for value in relative]
            ):
                if is_relative:
                    kronfluence_config.HEURISTIC_DAMPING_SCALE = float(damping)
                analyzer.compute_pairwise_scores(
                    f"{kind}_{number}",
                    "ekfac",
                    asked,
                    data,
                    per_device_query_batch_size=int(options.get("query_batch", 8)),
                    per_device_train_batch_size=batch,
                    score_args=ScoreArguments(
                        damping_factor=None if is_relative else float(damping),
                        aggregate_query_gradients=not per_query,
                        per_sample_gradient_dtype=dtype,
                        precondition_dtype=dtype,
                        score_dtype=dtype,
                    ),
                )
                scores = analyzer.load_pairwise_scores(f"{kind}_{number}")["all_modules"]
                rows.append(scores.double().numpy())
            np.save(folder / f"scores_{kind}.npy", np.stack(rows))
        seconds["scores"] = time.perf_counter() - began

    return {
        "kinds": kinds,
        "modules": names,
        "absolute": absolute,
        "relative": relative,
        "queries": len(queries) if per_query else 1,
        "examples": len(train),
        "tokens": train.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "lambda": summary(factors, names),
    }


def dump(factors: dict[str, dict[str, torch.Tensor]], names: list[str]) -> dict[str, torch.Tensor]:
    """A, S and λ of every module, each divided by its count."""
    kept = {}
    for name in names:
        for short, (matrix, count) in {
            "A": ("activation_covariance", "num_activation_covariance_processed"),
            "S": ("gradient_covariance", "num_gradient_covariance_processed"),
            "lambda": ("lambda_matrix", "num_lambda_processed"),
        }.items():
            kept[f"{name}.{short}"] = (factors[matrix][name] / factors[count][name]).contiguous()
    return kept


def summary(factors: dict[str, dict[str, torch.Tensor]], names: list[str]) -> dict[str, dict[str, float]]:
    """Per module: sum and mean of λ, positions and examples that were counted, traces of A and S."""
    made = {}
    for name in names:
        averaged = factors["lambda_matrix"][name].double() / factors["num_lambda_processed"][name]
        positions = float(factors["num_activation_covariance_processed"][name])
        made[name] = {
            "trace": float(averaged.sum()),
            "mean": float(averaged.mean()),
            "examples": float(factors["num_lambda_processed"][name]),
            "positions": positions,
            "trace_A": float(factors["activation_covariance"][name].trace()) / positions,
            "trace_S": float(factors["gradient_covariance"][name].trace()) / positions,
        }
        if not math.isfinite(made[name]["trace"]):
            raise ValueError(f"λ of {name} is not finite")
    return made


def main() -> None:
    folder, options = exchange.asked()
    exchange.write_json(folder / exchange.RESULT, score(folder, options))


if __name__ == "__main__":
    main()
