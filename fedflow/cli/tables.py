"""Runs and rounds as rich tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedflow.cli.text import digest, duration, metric, metrics, size
from fedflow.engine.summary import RoundSummary, RunSummary, Status
from fedflow.errors import one_line

__all__ = ["COLOURS", "output", "overview", "rounds_table", "runs_table"]

PIPED_WIDTH = 200
"""Columns where stdout is no terminal: nothing is cut off."""

COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "aborted": "yellow", "interrupted": "yellow"}


def output() -> Console:
    """The console that tables go to."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def runs_table(runs: Sequence[tuple[RunSummary, Status, str | None]]) -> Table:
    """One line a run."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "env", "status", "rounds", "key metric", "last", "best", "model", "started"):
        table.add_column(name, overflow="fold", no_wrap=name in ("run", "started"))
    for summary, status, env in runs:
        key = summary.recipe.key_metric.name
        best = None if summary.best is None else summary.rounds[summary.best]
        table.add_row(
            summary.run,
            env or "",
            Text(status, style=COLOURS[status]),
            f"{len(summary.rounds)}/{summary.recipe.rounds}",
            key,
            metric(summary.metrics[key]) if key in summary.metrics else "",
            "" if best is None else f"{metric(best.shown.get(key))} (round {best.round})",
            digest(summary.model_digest),
            f"{summary.created.astimezone():%Y-%m-%d %H:%M}",
        )
    return table


def overview(summary: RunSummary, status: Status, env: str | None, store: str) -> Table:
    """What a run is and how it stands."""
    recipe = summary.recipe
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("run", Text(summary.run, style="bold"))
    table.add_row("status", Text(status, style=COLOURS[status]))
    if status in ("failed", "aborted") and summary.last and summary.last.message:
        table.add_row("why", one_line(summary.last.message))
    table.add_row(
        "recipe", f"{recipe.name}: {recipe.algorithm.kind}, {recipe.schedule.kind}, model {recipe.model.path}"
    )
    table.add_row("sites", f"{len(summary.sites)}: {', '.join(summary.sites)}")
    table.add_row("rounds", f"{len(summary.rounds)} of {recipe.rounds}")
    if summary.best is not None:
        best, key = summary.rounds[summary.best], recipe.key_metric.name
        table.add_row("best", f"{key} {metric(best.shown.get(key))} in round {best.round}")
    table.add_row("model", summary.model_digest or "none yet")
    table.add_row("started", f"{summary.created.astimezone():%Y-%m-%d %H:%M:%S}")
    table.add_row("store", store + (f"  ({env})" if env else ""))
    return table


def rounds_table(summary: RunSummary) -> Table:
    """A section a round: the whole first, then each site, then who was excluded and why."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name in ("round", "site", "weight", "examples", "steps", "metrics", "time", "sent", "note"):
        right = name in ("weight", "examples", "steps", "time", "sent")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for round in summary.rounds:
        _add_round(table, round, summary)
    return table


def _add_round(table: Table, round: RoundSummary, summary: RunSummary) -> None:
    key, sites = summary.recipe.key_metric.name, round.sites
    whole = f"{len(sites)} of {len(sites) + len(round.excluded)}"
    values = round.shown if round.evaluation is None else {**round.metrics, **round.evaluation}
    table.add_row(
        str(round.round),
        whole,
        metric(sum(c.weight for c in sites.values())),
        str(sum(c.examples for c in sites.values())),
        str(sum(c.steps for c in sites.values())),
        metrics(values, key),
        duration(round.seconds),
        size(sum(c.bytes for c in sites.values())),
        "best" if round.round == summary.best else "",
        style="bold",
    )
    for site, c in sorted(sites.items()):
        note = "" if c.base_round == round.round else f"trained from round {c.base_round}"
        figures = (metric(c.weight), str(c.examples), str(c.steps), metrics(c.metrics, key))
        table.add_row("", site, *figures, duration(c.seconds), size(c.bytes), note)
    for site, why in sorted(round.excluded.items()):
        table.add_row("", site, "", "", "", "", "", "", f"excluded: {one_line(why)}", style="yellow")
    table.add_section()
