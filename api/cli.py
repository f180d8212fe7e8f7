"""The command line: `whence up` for the stack, everything else is a call to a server over HTTP."""

from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from api import cli_health, cli_life, cli_personas, cli_probes, cli_repair  # noqa: F401  (of indexes, concepts)
from api.cli_aliases import aliases_app, registry_app
from api.cli_asked import with_asked
from api.cli_concepts import concepts_app
from api.cli_directions import directions
from api.cli_groups import groups
from api.cli_indexes import indexes_app
from api.cli_rankings import (
    AllOption,
    GroupByOption,
    LimitOption,
    MetadataOption,
    SortOption,
    compare,
    download_all,
    groups_of,
    show_groups,
)
from api.cli_rerank import ExactOption, rerank
from api.cli_saes import saes_app
from api.cli_validate import validate, validation
from api.client import Client, WhenceError
from api.schemas import QueryOut, TokenSharesOut
from api.terminal import (
    DEFAULT_URL,
    AsJson,
    Url,
    connect,
    console,
    errors,
    follow_job,
    reasons,
    show,
    show_answer,
    show_table,
    show_tokens,
)
from service.contracts import JobRecord
from service.terms import GroupSort

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Which training examples pushed this model toward this concept?

A first session: `whence up` in one terminal, then `whence models add`, `whence datasets add`,
`whence indexes build`, `whence concepts fit` and `whence query` in another.""",
)
models_app = typer.Typer(no_args_is_help=True, help="Model folders and their lineage.")
datasets_app = typer.Typer(no_args_is_help=True, help="Training data: JSONL, one example per line.")
jobs_app = typer.Typer(no_args_is_help=True, help="Work in progress, and what came of it.")
for _name, _sub in (
    ("models", models_app),
    ("datasets", datasets_app),
    ("indexes", indexes_app),
    ("aliases", aliases_app),
    ("concepts", concepts_app),
    ("saes", saes_app),
    ("jobs", jobs_app),
    ("registry", registry_app),
):
    app.add_typer(_sub, name=_name)
app.command("compare")(compare)
app.command("groups")(groups)
app.command("validate")(validate)
app.command("validation")(validation)
indexes_app.command("directions")(directions)


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
    with connect(url) as client:
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
    with connect(url) as client:
        record = client.add_model(
            model_id or path.absolute().name,
            str(path.absolute()),
            base=base,
            checkpoints=[str(item.absolute()) for item in checkpoints or []],
        )
    show(record, as_json, f"model {record.id}: {record.architecture}, {record.n_layers} layers of {record.width}")


@models_app.command("list")
def list_models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Registered models."""
    with connect(url) as client:
        records = client.models()
    columns = ("id", "architecture", "n_layers", "width", "base", "path")
    show_table(records, columns, as_json)


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
    with connect(url) as client:
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
    show(
        record,
        as_json,
        f"dataset {record.id}: {record.lines} lines = {record.examples} examples + {record.duplicates} duplicates "
        f"+ {record.quarantined} quarantined{reasons(record.quarantine_reasons)}",
    )


@datasets_app.command("list")
def list_datasets(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Registered datasets."""
    with connect(url) as client:
        records = client.datasets()
    show_table(records, ("id", "lines", "examples", "duplicates", "quarantined", "source"), as_json)


# --- jobs -------------------------------------------------------------------------------------------


@jobs_app.command("watch")
def watch_job(
    job_id: Annotated[str, typer.Argument(help="As printed when the job began; see `whence jobs list`.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Follow a job to its end; exit status 1 when it fails. Ctrl-C leaves the job running."""
    with connect(url) as client:
        follow_job(client, client.job(job_id), detach=False)


@jobs_app.command("list")
def list_jobs(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """The newest jobs."""
    with connect(url) as client:
        records = client.jobs()
    show_table(records, ("id", "kind", "state", "attempts", "created_at", "finished_at"), as_json)


@jobs_app.command("cancel")
def cancel_job(
    job_id: Annotated[str, typer.Argument(help="See `whence jobs list`.")], url: Url = DEFAULT_URL
) -> None:
    """Stop a job; what it has finished is kept."""
    with connect(url) as client:
        console.print(f"{job_id}: {client.cancel(job_id).state}")


# --- query ------------------------------------------------------------------------------------------


@app.command("query")
@with_asked
def query(
    options: dict[str, Any],
    k: Annotated[int, typer.Option("-k", "--k", help="How many examples.")] = 20,
    tokens: Annotated[
        int,
        typer.Option(help="Show what the tokens of so many first hits add to the score.", min=0, max=100),
    ] = 0,
    exact: ExactOption = 0,
    to_file: AllOption = None,
    metadata: MetadataOption = False,
    group_by: GroupByOption = None,
    sort: SortOption = GroupSort.MEAN,
    limit: LimitOption = 50,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Which training examples pushed the model toward the concept? Positive score: training on it did."""
    if to_file is not None and group_by is not None:
        raise typer.BadParameter("--all and --group-by are two questions: ask one after the other.")
    if exact:
        if tokens or to_file is not None or group_by is not None:
            raise typer.BadParameter(
                "--exact makes a ranking of its own: leave --tokens, --all and --group-by out."
            )
        rerank(url, options | {"k": k}, exact, as_json)
        return
    with connect(url) as client:
        if to_file is not None:
            download_all(client, options, to_file, metadata=metadata)
            return
        if group_by is not None:
            found = groups_of(client, options, group_by, k=k, sort=sort, limit=limit)
            if as_json:
                console.print_json(data=found.model_dump(mode="json"))
            else:
                show_groups(found)
            return
        options |= {"k": k}
        answer = client.query(**options)
        if isinstance(answer, JobRecord):
            follow_job(client, answer, detach=False)
            answer = client.ask(**options)
        shares = _shares(client, answer, options, tokens) if tokens and answer.hits else []
    if as_json:
        answer_json = answer.model_dump(mode="json")
        if tokens:
            answer_json["tokens"] = [one.model_dump(mode="json") for one in shares]
        console.print_json(data=answer_json)
        return
    show_answer(answer)
    for hit, one in zip(answer.hits, shares, strict=False):
        show_tokens(hit, one)


def _shares(client: Client, answer: QueryOut, options: dict[str, Any], count: int) -> list[TokenSharesOut]:
    """Of the first hits, waiting for the job that computes them."""
    about = {name: value for name, value in options.items() if name not in {"order", "k", "index"}}
    about |= {"index": answer.index, "examples": [hit.example_id for hit in answer.hits[:count]]}
    found = client.tokens(**about)
    if isinstance(found, JobRecord):
        follow_job(client, found, detach=False)
        found = client.tokens(**about)
    if isinstance(found, JobRecord):
        raise WhenceError(202, {"code": "not_ready", "detail": f"Job {found.id} is still needed; ask again."})
    return found


if __name__ == "__main__":
    main()
