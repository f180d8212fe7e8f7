"""`whence query … --exact N`: the ranking of the best N by exact scores."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.schemas_evidence import RerankOut
from api.terminal import connect, console, duration, wait_for

ExactOption = Annotated[
    int,
    typer.Option(
        help="Score so many of the best again with untruncated EK-FAC, by a short job, and rank those.",
        min=0,
        max=10_000,
    ),
]


def rerank(url: str, options: dict[str, Any], candidates: int, as_json: bool) -> None:
    """Ask, wait for the jobs that it takes, and show both ranks of every hit."""
    with connect(url) as client:
        found = client.settle(
            lambda: client.rerank(candidates=candidates, **options), wait=lambda job: wait_for(client, job)
        )
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
    else:
        show(found)


def show(found: RerankOut) -> None:
    """Exact rank and score, then what the index had said, then the example."""
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "exact", "was", "score"):
        table.add_column(name, justify="right")
    table.add_column("example")
    for hit in found.hits:
        lines = ", ".join(f"{place.file}:{place.line}" for place in hit.places[:3])
        notes = " ".join(f"{key}={value}" for key, value in hit.metadata.items())
        text = " ".join(hit.text.split())
        table.add_row(
            str(hit.rank),
            f"{hit.score:+.4g}",
            str(hit.approximate_rank),
            f"{hit.approximate_score:+.4g}",
            f"{escape(text[:160])} [dim]{escape(lines)} {escape(notes[:80])}[/dim]",
        )
    console.print(table)
    used = found.concept
    about = f"; concept {used.id} (layer {used.layer})" if used else ""
    points = f"summed over {found.points} points of the run" if found.points > 1 else "at the end of the run"
    rho = "" if found.spearman is None else f"; Spearman {found.spearman:.3f} with the stored scores"
    said = (
        f"{found.order} of {found.candidates} candidates of {found.index} by exact {found.method}{about}{rho}",
        f"query set {found.query_set}; damping {found.damping:g}; {points}; took {duration(found.seconds)}",
    )
    for line in said:
        console.print(f"[dim]{escape(line)}[/dim]")
    for one in found.unscored:
        console.print(
            f"[yellow]left out[/yellow] {one.example_id} (was {one.approximate_rank}): {escape(one.reason)}"
        )
    for warning in found.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")
