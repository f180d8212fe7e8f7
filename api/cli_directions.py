"""`whence indexes directions`: what a dataset does to a model, as a table."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.schemas_evidence import AlignedOut, DirectionsOut, ExtremeOut
from api.terminal import DEFAULT_URL, AsJson, Url, connect, console, wait_for
from service.terms import ConceptFunction

_BAR = 20


def directions(
    reference: Annotated[str, typer.Argument(help="name or name@v3, with kind influence")],
    query_set: Annotated[
        str | None, typer.Option(help="Dataset Q of the embeddings, if there are several.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Their layer, if there are several.")] = None,
    concept_function: Annotated[
        ConceptFunction | None, typer.Option(help="Their f_v. Default: dot, where there are several.")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Their damping. Default: 1, where there are several.", min=0)
    ] = None,
    count: Annotated[int, typer.Option(help="How many directions.", min=1, max=100)] = 10,
    examples: Annotated[int, typer.Option(help="Extreme examples on each side.", min=0, max=100)] = 2,
    seed: Annotated[int, typer.Option(help="Of the randomised method.", min=0)] = 0,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """What does training on this dataset do to the model, when nobody has named the concept?

    The top singular directions of the influence embeddings: how much of all effects lies along each, which
    registered concepts it resembles (cosine), and the examples that push furthest along it (+) and against it (−).
    Nothing is centred: the first direction is often what all examples have in common. No model runs; the first
    call takes a few passes over the stored rows, later ones are answered at once.
    """
    options: dict[str, Any] = {
        "query_set": query_set,
        "layer": layer,
        "concept_function": concept_function,
        "damping": damping,
        "count": count,
        "examples": examples,
        "seed": seed,
    }
    with connect(url) as client:
        found = client.settle(
            lambda: client.directions(reference, **options), wait=lambda job: wait_for(client, job)
        )
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
    else:
        show(found)


def show(found: DirectionsOut) -> None:
    """One block of lines per direction: its share as number and bar, concepts, extreme examples."""
    table = Table(box=None, pad_edge=False)
    for name in ("direction", "share", "so far"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("concepts and extreme examples")
    largest = max((each.share for each in found.directions), default=0.0) or 1.0
    for each in found.directions:
        lines = [_concepts(each.concepts)]
        lines += [_line("+", one) for one in each.most] + [_line("−", one) for one in each.least]
        bar = "█" * max(1, round(_BAR * each.share / largest))
        share, total = f"{each.share:.1%}", f"{each.cumulative_share:.1%}"
        table.add_row(str(each.number), share, total, f"[cyan]{bar:<{_BAR}}[/cyan]", "\n".join(lines))
    console.print(table)
    summed = f"; summed over {found.points} points of the run" if found.points > 1 else "; at the end of the run"
    said = (
        f"{found.rows} examples in {found.index}: influence on layer {found.layer}, query set {found.query_set}, "
        f"{found.concept_function}, damping {found.damping:g}{summed}",
        f"what all examples have in common: {found.mean.share:.1%} of the energy; {_concepts(found.mean.concepts)}",
    )
    for line in said:
        console.print(f"[dim]{line}[/dim]")
    for warning in found.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")


def _concepts(found: list[AlignedOut]) -> str:
    named = ", ".join(f"{escape(each.concept)} {each.cosine:+.2f}" for each in found)
    return f"[bold]{named}[/bold]" if named else "[dim]no registered concept at this layer[/dim]"


def _line(side: str, one: ExtremeOut) -> str:
    where = ", ".join(f"{place.file}:{place.line}" for place in one.places[:1])
    text = " ".join(one.text.split())
    return f"{side} {one.score:+.3g} {escape(text[:90])} [dim]{escape(where)}[/dim]"
