"""`fedflow store verify`, `store gc`: whether a run's objects are whole, and which of them nobody needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, AsJson, Home, RunId
from fedflow.cli.text import size
from fedflow.errors import ObjectCorrupt

__all__ = ["app"]

app = typer.Typer(help="What a run keeps in the object store.", no_args_is_help=True)


@app.command()
def verify(run_id: RunId, home: Home = HOME, store: Store = None, as_json: AsJson = False) -> None:
    """Read every object that a commit of RUN names and check it, and the chain of the commits.

    Exit code 1 where anything is not as it was written.
    """
    from fedflow.engine.retention import check_run

    journal = find_journal(run_id, home, store)
    found = check_run(journal)
    if as_json:
        print(json.dumps(vars(found)))
    else:
        typer.echo(f"{found.objects} objects, {size(found.bytes)}: read and compared")
        if found.missing:
            typer.echo(f"{len(found.missing)} objects of superseded rounds are not there: dropped by gc, or lost")
    if found.problems:
        raise ObjectCorrupt("; ".join(found.problems), run=run_id)


@app.command()
def gc(
    run_id: RunId,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, metavar="N", help="Keep the N newest rounds.")] = 1,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, metavar="K", help="Keep every K-th round too.")
    ] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best/--drop-best", help="Keep the round with the best key metric.")
    ] = True,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it only say what would be.")] = False,
    home: Home = HOME,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Drop objects of RUN that nobody needs: of superseded rounds, and what failed attempts left.

    Models and updates of rounds that are dropped cannot be exported any more; their metrics stay. The newest commit, and
    whatever the run needs to go on, is always kept, also while it is running.
    """
    from fedflow.engine.retention import Policy, drop, garbage

    journal = find_journal(run_id, home, store)
    found = garbage(journal, Policy(keep_last, keep_every, keep_best))
    total = sum(journal.store.size(key) for key in found)
    if delete:
        drop(journal, found)
        journal.store.sweep()
    if as_json:
        print(json.dumps({"deleted": delete, "bytes": total, "objects": found}))
        return
    for key, why in found.items():
        typer.echo(f"{why:10}  {key}")
    said = "deleted" if delete else "would be deleted: add --delete"
    typer.echo(f"{len(found)} objects, {size(total)}: {said}")
