"""`whence saes`: sparse autoencoders and what their features say of a dataset."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli_asked import filter_of
from api.schemas_saes import FeatureOut, FeaturesOut, PushedOut, ScoredOut, ViewOut
from api.terminal import (
    DEFAULT_URL,
    AsJson,
    Detach,
    Url,
    connect,
    console,
    follow_job,
    show,
    show_table,
    wait_for,
)
from service.terms import ConceptFunction

_TEXT = 90

saes_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Sparse autoencoders: what a layer says, in features.

Import one of SAELens or train a small one on an index, then ask what a dataset pushes:
`whence saes train sae1 --index train`, `whence saes view train --sae sae1`, and
`whence query --index train --concept sae:sae1/7 --method concept_influence`.""",
)

SaeOption = Annotated[str, typer.Option("--sae", help="Id of an SAE at the layer of the rows.")]
Reference = Annotated[str, typer.Argument(help="name or name@v3")]


@saes_app.command("import")
def import_sae(
    folder: Annotated[Path, typer.Argument(help="SAELens folder, as the server sees it.")],
    model: Annotated[str, typer.Option(help="Id of the model whose residual stream it reads.")],
    sae_id: Annotated[str | None, typer.Option("--id", help="Default: the folder's name.")] = None,
    centred: Annotated[
        bool | None,
        typer.Option(
            "--centred/--not-centred",
            help="Whether rows lose their mean first (TransformerLens' center_writing_weights). Default: as its "
            "configuration says.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a SAELens folder: cfg.json, sae_weights.safetensors and, where there is one, sparsity.safetensors.

    Architectures standard, jumprelu, topk and gated, new and old configurations. Its hook must be
    blocks.N.hook_resid_post (layer N + 1) or hook_resid_pre (layer N). Example:
    `whence saes import /models/gpt2-res-8 --model gpt2 --id res8`.
    """
    with connect(url) as client:
        path = folder.absolute()
        record = client.import_sae(sae_id or path.name, str(path), model=model, centred=centred)
    about = f"{record.architecture}, {record.features} features of width {record.width}, layer {record.layer}"
    show(record, as_json, "\n".join([f"sae {record.id}: {about} of {record.model}", *record.notes]))


@saes_app.command("train")
def train(
    sae_id: Annotated[str, typer.Argument(help="Id of the new SAE.")],
    index: Annotated[str, typer.Option(help="Index with kind activation: name or name@v3.")],
    layer: Annotated[int | None, typer.Option(help="Of its activations, if there are several.")] = None,
    features: Annotated[
        int | None,
        typer.Option(help="How many. Default: one for every 20 rows, at most 8 for each dimension.", min=2),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", help="That fire on a row. Default: a third of them, at most 32.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: 20 passes, 2,000 at least.", min=1)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of Adam; falls to zero over the last fifth. Default: 2e-4 · √(16,384 / features)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and held-out rows.", min=0)] = 0,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Train a small TopK SAE on the activations of an index: a job, published in SAELens' own format.

    Few features for few rows: with more, what one feature could say is split over several. Example:
    `whence saes train tone --index train --features 24 -k 8`.
    """
    about = {"layer": layer, "features": features, "k": k, "steps": steps, "learning_rate": learning_rate}
    with connect(url) as client:
        job = client.train_sae(sae_id, index=index, seed=seed, **about)
        follow_job(client, job, detach)


@saes_app.command("list")
def list_saes(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Registered SAEs."""
    with connect(url) as client:
        records = client.saes()
    show_table(records, ("id", "model", "layer", "architecture", "features", "k", "pooling", "source"), as_json)


@saes_app.command("show")
def show_sae(
    sae_id: Annotated[str, typer.Argument(help="Id of an SAE.")], url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """One SAE: its shape, what its training came to, and the labels of its features."""
    with connect(url) as client:
        record, said = client.sae(sae_id), client.feature_labels(sae_id).labels
    lines = [
        f"sae {record.id}: {record.architecture}, {record.features} features of width {record.width}, layer "
        f"{record.layer} of {record.model} ({record.hook_name}); from {record.source}"
    ]
    if (done := record.training) is not None:
        lines.append(
            f"trained on {done.rows} rows, k {done.recipe.k}, {done.recipe.steps} steps, seed {done.recipe.seed}; "
            f"on {done.rows_held_out} held-out rows it explains {done.explained_variance:.1%} of the variance with "
            f"{done.l0:.1f} features; {done.dead:.1%} of the features are dead"
        )
    newest = {each.feature: each for each in said}
    for feature, each in sorted(newest.items()):
        lines.append(f"  {feature}: {each.text}" + (f" ({each.author}, {each.at[:10]})" if each.author else ""))
    show(record, as_json, "\n".join([*lines, *record.notes]))


@saes_app.command("label")
def label(
    sae_id: Annotated[str, typer.Argument(help="Id of an SAE.")],
    feature: Annotated[int | None, typer.Argument(help="Number of a feature.", min=0)] = None,
    text: Annotated[str | None, typer.Argument(help="What it means.")] = None,
    file: Annotated[
        Path | None, typer.Option("--from", help='JSON file of many: {"7": "rude answers", …}.', exists=True)
    ] = None,
    author: Annotated[str | None, typer.Option(help="Who says so.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say what a feature means: `whence saes label tone 7 "rude answers"`, or many `--from labels.json`."""
    said: dict[int, str] = {feature: text} if feature is not None and text is not None else {}
    if bool(said) == (file is not None):
        raise typer.BadParameter("Give a feature and a text, or --from a file of them.")
    try:
        said = said if file is None else json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"--from {file}: {error}") from None
    with connect(url) as client:
        found = client.label_features(sae_id, said, author=author)
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
        return
    labelled = len({each.feature for each in found.labels})
    console.print(f"sae {escape(sae_id)}: {labelled} features have a label", highlight=False)


@saes_app.command("features")
def features(
    reference: Reference,
    sae: SaeOption,
    example: Annotated[list[str] | None, typer.Option(help="Example id; repeatable.")] = None,
    feature: Annotated[list[int] | None, typer.Option(help="Number of a feature; repeatable.")] = None,
    count: Annotated[
        int, typer.Option(help="Features of an example, and examples of a feature.", min=1, max=100)
    ] = 10,
    top: Annotated[int, typer.Option(help="Features that fire on most examples.", min=0, max=1000)] = 20,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Which features fire on the examples of an index: on `--example ID`, of `--feature 7`, or most of all.

    The first call encodes the index, by a short job without a model; later ones are answered at once.
    """
    about: dict[str, Any] = {"examples": example or [], "features": feature or [], "count": count, "top": top}
    with connect(url) as client:
        found = client.settle(
            lambda: client.features(reference, sae=sae, **about), wait=lambda job: wait_for(client, job)
        )
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
    else:
        show_features(found, whole=not (example or feature))


@saes_app.command("view")
def view(
    reference: Reference,
    sae: SaeOption,
    query_set: Annotated[
        str | None, typer.Option(help="Dataset Q of the embeddings, if there are several.")
    ] = None,
    concept_function: Annotated[
        ConceptFunction | None, typer.Option(help="Their f_v. Default: dot, where there are several.")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Their damping. Default: 1, where there are several.", min=0)
    ] = None,
    count: Annotated[int, typer.Option(help="Features on each side.", min=1, max=100)] = 10,
    examples: Annotated[int, typer.Option(help="Examples of each.", min=0, max=100)] = 1,
    where: Annotated[
        list[str] | None, typer.Option(help="Sum only such examples: topic=harbor, score>=1; repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """How far training on this dataset pushes each feature: the sum of influence over all examples, no model run.

    The index needs kind influence at the SAE's layer. Example: `whence saes view train --sae tone --where
    topic=harbor`.
    """
    about = {"query_set": query_set, "concept_function": concept_function, "damping": damping}
    about |= {"count": count, "examples": examples, "filter": filter_of(where) if where else None}
    with connect(url) as client:
        found = client.feature_view(reference, sae=sae, **about)
    if as_json:
        console.print_json(data=found.model_dump(mode="json"))
    else:
        show_view(found)


# --- tables ---------------------------------------------------------------------------------------------


def show_features(found: FeaturesOut, *, whole: bool) -> None:
    """Of examples their features, of features their examples, else those that fire on most examples."""
    for each in found.examples:
        console.print(f"[bold]{each.example_id}[/bold] {escape(_short(each.text))} [dim]{each.l0} fire[/dim]")
        for one in each.features:
            console.print(f"  {one.feature:>6} {one.value:8.3g} {escape(one.label or '')}")
    shown = found.most if whole else found.features
    if shown:
        console.print(_feature_table(shown))
    silent = f"{found.silent:.1%} of the features fire on none"
    line = (
        f"{found.rows} examples of {found.index} in features of {found.sae}: {found.l0:.1f} fire on one; {silent}"
    )
    _end(line, found.warnings)


def show_view(found: ViewOut) -> None:
    """The features pushed up, and those pushed down."""
    for title, side in (("pushed up", found.up), ("pushed down", found.down)):
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for name in ("feature", "push", "share", "mean", "±", "up"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("label and examples")
        for each in side:
            table.add_row(*_pushed(each))
        console.print(table)
    points = f"summed over {found.points} points of the run" if found.points > 1 else "at the end of the run"
    line = (
        f"{found.rows} examples of {found.index}: influence on {found.features} features of {found.sae}, layer "
        f"{found.layer}, query set {found.query_set}, {found.concept_function}, damping {found.damping:g}; "
        f"{points}; {found.total_ms:.1f} ms in the server"
    )
    _end(line, found.warnings)


def _pushed(each: PushedOut) -> tuple[str, ...]:
    numbers = (
        f"{each.push:+.4g}",
        f"{each.share:.1%}",
        f"{each.mean:+.3g}",
        f"{each.error:.2g}",
        f"{each.upward:.0%}",
    )
    return (str(each.feature), *numbers, _lines(each.label, each.examples))


def _feature_table(shown: list[FeatureOut]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("feature", "fires on", "mean", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("label and examples")
    for each in shown:
        numbers = (f"{each.share:.1%}", f"{each.mean:.3g}", f"{each.largest:.3g}")
        table.add_row(str(each.feature), *numbers, _lines(each.label, each.examples))
    return table


def _lines(label: str | None, examples: list[ScoredOut]) -> str:
    lines = [f"[bold]{escape(label)}[/bold]"] if label else []
    for one in examples:
        where = ", ".join(f"{place.file}:{place.line}" for place in one.places[:1])
        lines.append(f"{one.score:+.3g} {escape(_short(one.text))} [dim]{escape(where)}[/dim]")
    return "\n".join(lines)


def _short(text: str) -> str:
    return " ".join(text.split())[:_TEXT]


def _end(line: str, warnings: list[str]) -> None:
    console.print(f"[dim]{escape(line)}[/dim]")
    for warning in warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")
