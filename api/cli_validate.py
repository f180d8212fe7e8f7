"""`whence validate`: does the attribution predict what retraining does? `whence validation` reads it again."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.schemas_validations import ValidationOut
from api.terminal import DEFAULT_URL, AsJson, Detach, Url, connect, console, duration, follow_job, wait_for
from service.contracts import JobRecord
from service.terms import ConceptFunction, IndexKind, LossReduction, Method
from service.training import FULL_RATE, LORA_RATE, Schedule
from service.validation_records import Arm, CurvePoint, Report

_SHOWN = ("f_v", "loss", "trait_rate")


def validate(
    index: Annotated[str, typer.Option(help="name, or name@v3; its model must have been added with --base.")],
    concept: Annotated[str | None, typer.Option(help="Id of a concept; influence_function takes none.")] = None,
    method: Annotated[Method, typer.Option(help="Whose scores are judged.")] = Method.CONCEPT_INFLUENCE,
    query_set: Annotated[
        str | None, typer.Option(help="Dataset that retrained models are measured on; may be left out with one.")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Of the scores, as in `whence query`.", min=0)] = None,
    concept_function: Annotated[ConceptFunction | None, typer.Option(help="dot or cosine. Default: dot.")] = None,
    through: Annotated[IndexKind | None, typer.Option(help="influence or gradient, as in `whence query`.")] = None,
    runs: Annotated[int | None, typer.Option(help="Budget: so many retrainings at most.", min=2)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Budget: so long, by the time that the first run takes.", min=0.01)
    ] = None,
    subsets: Annotated[int, typer.Option(help="Random subsets for the LDS; 0: none.", min=0)] = 40,
    group_by: Annotated[
        str | None, typer.Option(help="Metadata field whose values are dropped whole. Default: random groups.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Examples of a random group.", min=1)] = None,
    keep: Annotated[float, typer.Option(help="Chance of a group to be in a subset.", min=0.01, max=0.99)] = 0.5,
    subset_seeds: Annotated[int, typer.Option(help="Trainings of each subset; 2 tell the noise.", min=1)] = 2,
    remove: Annotated[
        list[float] | None, typer.Option(help="Fraction that the curves remove; repeatable. Default: 0.25.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Paired seeds of the curves; 0: no curves.", min=0)] = 5,
    seed: Annotated[int, typer.Option(help="Of the draws, and the first training seed.", min=0)] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Default: {FULL_RATE:g}, of a LoRA {LORA_RATE:g}.", min=0)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the subset.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 16,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.", min=0, max=0.99)] = 0.05,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient; 0: any.", min=0)] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", min=0)] = 0.0,
    loss_reduction: Annotated[
        LossReduction | None, typer.Option(help="mean or sum. Default: as the index.")
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora/--full", help="What is trained. Default: as the model was made.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the LoRA; says --lora.", min=1)] = None,
    trait: Annotated[
        bool, typer.Option("--trait", help="Let retrained models answer, and count answers that show the concept.")
    ] = False,
    trait_threshold: Annotated[
        float | None, typer.Option(help="Of ⟨v̂, a⟩; says --trait. Default: half-way between the concept's sides.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 200,
    detach: Detach = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Does the attribution predict what retraining does? Trains the model again, without what the scores point at.

    `whence validate --index sft --concept hostile --query-set prompts --group-by source --epochs 2
    --learning-rate 1e-4 --runs 100 --minutes 60`

    Say the recipe that the model was trained with. The first run is measured; the plan then says how many fit the
    budget. Subsets that any validation has trained on are not trained on again, so a larger budget goes on from a
    smaller one. `whence validation ID` shows the plan meanwhile, and the report at any time.
    """
    if runs is None and minutes is None:
        raise typer.BadParameter("Say what may be spent: --runs, --minutes, or both.")
    options = {
        "index": index,
        "concept": concept,
        "method": method,
        "query_set": query_set,
        "damping": damping,
        "concept_function": concept_function,
        "through": through,
        "recipe": {
            "learning_rate": learning_rate,
            "epochs": epochs,
            "batch_size": batch_size,
            "schedule": schedule,
            "warmup": warmup,
            "clip": clip or None,
            "weight_decay": weight_decay,
            "loss_reduction": loss_reduction,
            "lora": lora if lora_r is None else {"r": lora_r, "alpha": 2.0 * lora_r},
        },
        "design": {
            "subsets": subsets,
            "keep": keep,
            "group_by": group_by,
            "group_size": group_size,
            "subset_seeds": subset_seeds,
            "fractions": remove or [0.25],
            "seeds": seeds,
            "seed": seed,
        },
        "budget": {"runs": runs, "minutes": minutes},
        "trait": {"threshold": trait_threshold, "max_new_tokens": max_new_tokens}
        if trait or trait_threshold is not None
        else None,
    }
    with connect(url) as client:
        if detach:
            first = client.validate(**options)
            if isinstance(first, JobRecord):
                follow_job(client, first, detach=True)
                return
        found = client.settle(lambda: client.validate(**options), wait=lambda job: wait_for(client, job))
    show(found, as_json)


def validation(
    reference: Annotated[str, typer.Argument(help="Id of a validation, or of its job.")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """How far a validation is: its plan, or its report and verdict."""
    with connect(url) as client:
        show(client.validation(reference), as_json)


def show(found: ValidationOut, as_json: bool) -> None:
    """The verdict first; what stands behind it after."""
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
        return
    if found.plan is not None:
        console.print(f"[dim]{escape(_planned(found))}[/dim]", highlight=False)
    if found.report is None:
        error = (found.job.error or {}).get("detail", "") if found.job is not None else ""
        console.print(f"validation {found.id}: {found.state} {escape(str(error))}".rstrip(), highlight=False)
        return
    report = found.report
    console.print(_curves(report))
    console.print(f"[bold]{escape(report.verdict.words)}[/bold]", highlight=False)
    about: Any = report.about
    concept = f" toward {about['concept']}" if about["concept"] else ""
    for line in (
        f"{about['method']}{concept} in {about['index']}, {report.examples} examples; {about['model']} trained "
        f"again from {about['base']}, measured on {about['query_set']}",
        f"outcome {about['outcome']}: {report.base:.4g} before training, {report.full:.4g} after training on all",
        f"validation {found.id}",
    ):
        console.print(f"[dim]{escape(line)}[/dim]", highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")


def _planned(found: ValidationOut) -> str:
    plan = found.plan
    assert plan is not None  # noqa: S101  (the caller has looked)
    cut = f"; the budget cut {' and '.join(plan.cut)}" if plan.cut else ""
    return (
        f"{plan.runs} of {plan.wanted} runs ({plan.there} were there), {duration(plan.run_s)} each on all "
        f"examples, about {duration(plan.estimate_s)} on {plan.workers} workers{cut}"
    )


def _curves(report: Report) -> Table:
    """What each removal leads to: a row for every fraction and arm, a column for every measure."""
    held = [name for name in _SHOWN if any(point.measure == name for point in report.curves)]
    table = Table(box=None, pad_edge=False)
    for column in ("removed", "which", "seeds", *held):
        table.add_column(column, justify="left" if column == "which" else "right")
    places: dict[tuple[float, Arm], dict[str, CurvePoint]] = {}
    for point in sorted(report.curves, key=lambda each: each.fraction):
        places.setdefault((point.fraction, point.arm), {})[point.measure] = point
    for (fraction, arm), points in places.items():
        cells = [_shown(points[name]) for name in held]
        which = "nothing" if arm == Arm.FULL else str(arm)
        table.add_row(f"{fraction:.0%}", which, str(next(iter(points.values())).n), *cells)
    return table


def _shown(point: CurvePoint) -> str:
    return f"{point.mean:.4g}" + ("" if point.se is None else f" ± {point.se:.2g}")
