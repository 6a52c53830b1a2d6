"""`fedflow stats`: federated statistics, as a table or as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, Home, RunId

__all__ = ["stats"]


def stats(
    run_id: RunId,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="A page with histograms (.html), or a .json, .csv or .parquet."
        ),
    ] = None,
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Show the statistics that RUN found, or write them.

    Of a run whose algorithm is `statistics`, which `fedflow run` starts.
    """
    from fedflow.algorithms.statistics import statistics_table
    from fedflow.engine.results import read_result
    from fedflow.engine.statistics import write_statistics
    from fedflow.errors import UserError

    found = read_result(find_journal(run_id, home, store))
    if out is not None:
        typer.echo(write_statistics(found, out, run_id))
    elif "datasets" in found.values:
        typer.echo(statistics_table(found))
    else:
        raise UserError(f"{run_id}: found a result without statistics, expected a run of them; see `fedflow result`")
