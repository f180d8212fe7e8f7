"""Whole rankings on the command line: every score as a file, groups of examples, two rankings side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

from api.cli_asked import with_asked
from api.client import Client, WhenceError
from api.schemas_rankings import CompareOut, GroupsOut, MoverOut, RankingOut
from api.terminal import DEFAULT_URL, AsJson, Url, connect, console, errors, provenance, wait_for
from service.contracts import JobRecord
from service.terms import ConceptFunction, GroupSort, IndexKind, Method, Order

T = TypeVar("T")

AllOption = Annotated[
    Path | None,
    typer.Option("--all", help="Write the whole ranking to this Parquet file, one row an example; -k has no part."),
]
MetadataOption = Annotated[
    bool, typer.Option("--metadata", help="With --all: a column with each example's metadata as JSON.")
]
GroupByOption = Annotated[
    str | None,
    typer.Option(help="Metadata field: show groups of examples by its values, and their shares of the first k."),
]
SortOption = Annotated[GroupSort, typer.Option("--sort", help="With --group-by: what groups are sorted by.")]
LimitOption = Annotated[int, typer.Option("--limit", help="With --group-by: how many groups.", min=1, max=10_000)]

_ROUNDS = 3  # a comparison may need a job for either side
_SHOWN = 100  # characters of a text


def download_all(client: Client, options: dict[str, Any], file: Path, *, metadata: bool) -> None:
    """The whole ranking into ``file``, under a progress bar."""
    if not file.parent.is_dir():
        raise typer.BadParameter(f"There is no folder {file.parent}.", param_hint="--all")
    columns = (SpinnerColumn(), TextColumn("downloading"), DownloadColumn(), TransferSpeedColumn())

    def fetch() -> JobRecord | int:
        with Progress(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("", total=None)
            received = 0

            def on_received(count: int) -> None:
                nonlocal received
                received = count
                bar.update(task, completed=count)

            needed = client.download_scores(file, metadata=metadata, on_received=on_received, **options)
            return received if needed is None else needed

    console.print(f"{escape(str(file))}: {until_ready(client, fetch):,} bytes", highlight=False)


def groups_of(
    client: Client, options: dict[str, Any], field: str, *, k: int, sort: GroupSort, limit: int
) -> GroupsOut:
    return until_ready(client, lambda: client.groups(group_by=field, k=k, sort=sort, limit=limit, **options))


def until_ready(client: Client, ask: Callable[[], T | JobRecord]) -> T:
    """What ``ask`` answers once the jobs that it needs have ended, each under its progress."""
    for _ in range(_ROUNDS):
        answer = ask()
        if not isinstance(answer, JobRecord):
            return answer
        wait_for(client, answer)
    answer = ask()
    if isinstance(answer, JobRecord):
        raise WhenceError(202, {"code": "not_ready", "detail": f"Job {answer.id} is still needed; ask again."})
    return answer


def show_groups(answer: GroupsOut) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(answer.group_by or "cluster")
    for column in ("examples", "mean", "sum", f"of first {answer.k}", "lift"):
        table.add_column(column, justify="right")
    for group in answer.groups:
        table.add_row(
            "[dim]none[/dim]" if group.value is None else escape(str(group.value)),
            f"{group.count:,}",
            f"{group.mean:+.4g}",
            f"{group.sum:+.4g}",
            f"{group.share_of_top:.1%}",
            f"{group.lift:.2f}",
        )
    console.print(table)
    if answer.total > len(answer.groups):
        console.print(f"[dim]{len(answer.groups)} of {answer.total:,} groups, by {answer.sort}[/dim]")
    show_ranking(answer)


@with_asked
def compare(
    options: dict[str, Any],
    vs_index: Annotated[str | None, typer.Option(help="b: another index or version.")] = None,
    vs_concept: Annotated[str | None, typer.Option(help="b: another concept.")] = None,
    vs_method: Annotated[
        Method | None, typer.Option(help="b: another method; then only index, concept and order are taken over.")
    ] = None,
    vs_order: Annotated[Order | None, typer.Option(help="b: the other end.")] = None,
    vs_query_set: Annotated[str | None, typer.Option(help="b: another query set.")] = None,
    vs_damping: Annotated[float | None, typer.Option(help="b: another damping.", min=0)] = None,
    vs_concept_function: Annotated[ConceptFunction | None, typer.Option(help="b: another f_v.")] = None,
    vs_through: Annotated[IndexKind | None, typer.Option(help="b: embeddings, or gradient coordinates.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Overlap of the first k, beside 10, 100, 1000.", min=1)] = 100,
    movers: Annotated[int, typer.Option(help="How many examples that moved most, each way.", min=0, max=1000)] = 5,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Where do two rankings differ? Ranking a is asked for like a query; b is the same, but for what --vs-… says.

    Shows their rank correlation, how much of the first k they share, and which examples moved most. All figures are
    about the examples that both rank.
    """
    changed = {
        "index": vs_index,
        "concept": vs_concept,
        "method": vs_method,
        "order": vs_order,
        "query_set": vs_query_set,
        "damping": vs_damping,
        "concept_function": vs_concept_function,
        "through": vs_through,
    }
    b = other_side(options, {name: value for name, value in changed.items() if value is not None})
    with connect(url) as client:
        answer = until_ready(client, lambda: client.compare(options, b, k=k, movers=movers))
    if as_json:
        console.print_json(data=answer.model_dump(mode="json"))
    else:
        show_comparison(answer)


def other_side(a: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What b asks: a's question with these fields changed. Of another method's fields only those that all have are
    taken over: a method refuses what it makes no use of.
    """
    if not changed:
        raise typer.BadParameter("Say what the other ranking is: --vs-concept, --vs-method, --vs-index, …")
    if changed.get("method", a["method"]) == a["method"]:
        return a | changed
    taken = {"index", "order"} | ({"concept"} if changed["method"] != Method.INFLUENCE_FUNCTION else set())
    return {name: value for name, value in a.items() if name in taken} | changed


def show_comparison(answer: CompareOut) -> None:
    correlation = "none (one score only)" if answer.spearman is None else f"{answer.spearman:+.3f}"
    console.print(f"rank correlation (Spearman) {correlation} over {answer.common:,} examples", highlight=False)
    for each in answer.overlaps:
        console.print(f"first {each.k:,}: {each.share:.1%} shared, {each.by_chance:.1%} by chance", highlight=False)
    if answer.only_a or answer.only_b:
        console.print(f"only in a {answer.only_a:,}, only in b {answer.only_b:,}: left out", highlight=False)
    for title, movers in (("higher in b", answer.up), ("higher in a", answer.down)):
        if movers:
            _show_movers(title, movers)
    for name, ranking in (("a", answer.a), ("b", answer.b)):
        show_ranking(ranking, f"{name}: ")


def _show_movers(title: str, movers: list[MoverOut]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("rank in a", "in b", "percentile in a", "in b"):
        table.add_column(column, justify="right")
    table.add_column(title)
    for mover in movers:
        lines = ", ".join(f"{place.file}:{place.line}" for place in mover.places[:3])
        table.add_row(
            f"{mover.rank_a:,}",
            f"{mover.rank_b:,}",
            f"{mover.percentile_a:.1f}",
            f"{mover.percentile_b:.1f}",
            f"{escape(' '.join(mover.text.split())[:_SHOWN])} [dim]{escape(lines)}[/dim]",
        )
    console.print(table)


def show_ranking(found: RankingOut, name: str = "") -> None:
    """Where a ranking comes from."""
    concept = f"; concept {found.concept.id} (layer {found.concept.layer})" if found.concept else ""
    said = (
        f"{name}{found.order} of {found.rows:,} examples in {found.index} by {found.method}{concept}",
        provenance(found.provenance),
    )
    for line in said:
        console.print(f"[dim]{escape(line)}[/dim]")
    for warning in found.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")
