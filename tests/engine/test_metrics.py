"""Metrics as a long table: what a row says, and that other programs read the same in every format."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedflow.engine.metrics import (
    Events,
    MetricRow,
    metric_rows,
    print_metrics,
    write_events,
    write_metrics,
    write_table,
)
from fedflow.engine.summary import RoundSummary, RunSummary
from fedflow.errors import UserError
from fedflow.store.records import ContributorSummary
from tests.builders import recipe

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def contributor(loss: float | None, **fields: float) -> ContributorSummary:
    known = {"weight": 2.0, "examples": 20, "steps": 5, "seconds": 1.5, "bytes": 100, "received": 300}
    return ContributorSummary(update="", base_round=0, lr_sum=0.1, metrics={"loss": loss}, **(known | fields))


def round_of(number: int, server: float | None) -> RoundSummary:
    """Committed `number` minutes after `BEGAN`; it took 4 s."""
    committed = BEGAN + timedelta(minutes=number)
    sites = {"site-1": contributor(0.5), "site-2": contributor(None, weight=3.0, examples=30, seconds=2.5)}
    opened = committed - timedelta(seconds=4)
    return RoundSummary(
        number, "blake3:0", opened, committed, {"loss": 0.25}, {"accuracy": server}, sites, {"site-3": "late"}, {}
    )


@pytest.fixture
def summary() -> RunSummary:
    rounds = [round_of(0, 0.5), round_of(1, None)]
    return RunSummary("run-1", "nonce", recipe(rounds=2), ["site-1", "site-2", "site-3"], BEGAN, rounds, True, 0, None)


ROUND_0 = [
    MetricRow("run-1", 0, "", "server", "accuracy", 0.5, BEGAN, 4.0, 5.0, 50, 10, 200, 600),
    MetricRow("run-1", 0, "", "sites", "loss", 0.25, BEGAN, 4.0, 5.0, 50, 10, 200, 600),
    MetricRow("run-1", 0, "site-1", "site", "loss", 0.5, BEGAN, 1.5, 2.0, 20, 5, 100, 300),
    MetricRow("run-1", 0, "site-2", "site", "loss", None, BEGAN, 2.5, 3.0, 30, 5, 100, 300),
]
"""Sums over the two sites that count in the federation's rows, a site's own in its."""


def test_a_row_a_round_site_and_metric(summary: RunSummary) -> None:
    rows = list(metric_rows(summary))
    assert rows[:4] == ROUND_0
    assert [(row.round, row.metric, row.value) for row in rows[4:6]] == [(1, "accuracy", None), (1, "loss", 0.25)]
    assert list(metric_rows(summary, sites=False)) == [row for row in rows if row.site == ""]


def test_csv_has_every_value_to_the_last_digit(summary: RunSummary) -> None:
    text = io.StringIO()
    print_metrics(metric_rows(summary), text)
    read = list(csv.DictReader(io.StringIO(text.getvalue())))
    wanted = list(metric_rows(summary))
    assert [row["value"] for row in read] == ["" if row.value is None else repr(row.value) for row in wanted]
    assert [datetime.fromisoformat(row["committed"]) for row in read] == [row.committed for row in wanted]
    assert [int(row["received"]) for row in read] == [row.received for row in wanted]


def test_parquet_reads_back_the_same_rows(summary: RunSummary, tmp_path: Path) -> None:
    out = write_metrics(metric_rows(summary), tmp_path / "made" / "run.parquet")
    read = [MetricRow(**row) for row in pyarrow.parquet.read_table(out).to_pylist()]
    assert read == list(metric_rows(summary))
    assert [path.name for path in out.parent.iterdir()] == ["run.parquet"]


def test_a_run_without_figures_is_a_table_without_rows(tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(write_metrics([], tmp_path / "none.parquet"))
    assert table.num_rows == 0 and str(table.schema.field("committed").type) == "timestamp[us, tz=UTC]"
    assert write_metrics([], tmp_path / "none.csv").read_text().startswith("run,round,site,source,metric,value,")


def test_tables_of_other_columns(tmp_path: Path) -> None:
    out = write_table(["a", "b"], iter([(1, "x"), (2, None)]), tmp_path / "t.parquet")
    assert pyarrow.parquet.read_table(out).to_pylist() == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    many = write_table(["a"], ((number,) for number in range(120_000)), tmp_path / "many.parquet")
    assert pyarrow.parquet.read_table(many).column("a").to_pylist() == list(range(120_000))
    assert write_table(["a", "b"], [(1, None)], tmp_path / "t.csv").read_text() == "a,b\n1,\n"


# -- TensorBoard -------------------------------------------------------------------------------------------------------
def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Tag -> (step, time, value), as TensorBoard reads them."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.wall_time, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_federation_s_figures_and_each_site_s(summary: RunSummary, tmp_path: Path) -> None:
    place = write_events(summary, tmp_path)
    federation = scalars(place)
    began = BEGAN.timestamp()
    assert federation["sites/loss"] == [(0, began, 0.25), (1, began + 60, 0.25)]
    (first, second) = federation["server/accuracy"]
    assert first == (0, began, 0.5) and math.isnan(second[2])
    assert scalars(place / "site-1") == {"site/loss": [(0, began, 0.5), (1, began + 60, 0.5)]}
    assert not (place / "site-3").exists()


def test_what_is_written_again_is_there_once(summary: RunSummary, tmp_path: Path) -> None:
    write_events(summary, tmp_path)
    (tmp_path / "run-1" / "events.out.tfevents.1.of-somebody-else").touch()
    place = write_events(summary, tmp_path, sites=False)
    assert [step for step, _, _ in scalars(place)["sites/loss"]] == [0, 1]
    assert (place / "events.out.tfevents.1.of-somebody-else").exists()


def test_rounds_are_seen_as_they_are_added(summary: RunSummary, tmp_path: Path) -> None:
    with Events(tmp_path) as events:
        for number, round in enumerate(summary.rounds):
            events.add(round)
            events.flush()
            assert [step for step, _, _ in scalars(tmp_path)["sites/loss"]] == list(range(number + 1))


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: found '.*run\.xlsx', expected a name that ends in one of \.csv, "):
        write_metrics([], tmp_path / "run.xlsx")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a place that can be written"):
        write_metrics([], tmp_path / "file" / "run.csv")
    with pytest.raises(UserError, match="a folder that can be written"):
        Events(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("pyarrow", "write_metrics([], Path('a.parquet'))", "fedflow[parquet]"),
        ("tensorboard", "Events(Path('a'))", "fedflow[tensorboard]"),
    ],
)
def test_without_the_package_the_extra_is_named(module: str, call: str, extra: str, tmp_path: Path) -> None:
    """In a process in which it cannot be imported."""
    code = f"""
import sys
sys.modules[{module!r}] = None
from pathlib import Path
from fedflow.engine.metrics import Events, write_metrics
from fedflow.errors import UserError
try:
    {call}
except UserError as error:
    sys.exit(0 if "pip install '{extra}'" in str(error) else str(error))
sys.exit("nothing was said")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
