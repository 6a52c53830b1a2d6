"""The progress display on its own: what it shows of a run that stands still."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from fedflow.cli.progress import LiveProgress, PlainProgress
from fedflow.cli.text import duration, metric, metrics, size
from fedflow.engine import SiteWork, Step, open_round, site_step
from fedflow.engine.summary import Glance
from fedflow.engine.watching import Watch
from fedflow.environments import Run
from fedflow.errors import one_line
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import utc_now
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
    site_step(
        SiteWork("run", 2, "train"),
        SiteConfig(name="site-1", store=store.url, state=str(folder / "state"), allowed_imports=["*"]),
    )
    return Run("run", store, Standing())  # type: ignore[arg-type]


def looked(run: Run) -> Watch:
    watch = Watch(run.journal)
    assert [round.round for round in watch.look()] == [0, 1]
    return watch


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_watch_reads_only_what_is_new(standing: Run) -> None:
    watch = looked(standing)
    assert watch.look() == []
    assert watch.current is not None
    assert (watch.current.round, watch.current.answered, watch.current.asked) == (2, ["site-1"], ["site-1", "site-2"])
    assert watch.best is not None and watch.best.round in (0, 1)


def test_live_display(standing: Run) -> None:
    console = screen()
    live = LiveProgress(console, "run · sim")
    live.watch = looked(standing)
    console.print(live)
    header, bar, pace, now, sites = text_of(console).splitlines()
    assert header.rstrip() == "run · sim"
    assert "━━━" in bar and "2/5 rounds" in bar and "accuracy " in bar and "best " in bar
    assert re.search(
        r"^loss [\d.]+  sites' loss [\d.]+  \S+ (rounds/s|s a round)  \S+ (sites/s|s a site)  about .* left", pace
    )
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
        watch.look()
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


# -- fast rounds -------------------------------------------------------------------------------------------------------
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def committed(number: int, seconds: float, **fields: Any) -> Glance:
    """A round that was committed so long after `BEGAN`, a second after its opening."""
    known: dict[str, Any] = {"metrics": {"accuracy": 0.5}, "evaluation": None, "sites": 10, "excluded": {}}
    at = BEGAN + timedelta(seconds=seconds)
    return Glance(number, at - timedelta(seconds=1), at, **(known | fields))


def watching(rounds: list[Glance], **fields: Any) -> Watch:
    """A watch that has seen `rounds`, of a recipe that asks for 100."""
    journal = Journal(ObjectStore("memory://progress"), "run")
    spec = recipe(rounds=100, **fields)
    best = max(rounds, key=lambda r: (r.shown["accuracy"], -r.round))
    return Watch(journal, recipe=spec, rounds=rounds, best=best)


def test_the_pace_is_that_of_the_newest_rounds() -> None:
    """Ten rounds of 0.5 s after ten of 60 s: 2 rounds/s, 20 sites/s; 80 rounds are left, the next begun 0.25 s ago."""
    rounds = [committed(n, 60 * n) for n in range(10)] + [committed(10 + n, 1000 + n / 2) for n in range(10)]
    pace = watching(rounds).pace(rounds[-1].committed + timedelta(seconds=0.25))
    assert pace is not None
    assert (pace.rounds, pace.sites, pace.left) == (2.0, 20.0, timedelta(seconds=39.75))


def test_the_pace_of_one_round_is_from_its_opening_and_that_of_none_unknown() -> None:
    watch = watching([committed(0, 60)])
    found = watch.pace(BEGAN + timedelta(seconds=60))
    assert found is not None and (found.rounds, found.left) == (1.0, timedelta(seconds=99))
    watch.before = 1  # committed by an earlier start
    assert watch.pace(BEGAN) is None


def test_the_live_display_says_how_fast_it_goes_and_how_long_it_takes() -> None:
    rounds = [committed(n, n / 20, metrics={"accuracy": 0.5, "loss": 0.25}) for n in range(50)]
    now = utc_now()
    rounds = [replace(r, committed=now + (r.committed - rounds[-1].committed)) for r in rounds]
    for fields, words in (({}, "about"), ({"early_stop": {"patience": 3}}, "at most")):
        console = screen()
        live = LiveProgress(console, "run · sim")
        live.watch = watching(rounds, **fields)
        console.print(live)
        pace = text_of(console).splitlines()[2]
        assert re.match(rf"loss 0.25  20.0 rounds/s  200 sites/s  {words} 2.[45] s left", pace)


def test_many_rounds_at_once_are_one_line() -> None:
    console = screen(200)
    rounds = [committed(n, n, metrics={"accuracy": n / 100}) for n in range(20)]
    rounds[7] = committed(7, 7, metrics={"accuracy": 0.9}, excluded={"site-3": "not finite"})
    PlainProgress(console).show(watching(rounds), rounds)
    assert text_of(console) == (
        "rounds 0–19  accuracy 0.19  200/201 sites  best in round 7  1 excluded, the last: site-3 (not finite)\n"
    )


def test_a_watch_of_a_resumed_run_takes_earlier_rounds_as_known(standing: Run) -> None:
    watch = Watch(standing.journal, before=1)
    assert [round.round for round in watch.look()] == [1]
    assert watch.look() == []


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
