"""`whence concepts`: make directions, look at them, carry them between servers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli_rankings import until_ready
from api.terminal import (
    DEFAULT_URL,
    AsJson,
    PoolingOption,
    Url,
    connect,
    console,
    show,
    show_table,
)
from service.contracts import ConceptRecord
from service.terms import Pooling

concepts_app = typer.Typer(no_args_is_help=True, help="Directions in the residual stream.")

_BAR = 12  # characters

IdArgument = Annotated[str, typer.Argument(help="Id of a concept; see `whence concepts list`.")]
NewIdArgument = Annotated[str, typer.Argument(help="Id of the new concept.")]


@concepts_app.command("list")
def list_concepts(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Concepts, with how well each separates held-out examples."""
    with connect(url) as client:
        records = client.concepts()
    columns = ("id", "method", "model", "layer", "pooling", "auroc_held_out", "n_positive", "n_negative")
    show_table(records, columns, as_json)


@concepts_app.command("derive")
def derive_concept(
    concept_id: NewIdArgument,
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="CONCEPT[=WEIGHT]...", help="What is added up; the weight is 1 where none is given."
        ),
    ],
    without: Annotated[
        list[str] | None, typer.Option(help="Concept that is projected out of the sum; repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Put a concept together from others: a difference, an average, or what is left without another.

    `whence concepts derive hostile-not-blunt hostile friendly=-1 --without blunt`
    """
    with connect(url) as client:
        record = client.derive_concept(concept_id, dict(map(_term, terms)), project_out=without or ())
    show(record, as_json, _line(record))


@concepts_app.command("suggest")
def suggest_concepts(
    model: Annotated[str, typer.Option(help="Id of the model whose activations are compared.")],
    positive: Annotated[Path, typer.Option(help="JSONL file with a few examples that show the behaviour.")],
    negative: Annotated[Path, typer.Option(help="JSONL file with a few that do not.")],
    index: Annotated[
        str | None, typer.Option(help="Index whose main directions are candidates as well (name, or name@v3).")
    ] = None,
    query_set: Annotated[
        str | None, typer.Option(help="What its embeddings are about, where it has several.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only at this layer; repeatable.")] = None,
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    k: Annotated[int, typer.Option("-k", "--k", help="How many suggestions.", min=1, max=1000)] = 10,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Which concept, SAE feature or direction of a dataset tells a few labelled examples apart?

    `whence concepts suggest --model bot --positive rude.jsonl --negative polite.jsonl --index sft`, with ten lines
    in each file. What it names can be asked for: `whence query --concept sae:sft-sae/17 …`
    """
    sides = {"positive": _lines(positive), "negative": _lines(negative)}
    about = {"layers": layer or [], "pooling": pooling, "index": index, "query_set": query_set, "k": k}
    with connect(url) as client:
        answer = until_ready(client, lambda: client.suggest_concepts(model=model, **sides, **about))
    if as_json:
        console.print_json(data=answer.model_dump(mode="json"))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", "layer", "AUROC", "", "effect"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("label")
    for each in answer.suggestions:
        table.add_row(
            escape(("" if each.sign > 0 else "− ") + each.id),
            str(each.layer),
            f"{each.auroc:.3f}",
            "█" * round((each.auroc - 0.5) * 2 * _BAR),
            "∞" if each.effect is None else f"{each.effect:.1f}",
            escape(each.label or ""),
        )
    console.print(table)
    told = f"{answer.candidates:,} candidates, {answer.n_positive} against {answer.n_negative} examples"
    console.print(f"[dim]{told}; −: the negative ones are higher[/dim]", highlight=False)
    for warning in answer.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")


def _lines(file: Path) -> list[Any]:
    if not file.is_file():
        raise typer.BadParameter(f"There is no file {file}.")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise typer.BadParameter(f"{file}:{number}: {error}") from None
    return found


@concepts_app.command("export")
def export_concept(
    concept_id: IdArgument,
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is not there.")] = Path(),
    url: Url = DEFAULT_URL,
) -> None:
    """Write a concept as ID.safetensors and ID.json, which another server imports."""
    with connect(url) as client:
        for path in client.export_concept(concept_id, folder):
            console.print(str(path))


@concepts_app.command("import")
def import_concept(
    file: Annotated[Path, typer.Argument(help="A .safetensors file; NAME.json beside it is its sidecar.")],
    concept_id: Annotated[str | None, typer.Option("--id", help="Default: the sidecar's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Id of the model here. Default: one of the concept's lineage.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Without a sidecar: block output, from 1.")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Without a sidecar: what its activations were.")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a concept that was exported by another server, or one vector that another library saved.

    `whence concepts import hostile.safetensors`, or without a sidecar
    `whence concepts import v.safetensors --id v --model bot --layer 16 --pooling response_mean`
    """
    if not file.is_file():
        raise typer.BadParameter(f"There is no file {file}.")
    where = {"layer": layer, "pooling": pooling}
    told = {name: value for name, value in where.items() if value is not None}
    with connect(url) as client:
        record = client.import_concept(file, concept_id=concept_id, model=model, **told)
    show(record, as_json, _line(record))


def _term(said: str) -> tuple[str, float]:
    name, equals, weight = said.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise typer.BadParameter(f"{said}: a weight is a number, as in {name}=-1") from None


def _line(record: ConceptRecord) -> str:
    return f"concept {record.id}: {record.method}, layer {record.layer} of {record.model}, {record.pooling}"
