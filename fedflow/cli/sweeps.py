"""`fedflow sweep`: a recipe over a grid of values and seeds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedflow.cli.options import HOME, AsJson, FederationFile, Home, Quiet, RecipeFile, StoreUrl, Tracking
from fedflow.cli.runs import Kind, check_tracking, load_federation, load_recipe
from fedflow.cli.text import complain
from fedflow.cli.view import View
from fedflow.errors import UserError, field_error

if TYPE_CHECKING:
    from fedflow.cli.sweeping import SweepProgress
    from fedflow.sweep import Sweep, SweepResult

__all__ = ["sweep"]


def sweep(
    recipe: RecipeFile,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE,…",
            help="A field of the recipe and its values: algorithm.mu=0,0.01,0.1. May be repeated: every combination is a run.",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="SEED,…", help="Each combination with each of them: 0,1,2.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What the runs' names begin with. Default: the recipe's."),
    ] = None,
    env: Annotated[Kind, typer.Option("--env", help="Where the runs are trained, as of `fedflow run`.")] = "sim",
    parallel: Annotated[
        int,
        typer.Option("--parallel", min=1, metavar="N", help="So many runs at a time; sim: they share the processors."),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The table as a .csv or a .parquet.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="A .png, .svg or .pdf. Default: <home>/plots/<name>.png."),
    ] = None,
    tracking: Tracking = False,
    federation: FederationFile = None,
    store: StoreUrl = None,
    home: Home = HOME,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train RECIPE over a grid of values and seeds.

    A run's name follows from its values and seed: finished runs are found, interrupted ones continued. Ctrl-C stops the sweep.
    Exit code 0 only if every run trained as asked.
    """
    check_tracking(env, tracking)
    view = View(home, as_json, quiet)
    with contextlib.ExitStack() as stack:
        with view.starting(env):
            from fedflow.cli.sweeping import interruptible_sweep
            from fedflow.environments import make
            from fedflow.memory import processors
            from fedflow.sweep import Sweep

            spec, sites = load_recipe(recipe), load_federation(federation, recipe)
            grid = Sweep(spec, _fields(settings or []), _seeds(seeds), name or "")
            _check_targets(out, plot)
            options: dict[str, Any] = {"tracking": True} if tracking else {}
            if env == "sim" and parallel > 1:
                options["workers"] = max(1, processors() // parallel)
            environment = stack.enter_context(make(env, federation=sites, store=store, home=home, **options))
            grid.check(environment)
        progress = stack.enter_context(interruptible_sweep(grid, environment.kind, view))
        result = _executed(grid, environment, parallel, progress)
    raise typer.Exit(_conclude(grid, result, view, out, plot))


def _executed(grid: Sweep, environment: Any, parallel: int, progress: SweepProgress) -> SweepResult | None:
    """None where it was interrupted."""
    try:
        return grid.execute(environment, parallel=parallel, on_tick=progress.show)
    except KeyboardInterrupt:
        return None


# -- reading what was given --------------------------------------------------------------------------------------------
def _fields(settings: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for text in settings:
        path, equals, values = text.partition("=")
        if not (path and equals):
            raise UserError(field_error("--set", text, "FIELD=VALUE,…", "write it like algorithm.mu=0,0.01"))
        if path in found:
            raise UserError(field_error("--set", path, "each field once", f"give all its values at once: {path}=…,…"))
        found[path] = _values(text, values)
    return found


def _values(text: str, values: str) -> list[Any]:
    """Separated by commas, each as in a YAML file."""
    import yaml

    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise UserError(
            field_error(
                "--set", text, "values as in YAML, with commas between them", "put text with brackets in quotes"
            )
        ) from error
    return list(found)


def _seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        fix = "write them like 0,1,2"
        raise UserError(field_error("--seeds", text, "whole numbers with commas between them", fix)) from None


def _check_targets(out: Path | None, plot: Path | None) -> None:
    """Raises UserError where table or picture could not be written in the end."""
    from fedflow.engine.metrics import check_table
    from fedflow.plot import check_picture

    if out is not None:
        check_table(out)
    if plot is not None:
        check_picture(plot, "--plot")


# -- the end -----------------------------------------------------------------------------------------------------------
def _conclude(grid: Sweep, result: SweepResult | None, view: View, out: Path | None, plot: Path | None) -> int:
    """Table, files, picture; the exit code."""
    from fedflow.cli.sweeping import sweep_table
    from fedflow.cli.tables import output

    if result is None:
        complain(f"{grid.name}: stopped; the same command goes on")
        return 130
    files = list(_written(result, view.home, out, plot))
    if view.as_json:
        print(json.dumps({"sweep": result.name, "runs": result.table()}, allow_nan=False))
    else:
        output().print(sweep_table(result))
        for path in files:
            typer.echo(path)
    if result.unfinished:
        names = ", ".join(f"{row.trial.run} ({row.status})" for row in result.unfinished)
        complain(f"{grid.name}: not finished: {names}; `fedflow logs RUN` says why, the same command goes on")
        return 1
    return 0


def _written(result: SweepResult, home: Path, out: Path | None, plot: Path | None) -> Iterator[Path]:
    if out is not None:
        yield result.write(out)
    if any(row.summary and row.summary.rounds for row in result.rows):
        with contextlib.suppress(UserError) if plot is None else contextlib.nullcontext():  # matplotlib may be missing
            yield result.plot(plot or home / "plots" / f"{result.name}.png")
