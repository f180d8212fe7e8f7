"""`whence concepts health`: what speaks for and against attributions to a concept."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli_concepts import IdArgument, concepts_app
from api.schemas_health import DomainOut, HealthOut, MovementOut
from api.terminal import DEFAULT_URL, AsJson, Url, connect, console, wait_for
from service.health_doubts import without_doubts
from service.terms import ConceptFunction

_BAR = 24


@concepts_app.command("health")
def health(
    concept: IdArgument,
    index: Annotated[str, typer.Option(help="name or name@v3")],
    query_set: Annotated[
        str | None, typer.Option(help="Dataset Q; may be left out where the index has embeddings for one only.")
    ] = None,
    concept_function: Annotated[ConceptFunction | None, typer.Option(help="f_v. Default: dot.")] = None,
    damping: Annotated[
        float | None, typer.Option(help="Of the gradients that are compared. Default: 1.", min=0)
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """What speaks for and against attributions to a concept on this index?

    `whence concepts health hostile --index train --query-set prompts` measures f_v on the prompts along the
    training run (did it move, did it turn?), compares the rankings by gradients and by activations, and tests
    whether the prompts, and what the concept was fitted on, lie in the domain of the training data. A job does so
    once; queries on the same question then carry its warnings.
    """
    options: dict[str, Any] = {"query_set": query_set, "concept_function": concept_function, "damping": damping}
    with connect(url) as client:
        found = client.settle(
            lambda: client.concept_health(index=index, concept=concept, **options),
            wait=lambda job: wait_for(client, job),
        )
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
    else:
        show(found)


def show(found: HealthOut) -> None:
    """A line for every part, f_v along the run as a table, then the warnings."""
    about = found.concept
    fitted = "given, not fitted" if about.auroc_held_out is None else f"held-out AUROC {about.auroc_held_out:.2f}"
    _say(f"concept {about.id} (layer {about.layer}, {about.pooling}; {fitted}) on {found.index}")
    if found.movement is not None:
        _movement(found, found.movement)
    for name, part in (("query set", found.domain), ("concept's examples", found.concept_domain)):
        if part is not None:
            _say(f"{name}: {_domain(part)}")
    if found.agreement is not None:
        each = found.agreement
        rho = "undefined" if each.spearman is None else f"{each.spearman:+.2f}"
        _say(
            f"gradients against activations: Spearman {rho} over {each.examples:,} examples, {each.overlap:.0%} of "
            f"the first {each.k} in common ({each.by_chance:.0%} by chance)"
        )
    for said in found.absent.values():
        console.print(f"[dim]{escape(said)}[/dim]")
    for each in found.doubts:
        console.print(f"[yellow]warning[/yellow] {escape(each.said)}")
    if not found.doubts:
        change = found.movement.change if found.movement is not None else None
        _say(without_doubts(change, found.domain, found.concept_domain, found.agreement))


def _movement(found: HealthOut, movement: MovementOut) -> None:
    _say(f"f_v on {movement.examples} examples of {found.query_set}, {found.concept_function}:")
    table = Table(box=None, pad_edge=False)
    for name in ("point", "f_v", "± 95 %", ""):
        table.add_column(name, justify="right" if name in {"f_v", "± 95 %"} else "left", no_wrap=True)
    values = [point.f.value for point in movement.points]
    low, width = min(values), max(values) - min(values)
    for point in movement.points:
        place = round((point.f.value - low) / width * (_BAR - 1)) if width > 0 else 0
        half = "" if point.f.high is None else f"{point.f.high - point.f.value:.2g}"
        table.add_row(escape(point.name), f"{point.f.value:+.4g}", half, f"[cyan]{' ' * place}●[/cyan]")
    console.print(table)
    change = movement.change
    if change is not None:
        effect = "" if change.effect is None else f", {change.effect:+.2f} of its spread over the examples"
        _say(
            f"change from {movement.points[0].name} to the end {change.mean.value:+.3g}{effect}, "
            f"p {change.p_value:.2g}"
        )
    for name, reason in movement.left_out.items():
        console.print(f"[dim]{escape(f'left out {name}: {reason}')}[/dim]")


def _domain(found: DomainOut) -> str:
    verdict = "outside the index's domain" if found.outside else "within the index's domain"
    return (
        f"{verdict}: told from {found.against} of its examples of like length with AUROC {found.auroc:.2f} "
        f"(p {found.p_value:.2g}; {found.examples} examples of {found.name}, {found.alike:.0%} with a like in "
        "length)"
    )


def _say(line: str) -> None:
    console.print(escape(line), highlight=False)
