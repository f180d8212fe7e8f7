"""EK-FAC influence from the definitions, in float64, one example at a time: shares no maths with the engine.

Whole weight gradients by autograd, factors and λ fitted from scratch on the same examples with the same sampled
labels (their random numbers are part of the definition), H⁻¹ applied by whole matrices.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from service.contracts import Example
from service.terms import Pooling
from workers.curvature import uniforms
from workers.masks import Tokens, tokenise
from workers.models import load

F64 = NDArray[np.float64]


class Oracle:
    """A float64 model at ``path`` with the linear maps of blocks 1..layer."""

    def __init__(self, path: Path, layer: int, *, seed: int = 0) -> None:
        loaded = load(str(path), "float32")
        self._model: Any = loaded.model.double()
        self._block = loaded.blocks[layer - 1]
        self._modules: dict[str, Any] = loaded.linear_maps(layer)
        self._weights = [module.weight.requires_grad_(True) for module in self._modules.values()]
        self._tokenizer = loaded.tokenizer
        self._seed = seed

    def scores(
        self, examples: Sequence[Example], queries: Sequence[Example], directions: F64, damping: float
    ) -> F64:
        """−∇f_v(Q)ᵀ H⁻¹ ∇L(z), L the mean over targets, f_v pooled over the answer: (N, directions)."""
        texts = [tokenise(example.content, self._tokenizer) for example in examples]
        bases, squares = self._fit(examples, texts)
        found = []
        for direction in directions:
            total = [torch.zeros_like(weight) for weight in self._weights]
            for query in queries:
                value = self._value(tokenise(query.content, self._tokenizer), torch.from_numpy(direction))
                found_here = torch.autograd.grad(value, self._weights)
                total = [a + b / len(queries) for a, b in zip(total, found_here, strict=True)]
            found.append([self._solve(*each, damping) for each in zip(total, bases, squares, strict=True)])
        scores = np.zeros((len(examples), len(directions)))
        for row, tokens in enumerate(texts):
            gradients = torch.autograd.grad(self._loss(tokens), self._weights)
            for column, solved in enumerate(found):
                scores[row, column] = -sum(float((a * b).sum()) for a, b in zip(gradients, solved, strict=True))
        return scores

    def _fit(self, examples: Sequence[Example], texts: Sequence[Tokens]) -> tuple[list[Any], list[Any]]:
        sums = [[0.0, 0.0] for _ in self._weights]
        for example, tokens in zip(examples, texts, strict=True):
            for total, (a, g) in zip(sums, self._sides(example, tokens), strict=True):
                total[0] = total[0] + a.T @ a
                total[1] = total[1] + g.T @ g
        bases: list[Any] = [tuple(torch.linalg.eigh(side)[1] for side in total) for total in sums]
        squares: list[Any] = [0.0 for _ in self._weights]
        for example, tokens in zip(examples, texts, strict=True):
            for number, (a, g) in enumerate(self._sides(example, tokens)):
                U_A, U_S = bases[number]
                squares[number] = squares[number] + (U_S.T @ (g.T @ a) @ U_A) ** 2 / len(examples)
        return bases, squares

    @staticmethod
    def _solve(gradient: Any, basis: Any, square: Any, damping: float) -> Any:
        U_A, U_S = basis
        return U_S @ ((U_S.T @ gradient @ U_A) / (square + damping * square.mean())) @ U_A.T

    def _sides(self, example: Example, tokens: Tokens) -> list[tuple[Any, Any]]:
        """Inputs a (T, d_in) and gradients g (T, d_out) of the summed loss with labels drawn from the model."""
        inputs, outputs, handles = [], [], []
        for module in self._modules.values():

            def keep(_module: Any, given: Any, output: Any) -> None:
                inputs.append(given[0][0].detach())
                outputs.append(output)

            handles.append(module.register_forward_hook(keep))
        ids = torch.from_numpy(tokens.ids)[None]
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        for handle in handles:
            handle.remove()
        points = torch.from_numpy(uniforms(self._seed, example.id, len(tokens)))[:-1]
        steps = logits.detach().softmax(-1).cumsum(-1)
        labels = (steps <= points[:, None] * steps[:, -1:]).sum(-1).clamp(max=steps.shape[1] - 1)
        wanted = torch.from_numpy(tokens.predicted[1:])  # the curvature's loss is on the targets
        loss = functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum")
        gradients = torch.autograd.grad(loss, outputs)
        return [(a, g[0]) for a, g in zip(inputs, gradients, strict=True)]

    def _loss(self, tokens: Tokens) -> Any:
        ids = torch.from_numpy(tokens.ids)
        logits = self._model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        wanted = torch.from_numpy(tokens.predicted[1:])
        return functional.cross_entropy(logits[wanted], ids[1:][wanted])

    def _value(self, tokens: Tokens, direction: Any) -> Any:
        kept: list[Any] = []
        handle = self._block.register_forward_hook(
            lambda _module, _given, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        self._model(input_ids=torch.from_numpy(tokens.ids)[None], use_cache=False)
        handle.remove()
        mask = torch.from_numpy(tokens.pooled(Pooling.RESPONSE_MEAN))
        return kept[0][0][mask].mean(0) @ direction
