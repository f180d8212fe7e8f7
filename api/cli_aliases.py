"""`whence aliases`: names that a team agrees on, switched in one step. `whence registry`: Redis from storage."""

from typing import Annotated

import typer

from api.terminal import DEFAULT_URL, AsJson, Url, connect, console, errors, show, show_table
from service import codec

aliases_app = typer.Typer(no_args_is_help=True, help="Names for index versions: `prod` for what everybody queries.")
registry_app = typer.Typer(no_args_is_help=True, help="What Redis knows of storage.")

Name = Annotated[str, typer.Argument(help="Name of the alias, used wherever an index is named.")]
IfRevision = Annotated[
    int | None,
    typer.Option(help="Only if it is still this revision, as `whence aliases list` shows it.", min=1),
]
Force = Annotated[bool, typer.Option("--force", help="Whatever it points at now.")]


@aliases_app.command("set")
def set_alias(
    name: Name,
    index: Annotated[str, typer.Argument(help="name@v3; a plain name stands for its newest version now.")],
    if_revision: IfRevision = None,
    force: Force = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Point an alias at an index version, for everybody at once.

    A new one is simply made. One that is there already needs `--if-revision`, so that you do not undo what somebody
    else has just done, or `--force`. `whence query --index NAME` then asks the version it points at.
    """
    _check_one(if_revision, force)
    with connect(url) as client:
        alias = client.set_alias(name, index, if_revision=if_revision, force=force)
    before = f", before {alias.previous}" if alias.previous else ""
    show(alias, as_json, f"alias {alias.name}: {alias.index} (revision {alias.revision}{before})")


@aliases_app.command("list")
def list_aliases(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Aliases, what they point at, and their revisions."""
    with connect(url) as client:
        records = client.aliases()
    show_table(records, ("name", "index", "revision", "previous", "updated_at"), as_json)


@aliases_app.command("remove")
def remove_alias(name: Name, if_revision: IfRevision = None, force: Force = False, url: Url = DEFAULT_URL) -> None:
    """Take an alias away; the version that it points at stays. Needs `--if-revision` or `--force`."""
    _check_one(if_revision, force)
    with connect(url) as client:
        client.remove_alias(name, if_revision=if_revision, force=force)
    console.print(f"alias {name} is gone", highlight=False, markup=False)


@registry_app.command("rebuild")
def rebuild_registry(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Fill Redis again from storage: models, datasets, concepts, indexes, newest versions, aliases.

    For a Redis that was flushed, replaced or restored from a backup. Storage is only read. Exit status 1 when a
    record there is damaged.
    """
    with connect(url) as client:
        done = client.rebuild_registry()
    counts = {name: count for name, count in codec.to_plain(done).items() if name != "damaged"}
    show(done, as_json, "in Redis again: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for name in done.damaged:
        errors.print(f"damaged: {name}/record.json", highlight=False, markup=False)
    if done.damaged:
        raise typer.Exit(1)


def _check_one(if_revision: int | None, force: bool) -> None:
    if if_revision is not None and force:
        raise typer.BadParameter("Name either the revision that you know or --force, not both.")
