"""A run's metrics as one long table, a row a round, site and metric; and as files that other programs read."""

from __future__ import annotations

import csv
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from fedflow.engine.export import write_file
from fedflow.engine.summary import Glance, RoundSummary, RunSummary
from fedflow.errors import UserError, check_suffix, field_error
from fedflow.types import SiteId

__all__ = [
    "Events",
    "MetricRow",
    "check_events",
    "check_table",
    "metric_rows",
    "print_metrics",
    "write_events",
    "write_metrics",
    "write_table",
]

TABLES = (".csv", ".parquet")
_BATCH = 50_000  # rows that are in memory at once
_SUFFIX = ".fedflow"  # of the event files that are ours to replace


@dataclass(frozen=True)
class MetricRow:
    """One value.

    site:      whose; "" for the whole federation
    source:    "server": its evaluation; "sites": their weighted mean; "site": that site's own
    value:     None for NaN and infinities
    committed: when the round was; seconds: of the round, or of the site's part
    weight, examples, steps, bytes (of the update), received (of the broadcast): the site's, or the sum over sites
    """

    run: str
    round: int
    site: str
    source: Literal["server", "sites", "site"]
    metric: str
    value: float | None
    committed: datetime
    seconds: float
    weight: float
    examples: int
    steps: int
    bytes: int
    received: int


COLUMNS = [field.name for field in fields(MetricRow)]


def metric_rows(summary: RunSummary, *, sites: bool = True) -> Iterator[MetricRow]:
    """Every metric of every committed round: the server's, the sites' means, and, if `sites`, each site's own."""
    for round in summary.rounds:
        yield from _of_federation(summary.run, round)
        if sites:
            for site in round.sites:
                yield from _of_site(summary.run, round, site)


def _of_federation(run: str, round: RoundSummary) -> Iterator[MetricRow]:
    counted = round.sites.values()
    sums = (
        sum(c.weight for c in counted),
        sum(c.examples for c in counted),
        sum(c.steps for c in counted),
        sum(c.bytes for c in counted),
        sum(c.received for c in counted),
    )
    for source, name, value in _figures(round):
        yield MetricRow(run, round.round, "", source, name, value, round.committed, round.seconds, *sums)


def _figures(round: RoundSummary | Glance) -> Iterator[tuple[Literal["server", "sites"], str, float | None]]:
    yield from (("server", name, value) for name, value in sorted((round.evaluation or {}).items()))
    yield from (("sites", name, value) for name, value in sorted(round.metrics.items()))


def _of_site(run: str, round: RoundSummary, site: SiteId) -> Iterator[MetricRow]:
    c = round.sites[site]
    own = (c.seconds, c.weight, c.examples, c.steps, c.bytes, c.received)
    for name, value in sorted(c.metrics.items()):
        yield MetricRow(run, round.round, site, "site", name, value, round.committed, *own)


# -- tables ------------------------------------------------------------------------------------------------------------
def check_table(out: Path, field: str = "--out") -> None:
    """Raises UserError where `write_table` could not write `out`."""
    check_suffix(field, out, TABLES)
    if out.suffix == ".parquet":
        _pyarrow()


def write_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: Path, schema: Any = None) -> Path:
    """Write `rows`, whole or not at all, to `out`, a .csv or a .parquet, whose folder is made; returns `out`.

    schema: of pyarrow; default: what it finds in the first rows
    Raises UserError for another suffix, a place that cannot be written, or where pyarrow is needed and not installed.
    """
    check_table(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(field_error("--out", str(out), "a place that can be written", f"{error.strerror}")) from error
    if out.suffix == ".csv":
        write_file(out, lambda path: _write_csv(columns, rows, path), "--out")
    else:
        write_file(out, lambda path: _write_parquet(columns, rows, path, schema), "--out")
    return out


def write_metrics(rows: Iterable[MetricRow], out: Path) -> Path:
    """The same of metrics."""
    check_table(out)
    schema = _schema() if out.suffix == ".parquet" else None
    return write_table(COLUMNS, map(_values, rows), out, schema)


def print_metrics(rows: Iterable[MetricRow], file: TextIO) -> None:
    """Metrics as CSV into an open file."""
    _print_csv(COLUMNS, map(_values, rows), file)


def _values(row: MetricRow) -> list[Any]:
    return [getattr(row, name) for name in COLUMNS]


def _print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]], file: TextIO) -> None:
    """`rows` below a line of `columns`; times as ISO 8601, nothing for None."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([v.isoformat() if isinstance(v, datetime) else v for v in row] for row in rows)


def _write_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        _print_csv(columns, rows, file)


def _write_parquet(columns: Sequence[str], rows: Iterable[Sequence[Any]], path: Path, schema: Any) -> None:
    arrow, parquet = _pyarrow()
    left, writer = iter(rows), None
    try:
        while (part := list(itertools.islice(left, _BATCH))) or writer is None:
            by_column = list(zip(*part, strict=True)) if part else [()] * len(columns)
            table = arrow.table(dict(zip(columns, by_column, strict=True)), schema=schema)
            if writer is None:
                writer, schema = parquet.ParquetWriter(path, table.schema), table.schema
            writer.write_table(table)
            if not part:
                break
    finally:
        if writer is not None:
            writer.close()


def _schema() -> Any:
    """Of `MetricRow`: also where no value says what a column is."""
    arrow, _ = _pyarrow()
    kinds = {"str": arrow.string(), "int": arrow.int64(), "float": arrow.float64(), "float | None": arrow.float64()}
    kinds["datetime"] = arrow.timestamp("us", tz="UTC")
    return arrow.schema([(field.name, kinds.get(str(field.type), arrow.string())) for field in fields(MetricRow)])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet: found no pyarrow, expected it; pip install 'fedflow[parquet]'") from error
    return pyarrow, pyarrow.parquet


# -- TensorBoard -------------------------------------------------------------------------------------------------------
def check_events(folder: Path) -> Any:
    """TensorBoard's writer; `folder` is made. Raises UserError where it cannot be written, or tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard: found no tensorboard, expected it; pip install 'fedflow[tensorboard]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return SummaryWriter
    except OSError as error:
        raise UserError(
            field_error("TensorBoard", str(folder), "a folder that can be written", f"{error.strerror}")
        ) from error


class Events:
    """An event file of TensorBoard's in `folder`, in place of the one that an earlier `Events` left there.

    Raises what `check_events` raises.
    """

    def __init__(self, folder: Path) -> None:
        writer = check_events(folder)
        for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
            old.unlink()
        self._writer = writer(str(folder), filename_suffix=_SUFFIX)

    def add(self, round: RoundSummary | Glance) -> None:
        """The federation's figures of one round."""
        for source, name, value in _figures(round):
            self.scalar(f"{source}/{name}", value, round.round, round.committed)

    def scalar(self, tag: str, value: float | None, round: int, at: datetime) -> None:
        """One value; NaN where there is none."""
        number = float("nan") if value is None else value
        self._writer.add_scalar(tag, number, round, walltime=at.timestamp())

    def flush(self) -> None:
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()


def write_events(summary: RunSummary, folder: Path, *, sites: bool = True) -> Path:
    """A run for TensorBoard: the federation's figures in `<folder>/<run>`, each site's in `<folder>/<run>/<site>`."""
    place = folder / summary.run
    with Events(place) as events:
        for round in summary.rounds:
            events.add(round)
    for site in summary.sites if sites else ():
        values = [(r, c) for r in summary.rounds if (c := r.sites.get(site)) and c.metrics]
        if values:
            with Events(place / site) as events:
                for round, c in values:
                    for name, value in sorted(c.metrics.items()):
                        events.scalar(f"site/{name}", value, round.round, round.committed)
    return place
