"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fedflow.cli import (
    doctor,
    evaluating,
    files,
    looking,
    metrics,
    psi,
    recipes,
    results,
    roster,
    runs,
    servers,
    sites,
    statistics,
    stores,
    sweeps,
)
from fedflow.cli.options import Session
from fedflow.cli.text import complain
from fedflow.errors import FedflowError, ObjectCorrupt, StoreError, UserError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Federated learning as Prefect workflows: every round scheduled, retried, resumable and visible.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the boxes of typer's help take longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fedflow import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(
    ctx: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of any error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    ctx.obj.traceback = show_traceback


app.command("run")(runs.run)
app.command("resume")(runs.resume)
app.command("extend")(runs.extend)
app.command("abort")(runs.abort)
app.command("sweep")(sweeps.sweep)
app.add_typer(looking.app, name="runs")
app.command("logs")(looking.logs)
app.command("plot")(files.plot)
app.command("metrics")(metrics.metrics)
app.command("export")(files.export)
app.command("result")(results.result)
app.command("stats")(statistics.stats)
app.command("psi")(psi.psi)
app.command("evaluate")(evaluating.evaluate)
app.command("init")(files.init)
app.command("ui")(servers.ui)
app.command("deploy")(servers.deploy)
app.command("gate")(servers.gate)
app.command("enroll")(servers.enroll)
app.add_typer(recipes.app, name="recipe")
app.add_typer(sites.app, name="site")
app.command("sites")(roster.sites)
app.add_typer(stores.app, name="store")
app.command("doctor")(doctor.doctor)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for what failed, 2 for a mistake of the user. Never raises."""
    session = Session()
    os.environ.setdefault("DO_NOT_TRACK", "1")  # importing Prefect would report to its makers
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets another one, not an error
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = typer.main.get_command(app).main(
            list(sys.argv[1:] if args is None else args), prog_name="fedflow", standalone_mode=False, obj=session
        )
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except typer.Abort:
        return 130
    except Exception as error:
        return _report(error, session)
    return code if isinstance(code, int) else 0


def _report(error: Exception, session: Session) -> int:
    """One line on stderr, and the exit code that goes with the error."""
    if session.traceback and not isinstance(error, typer.TyperException):
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        text, code = _usage(error), error.exit_code
        if text.startswith("Usage: "):  # nothing was given, and so the text is the help
            typer.echo(error.format_message(), err=True)
            return code
    elif isinstance(error, UserError) or (isinstance(error, StoreError) and not isinstance(error, ObjectCorrupt)):
        text, code = str(error), 2
    elif isinstance(error, FedflowError):
        text, code = str(error), 1
    else:
        text, code = f"unexpected {type(error).__name__}: {error}; {_log(error, session.home)}", 1
    complain(text)
    return code


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the arguments, and which help tells more."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    command = getattr(getattr(error, "ctx", None), "command_path", "fedflow")
    return f"{message}; see `{command} --help`"


def _log(error: Exception, home: Path) -> str:
    """Write the traceback below `home`; say where it is."""
    path = home / "logs" / f"error-{datetime.now():%Y%m%d-%H%M%S-%f}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as problem:
        return f"its traceback could not be written to {path} ({problem.strerror}): `fedflow --traceback …` shows it"
    return f"its traceback is in {path}"
