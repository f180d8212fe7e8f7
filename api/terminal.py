"""What commands share: the consoles, common options, live progress, tables, and how a ranking is shown."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from api.client import Client
from api.schemas import HitOut, Provenance, QueryOut, TokenSharesOut
from service import codec
from service.contracts import JobEvent, JobRecord
from service.terms import Lora, Pooling

# Into a file or a pipe lines are as long as they are: a name that is cut cannot be used.
console = Console(width=None if sys.stdout.isatty() else 10_000)
errors = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="WHENCE_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and return at once.")]
PoolingOption = Annotated[Pooling, typer.Option(help="Which positions of a layer are averaged.")]
DEFAULT_URL = "http://127.0.0.1:8311"
_SHOWN_STAGES = 12  # of an estimate


@contextmanager
def connect(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


# --- jobs -------------------------------------------------------------------------------------------


def follow_job(client: Client, job: JobRecord, detach: bool) -> None:
    """Show a job's progress until it ends, and what came of it; with ``detach`` only its id."""
    if detach:
        console.print(job.id)
        return
    done = wait_for(client, job)
    result = done.result or {}
    console.print(f"{done.kind} done: " + ", ".join(f"{key} {_plain(value)}" for key, value in result.items()))


def wait_for(client: Client, job: JobRecord) -> JobRecord:
    """Show a job's progress until it ends; Ctrl-C leaves it to itself."""
    errors.print(f"[dim]job {job.id} (whence jobs watch {job.id})[/dim]")
    try:
        return follow(client, job.id)
    except KeyboardInterrupt:
        errors.print(f"\n{job.id} goes on; `whence jobs cancel {job.id}` stops it.")
        raise typer.Exit(130) from None


def follow(client: Client, job_id: str) -> JobRecord:
    """Wait for a job under a live progress bar. Raises JobFailed."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=False) as bar:
        live: dict[str, Any] = {}  # the stage that runs; those that took a while scroll away as lines

        def end() -> None:
            for stage, task in live.items():
                done = next(each for each in bar.tasks if each.id == task)
                took, unit = done.elapsed or 0.0, done.fields["unit"]
                if took >= 1 or unit == "examples":
                    amount = f"{done.completed:.0f}/{done.total:.0f} {unit} {done.fields['note']}".rstrip()
                    bar.console.print(f"  [dim]{escape(stage)}: {escape(amount)} in {took:.1f} s[/dim]")
                bar.remove_task(task)
            live.clear()

        def on_event(event: JobEvent) -> None:
            data = event.data
            if event.type == "log":
                bar.console.print(f"[dim]{escape(str(data['message']))}[/dim]")
            if event.type != "progress":
                return
            stage = str(data["stage"])
            if stage not in live:
                end()
                live[stage] = bar.add_task(stage, total=data["total"], unit=data["unit"], note="")
            rate = f"{data['rate']:.{0 if data['rate'] >= 10 else 1}f}/s" if data["rate"] else ""
            rate += f" {tokens:,.0f} tokens/s" if (tokens := data.get("tokens_per_s")) else ""
            aside = f" {data['quarantined']} quarantined" if data["quarantined"] else ""
            bar.update(live[stage], completed=data["done"], note=rate + aside)

        job = client.wait(job_id, on_event=on_event)
        end()
        return job


# --- records ----------------------------------------------------------------------------------------


def show(record: Any, as_json: bool, line: str) -> None:
    """One record: as JSON, or as the line that sums it up."""
    if as_json:
        console.print_json(codec.encode(record))
    else:
        console.print(escape(line), highlight=False)


def show_table(records: list[Any], columns: tuple[str, ...], as_json: bool) -> None:
    plain = [codec.to_plain(record) for record in records]
    if as_json:
        console.print_json(json.dumps(plain))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in {"id", "name"}, overflow="fold")  # what one copies, whole
    for item in plain:
        table.add_row(*(escape(_plain(item.get(column))) for column in columns))
    console.print(table)


def reasons(counts: Any) -> str:
    return f" ({', '.join(f'{reason} {count}' for reason, count in counts.items())})" if counts else ""


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_plain_item(item) for item in value)
    return str(value)


def _plain_item(item: Any) -> str:
    if isinstance(item, dict) and "line" in item:
        return f"{item['file']}:{item['line']}"
    if isinstance(item, dict) and "dims" in item:
        layer = "" if item["layer"] is None else f" l{item['layer']}"
        about = item["embedding"]
        asked = f" {about['query_set']} {about['function']} δ{about['damping']:g}" if about else ""
        return f"{item['kind']}{layer}{asked} ({item['dims']})"
    return str(item)


# --- rankings ---------------------------------------------------------------------------------------


def show_answer(answer: QueryOut) -> None:
    """The ranking as a table, with its provenance and warnings."""
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("example")
    for hit in answer.hits:
        lines = ", ".join(f"{place.file}:{place.line}" for place in hit.places[:3])
        notes = " ".join(f"{key}={value}" for key, value in hit.metadata.items())
        text = " ".join((hit.text or hit.example_id).split())
        table.add_row(
            str(hit.rank),
            f"{hit.score:+.4g}",
            f"{escape(text[:160])} [dim]{escape(lines)} {escape(notes[:80])}[/dim]",
        )
    console.print(table)
    used = answer.concept
    about = ""
    if used:
        fitted = "" if used.auroc_held_out is None else f", held-out AUROC {used.auroc_held_out:.2f}"
        about = f"; concept {used.id} (layer {used.layer}{fitted})"
    said = (
        f"{answer.order} of {answer.rows} examples in {answer.index} by {answer.method}{about}; "
        f"{answer.timing.total_ms:.1f} ms in the server",
        provenance(answer.provenance),
        *([answer.health.said] if answer.health else []),
    )
    for line in said:
        console.print(f"[dim]{escape(line)}[/dim]")
    for warning in answer.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")


def show_estimate(found: Mapping[str, Any]) -> None:
    """What a build would cost: the stages that take longest, and all of them together."""
    stages = sorted(found["stages"], key=lambda stage: -stage["seconds"])
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "tasks", "time", "worker memory", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages[:_SHOWN_STAGES]:
        memory, disk = size(stage["worker_bytes"]), size(stage["disk_bytes"])
        table.add_row(escape(stage["name"]), str(stage["tasks"]), duration(stage["seconds"]), memory, disk)
    if rest := stages[_SHOWN_STAGES:]:
        disk = size(sum(stage["disk_bytes"] for stage in rest))
        table.add_row(f"{len(rest)} more", "", duration(sum(stage["seconds"] for stage in rest)), "", disk)
    console.print(table)
    gpu = f", {size(found['device_bytes'])} of its GPU" if found["device_bytes"] else ""
    console.print(
        f"{found['examples']:,} examples on {found['workers']} workers: {duration(found['seconds'])}, "
        f"{size(found['worker_bytes'])} of memory in a worker{gpu}, {size(found['disk_bytes'])} on disk"
    )


def duration(seconds: float) -> str:
    """As people say it, to two digits or so."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


def show_tokens(hit: HitOut, found: TokenSharesOut) -> None:
    """The example with the tokens that its score comes from: green pushes toward the concept, red away from it."""
    if not found.tokens:
        return
    console.print(f"[dim]rank {hit.rank}: shares of {found.score:+.4g} by token[/dim]")
    largest = max(abs(token.share) for token in found.tokens) or 1.0
    line = Text()
    for token in found.tokens:
        strength = round(200 * abs(token.share) / largest)
        color = f"rgb(0,{strength},0)" if token.share > 0 else f"rgb({strength},0,0)"
        line.append(token.text, style=f"white on {color}" if strength > 20 else "")
    console.print(line)


def provenance(found: Provenance) -> str:
    """What stands behind the scores, in one line."""
    parts = [f"{found.kind} rows" + (f" of layer {found.layer}" if found.layer is not None else "")]
    if found.query_set is not None:
        parts.append(f"query set {found.query_set}")
    if found.damping is not None:
        parts.append(f"damping {found.damping:g}")
    if found.points > 1:
        parts.append(f"summed over {found.points} points of the run")
    elif found.query_set is not None:
        parts.append("at the end of the run")
    if found.modules is not None and (found.modules != "all" or found.stride > 1):
        every = f" of every {found.stride}th block" if found.stride > 1 else ""
        parts.append(f"gradients of {found.modules}{every}")
    if found.lora == Lora.ADAPTER:
        parts.append("gradients of the LoRA's own maps")
    if found.answerer is not None:
        parts.append(f"against answers of {found.answerer}")
    if found.captured < 1 - 1e-3:
        parts.append(f"{found.captured:.0%} of the concept captured")
    if found.fidelity is not None:
        measured = found.fidelity
        held_out = "held-out" if measured.held_out else "fitted-on"
        parts.append(
            f"fidelity {measured.mean:.4f} (least {measured.least:.4f}) over {measured.queries} queries and "
            f"{measured.examples} {held_out} examples, against {measured.against}"
        )
    return "; ".join(parts)
