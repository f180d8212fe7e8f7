"""What a persona job leaves: concepts that say what they were made from, and warnings in plain words."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from service import codec, derived
from service.contracts import ConceptRecord, ModelRecord
from service.judging import UNREADABLE, NoJudge
from service.personas import FEW_PAIRS, FOLDS, PERSONA, Answered, PersonaSpec
from service.registry import Registry
from service.terms import Pooling
from workers.persona_vectors import Layered
from workers.stages import Stages

_WEAK = 0.7  # held-out AUROC
_MANY = 0.2  # of the pairs


def reasons(answered: Sequence[Answered]) -> dict[str, int]:
    """How many pairs were left out, and why."""
    return dict(sorted(Counter(each.reason for each in answered[::2] if each.reason).items()))


def publish(
    stages: Stages,
    registry: Registry,
    spec: PersonaSpec,
    model: ModelRecord,
    answered: Sequence[Answered],
    found: Layered,
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """Register a concept for every layer, or for the best, and say what came of the job.

    Raises Conflict where an id was taken meanwhile, and Invalid where both sides have the same mean.
    """
    provenance = _provenance(spec, answered, found, bounds)
    chosen = range(len(spec.layers)) if spec.each_layer else [found.best()]
    stages.context.check()
    made = []
    for number in chosen:
        layer = spec.layers[number]
        record = ConceptRecord(
            id=spec.concept_ids()[layer],
            model=model.id,
            model_fingerprint=model.fingerprint,
            lineage=model.lineage,
            layer=layer,
            pooling=Pooling.RESPONSE_MEAN,
            width=model.width,
            method=PERSONA,
            norm=0.0,
            auroc_held_out=float(found.auroc[number]),
            n_positive=provenance["pairs"]["kept"],
            n_negative=provenance["pairs"]["kept"],
            provenance=provenance,
            sha256="",
            created_at="",
        )
        made.append(derived.register(stages.storage, registry, record, found.vectors[number]))
    return {
        "concept": made[0].id if len(made) == 1 else [each.id for each in made],
        "layer": made[0].layer if len(made) == 1 else [each.layer for each in made],
        "auroc_held_out": max(each.auroc_held_out or 0.0 for each in made),
        "pairs": provenance["pairs"],
        "sweep": provenance["sweep"],
        "answers": spec.key,
        "warnings": _warnings(spec, answered, [float(found.auroc[number]) for number in chosen], found),
    }


def _provenance(
    spec: PersonaSpec, answered: Sequence[Answered], found: Layered, bounds: tuple[float, float]
) -> dict[str, Any]:
    """Decided by the job's specification alone, so that an attempt after a death registers the same."""
    trait, dropped = spec.file.trait, reasons(answered)
    judge = codec.to_plain(spec.judge)
    if not isinstance(spec.judge, NoJudge):
        judge |= {"positive_above": bounds[0], "negative_below": bounds[1]}
    questions = len({each.question for each in answered if each.kept})
    return {
        "trait": {
            "sha256": spec.file.sha256,
            "instructions": len(trait.instruction),
            "questions": len(trait.questions),
        },
        "answers": spec.key,
        "generation": {
            "samples": spec.samples,
            "seed": spec.answers.seed,
            "temperature": spec.answers.temperature,
            "max_new_tokens": spec.answers.max_new_tokens,
            "system_prompt": str(spec.system_prompt),
        },
        "activations": "mean over the answer's tokens, each answer under its own system prompt",
        "judge": judge,
        "pairs": {
            "made": len(answered) // 2,
            "kept": len(answered) // 2 - sum(dropped.values()),
            "dropped": dropped,
            "questions": questions,
        },
        "folds": {"by": "question", "count": min(FOLDS, questions)},
        "auroc_of_choice": None if spec.each_layer else found.auroc_of_choice,
        "sweep": [
            {"layer": layer, "auroc_held_out": float(area), "separation": float(apart)}
            for layer, area, apart in zip(spec.layers, found.auroc, found.separation, strict=True)
        ],
    }


def _warnings(spec: PersonaSpec, answered: Sequence[Answered], areas: Sequence[float], found: Layered) -> list[str]:
    dropped, pairs = reasons(answered), len(answered) // 2
    kept = pairs - sum(dropped.values())
    said: list[str] = []
    if isinstance(spec.judge, NoJudge):
        said.append(
            "No judge looked at the answers: every pair counts, whether it shows the trait or not. Read some."
        )
    if kept < FEW_PAIRS:
        said.append(
            f"{kept} pairs are few: the direction, and its held-out AUROC, are noisy. Ask for more samples."
        )
    if (unread := dropped.get(UNREADABLE, 0)) > _MANY * pairs:
        said.append(f"The judge's words were no score in {unread} of {pairs} pairs: look at what it says.")
    if kept < pairs / 2:
        said.append(f"Only {kept} of {pairs} pairs show the trait: the model may not take to the instructions.")
    if min(areas) < _WEAK:
        said.append(
            f"The direction barely tells answers to unseen questions apart (held-out AUROC {min(areas):.2f}; .5 is "
            "chance): do not rely on it."
        )
    elif not spec.each_layer and found.auroc_of_choice is not None and found.auroc_of_choice < _WEAK:
        said.append(
            f"The layer was chosen as the best of {len(spec.layers)}. With the choice held out too, the AUROC is "
            f"{found.auroc_of_choice:.2f}, not {areas[0]:.2f}: do not rely on it."
        )
    return said
