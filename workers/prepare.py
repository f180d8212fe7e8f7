"""From examples to batches: tokenise, mask, fit into the context, or say why an example cannot run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from service.contracts import Example, Quarantined
from service.errors import Invalid
from service.terms import LossReduction, Pooling
from service.work import Reading
from workers.batches import Batch, collate, plan
from workers.masks import Tokens, UnrenderableError, fit, tokenise
from workers.models import Loaded


@dataclass(frozen=True)
class Prepared:
    """``tokens`` by position among the examples that were given; the others are in ``aside``."""

    tokens: dict[int, Tokens]
    aside: dict[int, Quarantined]

    def batches(
        self, loaded: Loaded, reading: Reading, *, pooling: Pooling | None, reduction: LossReduction
    ) -> Iterator[tuple[list[int], Batch]]:
        """Positions and the batch they run in, by the plan that lengths and token budget decide."""
        positions = list(self.tokens)
        for group in plan([len(self.tokens[position]) for position in positions], reading.token_budget):
            members = [positions[i] for i in group]
            yield members, self.batch(loaded, members, pooling=pooling, reduction=reduction)

    def batch(
        self, loaded: Loaded, members: Sequence[int], *, pooling: Pooling | None, reduction: LossReduction
    ) -> Batch:
        """These positions as one batch."""
        chosen = [self.tokens[position] for position in members]
        return collate(chosen, pooling=pooling, reduction=reduction, device=loaded.device)

    def finite(
        self,
        loaded: Loaded,
        reading: Reading,
        compute: Callable[[list[int], Batch], Mapping[str, Sequence[Tensor]]],
        *,
        pooling: Pooling | None,
        reduction: LossReduction,
    ) -> tuple[dict[str, list[Tensor]], list[int]]:
        """Sums over all batches of what ``compute`` gives by name, and the positions that went into them.

        A batch whose result holds NaN or infinity is done again example by example; the damaged ones are left out.
        """
        sums: dict[str, list[Tensor]] = {}
        used: list[int] = []

        def add(members: list[int], batch: Batch) -> bool:
            found = compute(members, batch)
            if not all(bool(each.isfinite().all()) for values in found.values() for each in values):
                return False
            for name, values in found.items():
                if name in sums:
                    sums[name] = [total.add_(value) for total, value in zip(sums[name], values, strict=True)]
                else:
                    sums[name] = list(values)
            used.extend(members)
            return True

        for members, batch in self.batches(loaded, reading, pooling=pooling, reduction=reduction):
            if not add(members, batch) and len(members) > 1:
                for position in members:
                    add([position], self.batch(loaded, [position], pooling=pooling, reduction=reduction))
        return sums, used


def prepare(
    loaded: Loaded, reading: Reading, examples: Sequence[Example], *, trains: bool, pooling: Pooling | None
) -> Prepared:
    """``trains``: an example without a token to predict is set aside; ``pooling``: one without a token to pool."""
    found = Prepared({}, {})
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])  # pyright: ignore
    for position, example in enumerate(examples):
        ready = _one(loaded, reading, example, trains, pooling)
        if isinstance(ready, Quarantined):
            found.aside[position] = ready
        else:
            if ready.ids.max(initial=0) >= vocabulary:
                raise Invalid(
                    "vocabulary_too_small",
                    f"The tokenizer gives token {ready.ids.max()}, but the model of fingerprint "
                    f"{reading.model_fingerprint[:12]} knows {vocabulary}: a base or checkpoint from before the "
                    "vocabulary grew. Build with checkpoints 'end', or declare others.",
                    param="checkpoints",
                )
            found.tokens[position] = ready
    return found


def _one(
    loaded: Loaded, reading: Reading, example: Example, trains: bool, pooling: Pooling | None
) -> Tokens | Quarantined:
    try:
        whole = tokenise(example.content, loaded.tokenizer)
    except UnrenderableError as error:
        return Quarantined(example.id, error.code, error.detail)
    tokens = fit(whole, reading.max_length, reading.long_examples)
    if tokens is None:
        detail = f"{len(whole)} tokens, the limit is {reading.max_length}."
        return Quarantined(example.id, "too_long", detail)
    cut = f" within the first {reading.max_length} of {len(whole)} tokens" if tokens.truncated else ""
    if trains and not tokens.predicted.any():
        reason = "target_cut_off" if tokens.truncated else "no_target"
        return Quarantined(example.id, reason, f"There is no token to predict{cut}.")
    if pooling is not None and not tokens.pooled(pooling).any():
        return Quarantined(example.id, "nothing_to_pool", f"No token is left to pool by {pooling}{cut}.")
    return tokens
