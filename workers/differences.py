"""Projection differences: a_l(x, y) − a_l(x, y'), the example's last answer against the base model's own."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from service.contracts import ArrayInfo, Example, Quarantined
from service.rows import F32
from service.terms import IndexKind, LossReduction, Pooling
from service.work import DifferenceSpec, Reading
from workers.activations import block_outputs, pool, run_until
from workers.answers import Ids, ends_of
from workers.batches import Batch
from workers.masks import Tokens, last_answer_only, up_to_end
from workers.models import Loaded
from workers.passes import PassResult
from workers.prepare import Prepared, check_vocabulary, prepare
from workers.works import answers


def run(loaded: Loaded, answered: Iterable[Ids], spec: DifferenceSpec, examples: Sequence[Example]) -> PassResult:
    """One row per example and layer, against ``answered``, one answer per example; without one it is set aside."""
    prepared = prepare(loaded, spec, examples, trains=False, pooling=spec.pooling, windows=True)
    aside = prepared.aside
    ends = ends_of(loaded, spec.ends)
    own: dict[int, Tokens] = {}
    theirs: dict[int, Tokens] = {}
    for position, answer in enumerate(answered):
        if position in aside:
            continue
        example, tokens = examples[position], prepared.tokens[position]
        prompt = answers.prompt_of(example, loaded, spec)
        if isinstance(prompt, Quarantined):
            aside[position] = prompt
        elif not len(answer):
            detail = f"The base gave no answer to its prompt of {len(prompt)} tokens (limit {spec.max_length})."
            aside[position] = Quarantined(example.id, "no_answer", detail)
        elif not (trained_on := last_answer_only(tokens)).pooled(spec.pooling).any():
            reason, detail = "empty_target", "Its last answer has no token."
            if tokens.truncated:
                reason, detail = (
                    "target_cut_off",
                    f"Its last answer lies beyond the first {spec.max_length} tokens.",
                )
            aside[position] = Quarantined(example.id, reason, detail)
        else:
            own[position] = up_to_end(trained_on, ends)
            check_vocabulary(loaded, spec, answer)
            ids, target = np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt)
            theirs[position] = Tokens(ids, target, tokens.bos, has_prompt=True)
    trained, compared = (
        pooled(loaded, spec, Prepared(examples, some, aside), layers=spec.layers, pooling=spec.pooling)
        for some in (own, theirs)
    )
    rows = {  # (layers, d) each
        position: trained[position] - compared[position] for position in trained if position not in aside
    }
    for position in [position for position, row in rows.items() if not np.isfinite(row).all()]:
        del rows[position]
        aside[position] = Quarantined(examples[position].id, "not_finite", "The difference holds NaN or infinity.")
    kept = sorted(rows)
    width = loaded.width
    whole = np.array([rows[position] for position in kept], dtype=np.float32).reshape(-1, len(spec.layers), width)
    return PassResult(
        ids=tuple(examples[position].id for position in kept),
        arrays={
            ArrayInfo(IndexKind.DIFFERENCE, layer, width): whole[:, number]
            for number, layer in enumerate(spec.layers)
        },
        quarantined=tuple(aside[position] for position in sorted(aside)),
        long=tuple(examples[position].id for position in kept if prepared.is_long(position, spec)),
        tokens=sum(len(tokens) for some in (own, theirs) for tokens in some.values()),
    )


def pooled(
    loaded: Loaded, reading: Reading, prepared: Prepared, *, layers: Sequence[int], pooling: Pooling
) -> dict[int, F32]:
    """a_l at every one of ``layers``, (layers, d) by position."""

    def states(_members: list[int], batch: Batch) -> F32:
        with block_outputs(loaded.blocks, layers, stop=True) as outputs, torch.no_grad():
            run_until(loaded.model, batch.ids)
        return np.stack([pool(outputs[layer], batch.pool_weight).cpu().numpy() for layer in layers], axis=1)

    found: dict[int, F32] = {}
    for members, rows in prepared.each(loaded, reading, states, pooling=pooling, reduction=LossReduction.MEAN):
        for position, row in zip(members, rows, strict=True):
            found[position] = found[position] + row if position in found else row
    return found
