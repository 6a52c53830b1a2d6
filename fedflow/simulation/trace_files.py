"""Traces in files: tables as CSV, any trace as YAML or JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedflow.errors import RecipeError, field_error
from fedflow.recipe import read_model
from fedflow.simulation.tables import Row, Table
from fedflow.simulation.traces import Generated, Period, Trace
from fedflow.types import SiteId

__all__ = ["COLUMNS", "parse_trace", "read_trace", "write_csv"]

COLUMNS = tuple(Row.model_fields)


def parse_trace(value: Mapping[str, Any]) -> Generated | Table:
    """A trace from a mapping with its `kind`. Raises RecipeError."""
    kinds: dict[Any, type[Generated] | type[Table]] = {"generated": Generated, "table": Table}
    cls = kinds.get(value.get("kind"))
    if cls is None:
        raise RecipeError(field_error("trace.kind", value.get("kind"), f"one of {sorted(kinds)}", "correct it"))
    return read_model(cls, value, "trace")


def read_trace(path: str | Path) -> Generated | Table:
    """A table from a .csv file, or any trace from a .yaml or .json one.

    Raises RecipeError, naming file, line and column, the value found and the one expected.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise RecipeError(field_error("trace", str(path), "a .csv, .yaml or .json file", "rename it"))
    return parse_trace(read_model(_Fields, path, "trace").model_dump())


class _Fields(BaseModel):
    """Whatever a file has."""

    model_config = ConfigDict(extra="allow")


def _read_csv(path: Path) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            _check_header(path, header)
            numbered = [(lines.line_num, cells) for cells in lines if any(cell.strip() for cell in cells)]
    except OSError as error:
        raise RecipeError(field_error("trace", str(path), "a readable file", f"check it: {error.strerror}")) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid CSV in UTF-8: {error}; save it as such") from error
    rows = [_row(path, number, header, cells) for number, cells in numbered]
    if not rows:
        raise RecipeError(field_error(str(path), "no rows", "at least one below the header", "add one"))
    table = Table.model_construct(rows=tuple(rows))
    for before, after in table.overlaps():
        lines_of = [numbered[i][0] for i in (before, after)]
        expected = f"rows of {rows[after].site} that do not overlap those of line {lines_of[0]}"
        found = f"{rows[after].start:g} … {rows[after].until:g}"
        raise RecipeError(field_error(f"{path}, line {lines_of[1]}, columns start, end", found, expected, "move one"))
    return table


def _check_header(path: Path, header: list[str]) -> None:
    where = f"{path}, line 1"
    if unknown := [name for name in header if name not in COLUMNS]:
        raise RecipeError(field_error(where, unknown[0], f"columns among {', '.join(COLUMNS)}", "correct its name"))
    if twice := [name for name in header if header.count(name) > 1]:
        raise RecipeError(field_error(where, twice[0], "every column once", "leave one out"))
    if "site" not in header or not {"seconds_per_step", "seconds"} & set(header):
        expected = "a column site and one of seconds_per_step, seconds"
        raise RecipeError(field_error(where, ", ".join(header), expected, "begin the file with such a line"))


def _row(path: Path, number: int, header: list[str], cells: list[str]) -> Row:
    where = f"{path}, line {number}"
    if len(cells) != len(header):
        expected = f"{len(header)} cells, one a column"
        raise RecipeError(field_error(where, f"{len(cells)} cells", expected, "add or remove commas"))
    given = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
    try:
        row = Row.model_validate(given)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        column = str(item["loc"][0])
        if item["type"] == "missing":
            raise RecipeError(field_error(f"{where}, column {column}", "", "a name", "fill it in")) from error
        expected = item["msg"].removeprefix("Input should be ")
        expected = {"float_parsing": "a number", "finite_number": "a finite number"}.get(item["type"], expected)
        fix = f"correct it: {Row.model_json_schema()['properties'][column]['description']}"
        raise RecipeError(field_error(f"{where}, column {column}", given[column], expected, fix)) from error
    if problem := row.problem():
        raise RecipeError(field_error(f"{where}, column {problem[0]}", *problem[1:]))
    return row


def write_csv(trace: Trace, path: str | Path, sites: Iterable[SiteId], until: float) -> Path:
    """What holds at `sites` in the first `until` seconds, as a table that says the same; of a site that is offline all that
    time, when it comes."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for site in sites:
            for period in _online(trace, site, until):
                c = trace.conditions(site, period.start)
                end = None if period.end == math.inf else period.end
                speeds = (c.seconds_per_step, c.seconds, c.download_mbit, c.upload_mbit)
                lines.writerow([site, period.start, end, *speeds, c.latency, c.drop])
    return Path(path)


def _online(trace: Trace, site: SiteId, until: float) -> Iterator[Period]:
    """The periods in which `site` is online that begin before `until`; the first one after it where there is none."""
    at, found = 0.0, False
    while at < until or (not found and at < math.inf):
        period = trace.period(site, at)
        if period.online:
            found = True
            yield period
        at = period.end
