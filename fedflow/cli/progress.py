"""A run's progress in the terminal: a live display, or one line a round where there is no terminal.

Rounds that are faster than anybody reads are a line for many of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedflow.cli.text import duration, metric, metrics
from fedflow.engine.summary import Current, Glance
from fedflow.engine.watching import Watch
from fedflow.errors import one_line
from fedflow.recipe import Recipe
from fedflow.store.records import utc_now

__all__ = ["LiveProgress", "PlainProgress", "Progress", "Silent", "pace_text", "write_line"]

NAMED = 12
"""So many sites are shown one by one; more are counted."""
SINGLE = 8
"""So many rounds between two looks are a line each; more share one."""


class Progress(Protocol):
    """What is shown while a run goes on."""

    def __enter__(self) -> object: ...
    def __exit__(self, *exc: object) -> None: ...
    def show(self, watch: Watch, new: list[Glance]) -> None:
        """Called after every look. new: the rounds that were committed since the one before."""
        ...


class Silent(AbstractContextManager[None]):
    """Shows nothing."""

    def __exit__(self, *exc: object) -> None: ...
    def show(self, watch: Watch, new: list[Glance]) -> None: ...


class PlainProgress(nullcontext[None]):
    """One line a committed round, and one when a round is opened again."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._opening: tuple[int, str, int] | None = None

    def show(self, watch: Watch, new: list[Glance]) -> None:
        for line in lines_of(watch, new):
            write_line(self.console, line)
        now = watch.current
        if now and self._opening != (now.round, now.phase, now.opening):
            if now.opening > 1:
                write_line(self.console, reopened_line(now))
            self._opening = (now.round, now.phase, now.opening)


class LiveProgress:
    """Header, bar and the sites of the round in progress, kept at the bottom; committed rounds scroll up as lines.

    header: what the run is, and where its UI is
    """

    def __init__(self, console: Console, header: str) -> None:
        self.console, self.header = console, header
        self.watch: Watch | None = None
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> object:
        return self._live.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, watch: Watch, new: list[Glance]) -> None:
        self.watch = watch
        for line in lines_of(watch, new):
            write_line(self.console, line)

    def __rich__(self) -> RenderableType:
        watch = self.watch
        if watch is None or watch.recipe is None:
            return Group(Text(self.header, style="bold"), _row(self._spinner, Text("starting")))
        parts: list[RenderableType] = [Text(self.header, style="bold", overflow="ellipsis", no_wrap=True)]
        parts.append(_bar(watch, watch.recipe.rounds))
        parts += _pace(watch, watch.recipe)
        parts += _round(self._spinner, watch.current, len(watch.rounds), watch.recipe.rounds)
        return Group(*parts)


def write_line(console: Console, line: Text) -> None:
    """One line, however narrow the terminal or however long the line."""
    console.print(line, soft_wrap=True)


# -- lines -------------------------------------------------------------------------------------------------------------
def lines_of(watch: Watch, new: Sequence[Glance]) -> list[Text]:
    """What is said of rounds that were committed since the last look."""
    return [_many_line(watch, new)] if len(new) > SINGLE else [round_line(watch, round) for round in new]


def round_line(watch: Watch, round: Glance) -> Text:
    """ "round 3  accuracy 0.9123  loss 0.31  3/4 sites  1.2 s  without site-2 (no update by the deadline)"."""
    line = _beginning(watch, f"round {round.round}", round)
    line.append(f"  {round.sites}/{round.sites + len(round.excluded)} sites  {duration(round.seconds)}")
    if watch.best is round:
        line.append("  best", style="green")
    if round.excluded:
        line.append(f"  without {reasons(round.excluded)}", style="yellow")
    return line


def _many_line(watch: Watch, rounds: Sequence[Glance]) -> Text:
    """ "rounds 40–87  accuracy 0.9123  loss 0.31  480/480 sites  best in round 81": the figures are the newest round's."""
    line = _beginning(watch, f"rounds {rounds[0].round}–{rounds[-1].round}", rounds[-1])
    sites, excluded = sum(round.sites for round in rounds), sum(len(round.excluded) for round in rounds)
    line.append(f"  {sites}/{sites + excluded} sites")
    if watch.best and watch.best.round >= rounds[0].round:
        line.append(f"  best in round {watch.best.round}", style="green")
    if excluded:
        last = next(round for round in reversed(rounds) if round.excluded)
        line.append(f"  {excluded} excluded, the last: {reasons(last.excluded, 1)}", style="yellow")
    return line


def _beginning(watch: Watch, which: str, round: Glance) -> Text:
    assert watch.recipe is not None
    return Text.assemble((which, "bold"), "  ", metrics(_figures(round), watch.recipe.key_metric.name))


def _figures(round: Glance) -> Mapping[str, float | None]:
    """The server's figures, and of the sites' those that it does not have; told apart where both have one."""
    if round.evaluation is None:
        return round.metrics
    own = {name if name not in round.evaluation else f"sites' {name}": v for name, v in round.metrics.items()}
    return {**own, **round.evaluation}


def reasons(excluded: Mapping[str, str], most: int = 5) -> str:
    """ "site-2 (why), site-3 (why)", at most `most` of them."""
    named = [f"{site} ({one_line(why)})" for site, why in sorted(excluded.items())]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def reopened_line(now: Current) -> Text:
    waiting = [site for site in now.asked if site not in now.answered]
    names = ", ".join(waiting[:NAMED]) + (f" and {len(waiting) - NAMED} more" if len(waiting) > NAMED else "")
    text = f"round {now.round}  opens again (opening {now.opening}), waits for {names or 'nobody'} until {now.deadline.astimezone():%H:%M:%S}"
    return Text(text, style="yellow")


# -- the live display --------------------------------------------------------------------------------------------------
def _row(*cells: RenderableType) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(*cells)
    return row


def _bar(watch: Watch, total: int) -> Table:
    done = len(watch.rounds)
    cells: list[RenderableType] = [ProgressBar(total=total, completed=done, width=30), Text(f"{done}/{total} rounds")]
    if watch.rounds and watch.recipe:
        name = watch.recipe.key_metric.name
        cells.append(Text(f"{name} {metric(watch.key_metric(watch.rounds[-1]))}", style="cyan"))
        if best := watch.best:
            cells.append(Text(f"best {metric(watch.key_metric(best))} (round {best.round})", style="green"))
    return _row(*cells)


def _pace(watch: Watch, recipe: Recipe) -> Iterator[RenderableType]:
    """Figures of the newest round, how fast it goes, and how long it may still take."""
    if text := pace_text(watch):
        figures = {name: v for name, v in _figures(watch.rounds[-1]).items() if name != recipe.key_metric.name}
        shown = "  ".join([metrics(figures), text] if figures else [text])
        yield Text(shown, style="dim", overflow="ellipsis", no_wrap=True)


def pace_text(watch: Watch) -> str | None:
    """ "23.4 rounds/s  234 sites/s  about 25 s left"; None before the first round."""
    pace = watch.pace(utc_now())
    if pace is None or watch.recipe is None:
        return None
    text = f"{_rate(pace.rounds, 'round')}  {_rate(pace.sites, 'site')}"
    if len(watch.rounds) >= watch.recipe.rounds:
        return text
    stop = watch.recipe.early_stop
    most = "about" if stop.patience is None and stop.target is None else "at most"
    return f"{text}  {most} {duration(pace.left.total_seconds())} left"


def _rate(per_second: float, what: str) -> str:
    """ "23.4 rounds/s", "2.3 s a round"."""
    if per_second < 1:
        return f"{duration(1 / per_second)} a {what}" if per_second > 0 else f"no {what}s"
    return f"{per_second:,.{1 if per_second < 100 else 0}f} {what}s/s"


def _round(spinner: Spinner, now: Current | None, done: int, total: int) -> Iterator[RenderableType]:
    """The round in progress: how long it may still take, and what became of each site."""
    if now is None:
        if done < total:
            yield _row(spinner, Text(f"round {done} …"))
        return
    left = (now.deadline - utc_now()).total_seconds()
    text = Text.assemble((f"round {now.round}", "bold"), f"  {len(now.answered)}/{len(now.asked)} sites answered")
    text.append(f"  {duration(left)} to the deadline" if left > 0 else "  deadline passed, closing")
    if now.opening > 1:
        text.append(f"  opening {now.opening}", style="yellow")
    yield _row(spinner, text)
    yield _sites(now)


def _sites(now: Current) -> Text:
    text = Text("  ")
    waiting = [site for site in now.asked if site not in now.answered]
    if len(now.asked) + len(now.absent) > NAMED:
        text.append(f"waits for {', '.join(waiting[:NAMED])}" + (" …" if len(waiting) > NAMED else ""))
    else:
        for site in now.asked:
            answered = site in now.answered
            text.append(f"{'✓' if answered else '·'} {site}", style="green" if answered else "default")
            text.append(f" {'answered' if answered else 'asked'}   ", style="dim")
    if now.absent:
        text.append(f"✗ absent: {reasons(now.absent)}", style="yellow")
    return text
