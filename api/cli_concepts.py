"""`whence concepts`: make directions, look at them, carry them between servers."""

from pathlib import Path
from typing import Annotated

import typer

from api.terminal import (
    DEFAULT_URL,
    AsJson,
    Url,
    connect,
    console,
    show,
    show_table,
)
from service.contracts import ConceptRecord
from service.terms import Pooling

concepts_app = typer.Typer(no_args_is_help=True, help="Directions in the residual stream.")

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
