"""What the sites of a simulation remember, and what is known of them, in one local file that grows with those that took part."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedflow.errors import SiteStateLost, UserError, field_error
from fedflow.simulation.kept import Encoded
from fedflow.types import SiteId, SiteView

__all__ = ["Entry", "SiteBook"]


@dataclass(frozen=True)
class Entry:
    """One site as of the last commit that names it. step: that commit's number, phases counted from 0."""

    step: int
    last_round: int | None = None
    seconds: float | None = None
    failures: int = 0
    steps: int | None = None

    def view(self) -> SiteView:
        """The same for a schedule."""
        return SiteView(
            online=True, last_round=self.last_round, seconds=self.seconds, failures=self.failures, steps=self.steps
        )


_TABLES = """
create table if not exists runs (run text primary key, nonce text not null, step integer not null);
create table if not exists sites (
    run text not null, site text not null, step integer not null, last_round integer, seconds real, failures integer not null,
    steps integer, primary key (run, site, step)
) without rowid;
create table if not exists states (
    run text not null, site text not null, step integer not null, plain text not null, tensors blob not null,
    primary key (run, site, step)
);
"""


class SiteBook:
    """The book of one run, consistent with the commit number `head`: what was written after it is forgotten.

    path:   of the file, which several runs may share; None: one that is gone after `close`
    newest: number of the newest commit, where the run goes on from an earlier one
    Several threads may use it.
    Raises UserError where the file cannot be used, and SiteStateLost where sites remembered something as of `head` (`needed`)
    that is not in it.
    """

    def __init__(
        self, path: Path | None, run: str, nonce: str, *, head: int, needed: bool, newest: int | None = None
    ) -> None:
        self._newest = head if newest is None else newest
        self._folder = tempfile.TemporaryDirectory(prefix="fedflow-book-") if path is None else None
        self.path = Path(self._folder.name) / "book.sqlite" if path is None and self._folder else Path(path or "")
        self.run, self._lock = run, threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._sync = "full" if path else "off"
            try:
                self._open(nonce, head, needed)
            except BaseException:
                self._file.close()
                raise
        except (OSError, sqlite3.Error) as error:
            fix = f"make it writable, or remove it if no run needs it: {error}"
            raise UserError(field_error("book", str(self.path), "a file that fedflow wrote, or none", fix)) from error

    def _open(self, nonce: str, head: int, needed: bool) -> None:
        self._file.executescript(f"pragma page_size = 65536; pragma journal_mode = wal; {_TABLES}")
        with self._transaction(self._sync):
            self._continue(nonce, head, needed)

    def _continue(self, nonce: str, head: int, needed: bool) -> None:
        found = self._file.execute("select nonce, step from runs where run = ?", (self.run,)).fetchone()
        known = found[1] if found and found[0] == nonce else -1
        # one further than the newest where a process was killed just before a commit
        if needed and not head <= known <= self._newest + 1:
            raise SiteStateLost(
                f"site states lost: found those as of commit {known} in {self.path}, expected commit {head}'s; restore the file from a copy",
                run=self.run,
            )
        for table in ("sites", "states"):
            self._file.execute(
                f"delete from {table} where run = ? and step > ?", (self.run, head if known >= head else -1)
            )
        self._file.execute("insert or replace into runs values (?, ?, ?)", (self.run, nonce, head))
        self._remembers = bool(self._file.execute("select 1 from states where run = ? limit 1", (self.run,)).fetchall())

    @contextmanager
    def _transaction(self, sync: str) -> Iterator[None]:
        """All of it or nothing; with `sync` full it is on disk at the end, with all that was written before."""
        with self._lock:
            self._file.execute(f"pragma synchronous = {sync}")
            with self._file:
                self._file.execute("begin immediate")
                yield

    def entries(self) -> dict[SiteId, Entry]:
        """What is known of every site that ever took part."""
        with self._lock:
            rows = self._file.execute(
                "select site, max(step), last_round, seconds, failures, steps from sites where run = ? group by site",
                (self.run,),
            ).fetchall()
        return {site: Entry(*rest) for site, *rest in rows}

    def kept(self, site: SiteId) -> Encoded | None:
        """What `site` remembers, encoded."""
        if not self._remembers:
            return None
        with self._lock:
            row = self._file.execute(
                "select plain, tensors from states where run = ? and site = ? order by step desc limit 1",
                (self.run, site),
            ).fetchone()
        return (row[0], row[1]) if row else None

    def keep(self, step: int, states: Mapping[SiteId, Encoded]) -> None:
        """What sites remember if there will be a commit `step`. Seen by `kept` at once; on disk after the next `write`."""
        self._remembers |= bool(states)
        with self._transaction("off"):
            self._file.executemany(
                "insert or replace into states values (?, ?, ?, ?, ?)",
                [(self.run, site, step, *kept) for site, kept in states.items()],
            )

    def write(self, step: int, entries: Mapping[SiteId, Entry], committed: int) -> None:
        """Write what is known of sites as of commit `step`, and all that was to be kept; on disk when this returns.

        committed: the newest commit that is there: what was remembered before it is deleted
        """
        if self._folder and not self._remembers:
            return  # nobody will read it
        with self._transaction(self._sync):
            self._file.executemany(
                "insert or replace into sites values (?, ?, ?, ?, ?, ?, ?)",
                [(self.run, s, step, e.last_round, e.seconds, e.failures, e.steps) for s, e in entries.items()],
            )
            for table in ("sites", "states") if self._remembers else ("sites",):
                newest = f"select max(step) from {table} where run = :run and site = :site and step <= :committed"
                self._file.executemany(
                    f"delete from {table} where run = :run and site = :site and step < ({newest})",
                    [{"run": self.run, "site": site, "committed": committed} for site in entries],
                )
            self._file.execute("update runs set step = ? where run = ?", (step, self.run))

    def close(self) -> None:
        """Nothing is lost by closing: what was not written belongs to no commit."""
        self._file.close()
        if self._folder:
            self._folder.cleanup()
