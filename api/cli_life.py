"""`whence indexes append`, `delete` and `compact`: new versions of an index from an old one."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from api.cli_asked import filter_of
from api.cli_indexes import indexes_app
from api.terminal import DEFAULT_URL, Detach, Url, connect, follow_job
from service.specs import ROWS_PER_SHARD

Reference = Annotated[str, typer.Argument(help="name (its newest version when the job runs) or name@v3")]


@indexes_app.command("append")
def append_examples(
    reference: Reference,
    dataset: Annotated[str, typer.Argument(help="Id of a registered dataset.")],
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Add the examples of a dataset: a new version. Only what the index does not hold yet is run through the model.

    Curvature, Jacobians and all shards of before are used as they are. Lines that the index holds already are
    counted as duplicates. Appends to one name that are queued together build on each other.
    """
    with connect(url) as client:
        follow_job(client, client.append(reference, dataset), detach)


@indexes_app.command("delete")
def delete_examples(
    reference: Reference,
    example: Annotated[list[str] | None, typer.Argument(help="Ids of examples, as hits name them.")] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="File with one id per line; - reads standard input.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="All examples with such metadata instead: topic=harbor, score>=1, …; repeatable."),
    ] = None,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Take examples out: a new version that never ranks them. Older versions stay as they are.

    They are counted as quarantined for the reason `deleted`, and stay deleted when their dataset is appended again.
    Their rows are left out of storage by `whence indexes compact`.
    """
    ids = list(example or ())
    if from_file is not None:
        text = sys.stdin.read() if str(from_file) == "-" else _read(from_file)
        ids += text.split()
    with connect(url) as client:
        job = client.delete_examples(reference, ids=ids or None, filter=filter_of(where) if where else None)
        follow_job(client, job, detach)


@indexes_app.command("compact")
def compact_index(
    reference: Reference,
    rows_per_shard: Annotated[
        int, typer.Option(help="Most rows of a new shard. A worker needs three times its widest array.", min=1)
    ] = ROWS_PER_SHARD,
    url: Url = DEFAULT_URL,
    detach: Detach = False,
) -> None:
    """Rewrite into few large shards: a new version with the same numbers and without the rows of deleted examples.

    Rankings and scores are the same, bit for bit. It loads faster, and can be appended to and extended as before.
    """
    with connect(url) as client:
        follow_job(client, client.compact(reference, rows_per_shard=rows_per_shard), detach)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint="--from") from error
