"""`whence groups`: which groups of examples pushed the model toward the concept."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli_asked import with_asked
from api.cli_rankings import show_ranking, until_ready
from api.schemas_rankings import GroupOut, GroupsOut
from api.terminal import DEFAULT_URL, AsJson, Url, connect, console
from service.specs import MOST_CLUSTERS
from service.terms import GroupSort

_BAR = 21  # characters, zero in the middle
_TEXT = 100  # characters of an example


@with_asked
def groups(
    options: dict[str, Any],
    by: Annotated[str | None, typer.Option("--by", help="Metadata field whose values make the groups.")] = None,
    clusters: Annotated[
        int | None,
        typer.Option(help="Or so many clusters of what examples do to the model.", min=2, max=MOST_CLUSTERS),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the clusters.", min=0)] = 0,
    sae: Annotated[
        str | None, typer.Option(help="Or an SAE: examples on which one of its features fires are a group.")
    ] = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="Number of a feature; repeatable. Default: the --limit that stand out most.", min=0),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="A feature fires above this value. Default: wherever it is not 0.", min=0)
    ] = 0.0,
    relative: Annotated[
        bool, typer.Option("--relative", help="--threshold is a share of each feature's largest value: 0.5.")
    ] = False,
    k: Annotated[int, typer.Option("-k", "--k", help="The first so many, of which shares are shown.", min=1)] = 100,
    sort: Annotated[GroupSort, typer.Option(help="What groups are sorted by; --order says which end first.")] = (
        GroupSort.MEAN
    ),
    limit: Annotated[int, typer.Option(help="How many groups.", min=1, max=10_000)] = 20,
    examples: Annotated[int, typer.Option(help="How many examples of each.", min=0, max=100)] = 1,
    terms: Annotated[int, typer.Option(help="How many words of each.", min=0, max=100)] = 6,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Which groups of training examples pushed the model toward the concept?

    `whence groups --index sft --concept hostile --by source` groups by a metadata field.

    `whence groups --index sft --concept hostile --method concept_influence --clusters 20` finds groups by itself:
    examples that do the same to the model.

    `whence groups --index sft --concept hostile --sae tone --feature 7 --threshold 0.5 --relative` takes the
    examples on which a feature fires, here above half of its largest value. One may be in several of these groups;
    the last line is of those that are in none. Without --feature: the features that stand out, whose examples'
    scores sum to what is furthest from that of as many average ones. The first call encodes the index, in a job.

    Each group is shown with its mean and the 95 % interval of that, its share of all that pushes, the words that
    tell it from the rest, and its first examples.
    """
    if sum(each is not None for each in (by, clusters, sae)) != 1:
        raise typer.BadParameter(
            "Groups are made by a metadata field (--by), by --clusters or by the features of an --sae: name one."
        )
    if sae is None and (feature or threshold or relative):
        raise typer.BadParameter(
            "--feature, --threshold and --relative are about the features of an SAE: name --sae."
        )
    if by is not None:
        made: dict[str, Any] = {"group_by": by}
    elif clusters is not None:
        made = {"clusters": clusters, "seed": seed}
    else:
        made = {"sae": sae, "features": feature or None, "threshold": threshold, "relative": relative}
    shown = {"k": k, "sort": sort, "limit": limit, "examples": examples, "terms": terms}
    with connect(url) as client:
        answer = until_ready(client, lambda: client.groups(**made, **shown, **options))
    if as_json:
        console.print_json(data=answer.model_dump(mode="json"))
    else:
        show(answer)


def show(answer: GroupsOut) -> None:
    shown = answer.groups if answer.rest is None else [*answer.groups, answer.rest]
    ends = [each.high if each.high is not None else each.mean for each in shown]
    ends += [each.low if each.low is not None else each.mean for each in shown]
    widest = max(map(abs, ends), default=0.0)
    table = Table(box=None, pad_edge=False)
    made_by = answer.group_by or ("cluster" if answer.sae is None else "feature")
    table.add_column(made_by)
    for column in ("examples", "mean", "", "± 95 %", "share", f"of first {answer.k}"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("words, and what comes first")
    for group in shown:
        table.add_row(
            "[dim]none[/dim]" if group.value is None else escape(f"{group.value} {group.label or ''}".strip()),
            f"{group.count:,}",
            f"{group.mean:+.4g}",
            bar(group, widest),
            "" if group.high is None else f"{group.high - group.mean:.2g}",
            f"{group.share:+.1%}",
            f"{group.share_of_top:.1%}",
            _words(group),
        )
    console.print(table)
    if answer.total > len(answer.groups):
        console.print(f"[dim]{len(answer.groups)} of {answer.total:,} groups, by {answer.sort}[/dim]")
    if answer.cohesion is not None:
        said = f"mean cosine of an example with the centre of its cluster: {answer.cohesion:.2f}"
        console.print(f"[dim]{said}[/dim]", highlight=False)
    if answer.covered is not None:
        some = f"{answer.covered:,} of {answer.rows:,} examples"
        said = f"{some} are in a group, shown or not; one may be in several"
        console.print(f"[dim]{said}[/dim]", highlight=False)
    show_ranking(answer)


def bar(group: GroupOut, widest: float) -> str:
    """The interval of the mean as a line, its mean as a point, zero as a bar in the middle."""
    if widest == 0:
        return ""

    def place(value: float) -> int:
        return round((value / widest + 1) / 2 * (_BAR - 1))

    cells = [" "] * _BAR
    if group.low is not None and group.high is not None:
        for at in range(place(group.low), place(group.high) + 1):
            cells[at] = "─"
    cells[place(0)] = "│"
    cells[place(group.mean)] = "●"
    return "".join(cells)


def _words(group: GroupOut) -> str:
    lines = [" ".join(term.word for term in group.terms)] if group.terms else []
    for each in group.examples:
        place = f"{each.places[0].file}:{each.places[0].line}" if each.places else ""
        lines.append(f"[dim]{escape(' '.join(each.text.split())[:_TEXT])} {escape(place)}[/dim]")
    return "\n".join(lines)
