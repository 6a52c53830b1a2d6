"""`fedflow run`, `resume`, `extend`, `abort`: commands that start and stop training."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedflow.cli.options import (
    HOME,
    AsJson,
    FederationFile,
    Home,
    Quiet,
    RecipeFile,
    RunId,
    StoreUrl,
    TensorBoard,
    Tracking,
)
from fedflow.cli.servers import hold
from fedflow.cli.view import View
from fedflow.errors import RecipeError, UserError, field_error

if TYPE_CHECKING:
    from fedflow.environments import Run
    from fedflow.recipe import Federation, Recipe
    from fedflow.store.journal import Journal

__all__ = ["Backend", "Kind", "abort", "check_tracking", "extend", "load_federation", "load_recipe", "resume", "run"]

Kind = Literal["sim", "poc", "prod"]
Backend = Literal["processes", "ray", "debug"]
"""`fedflow.simulation.engine.Backend`, which takes an import of torch to read; a test holds them equal."""

Rounds = Annotated[int | None, typer.Option("--rounds", min=1, metavar="N", help="So many rounds in all.")]
KeepServer = Annotated[
    bool, typer.Option("--keep-server", help="poc: keep the Prefect server after the run, until Ctrl-C.")
]


def run(
    recipe: RecipeFile,
    env: Annotated[
        Kind,
        typer.Option(
            "--env",
            help="sim: in one process here. poc: a Prefect server and a worker per site, started here. prod: your server and your sites.",
        ),
    ] = "sim",
    federation: FederationFile = None,
    store: StoreUrl = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", metavar="ID", help="A name for the run; one that exists is resumed.")
    ] = None,
    home: Home = HOME,
    keep_server: KeepServer = False,
    tracking: Tracking = False,
    tensorboard: TensorBoard = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="sim: how the sites fare over simulated time, CSV or YAML. It decides who counts and when rounds close.",
        ),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            "--backend",
            help="sim: who trains: worker processes (the default), actors of Ray, or this process, where breakpoints work.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="sim: so many train at a time. Default: one a processor."),
    ] = None,
    journal_every: Annotated[
        int | None,
        typer.Option("--journal-every", min=1, metavar="N", help="sim: write the model every N rounds. Default: 1."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train RECIPE and show its rounds. Ctrl-C stops it; `fedflow resume` goes on.

    Exit code 0 only if the run trained as asked; 1 if it failed or was stopped; 2 for a mistake in what was given.
    """
    _check_keeping(env, keep_server)
    check_tracking(env, tracking)
    _check_trace(env, trace)
    simulation = {"backend": backend, "workers": workers, "journal_every": journal_every}
    simulation = {name: value for name, value in simulation.items() if value is not None}
    _check_simulated(env, simulation)
    _check_name(run_id)
    view = View(home, as_json, quiet, tensorboard)
    with ExitStack() as stack:
        with view.starting(env, backend):
            from fedflow.cli.following import committed_rounds
            from fedflow.environments import make

            spec, sites = load_recipe(recipe), load_federation(federation, recipe)
            _check_evaluation(spec, env)
            view.check()
            options: dict[str, Any] = simulation | ({"tracking": True} if tracking else {})
            options |= {} if trace is None else {"trace": trace}
            environment = stack.enter_context(make(env, federation=sites, store=store, home=home, **options))
            before = committed_rounds(environment.store, run_id) if run_id else 0
            handle = environment.execute(spec, run_id=run_id)
        code = _follow(environment, handle, before, view)
        if keep_server:
            hold(handle)
    raise typer.Exit(code)


def resume(
    run_id: RunId,
    rounds: Rounds = None,
    quorum: Annotated[
        int | None, typer.Option("--quorum", min=1, metavar="N", help="So many updates close a round.")
    ] = None,
    timeout: Annotated[
        list[str] | None,
        typer.Option(
            "--timeout", metavar="NAME=DURATION", help="Change a timeout: round_deadline=20m. May be repeated."
        ),
    ] = None,
    add_site: Annotated[
        list[str] | None, typer.Option("--add-site", metavar="SITE", help="A site that joins the run. May be repeated.")
    ] = None,
    home: Home = HOME,
    tensorboard: TensorBoard = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on with RUN from its last committed round.

    Updates that have arrived since count. What the options change is written into the run's journal.
    """
    from fedflow.environments import recall

    view = View(home, as_json, quiet, tensorboard)
    view.check()
    changes: dict[str, Any] = {"rounds": rounds, "quorum": quorum}
    changes = {field: value for field, value in changes.items() if value is not None}
    with recall(run_id, home) as environment:
        _amend(environment, run_id, changes, timeouts=timeout or [], sites=add_site or [])
        code = _go_on(environment, run_id, view)
    raise typer.Exit(code)


def extend(
    run_id: RunId,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="So many rounds in all.")],
    home: Home = HOME,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train RUN for more rounds than its recipe asked for."""
    from fedflow.environments import recall
    from fedflow.store.journal import Journal

    with recall(run_id, home) as environment:
        _check_extension(Journal(environment.store, run_id), rounds)
        _amend(environment, run_id, {"rounds": rounds})
        code = _go_on(environment, run_id, View(home, as_json, quiet))
    raise typer.Exit(code)


def abort(run_id: RunId, home: Home = HOME) -> None:
    """Stop RUN and everything that works on it. What is committed stays, and `fedflow resume` goes on from there."""
    from fedflow.cli.following import resume_command
    from fedflow.environments import recall

    with recall(run_id, home) as environment:
        handle = environment.attach(run_id)
        if handle.status() != "running":
            typer.echo(f"{run_id} is not running ({handle.status()})")
            return
        handle.abort()
        typer.echo(f"{run_id} is stopped; `{resume_command(run_id, home)}` goes on from its last committed round")


# -- reading what was given --------------------------------------------------------------------------------------------
def load_recipe(path: Path) -> Recipe:
    """The recipe; code beside it is found from here on, and by every process that is started."""
    from fedflow.recipe import Recipe

    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return Recipe.load(path)


def load_federation(path: Path | None, recipe: Path) -> Federation:
    """The federation of that file, or the one beside the recipe."""
    from fedflow.recipe import Federation

    beside = recipe.parent / "federation.yaml"
    if path is None and not beside.exists():
        fix = f"write {beside} with `sites: [site-1, site-2]`, or name another file with --federation"
        raise RecipeError(field_error("--federation", None, "a file with the sites", fix))
    return Federation.load(path or beside)


# -- going on ----------------------------------------------------------------------------------------------------------
def _go_on(environment: Any, run_id: str, view: View) -> int:
    from fedflow.cli.following import committed_rounds, conclude
    from fedflow.environments.base import Ended, Run

    ended = Run(run_id, environment.store, Ended())
    if ended.is_complete():  # nothing to be started
        return conclude(environment, ended, view)
    with view.starting(environment.kind, getattr(environment, "backend", None)):
        before = committed_rounds(environment.store, run_id)
        handle = environment.resume(run_id)
    return _follow(environment, handle, before, view)


def _follow(environment: Any, handle: Run, before: int, view: View) -> int:
    from fedflow.cli.following import follow

    return follow(environment, handle, before, view)


def _amend(
    environment: Any,
    run_id: str,
    changes: dict[str, Any],
    *,
    timeouts: list[str] | None = None,
    sites: list[str] | None = None,
) -> None:
    """Write changes of a run into its journal. Raises RecipeError where they contradict each other."""
    from pydantic import ValidationError

    from fedflow.engine import amend_run
    from fedflow.recipe import FederationSite, explain
    from fedflow.store.journal import Journal

    journal = Journal(environment.store, run_id)
    if timeouts:
        changes["timeouts"] = {**journal.recipe().timeouts.model_dump(), **dict(_timeout(text) for text in timeouts)}
    try:
        joining = [FederationSite(name=site).name for site in sites or []]
        amend_run(journal, sites=joining, **changes)
        environment.federation = environment.federation.joined(joining)
    except ValidationError as error:
        raise RecipeError(f"{run_id}: {explain(error)}") from error


def _timeout(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(field_error("--timeout", text, "NAME=DURATION", "write it like round_deadline=20m"))
    return name, value


def _check_extension(journal: Journal, rounds: int) -> None:
    """Raises UserError where `rounds` in all would train nothing more."""
    from fedflow.engine.best import key_metrics, stops_early

    recipe = journal.recipe()
    if rounds <= recipe.rounds:
        fix = f"give more than {recipe.rounds}"
        raise UserError(field_error("--rounds", rounds, f"more rounds in all than the run's {recipe.rounds}", fix))
    values = key_metrics(journal, recipe)
    if stops_early(values, recipe):
        raise UserError(
            f"{journal.run}: found it stopped by early_stop after {len(values)} rounds, expected a run that reached its last round; "
            "start a new run with its exported model as the checkpoint and another early_stop"
        )


def _check_keeping(env: Kind, keep_server: bool) -> None:
    if keep_server and env != "poc":
        raise UserError(field_error("--keep-server", env, "the environment poc, which starts a server", "leave it out"))


def check_tracking(env: Kind, tracking: bool) -> None:
    """Raises UserError where `--tracking` says nothing."""
    if tracking and env != "sim":
        raise UserError(
            field_error("--tracking", env, "the environment sim; others are on a server anyhow", "leave it out")
        )


def _check_trace(env: Kind, trace: Path | None) -> None:
    if trace is not None and env != "sim":
        raise UserError(field_error("--trace", env, "the environment sim, whose time is simulated", "leave it out"))


def _check_simulated(env: Kind, options: Mapping[str, object]) -> None:
    """Raises UserError where options of the simulator are given to another environment."""
    for name in options if env != "sim" else ():
        expected = "the environment sim; in others each site has its own worker, and every round is written"
        raise UserError(field_error("--" + name.replace("_", "-"), env, expected, "leave it out"))


def _check_name(run_id: str | None) -> None:
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", run_id):
        wanted = "letters, digits, dots, dashes and underscores, at most 63"
        raise UserError(field_error("--run-id", run_id, wanted, "choose such a name"))


def _check_evaluation(recipe: Recipe, env: Kind) -> None:
    """Raises ResolveError where the coordinator, which is on this machine unless in prod, would not find the evaluation."""
    from fedflow.registry import resolve

    if recipe.evaluation is not None and env != "prod":
        resolve("workloads", recipe.evaluation.path, field="evaluation")
