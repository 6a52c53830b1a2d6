"""Following a started run to its end: progress, Ctrl-C, the result, the exit code."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fedflow.cli.options import HOME
from fedflow.cli.progress import LiveProgress, PlainProgress, Progress, Silent, write_line
from fedflow.cli.text import complain, metric
from fedflow.cli.view import View
from fedflow.engine.summary import RunSummary
from fedflow.engine.watching import Watch
from fedflow.errors import FedflowError, RunMissing, StoreError, UnreachableError, UserError, one_line
from fedflow.store.journal import Journal

if TYPE_CHECKING:
    from fedflow.environments import Run
    from fedflow.store.objects import ObjectStore

__all__ = ["committed_rounds", "conclude", "follow", "interruptible", "resume_command", "ui_of"]


def follow(environment: Any, run: Run, before: int, view: View) -> int:
    """Show `run` until it ends. before: rounds that were committed when it was started. Ctrl-C, or SIGTERM, aborts it.

    Returns the exit code: 0 only if the run trained as asked; else what stopped it is on stderr.
    """
    console, watch = view.console(), Watch(run.journal, before)
    with (
        interruptible(),
        _board(run, view) as record,
        _progress(console, environment, run, before, view) as progress,
    ):

        def tick(run: Run, *, last: bool = False) -> None:
            with contextlib.suppress(StoreError):  # an outage is the coordinator's matter; look again later
                progress.show(watch, watch.look(last=last))
            record(watch)

        try:
            run.wait(on_tick=tick)
        except KeyboardInterrupt:
            write_line(console, Text("stopping the run …", style="yellow"))
            run.abort()
        tick(run, last=True)
    try:
        return conclude(environment, run, view)
    except StoreError as error:  # no mistake of the user's: the run has begun
        raise FedflowError(f"what became of the run cannot be read: {error}", run=run.id) from error


def committed_rounds(store: ObjectStore, run: str) -> int:
    """How many rounds of `run` are committed; 0 where there is no such run."""
    journal = Journal(store, run)
    try:
        return len(journal.rounds(journal.recipe().phases[-1]))
    except RunMissing:
        return 0


def resume_command(run: str, home: Path) -> str:
    """What the user types to go on with `run`."""
    return f"fedflow resume {run}" + ("" if home == HOME else f" --home {home}")


# -- while it goes on --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _board(run: Run, view: View) -> Iterator[Callable[[Watch], None]]:
    """Called after every look, writes what is new for TensorBoard, if that is wanted."""
    if view.tensorboard is None:
        yield lambda watch: None
        return
    from fedflow.engine.metrics import Events

    with Events(view.tensorboard / run.id) as events:
        written = 0

        def record(watch: Watch) -> None:
            nonlocal written
            for round in watch.rounds[written:]:
                events.add(round)
            if len(watch.rounds) > written:
                events.flush()
            written = len(watch.rounds)

        yield record


@contextlib.contextmanager
def _progress(console: Console, environment: Any, run: Run, before: int, view: View) -> Iterator[Progress]:
    header = _header(environment, run, before)
    live = console.is_terminal and not console.is_dumb_terminal
    if not view.quiet and not live:
        write_line(console, Text(header))
    progress = Silent() if view.quiet else LiveProgress(console, header) if live else PlainProgress(console)
    with progress:
        yield progress


def _header(environment: Any, run: Run, before: int) -> str:
    parts = [run.id, environment.kind, f"{len(environment.federation.sites)} sites"]
    if before:
        parts.append(f"resumed after {before} rounds")
    return " · ".join([*parts, ui_of(run) or f"store {run.store.url}"])


def ui_of(run: Run) -> str | None:
    """URL of the run in the Prefect UI, if there is one and it answers."""
    with contextlib.suppress(UnreachableError):
        return run.backend.ui()
    return None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM means the same as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- the end -----------------------------------------------------------------------------------------------------------
def conclude(environment: Any, run: Run, view: View) -> int:
    """Show what became of `run`, which is not running any more; the exit code."""
    try:
        summary: RunSummary | None = run.summary()
    except RunMissing:
        summary = None
    if summary is not None and summary.rounds:
        _show_result(environment, run, summary, view, view.console())
    if view.as_json:
        print(json.dumps(summary.as_json() if summary else _never_started(run.id), allow_nan=False), flush=True)
    if summary is None or summary.status != "finished":
        complain(f"{run.id}: {_why(run, summary)}; `{resume_command(run.id, view.home)}` goes on")
        return 1
    return 0


def _never_started(run: str) -> dict[str, object]:
    nothing: dict[str, object] = {"run_id": run, "status": "failed", "rounds": 0, "model_digest": None, "metrics": {}}
    return {**nothing, "best_round": None, "message": "the run did not start"}


def _why(run: Run, summary: RunSummary | None) -> str:
    """What stopped the run, in one line."""
    if summary is None:
        return f"the run did not start{_last_words(run)}"
    done = f"after {len(summary.rounds)} of {summary.recipe.rounds} rounds"
    if summary.status == "failed" and summary.last:
        return f"failed {done}: {one_line(summary.last.message)}"
    if summary.status == "aborted":
        return f"aborted {done}"
    return f"stopped {done}{_last_words(run)}"


def _last_words(run: Run) -> str:
    """The end of the run's log, if it has one and it can be read."""
    with contextlib.suppress(FedflowError):
        lines = [line for line in run.logs() if line.strip()]
        return f"; its log ends with {one_line(lines[-1])!r}, `fedflow logs {run.id}` shows all of it" if lines else ""
    return ""


def _show_result(environment: Any, run: Run, summary: RunSummary, view: View, console: Console) -> None:
    lines = [("", f"{summary.run} {summary.status}: {len(summary.rounds)} rounds")]
    lines += _key_metric_lines(summary)
    lines.append(("model", summary.model_digest or ""))
    if plot := _plot(summary, view.home):
        lines.append(("plot", str(plot)))
    if command := environment.ui_command(run):
        lines.append(("look at it", command))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        write_line(
            console, Text.assemble((f"  {name:<{width}}  ", "dim"), value) if name else Text(value, style="bold")
        )


def _key_metric_lines(summary: RunSummary) -> list[tuple[str, str]]:
    name = summary.recipe.key_metric.name
    if summary.best is None:
        return []
    last, best = summary.rounds[-1], summary.rounds[summary.best]
    text = f"{metric(last.shown.get(name))} last model (round {last.round}), "
    return [(name, text + f"{metric(best.shown.get(name))} best model (round {best.round})")]


def _plot(summary: RunSummary, home: Path) -> Path | None:
    """Where the run's plot lies; None where matplotlib is missing."""
    from fedflow.plot import plot_run

    try:
        return plot_run(summary, home / "plots" / f"{summary.run}.png")
    except UserError:
        return None
