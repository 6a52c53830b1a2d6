"""`fedflow runs ls`, `runs show`, `logs`: what is known of runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedflow.cli.options import HOME, AsJson, Home, RunId
from fedflow.errors import FedflowError, UnreachableError

if TYPE_CHECKING:
    from fedflow.engine.summary import RunSummary, Status
    from fedflow.store.journal import Journal

__all__ = ["Store", "app", "find_journal", "logs"]

app = typer.Typer(help="Runs: a list, or one in detail.", no_args_is_help=True)

Store = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="Look in this store, for runs that were not started from here."),
]


def find_journal(run_id: str, home: Path, store: str | None) -> Journal:
    """The journal of a run that was started from `home`, or that is in `store`. Raises RunMissing."""
    from fedflow.environments import recall
    from fedflow.store.journal import Journal
    from fedflow.store.objects import ObjectStore

    journal = Journal(ObjectStore(store) if store else recall(run_id, home).store, run_id)
    journal.record()
    return journal


@dataclass(frozen=True)
class Known:
    """One run. env: None where it is known from its store alone, and then it is never "running"."""

    summary: RunSummary
    status: Status
    env: str | None
    store: str

    def as_json(self) -> dict[str, object]:
        return {**self.summary.as_json(), "status": self.status, "env": self.env, "store": self.store}


def _started_here(run_id: str, home: Path) -> Known:
    """A run that was started from `home`."""
    from fedflow.engine.summary import summarize
    from fedflow.environments import recall
    from fedflow.store.journal import Journal

    with recall(run_id, home) as environment:
        summary = summarize(Journal(environment.store, run_id))
        return Known(summary, _status(environment, summary), environment.kind, environment.store.url)


def _status(environment: Any, summary: RunSummary) -> Status:
    """Whether it is running, as its environment says; for poc as its store says, for asking would start a server."""
    if environment.kind == "poc" or summary.finished:
        return summary.status
    with contextlib.suppress(UnreachableError):
        status: Status = environment.attach(summary.run).status()
        return status
    return summary.status


def _stored(run_id: str, store: str) -> Known:
    from fedflow.engine.summary import summarize
    from fedflow.store.journal import Journal
    from fedflow.store.objects import ObjectStore

    summary = summarize(Journal(ObjectStore(store), run_id))
    return Known(summary, summary.status, None, store)


@app.command("ls")
def list_all(home: Home = HOME, store: Store = None, as_json: AsJson = False) -> None:
    """List the runs that were started from here."""
    known, unreadable = _all_runs(home, store)
    if as_json:
        problems = [{"run_id": run, "message": why} for run, why in unreadable.items()]
        print(json.dumps({"runs": [one.as_json() for one in known], "unreadable": problems}, allow_nan=False))
        return
    from fedflow.cli.tables import output, runs_table

    if known:
        output().print(runs_table([(one.summary, one.status, one.env) for one in known]))
    for run, why in unreadable.items():
        typer.echo(f"{run}: {why}", err=True)
    if not known and not unreadable:
        typer.echo(f"no runs in {store or home}")


def _all_runs(home: Path, store: str | None) -> tuple[list[Known], dict[str, str]]:
    """Those that can be read, the newest last; and of the others why not."""
    from fedflow.store.journal import list_runs
    from fedflow.store.objects import ObjectStore

    names = list_runs(ObjectStore(store)) if store else [path.stem for path in (home / "runs").glob("*.json")]
    known, unreadable = [], {}
    for run in sorted(names):
        try:
            known.append(_stored(run, store) if store else _started_here(run, home))
        except FedflowError as error:
            unreadable[run] = str(error)
    return sorted(known, key=lambda one: one.summary.created), unreadable


@app.command()
def show(run_id: RunId, home: Home = HOME, store: Store = None, as_json: AsJson = False) -> None:
    """Show every round of RUN with its sites.

    Of each its weight, steps, metrics, seconds and bytes, and who was excluded and why.
    """
    known = _stored(run_id, store) if store else _started_here(run_id, home)
    if as_json:
        print(json.dumps({**known.as_json(), "history": _history(known.summary)}, allow_nan=False))
        return
    from fedflow.cli.tables import output, overview, rounds_table

    console = output()
    console.print(overview(known.summary, known.status, known.env, known.store))
    if known.summary.rounds:
        console.print(rounds_table(known.summary))


def _history(summary: RunSummary) -> list[dict[str, Any]]:
    """Every round, as JSON."""
    return [
        {
            "round": round.round,
            "model_digest": round.model_digest,
            "seconds": round.seconds,
            "metrics": dict(round.metrics),
            "evaluation": None if round.evaluation is None else dict(round.evaluation),
            "sites": {site: c.model_dump(mode="json") for site, c in round.sites.items()},
            "excluded": dict(round.excluded),
        }
        for round in summary.rounds
    ]


def logs(
    run_id: RunId,
    site: Annotated[str | None, typer.Option("--site", metavar="SITE", help="Only what this site wrote.")] = None,
    home: Home = HOME,
) -> None:
    """Show the log of RUN, its sites' tracebacks included."""
    from fedflow.environments import recall
    from fedflow.errors import RecipeError, field_error

    with recall(run_id, home) as environment:
        handle = environment.attach(run_id)
        sites = handle.journal.sites()
        if site is not None and site not in sites:
            raise RecipeError(field_error("--site", site, f"one of {sites}", "correct the name"))
        for line in handle.logs(site):
            typer.echo(line)
