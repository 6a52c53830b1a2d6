"""`fedflow metrics`: every round's figures, for other programs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, Home, RunIds
from fedflow.errors import UserError, field_error

if TYPE_CHECKING:
    from fedflow.engine.metrics import MetricRow
    from fedflow.engine.summary import RunSummary

__all__ = ["metrics"]


def metrics(
    run_ids: RunIds,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="A .csv or a .parquet, or a folder for TensorBoard. Default: CSV on the screen.",
        ),
    ] = None,
    sites: Annotated[
        bool, typer.Option("--sites/--no-sites", help="Each site's own figures too, or only the federation's.")
    ] = True,
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Write every round's metrics: a row a round, site and metric."""
    from fedflow.engine.metrics import check_table, metric_rows, print_metrics, write_events, write_metrics
    from fedflow.engine.summary import summarize

    if out is not None and out.suffix:
        check_table(out)
    runs = [
        find_journal(run_id, home, store) for run_id in run_ids
    ]  # a mistake in a name is told before anything is written

    def summaries() -> Iterator[RunSummary]:
        return (summarize(run) for run in runs)

    def rows() -> Iterator[MetricRow]:
        return (row for summary in summaries() for row in metric_rows(summary, sites=sites))

    if out is None:
        with _readable_in_part():
            print_metrics(rows(), sys.stdout)
    elif out.suffix:
        typer.echo(write_metrics(rows(), out))
    elif out.is_file():
        raise UserError(field_error("--out", str(out), "a .csv, a .parquet or a folder", "choose another name"))
    else:
        for summary in summaries():
            typer.echo(write_events(summary, out, sites=sites))


@contextlib.contextmanager
def _readable_in_part() -> Iterator[None]:
    """Whoever reads stdout may stop before its end, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
