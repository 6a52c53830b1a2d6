"""The progress display on its own: what it shows of a run that stands still."""

from __future__ import annotations

import io
import re
from datetime import timedelta

import pytest
from rich.console import Console

from fedflow.cli.progress import LiveProgress, PlainProgress
from fedflow.cli.text import duration, metric, metrics, one_line, size
from fedflow.cli.watching import Watch
from fedflow.engine import SiteWork, Step, open_round, site_step
from fedflow.environments import Run
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.builders import recipe, run


class Standing:
    """The backend of a run that somebody else holds still."""

    def alive(self) -> bool:
        return True

    def abort(self) -> None: ...

    def logs(self, site: str | None) -> list[str]:
        return []

    def ui(self) -> str | None:
        return None


@pytest.fixture
def standing(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds are committed; in round 2 site-1 has answered, site-2 has not, and site-3 is absent."""
    folder = tmp_path_factory.mktemp("standing")
    store = ObjectStore(str(folder / "store"))
    spec = recipe(rounds=2, evaluation="tests.builders:HeldOut", quorum=1, timeouts={"round_deadline": "1h"})
    run(spec, store.url)
    journal = Journal(store, "run")
    from fedflow.engine import amend_run

    amend_run(journal, rounds=5)
    open_round(journal, Step(2, "train"), absent={"site-3": "no worker"})
    site_step(SiteWork("run", 2, "train"), SiteConfig(name="site-1", store=store.url, state=str(folder / "state")))
    return Run("run", store, Standing())  # type: ignore[arg-type]


def looked(run: Run) -> Watch:
    watch = Watch(run.journal)
    assert [round.round for round in watch.look(run)] == [0, 1]
    return watch


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_watch_reads_only_what_is_new(standing: Run) -> None:
    watch = looked(standing)
    assert watch.look(standing) == []
    assert watch.current is not None
    assert (watch.current.round, watch.current.answered, watch.current.asked) == (2, ["site-1"], ["site-1", "site-2"])
    assert watch.best is not None and watch.best.round in (0, 1)


def test_live_display(standing: Run) -> None:
    console = screen()
    live = LiveProgress(console, "run · sim")
    live.watch = looked(standing)
    console.print(live)
    header, bar, now, sites = text_of(console).splitlines()
    assert header.rstrip() == "run · sim"
    assert "━━━" in bar and "2/5 rounds" in bar and "accuracy " in bar and "best " in bar
    assert re.search(r"round 2  1/2 sites answered  (59m \d\ds|1h 00m) to the deadline", now)
    assert sites.split("   ") == ["  ✓ site-1 answered", "· site-2 asked", "✗ absent: site-3 (no worker)"]


def test_live_display_before_anything_is_there() -> None:
    console = screen()
    console.print(LiveProgress(console, "run · sim"))
    assert "starting" in text_of(console)


@pytest.mark.parametrize("width", [20, 40])
def test_live_display_fits_a_narrow_terminal(standing: Run, width: int) -> None:
    console = screen(width)
    live = LiveProgress(console, "a run with quite a long header")
    live.watch = looked(standing)
    console.print(live)
    assert max(map(len, text_of(console).splitlines())) <= width


def test_plain_lines(standing: Run) -> None:
    console = screen(40)  # a line is a line, however narrow
    plain, watch = PlainProgress(console), looked(standing)
    plain.show(watch, watch.rounds)
    assert [line.split("  ")[0] for line in text_of(console).splitlines()] == ["round 0", "round 1"]
    plain.show(watch, [])
    assert len(text_of(console).splitlines()) == 2


def test_a_round_that_is_opened_again_is_a_line(standing: Run) -> None:
    console = screen()
    plain, watch = PlainProgress(console), looked(standing)
    plain.show(watch, [])
    open_round(standing.journal, Step(2, "train"), reopen=True, why="resume")
    for _ in range(2):
        watch.look(standing)
        plain.show(watch, [])
    (line,) = text_of(console).splitlines()
    assert line.startswith("round 2  opens again (opening 2), waits for site-2 until ")


def test_many_sites_are_counted() -> None:
    from fedflow.cli.progress import reopened_line
    from fedflow.engine.summary import Current
    from fedflow.store.records import utc_now

    asked = [f"site-{number}" for number in range(100)]
    now = Current(3, "train", 2, utc_now() + timedelta(minutes=1), asked, asked[:10], {})
    assert "site-10, site-11" in reopened_line(now).plain and "and 78 more" in reopened_line(now).plain


# -- text --------------------------------------------------------------------------------------------------------------
def test_traceback_becomes_its_last_line() -> None:
    text = """training failed:
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    1 / 0
ZeroDivisionError: division by zero

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 1, in <module>
    raise OSError("gone")
OSError: gone
"""
    wanted = (
        "training failed: ZeroDivisionError: division by zero "
        "During handling of the above exception, another exception occurred: OSError: gone"
    )
    assert one_line(text) == wanted
    assert one_line("as\n it  is") == "as it  is"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59, "59 s"), (60, "1m 00s"), (3599.6, "1h 00m"), (7500, "2h 05m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures() -> None:
    assert [size(n) for n in (0, 999, 1000, 123456, 5_000_000_000)] == ["0 B", "999 B", "1.0 kB", "123 kB", "5.0 GB"]
    assert [metric(v) for v in (0.961111, 1.0, 12345.6, None)] == ["0.9611", "1", "1.235e+04", "n/a"]
    assert metrics({"loss": 0.5, "accuracy": None}, "loss") == "loss 0.5  accuracy n/a"
