"""`whence indexes verify` and `whence indexes repair`: is what is stored what was written? Else make it again."""

from typing import Annotated

import typer
from rich.markup import escape

from api.cli_indexes import indexes_app
from api.terminal import DEFAULT_URL, AsJson, Detach, Url, connect, console, follow_job, show_table, wait_for

Reference = Annotated[str, typer.Argument(help="name (its newest version) or name@v3")]


@indexes_app.command("verify")
def verify_index(
    reference: Reference, url: Url = DEFAULT_URL, detach: Detach = False, as_json: AsJson = False
) -> None:
    """Check the sha256 of every file a version needs: rows, artifacts, texts, query sets, concepts, records.

    Exit status 1 when something is damaged. Queries notice damage by themselves, file by file; this looks at
    everything at once.
    """
    with connect(url) as client:
        job = client.verify_index(reference)
        if detach:
            follow_job(client, job, detach)
            return
        result = wait_for(client, job).result or {}
    damage = result.get("damage", [])
    if as_json:
        console.print_json(data=result)
    else:
        if damage:
            show_table(damage, ("file", "what", "belongs_to", "owner"), as_json)
        read = f"{result['files']} files, {result['bytes'] / 1e6:.1f} MB"
        state = f"{result['damaged']} damaged: whence indexes repair {result['index']}" if damage else "all intact"
        console.print(f"{escape(result['index'])}: {read}, {escape(state)}", highlight=False)
    if damage:
        raise typer.Exit(1)


@indexes_app.command("repair")
def repair_index(reference: Reference, url: Url = DEFAULT_URL, detach: Detach = False) -> None:
    """Make what is damaged of a version again, by the job that built it; what is intact is not computed again.

    It takes its place only when it comes out the same, byte for byte. Damaged training data cannot be computed: add
    the same file again (`whence datasets add FILE --id ID`), then repair.
    """
    with connect(url) as client:
        follow_job(client, client.repair_index(reference), detach)
