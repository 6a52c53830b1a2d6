"""Traces: pure functions of seed, site and time; the distributions that they name; the same from a file."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflow.errors import RecipeError, UserError
from fedflow.simulation.tables import Row, Table
from fedflow.simulation.trace_files import parse_trace, read_trace, write_csv
from fedflow.simulation.traces import Conditions, Diurnal, Generated, LogNormal, Pareto, Trace, UpDown

SITES = [f"site-{i}" for i in range(2000)]
HOUR, DAY, WEEK = 3600, 86400, 7 * 86400

DIURNAL = {"kind": "diurnal", "online": "8h", "begins": "7h", "spread": "3h"}
UP_DOWN = {"kind": "up_down", "up": "3h", "down": "90m"}
GENERATED = {
    "always": Generated(seconds=2.5),
    "diurnal": Generated(seconds_per_step=LogNormal(median=0.2, sigma=1), availability=Diurnal.model_validate(DIURNAL)),
    "up and down": Generated(
        seed=7,
        seconds_per_step=Pareto(least=0.1, alpha=1.5),
        download_mbit=LogNormal(median=20, sigma=0.5),
        upload_mbit=LogNormal(median=5, sigma=0.5),
        latency=0.05,
        drop=0.1,
        availability=UpDown.model_validate(UP_DOWN),
    ),
}


def near(values: list[bool], probability: float) -> bool:
    """Whether so many are true as that probability says, within five standard deviations."""
    return abs(fmean(values) - probability) < 5 * math.sqrt(probability * (1 - probability) / len(values))


# -- draws -------------------------------------------------------------------------------------------------------------
def test_pareto_speeds_have_their_tail() -> None:
    """P(X > x) = (least / x)^alpha."""
    trace = Generated(seconds=Pareto(least=3, alpha=1.5))
    drawn = [trace.conditions(site, 0).seconds or 0 for site in SITES]
    assert min(drawn) >= 3
    for x in (4, 6, 12):
        assert near([value > x for value in drawn], (3 / x) ** 1.5)


def test_lognormal_speeds_have_their_median_and_spread() -> None:
    """ln X is normal: half of all below the median, 15.87 % beyond one sigma."""
    trace = Generated(seconds=LogNormal(median=3, sigma=0.7))
    drawn = [math.log((trace.conditions(site, 0).seconds or 0) / 3) / 0.7 for site in SITES]
    assert near([value < 0 for value in drawn], 0.5)
    assert near([value > 1 for value in drawn], 0.158655)


def test_what_a_site_has_does_not_depend_on_one_another() -> None:
    """Speed and network are drawn apart: fast sites have the median's bandwidth."""
    trace = Generated(seconds=LogNormal(median=1, sigma=1), upload_mbit=LogNormal(median=1, sigma=1))
    found = [trace.conditions(site, 0) for site in SITES]
    fast = [c for c in found if c.seconds is not None and c.seconds < median(c.seconds or 0 for c in found)]
    assert near([(c.upload_mbit or 0) < 1 for c in fast], 0.5)


def test_another_seed_is_another_federation() -> None:
    traces = [Generated(seed=seed, seconds=Pareto(least=1, alpha=1)) for seed in (0, 1)]
    assert traces[0].conditions("a", 0) != traces[1].conditions("a", 0)


PROGRAM = """
from fedflow.simulation.trace_files import parse_trace
import sys, json
trace = parse_trace(json.loads(sys.argv[1]))
print(repr([(trace.period(s, 1e5), trace.conditions(s, 1e5)) for s in ("a", "b", "c")]))
"""


def test_every_process_draws_the_same() -> None:
    trace = GENERATED["up and down"]
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, trace.model_dump_json()]
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == repr([(trace.period(s, 1e5), trace.conditions(s, 1e5)) for s in "abc"])


# -- availability ------------------------------------------------------------------------------------------------------
@settings(max_examples=100)
@given(st.sampled_from(sorted(GENERATED)), st.sampled_from(SITES), st.floats(0, 4 * WEEK))
def test_periods_lie_one_behind_the_other(name: str, site: str, at: float) -> None:
    period = GENERATED[name].period(site, at)
    assert 0 <= period.start <= at < period.end
    assert GENERATED[name].period(site, period.start) == period
    if period.end < math.inf:
        assert GENERATED[name].period(site, period.end).start == period.end


def online_seconds(trace: Trace, site: str, until: float) -> float:
    at = found = 0.0
    while at < until:
        period = trace.period(site, at)
        found += (min(period.end, until) - at) * period.online
        at = period.end
    return found


def test_diurnal_sites_are_there_for_their_hours_from_a_time_within_the_spread() -> None:
    trace = GENERATED["diurnal"]
    for site in SITES[:50]:
        (begins,) = {
            p.start % DAY for h in range(24, 72) if (p := trace.period(site, h * HOUR)).online and p.start >= DAY
        }
        assert 7 * HOUR <= begins <= 10 * HOUR
        assert online_seconds(trace, site, 3 * DAY) == 3 * 8 * HOUR


def test_sites_that_come_and_go_are_there_as_long_as_the_means_say() -> None:
    """In equilibrium at any time P(online) = up / (up + down); times there are exponential: P(T > up) = 1/e."""
    trace = GENERATED["up and down"]
    for at in (0, HOUR, 3.3 * DAY, 20 * DAY):
        assert near([trace.period(site, at).online for site in SITES], 3 / 4.5)
    lasting = []
    for site in SITES[:300]:
        period = trace.period(site, 0)
        while period.end < DAY:  # in the middle of a window of the draws
            period = trace.period(site, period.end)
            if period.online and period.start < 0.5 * DAY:
                lasting.append(period.end - period.start > 3 * HOUR)
    assert near(lasting, math.exp(-1))


# -- what an attempt takes ---------------------------------------------------------------------------------------------
def test_an_attempt_takes_its_transfers_and_its_steps() -> None:
    """10 MB at 80 Mbit/s are 1 s, 5 MB at 8 Mbit/s are 5 s, 7 steps of 0.5 s are 3.5 s, two latencies of 0.1 s."""
    conditions = Conditions(seconds_per_step=0.5, download_mbit=80, upload_mbit=8, latency=0.1)
    assert conditions.duration(7, 10_000_000, 5_000_000) == pytest.approx(9.7)
    assert Conditions(seconds=3).duration(None, 10**9, 10**9) == 3


def test_steps_must_be_known_where_they_take_time() -> None:
    with pytest.raises(
        UserError, match=r"trace.seconds_per_step: found a recipe that trains by epochs, expected a num"
    ):
        Conditions(seconds_per_step=1).duration(None, 0, 0)


# -- tables and files --------------------------------------------------------------------------------------------------
def test_where_no_row_holds_a_site_is_offline() -> None:
    table = Table(rows=(Row(site="a", start=5, end=8, seconds=2), Row(site="*", seconds=1)))
    assert [table.period("a", at).online for at in (0, 5, 7.9, 8, 100)] == [False, True, True, False, False]
    assert (table.period("a", 0).end, table.period("a", 8).end) == (5, math.inf)
    assert table.conditions("a", 6).seconds == 2 and table.conditions("anybody", 6).seconds == 1


def test_a_site_without_a_row_is_named() -> None:
    with pytest.raises(
        UserError, match=r"trace: found 'b', expected one of the sites \['a'\]; give it a row, or one wi"
    ):
        Table(rows=(Row(site="a", seconds=1),)).period("b", 0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(GENERATED)), st.lists(st.floats(0, WEEK, exclude_max=True), min_size=5, max_size=20))
def test_a_trace_written_as_csv_is_read_as_the_same(name: str, instants: list[float]) -> None:
    trace, sites = GENERATED[name], SITES[:5]
    folder = Path(tempfile.gettempdir()) / f"fedflow-traces-{os.getpid()}.csv"
    try:
        found = read_trace(write_csv(trace, folder, sites, WEEK))
    finally:
        folder.unlink(missing_ok=True)
    for at in instants:
        for site in sites:
            assert found.period(site, at).online == trace.period(site, at).online
            if trace.period(site, at).online:
                assert found.period(site, at) == trace.period(site, at)
                assert found.conditions(site, at) == trace.conditions(site, at)


@pytest.mark.parametrize("trace", GENERATED.values(), ids=GENERATED)
def test_a_trace_is_json(trace: Generated) -> None:
    assert parse_trace(trace.model_dump(mode="json")) == trace


def test_a_generated_trace_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "trace.yaml"
    path.write_text(
        "kind: generated\nseed: 7\nseconds_per_step: {kind: pareto, least: 0.1, alpha: 1.5}\n"
        "download_mbit: {kind: lognormal, median: 20, sigma: 0.5}\nupload_mbit: {kind: lognormal, median: 5, sigma: 0.5}\n"
        "latency: 0.05\ndrop: 0.1\navailability: {kind: up_down, up: 3h, down: 90m}\n"
    )
    assert read_trace(path) == GENERATED["up and down"]


def test_empty_cells_mean_the_default_and_columns_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds, site ,end,drop\n\n2,a,10,\n3,b,,0.5\n")
    assert read_trace(path) == Table(
        rows=(Row(site="a", end=10, seconds=2), Row(site="b", seconds=3, drop=0.5)),
    )


BAD = {
    "site,second\na,1": r"line 1: found 'second', expected columns among site, start, .*; correct its name",
    "site,seconds,seconds\na,1,1": r"line 1: found 'seconds', expected every column once; leave one out",
    "seconds\n1": r"line 1: found 'seconds', expected a column site and one of seconds_per_step, seconds; begin",
    "site,seconds": r": found 'no rows', expected at least one below the header; add one",
    "site,seconds\na,1\nb": r"line 3: found '1 cells', expected 2 cells, one a column; add or remove commas",
    "site,seconds\na,1\n,1": r"line 3, column site: found '', expected a name; fill it in",
    "site,seconds\na,fast": r"line 2, column seconds: found 'fast', expected a number; correct it: Of a local training",
    "site,seconds\na,-1": r"line 2, column seconds: found '-1', expected greater than or equal to 0; correct it",
    "site,seconds\na,inf": r"line 2, column seconds: found 'inf', expected a finite number; correct it",
    "site,seconds,drop\na,1,1.5": r"line 2, column drop: found '1.5', expected less than or equal to 1; correct it: Prob",
    "site,seconds,upload_mbit\na,1,0": r"line 2, column upload_mbit: found '0', expected greater than 0; correct it: Mbit",
    "site,seconds,start,end\na,1,5,5": r"line 2, column end: found 5.0, expected more than start \(5\); raise end",
    "site,seconds,seconds_per_step\na,1,1": r"line 2, column seconds_per_step, seconds: found 'both', expected exactly one",
    "site,seconds,drop\na,,0": r"line 2, column seconds_per_step, seconds: found 'neither', expected exactly one of the",
    "site,seconds,start,end\na,1,5,9\nb,1,,\na,1,8,": (
        r"line 4, columns start, end: found '8 … inf', expected rows of a that do not overlap those of line 2; move one"
    ),
    'site,seconds\n"a,1': r"not valid CSV in UTF-8: unexpected end of data; save it as such",
}


@pytest.mark.parametrize(("text", "told"), BAD.items(), ids=BAD)
def test_a_file_that_is_no_trace_is_refused_with_its_place(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"^{re.escape(str(path))}[,:]? ?.*{told}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("trace.txt", "", "trace: found '.*trace.txt', expected a .csv, .yaml or .json file; rename it"),
        (
            "trace.yaml",
            "kind: magic",
            r"trace.kind: found 'magic', expected one of \['generated', 'table'\]; correct it",
        ),
        ("trace.yaml", "kind: generated", "trace: give exactly one of seconds_per_step and seconds"),
        ("trace.json", '{"kind": "table", "rows": []}', r"trace: rows: found \[\], tuple should have at least 1 item"),
    ],
)
def test_other_files_are_refused_too(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=told):
        read_trace(tmp_path / name)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(
        RecipeError, match="trace: found 'nowhere.csv', expected a readable file; check it: No such file"
    ):
        read_trace("nowhere.csv")


def test_rows_of_a_table_in_json_are_checked_too() -> None:
    rows: list[dict[str, Any]] = [{"site": "a", "seconds": 1, "end": 5}, {"site": "a", "seconds": 1, "start": 4}]
    with pytest.raises(RecipeError, match=r"trace: rows.1: overlaps rows.0 of a; move start or end"):
        parse_trace({"kind": "table", "rows": rows})
