"""`fedflow result`: what a run found that is no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, Home, RunId

__all__ = ["result"]


def result(
    run_id: RunId,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write all of it there: a .json or a .safetensors file."),
    ] = None,
    round: Annotated[
        int | None, typer.Option("--round", min=0, metavar="N", help="The result of this round. Default: the last.")
    ] = None,
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Print what RUN found that is no model.

    Its values, and the shapes of its arrays, as one JSON object.
    """
    from fedflow.engine.results import outlined, read_result, write_result

    found = read_result(find_journal(run_id, home, store), round)
    if out is None:
        print(json.dumps(outlined(found), indent=1, allow_nan=False))
    else:
        typer.echo(write_result(found, out))
