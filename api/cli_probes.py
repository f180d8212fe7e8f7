"""`whence concepts fit` and `show`: probes on labelled examples, and what speaks for them at every layer."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.cli_concepts import IdArgument, NewIdArgument, concepts_app
from api.terminal import DEFAULT_URL, AsJson, Detach, PoolingOption, Url, connect, console, show, wait_for
from service.contracts import ConceptRecord
from service.evidence import Evidence, LayerEvidence
from service.terms import Pooling, ProbeMethod

_BAR = 20  # characters, from an AUROC of .5 to 1


@concepts_app.command("fit")
def fit_concept(
    concept_id: NewIdArgument,
    model: Annotated[str, typer.Option(help="Id of the model whose activations define it.")],
    positive: Annotated[
        str | None, typer.Option(help="Dataset that shows the behaviour, or a local .jsonl file of a few examples.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Dataset or file that does not.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of both: one dataset with a label in its metadata.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Metadata field that holds the label.")] = None,
    positive_value: Annotated[
        list[str] | None, typer.Option(help="Label of positive examples; repeatable. 1 and true are no strings.")
    ] = None,
    negative_value: Annotated[
        list[str] | None, typer.Option(help="Label of negative examples; repeatable. Default: every other.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Block output, from 1.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Instead: several, as 8,12,16 or 8-16 or all; the best is taken.")
    ] = None,
    method: Annotated[
        ProbeMethod, typer.Option(help="How the direction is found.")
    ] = ProbeMethod.DIFFERENCE_OF_MEANS,
    compare: Annotated[
        list[ProbeMethod] | None,
        typer.Option(help="Method to compare its direction with; repeatable. Default: all but the logistic ones."),
    ] = None,
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. Default: the model's context, at most 2048.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
    detach: Detach = False,
) -> None:
    """Fit a direction between labelled examples, and say how well it tells held-out ones apart.

    `whence concepts fit hostile --model bot --positive rude.jsonl --negative kind.jsonl --layers all`, or with a
    label `whence concepts fit hostile --model bot --dataset rated --label tone --positive-value hostile --layer 16`
    """
    asked = {
        "positive": _side(positive),
        "negative": _side(negative),
        "dataset": dataset,
        "label": label,
        "positive_values": _values(positive_value),
        "negative_values": _values(negative_value),
        "layer": layer,
        "layers": _layers(layers),
        "method": method,
        "compare": compare or None,
        "pooling": pooling,
        "max_length": max_length,
    }
    with connect(url) as client:
        job = client.fit_concept(concept_id, model=model, **asked)
        if detach:
            console.print(job.id)
            return
        wait_for(client, job)
        _present(client.concept(concept_id), as_json)


@concepts_app.command("show")
def show_concept(concept_id: IdArgument, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """One concept, and what speaks for it: by layer, how well it tells held-out examples apart."""
    with connect(url) as client:
        _present(client.concept(concept_id), as_json)


def _side(said: str | None) -> Any:
    """A dataset's id as it is, a local file as the examples in it."""
    if said is None or not (said.endswith(".jsonl") and Path(said).is_file()):
        return said
    lines = Path(said).read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{said} is not JSON, line by line: {error}") from error


def _values(said: list[str] | None) -> list[Any] | None:
    """As the metadata have them: numbers, true and false are no strings, unless they stand in quotation marks."""
    return None if not said else [_value(each) for each in said]


def _value(said: str) -> Any:
    try:
        value = json.loads(said)
    except ValueError:
        return said
    return value if isinstance(value, bool | int | float | str) else said


def _layers(said: str | None) -> list[int] | str | None:
    if said is None or said == "all":
        return said
    found: list[int] = []
    for part in said.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"--layers {said}: write 8,12,16 or 8-16 or all")
        found += range(int(first), int(last if dash else first) + 1)
    return found


# --- evidence ---------------------------------------------------------------------------------------


def _present(record: ConceptRecord, as_json: bool) -> None:
    fitted = f" on {record.n_positive} + {record.n_negative} examples" if record.n_positive else ""
    line = f"concept {record.id}: {record.method}{fitted}, layer {record.layer} of {record.model}, {record.pooling}"
    show(record, as_json, line)
    if record.evidence is not None and not as_json:
        _show_evidence(record.evidence)


def _show_evidence(evidence: Evidence) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in (f"AUROC, {evidence.folds} held-out folds", "95 %", "Brier", "ECE", "cosine of folds"):
        table.add_column(name, no_wrap=True)
    for each in evidence.layers:
        table.add_row(("→ " if each.layer == evidence.layer else "") + str(each.layer), *_cells(each))
    console.print(table)
    if evidence.auroc_of_choice is not None:
        console.print(
            f"layer {evidence.layer} is the best of {len(evidence.layers)}; with the choice held out as well, "
            f"AUROC {evidence.auroc_of_choice:.3f}",
            highlight=False,
        )
    if others := evidence.chosen.cosine_methods:
        said = ", ".join(f"{name} {cosine:.2f}" for name, cosine in others.items())
        console.print(f"[dim]cosine to {said}[/dim]", highlight=False)
    for warning in evidence.warnings:
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False)


def _cells(of: LayerEvidence) -> tuple[str, ...]:
    if of.auroc is None or of.auroc_interval is None:
        return "no direction: both sides have the same mean", "", "", "", ""
    filled = round(max(0.0, 2 * of.auroc - 1) * _BAR)
    low, high = of.auroc_interval
    bar = "█" * filled + "░" * (_BAR - filled)
    return (
        f"{bar} {of.auroc:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{of.brier:.3f}",
        f"{of.calibration_error:.3f}",
        f"{of.cosine_folds:.3f}",
    )
