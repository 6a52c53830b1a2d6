"""`fedflow plot`, `export`, `init`: commands that write files."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, Home, RunId, RunIds
from fedflow.cli.text import metrics
from fedflow.errors import UserError, field_error

if TYPE_CHECKING:
    from fedflow.engine.summary import RunSummary

__all__ = ["export", "init", "plot"]


def plot(
    run_ids: RunIds,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="A .png, .svg or .pdf. Default: <home>/plots/<run>.png."),
    ] = None,
    x: Annotated[
        Literal["round", "seconds", "bytes"],
        typer.Option("--x", help="Of several runs: over rounds, seconds of training, or bytes communicated."),
    ] = "round",
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Draw RUN: metrics per round and site, best round, exclusions. Or several.

    Of several runs those that differ in nothing but the seed are one line, their median, with a band from the smallest to the
    largest.
    """
    from fedflow.engine.summary import summarize
    from fedflow.plot import SUFFIXES, plot_run, plot_runs

    if pictures := [name for name in run_ids if name.endswith(SUFFIXES)]:
        raise UserError(field_error("RUN", pictures[-1], "ids of runs", f"give the picture as --out {pictures[-1]}"))
    if twice := sorted({name for name in run_ids if run_ids.count(name) > 1}):
        raise UserError(field_error("RUN", twice[0], "each run once", "leave it out"))
    runs = [summarize(find_journal(run_id, home, store)) for run_id in run_ids]
    if len(runs) == 1 and x == "round":
        typer.echo(plot_run(runs[0], out or home / "plots" / f"{run_ids[0]}.png"))
    else:
        typer.echo(plot_runs(runs, out or home / "plots" / f"{run_ids[0]}-and-{len(runs) - 1}-more.png", x=x))


def export(
    run_id: RunId,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A .safetensors file, a .pt with a PyTorch state dict; of xgboost, .json or .ubj."
        ),
    ],
    best: Annotated[bool, typer.Option("--best", help="The model of the round with the best key metric.")] = False,
    round: Annotated[
        int | None, typer.Option("--round", min=0, metavar="N", help="The model of this round. Default: the last.")
    ] = None,
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Write a global model of RUN into a file."""
    from fedflow.engine.export import check_target, export_model
    from fedflow.engine.summary import summarize

    journal = find_journal(run_id, home, store)
    check_target(out, journal.recipe().algorithm.model_files)
    summary = summarize(journal)
    chosen = summary.rounds[_choose(summary, best, round)]
    notes = export_model(journal, chosen.round, out)
    typer.echo(
        f"{out}: round {chosen.round}  {metrics(chosen.shown, summary.recipe.key_metric.name)}  {chosen.model_digest}"
    )
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _choose(summary: RunSummary, best: bool, round: int | None) -> int:
    """Which round's model is meant."""
    if best and round is not None:
        raise UserError(field_error("--best, --round", round, "one of the two", "leave one out"))
    if not summary.rounds:
        raise UserError(f"{summary.run}: found no committed round, expected at least one; resume the run")
    if best and summary.best is None:
        name = summary.recipe.key_metric.name
        fix = "give --round, or let the workload or the evaluation report it"
        raise UserError(field_error("--best", sorted(summary.metrics), f"the key metric {name!r} in a round", fix))
    if round is not None and round >= len(summary.rounds):
        raise UserError(
            field_error("--round", round, f"a round from 0 to {len(summary.rounds) - 1}", "choose one of them")
        )
    return summary.best if best and summary.best is not None else len(summary.rounds) - 1 if round is None else round


# -- init --------------------------------------------------------------------------------------------------------------
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the project goes; made if it is not there.")],
) -> None:
    """Lay out a project that runs as it is.

    Handwritten digits at four sites; the files of a deployment; the flows, to read or to change. Nothing that is there is
    overwritten.
    """
    try:
        _copy(files("fedflow") / "template", folder)
        for part in ("deployments", "flows"):
            _copy(files("fedflow") / part, folder / part)
    except OSError as error:
        raise UserError(field_error("DIR", str(folder), "a folder that can be written", f"{error.strerror}")) from error
    recipe = folder / "recipe.yaml"
    typer.echo("next:")
    if importlib.util.find_spec("sklearn") is None:
        typer.echo("  pip install 'fedflow[examples]'   # scikit-learn, for its images")
    typer.echo(f"  fedflow run {recipe}             # simulated here")
    typer.echo(f"  fedflow run {recipe} --env poc   # with a Prefect server and a worker per site")


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name):
        path = target / entry.name
        if entry.name == "__pycache__":
            continue
        if entry.is_dir():
            _copy(entry, path)
            continue
        try:
            with path.open("xb") as file:
                file.write(entry.read_bytes())
            typer.echo(f"wrote {path}")
        except FileExistsError:
            typer.echo(f"kept  {path}, which was there")
