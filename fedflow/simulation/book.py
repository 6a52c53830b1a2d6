"""What the sites of a simulation remember, and what is known of them, in one local file that grows with those that took part."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedflow.errors import SiteStateLost
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

    def view(self) -> SiteView:
        """The same for a schedule."""
        return SiteView(online=True, last_round=self.last_round, seconds=self.seconds, failures=self.failures)


_TABLES = """
create table if not exists runs (run text primary key, nonce text not null, step integer not null);
create table if not exists sites (
    run text not null, site text not null, step integer not null, last_round integer, seconds real, failures integer not null,
    primary key (run, site, step)
) without rowid;
create table if not exists states (
    run text not null, site text not null, step integer not null, plain text not null, tensors blob not null,
    primary key (run, site, step)
);
"""


class SiteBook:
    """The book of one run, consistent with the commit number `head`: what was written after it is forgotten.

    path: of the file, which several runs may share; None: one that is gone after `close`. One thread notes and reads, another
    may write meanwhile. Raises SiteStateLost where the book is older than `head`
    and `needed`: sites remembered something then that is not in it.
    """

    def __init__(self, path: Path | None, run: str, nonce: str, *, head: int, needed: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedflow-book-") if path is None else None
        path = Path(self._folder.name) / "book.sqlite" if self._folder else path
        assert path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run, self._lock = run, threading.Lock()
        self._file, self._reading = (sqlite3.connect(path, check_same_thread=False, isolation_level=None) for _ in "wr")
        self._file.executescript(f"pragma journal_mode = wal; pragma synchronous = full; {_TABLES}")
        found = self._file.execute("select nonce, step from runs where run = ?", (run,)).fetchone()
        known = found[1] if found and found[0] == nonce else -1
        if known < head and needed:
            raise SiteStateLost(
                f"site states lost: found those as of commit {known} in {path}, expected commit {head}'s; restore the file from a copy",
                run=run,
            )
        with self._file:
            self._file.execute("begin")
            for table in ("sites", "states"):
                self._file.execute(
                    f"delete from {table} where run = ? and step > ?", (run, head if known >= head else -1)
                )
            self._file.execute("insert or replace into runs values (?, ?, ?)", (run, nonce, head))
        known_sites = self._reading.execute("select distinct site from states where run = ?", (run,))
        self._remembering = {site for (site,) in known_sites}
        self._pending: list[tuple[dict[SiteId, Entry], dict[SiteId, Encoded]]] = []

    def entries(self) -> dict[SiteId, Entry]:
        """What is known of every site that ever took part."""
        rows = self._reading.execute(
            "select site, max(step), last_round, seconds, failures from sites where run = ? group by site", (self.run,)
        )
        return {site: Entry(*rest) for site, *rest in rows}

    def kept(self, site: SiteId) -> Encoded | None:
        """What `site` remembers, encoded."""
        if site not in self._remembering:
            return None
        with self._lock:
            pending = self._pending[::-1]
        for _, states in pending:
            if site in states:
                return states[site]
        row = self._reading.execute(
            "select plain, tensors from states where run = ? and site = ? order by step desc limit 1", (self.run, site)
        ).fetchone()
        return (row[0], row[1]) if row else None

    def note(self, entries: Mapping[SiteId, Entry], states: Mapping[SiteId, Encoded]) -> None:
        """What a phase adds; found at once, and in the file after the next `write`."""
        with self._lock:
            self._pending.append((dict(entries), dict(states)))
        self._remembering |= states.keys()

    def write(self, step: int, committed: int) -> None:
        """Write the oldest noted phase, which is to be commit `step`; on disk when this returns.

        committed: the newest commit that is there: what was remembered before it is deleted
        """
        entries, states = self._pending[0]
        rows = [(self.run, s, step, e.last_round, e.seconds, e.failures) for s, e in entries.items()]
        with self._file:
            self._file.execute("begin immediate")
            self._file.executemany("insert or replace into sites values (?, ?, ?, ?, ?, ?)", rows)
            self._file.executemany(
                "insert or replace into states values (?, ?, ?, ?, ?)",
                [(self.run, site, step, *kept) for site, kept in states.items()],
            )
            self._prune("sites", entries, committed)
            self._prune("states", states, committed)
            self._file.execute("update runs set step = ? where run = ?", (step, self.run))
        with self._lock:
            self._pending.pop(0)

    def _prune(self, table: str, sites: Iterable[SiteId], committed: int) -> None:
        newest = f"select max(step) from {table} where run = :run and site = :site and step <= :committed"
        self._file.executemany(
            f"delete from {table} where run = :run and site = :site and step < ({newest})",
            [{"run": self.run, "site": site, "committed": committed} for site in sites],
        )

    def close(self) -> None:
        """Nothing is lost by closing: what was not written belongs to no commit."""
        self._file.close()
        self._reading.close()
        if self._folder:
            self._folder.cleanup()
