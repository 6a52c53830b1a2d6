"""A sweep in the terminal: its runs as they go on, one line for each that is done, one table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedflow.cli.following import interruptible
from fedflow.cli.progress import pace_text, write_line
from fedflow.cli.tables import COLOURS
from fedflow.cli.text import duration, metric
from fedflow.cli.view import View
from fedflow.engine.watching import Watch
from fedflow.environments.base import Run
from fedflow.errors import StoreError
from fedflow.sweep import Row, Sweep, SweepResult

__all__ = ["SweepProgress", "interruptible_sweep", "sweep_table"]


class SweepProgress:
    """A line for each run that is done; where there is a terminal, below them a bar and the runs that are going on."""

    def __init__(self, console: Console, header: str, total: int, *, quiet: bool) -> None:
        self.console, self.header, self.total, self.quiet = console, header, total, quiet
        self._watches: dict[str, Watch] = {}
        self._active: list[str] = []
        self._done: list[str] = []
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._live = Live(self, console=console, refresh_per_second=5, transient=True) if live else None

    def __enter__(self) -> SweepProgress:
        if self._live is not None:
            self._live.__enter__()
        elif not self.quiet:
            write_line(self.console, Text(self.header))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def show(self, active: Sequence[Run], done: Sequence[Row]) -> None:
        """Called again and again; done: every run that is, so far."""
        self._active = [run.id for run in active]
        for row in done[len(self._done) :]:
            self._done.append(row.trial.run)
            if not self.quiet:
                write_line(self.console, _line(row, len(self._done), self.total))
        if self._live is not None:
            for run in active:
                watch = self._watches.setdefault(run.id, Watch(run.journal))
                with contextlib.suppress(StoreError):
                    watch.look()

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self.header, style="bold", overflow="ellipsis", no_wrap=True)]
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=self.total, completed=len(self._done), width=30),
            Text(f"{len(self._done)}/{self.total} runs"),
        )
        return Group(*parts, row, *(_going_on(name, self._watches.get(name)) for name in self._active))


def _line(row: Row, number: int, total: int) -> Text:
    """ "3/9  digits-mu-0.01-seed-2  finished  10 rounds  accuracy 0.9123, best 0.92 in round 7  12 s"."""
    found = row.as_dict()
    line = Text.assemble(f"{number}/{total}  ", (row.trial.run, "bold"), "  ", (row.status, COLOURS[row.status]))
    line.append(f"  {found['rounds']} rounds")
    if found["best_round"] is not None:
        line.append(
            f"  {found['key_metric']} {metric(found['final'])}, best {metric(found['best'])} in round {found['best_round']}"
        )
    line.append(f"  {duration(found['seconds'])}")
    return line


def _going_on(name: str, watch: Watch | None) -> Text:
    line = Text.assemble((name, "bold"), overflow="ellipsis", no_wrap=True)
    if watch is None or watch.recipe is None:
        return line
    line.append(f"  {len(watch.rounds)}/{watch.recipe.rounds} rounds")
    if watch.rounds:
        line.append(f"  {watch.recipe.key_metric.name} {metric(watch.key_metric(watch.rounds[-1]))}", style="cyan")
    if text := pace_text(watch):
        line.append(f"  {text}", style="dim")
    return line


@contextlib.contextmanager
def interruptible_sweep(sweep: Sweep, env: str, view: View) -> Iterator[SweepProgress]:
    """Progress of `sweep`, while SIGTERM means the same as Ctrl-C."""
    header = f"{sweep.name} · {env} · {len(sweep.trials)} runs"
    with interruptible(), SweepProgress(view.console(), header, len(sweep.trials), quiet=view.quiet) as progress:
        yield progress


def sweep_table(result: SweepResult) -> Table:
    """One line a run: the fields that are swept, seed, status, and the key metric."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = result.table()
    fields = list(result.rows[0].trial.values)
    key = rows[0]["key_metric"]
    for column in (*fields, "seed", "status", "rounds", key, f"best {key}", "time", "run"):
        table.add_column(column, overflow="fold", no_wrap=column == "run")
    for row, values in zip(result.rows, rows, strict=True):
        best = "" if values["best_round"] is None else f"{metric(values['best'])} (round {values['best_round']})"
        table.add_row(
            *(str(values[field]) for field in fields),
            str(values["seed"]),
            Text(row.status, style=COLOURS[row.status]),
            str(values["rounds"]),
            metric(values["final"]) if values["rounds"] else "",
            best,
            duration(values["seconds"]),
            row.trial.run,
        )
    return table
