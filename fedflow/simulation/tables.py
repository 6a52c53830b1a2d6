"""Traces that somebody measured or wrote down: a row for each time that a site is there."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedflow.described import Described
from fedflow.errors import UserError, field_error
from fedflow.simulation.traces import Conditions, Period, Trace
from fedflow.types import SiteId

__all__ = ["ANY", "Row", "Table"]

ANY = "*"
"""In place of a site's name: every site that has no rows of its own."""

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Row(Described):
    """One line of a table: a site is there from `start` to before `end`, and like this. Where no row holds, it is offline."""

    site: Annotated[str, Field(min_length=1)]
    """Its name, or * for every site that has no rows of its own."""
    start: Amount = 0.0
    """Seconds of the run."""
    end: Amount | None = None
    """Seconds of the run; empty = for ever."""
    seconds_per_step: Amount | None = None
    """Of an optimizer step. Give this or `seconds`."""
    seconds: Amount | None = None
    """Of a local training, whatever its steps."""
    download_mbit: Speed | None = None
    """Mbit/s; empty = unlimited."""
    upload_mbit: Speed | None = None
    """Mbit/s; empty = unlimited."""
    latency: Amount = 0.0
    """Seconds of each transfer besides."""
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that an attempt fails on the way."""

    def problem(self) -> tuple[str, object, str, str] | None:
        """(column, found, expected, fix) of what does not fit together."""
        if self.end is not None and self.end <= self.start:
            return "end", self.end, f"more than start ({self.start:g})", "raise end, or leave it empty for ever"
        if (self.seconds_per_step is None) == (self.seconds is None):
            found = "neither" if self.seconds is None else "both"
            return "seconds_per_step, seconds", found, "exactly one of the two", "fill in one"
        return None

    @property
    def until(self) -> float:
        """Its end, in seconds of the run."""
        return math.inf if self.end is None else self.end


class Table(Trace):
    """What somebody measured, or wrote down: rows, in any order, those of a site not overlapping."""

    kind: Literal["table"] = "table"
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for i, row in enumerate(self.rows):
            if problem := row.problem():
                raise ValueError(field_error(f"rows.{i}.{problem[0]}", *problem[1:]))
        for before, after in self.overlaps():
            raise ValueError(f"rows.{after}: overlaps rows.{before} of {self.rows[after].site}; move start or end")
        return self

    def overlaps(self) -> Iterator[tuple[int, int]]:
        """Pairs of rows, by number, of which the second begins before the first has ended."""
        order = sorted(range(len(self.rows)), key=lambda i: (self.rows[i].site, self.rows[i].start))
        for i, j in pairwise(order):
            a, b = self.rows[i], self.rows[j]
            if a.site == b.site and (a.end is None or a.end > b.start):
                yield min(i, j), max(i, j)

    @cached_property
    def _by_site(self) -> dict[SiteId, list[Row]]:
        found: dict[SiteId, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.start):
            found.setdefault(row.site, []).append(row)
        return found

    def _around(self, site: SiteId, at: float) -> tuple[Row | None, Row | None]:
        """The row that begins last until `at`, and the one after it."""
        rows = self._by_site.get(site) or self._by_site.get(ANY)
        if rows is None:
            fix = f"give it a row, or one with the site {ANY} for all that have none"
            raise UserError(field_error("trace", site, f"one of the sites {sorted(self._by_site)[:20]}", fix))
        i = bisect_right(rows, at, key=lambda row: row.start)
        return rows[i - 1] if i else None, rows[i] if i < len(rows) else None

    def period(self, site: SiteId, at: float) -> Period:
        last, following = self._around(site, at)
        if last is not None and at < last.until:
            return Period(last.start, last.until, True)
        return Period(last.until if last else 0.0, following.start if following else math.inf, False)

    def conditions(self, site: SiteId, at: float) -> Conditions:
        row, _ = self._around(site, at)
        assert row is not None
        speeds = row.seconds_per_step, row.seconds, row.download_mbit, row.upload_mbit
        return Conditions(*speeds, latency=row.latency, drop=row.drop)
