"""The command line: `whence up` for the stack, everything else is a call to a server over HTTP."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from api.client import Client, WhenceError
from api.schemas import QueryOut
from service import codec
from service.contracts import IndexKind, JobEvent, JobRecord, LongExamples, LossReduction, Method, Order, Pooling

console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Which training examples pushed this model toward this concept?

A first session: `whence up` in one terminal, then `whence models add`, `whence datasets add`,
`whence indexes build`, `whence concepts fit` and `whence query` in another.""",
)
models_app = typer.Typer(no_args_is_help=True, help="Model folders and their lineage.")
datasets_app = typer.Typer(no_args_is_help=True, help="Training data: JSONL, one example per line.")
indexes_app = typer.Typer(no_args_is_help=True, help="What is stored per training example, ready to be queried.")
concepts_app = typer.Typer(no_args_is_help=True, help="Directions in the residual stream.")
jobs_app = typer.Typer(no_args_is_help=True, help="Work in progress, and what came of it.")
for _name, _sub in (
    ("models", models_app),
    ("datasets", datasets_app),
    ("indexes", indexes_app),
    ("concepts", concepts_app),
    ("jobs", jobs_app),
):
    app.add_typer(_sub, name=_name)

Url = Annotated[str, typer.Option("--url", envvar="WHENCE_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and return at once.")]
PoolingOption = Annotated[Pooling, typer.Option(help="Which positions of a layer are averaged.")]
DEFAULT_URL = "http://127.0.0.1:8311"


def main() -> None:
    """Entry point: problems of the server are printed, not traced; exit status 1."""
    try:
        app()
    except WhenceError as error:
        where = f" ({error.param})" if error.param else ""
        errors.print(f"[red]error[/red] {escape(error.detail)} [dim]{escape(error.code + where)}[/dim]")
        for line in error.problem.get("lines", [])[:5]:
            errors.print(f"  line {line['line']}: {escape(line['detail'])}")
        raise SystemExit(1) from None
    except httpx.TransportError as error:
        errors.print(
            f"[red]error[/red] no answer from the server: {escape(str(error))}. Is `whence up` running? "
            "Set --url or WHENCE_URL to its address."
        )
        raise SystemExit(1) from None


@app.command()
def up(
    home: Annotated[Path, typer.Option(help="Folder for storage, Redis data and logs.")] = Path(".whence"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8311,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that requests may name paths in; repeatable. Default: the current folder."),
    ] = None,
) -> None:
    """Run the whole service on this machine: Redis, dispatcher with Ray, api. Ctrl-C stops it."""
    try:
        from api.up import run
    except ModuleNotFoundError as error:
        errors.print(
            f"[red]error[/red] {error.name} is missing: this is the client-only install. For the service itself: "
            "pip install 'whence\\[server,cpu]'",
            highlight=False,
        )
        raise typer.Exit(1) from None
    from service.errors import DomainError

    try:
        run(
            home,
            host=host,
            port=port,
            roots=root or [Path.cwd()],
            say=lambda line: console.print(line, highlight=False),
        )
    except DomainError as error:
        errors.print(f"[red]error[/red] {escape(error.detail)}")
        raise typer.Exit(1) from None
    except OSError as error:
        errors.print(f"[red]error[/red] --home {escape(str(home))}: {escape(str(error))}")
        raise typer.Exit(1) from None


@app.command()
def status(url: Url = DEFAULT_URL) -> None:
    """Is the server there, and can it work?"""
    with _client(url) as client:
        health = client.ready()
    console.print(
        f"{url}: {health.status} (redis {health.redis}, dispatcher {health.dispatcher}, {health.version})"
    )
    if health.status != "ok":
        raise typer.Exit(1)


# --- models -----------------------------------------------------------------------------------------


@models_app.command("add")
def add_model(
    path: Annotated[Path, typer.Argument(help="Hugging Face folder, as the server sees it.")],
    model_id: Annotated[str | None, typer.Option("--id", help="Default: the folder's name.")] = None,
    base: Annotated[str | None, typer.Option(help="Id of the model it was fine-tuned from.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Folder of a checkpoint of the run, base first; repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a model: its shape and fingerprint are read, nothing is loaded."""
    with _client(url) as client:
        record = client.add_model(
            model_id or path.absolute().name,
            str(path.absolute()),
            base=base,
            checkpoints=[str(item.absolute()) for item in checkpoints or []],
        )
    _show(record, as_json, f"model {record.id}: {record.architecture}, {record.n_layers} layers of {record.width}")


@models_app.command("list")
def list_models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Registered models."""
    with _client(url) as client:
        records = client.models()
    columns = ("id", "architecture", "n_layers", "width", "base", "path")
    _table(records, columns, as_json)


# --- datasets ---------------------------------------------------------------------------------------


@datasets_app.command("add")
def add_dataset(
    file: Annotated[Path, typer.Argument(help="JSONL or JSONL.gz with messages, prompt/completion or text.")],
    dataset_id: Annotated[str | None, typer.Option("--id", help="Default: the file's name.")] = None,
    on_server: Annotated[
        bool, typer.Option("--on-server", help="FILE is a path on the server; nothing is uploaded.")
    ] = False,
    quarantine_invalid: Annotated[
        bool, typer.Option(help="Set lines aside that cannot be read, instead of refusing the file.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register a dataset: upload a file, or name one that the server can read."""
    name = dataset_id or file.name.removesuffix(".gz").removesuffix(".jsonl")
    invalid_lines = "quarantine" if quarantine_invalid else "refuse"
    with _client(url) as client:
        if on_server:
            record = client.add_dataset(name, str(file), invalid_lines=invalid_lines)
        else:
            if not file.is_file():
                raise typer.BadParameter(
                    f"There is no file {file} here. Is it on the server? Then add --on-server."
                )
            with Progress(TextColumn("uploading"), BarColumn(), DownloadColumn(), console=errors) as bar:
                task = bar.add_task("", total=file.stat().st_size)
                record = client.upload_dataset(
                    name, file, invalid_lines=invalid_lines, on_sent=lambda sent: bar.update(task, completed=sent)
                )
    _show(
        record,
        as_json,
        f"dataset {record.id}: {record.lines} lines = {record.examples} examples + {record.duplicates} duplicates "
        f"+ {record.quarantined} quarantined{_reasons(record.quarantine_reasons)}",
    )


@datasets_app.command("list")
def list_datasets(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Registered datasets."""
    with _client(url) as client:
        records = client.datasets()
    _table(records, ("id", "lines", "examples", "duplicates", "quarantined", "source"), as_json)


# --- indexes ----------------------------------------------------------------------------------------


@indexes_app.command("build")
def build_index(
    name: Annotated[str, typer.Argument(help="Name of the index; building again makes a new version.")],
    model: Annotated[str, typer.Option(help="Id of a model.")],
    dataset: Annotated[str, typer.Option(help="Id of a dataset.")],
    kind: Annotated[list[IndexKind] | None, typer.Option(help="Repeatable. Default: both.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Block output to pool, from 1; repeatable. Default: the middle one.")
    ] = None,
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    loss_reduction: Annotated[
        LossReduction, typer.Option(help="How token losses become L(z).")
    ] = LossReduction.MEAN,
    projection_dim: Annotated[int, typer.Option(help="Gradients: p × p numbers per module.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the projection.", min=0)] = 0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. Default: the model's context, at most 2048.")
    ] = None,
    long_examples: Annotated[
        LongExamples, typer.Option(help="What happens to longer ones; they are counted.")
    ] = LongExamples.TRUNCATE_RIGHT,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Build an index: one pass of the model over the dataset, sharded over the workers."""
    options: dict[str, Any] = {
        "layers": layer or [],
        "pooling": pooling,
        "loss_reduction": loss_reduction,
        "projection_dim": projection_dim,
        "seed": seed,
        "max_length": max_length,
        "long_examples": long_examples,
    }
    if kind:
        options["kinds"] = kind
    with _client(url) as client:
        job = client.build_index(name, model=model, dataset=dataset, **options)
        _follow(client, job, detach)


@indexes_app.command("list")
def list_indexes(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Published indexes, every version."""
    with _client(url) as client:
        records = client.indexes()
    _table(records, ("name", "version", "model", "dataset", "pooling", "arrays", "bytes"), as_json)


@indexes_app.command("quarantine")
def index_quarantine(
    reference: Annotated[str, typer.Argument(help="name or name@v3")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """What of the source is not in the index, and why."""
    with _client(url) as client:
        page = client.index_quarantine(reference)
    _table(page.items, ("id", "reason", "detail", "places"), as_json)


# --- concepts ---------------------------------------------------------------------------------------


@concepts_app.command("fit")
def fit_concept(
    concept_id: Annotated[str, typer.Argument(help="Id of the new concept.")],
    model: Annotated[str, typer.Option(help="Id of the model whose activations define it.")],
    positive: Annotated[str, typer.Option(help="Dataset that shows the behaviour.")],
    negative: Annotated[str, typer.Option(help="Dataset that does not.")],
    layer: Annotated[int, typer.Option(help="Block output, from 1.")],
    pooling: PoolingOption = Pooling.RESPONSE_MEAN,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. Default: the model's context, at most 2048.")
    ] = None,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Fit a direction: mean activation of the positive examples minus that of the negative ones."""
    with _client(url) as client:
        job = client.fit_concept(
            concept_id,
            model=model,
            positive=positive,
            negative=negative,
            layer=layer,
            pooling=pooling,
            max_length=max_length,
        )
        _follow(client, job, detach)


@concepts_app.command("list")
def list_concepts(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Concepts, with how well each separates held-out examples."""
    with _client(url) as client:
        records = client.concepts()
    _table(records, ("id", "model", "layer", "pooling", "auroc_held_out", "n_positive", "n_negative"), as_json)


# --- jobs -------------------------------------------------------------------------------------------


@jobs_app.command("watch")
def watch_job(
    job_id: Annotated[str, typer.Argument(help="As printed when the job began; see `whence jobs list`.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Follow a job to its end; exit status 1 when it fails. Ctrl-C leaves the job running."""
    with _client(url) as client:
        _follow(client, client.job(job_id), detach=False)


@jobs_app.command("list")
def list_jobs(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """The newest jobs."""
    with _client(url) as client:
        records = client.jobs()
    _table(records, ("id", "kind", "state", "attempts", "created_at", "finished_at"), as_json)


@jobs_app.command("cancel")
def cancel_job(
    job_id: Annotated[str, typer.Argument(help="See `whence jobs list`.")], url: Url = DEFAULT_URL
) -> None:
    """Stop a job; what it has finished is kept."""
    with _client(url) as client:
        console.print(f"{job_id}: {client.cancel(job_id).state}")


# --- query ------------------------------------------------------------------------------------------


@app.command()
def query(
    index: Annotated[str, typer.Option(help="name, or name@v3 for one version.")],
    concept: Annotated[str, typer.Option(help="Id of a concept.")],
    method: Annotated[
        Method, typer.Option(help="vector_filter reads activations, concept_influence gradients.")
    ] = Method.VECTOR_FILTER,
    order: Annotated[Order, typer.Option(help="Those that push toward the concept most, or least.")] = Order.MOST,
    k: Annotated[int, typer.Option("-k", "--k", help="How many examples.")] = 20,
    query_set: Annotated[
        str | None, typer.Option(help="Dataset on which the behaviour is measured; for concept_influence.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Which training examples pushed the model toward the concept? Positive score: training on it did."""
    options: dict[str, Any] = {"method": method, "order": order, "k": k, "query_set": query_set}
    with _client(url) as client:
        answer = client.query(index=index, concept=concept, **options)
        if isinstance(answer, JobRecord):
            _follow(client, answer, detach=False)
            answer = client.ask(index=index, concept=concept, **options)
    if as_json:
        console.print_json(answer.model_dump_json())
    else:
        show_answer(answer)


def show_answer(answer: QueryOut) -> None:
    """The ranking as a table, with its provenance and warnings."""
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("example")
    for hit in answer.hits:
        lines = ", ".join(f"{place.file}:{place.line}" for place in hit.places[:3])
        notes = " ".join(f"{key}={value}" for key, value in hit.metadata.items())
        text = " ".join(hit.text.split())
        table.add_row(
            str(hit.rank),
            f"{hit.score:+.4g}",
            f"{escape(text[:160])} [dim]{escape(lines)} {escape(notes[:80])}[/dim]",
        )
    console.print(table)
    used = answer.concept
    console.print(
        f"[dim]{answer.order} of {answer.rows} examples in {answer.index} by {answer.method}; concept {used.id} "
        f"(layer {used.layer}, held-out AUROC {used.auroc_held_out:.2f}); {answer.timing.total_ms:.1f} ms in the "
        "server[/dim]"
    )
    for warning in answer.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}")


# --- helpers ----------------------------------------------------------------------------------------


@contextmanager
def _client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def _follow(client: Client, job: JobRecord, detach: bool) -> None:
    """Show a job's progress until it ends, and what came of it."""
    if detach:
        console.print(job.id)
        return
    errors.print(f"[dim]job {job.id} (whence jobs watch {job.id})[/dim]")
    try:
        done = follow(client, job.id)
    except KeyboardInterrupt:
        errors.print(f"\n{job.id} goes on; `whence jobs cancel {job.id}` stops it.")
        raise typer.Exit(130) from None
    result = done.result or {}
    console.print(f"{done.kind} done: " + ", ".join(f"{key} {_plain(value)}" for key, value in result.items()))


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
        tasks: dict[str, Any] = {}

        def on_event(event: JobEvent) -> None:
            data = event.data
            if event.type == "log":
                bar.console.print(f"[dim]{escape(str(data['message']))}[/dim]")
            if event.type != "progress":
                return
            stage = str(data["stage"])
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=data["total"], unit=data["unit"], note="")
            rate = f"{data['rate']:.0f}/s" if data["rate"] else ""
            aside = f" {data['quarantined']} quarantined" if data["quarantined"] else ""
            bar.update(tasks[stage], completed=data["done"], note=rate + aside)

        return client.wait(job_id, on_event=on_event)


def _show(record: Any, as_json: bool, line: str) -> None:
    if as_json:
        console.print_json(codec.encode(record))
    else:
        console.print(escape(line), highlight=False)


def _table(records: list[Any], columns: tuple[str, ...], as_json: bool) -> None:
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
        return f"{item['kind']}{layer} ({item['dims']})"
    return str(item)


def _reasons(reasons: Any) -> str:
    return f" ({', '.join(f'{reason} {count}' for reason, count in reasons.items())})" if reasons else ""


if __name__ == "__main__":
    main()
