"""What every environment offers: `run = recipe.execute(env)`, and a handle on the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedflow.engine.metrics import MetricRow, metric_rows
from fedflow.engine.rounds import record_abort
from fedflow.engine.summary import Current, RunSummary, Status, current, status_of, summarize
from fedflow.errors import FedflowError, ObjectMissing, RoundAborted, RoundError, RunMissing
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore

__all__ = ["DEFAULT_HOME", "Backend", "Ended", "Environment", "Run"]

DEFAULT_HOME = Path("fedflow-runs")
"""Where runs on this machine keep store, sites' states and logs, unless told otherwise."""


class Backend(Protocol):
    """What differs between environments, for one run."""

    def alive(self) -> bool:
        """Whether a coordinator works on the run, or is about to."""
        ...

    def abort(self) -> None:
        """Stop coordinator and sites; returns when nothing of the run is left running."""
        ...

    def logs(self, site: str | None) -> Iterator[str]:
        """Log lines so far, oldest first; of one site if named."""
        ...

    def ui(self) -> str | None:
        """URL of the run in the Prefect UI, where there is one."""
        ...


class Ended:
    """Of a run that nobody works on."""

    def alive(self) -> bool:
        return False

    def abort(self) -> None:
        """There is nothing to stop."""

    def logs(self, site: str | None) -> Iterator[str]:
        return iter(())

    def ui(self) -> str | None:
        return None


@dataclass(frozen=True)
class Run:
    """A run that was started. The same in every environment; all it says of rounds comes from the store."""

    id: str
    store: ObjectStore
    backend: Backend

    @property
    def journal(self) -> Journal:
        return Journal(self.store, self.id)

    def status(self) -> Status:
        """ "running" while a coordinator is alive, else what the store says."""
        if self.backend.alive():
            return "running"
        try:
            return status_of(self.journal)[0]
        except (RunMissing, ObjectMissing):
            return "failed"

    def is_complete(self) -> bool:
        """Whether it ended as asked, and nobody has asked for more since: to resume it would do nothing."""
        try:
            return status_of(self.journal)[1]
        except (RunMissing, ObjectMissing):
            return False

    def summary(self) -> RunSummary:
        """Everything committed so far. Raises RunMissing before the run's record is written."""
        return summarize(self.journal)

    def metrics(self) -> list[MetricRow]:
        """Every metric of every committed round, the server's and each site's: `pandas.DataFrame(run.metrics())`."""
        return list(metric_rows(self.summary()))

    def current(self) -> Current | None:
        """The round in progress; None between rounds, and before the first."""
        try:
            return current(self.journal)
        except RunMissing:
            return None

    def wait(
        self,
        timeout: float | None = None,
        on_tick: Callable[[Run], None] = lambda run: None,
        *,
        until: Callable[[], bool] = lambda: False,
        every: float = 0.5,
    ) -> Status:
        """Block until the run is not running any more, or `until()` is true, at most `timeout` seconds.

        on_tick: called every `every` seconds
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.status()) == "running" and not until() and (end is None or time.monotonic() < end):
            on_tick(self)
            time.sleep(every)
        on_tick(self)
        return status

    def result(self, timeout: float | None = None) -> RunSummary:
        """Wait, and return the summary of a run that trained as asked.

        Raises RoundAborted or RoundError with what stopped it; what was committed stays, and the run can be resumed.
        """
        status = self.wait(timeout)
        if status == "running":
            raise FedflowError(f"still running after {timeout} s; wait longer", run=self.id)
        try:
            summary = self.summary()
        except RunMissing:
            raise RoundError(f"the run did not start; last log lines:\n{self._tail()}", run=self.id) from None
        if status == "finished":
            return summary
        if status == "aborted":
            raise RoundAborted("aborted; `fedflow resume` goes on from the last committed round", run=self.id)
        why = (
            summary.last.message
            if summary.last and status == "failed"
            else f"its coordinator died; last log lines:\n{self._tail()}"
        )
        raise RoundError(f"{why}; `fedflow resume {self.id}` goes on from the last committed round", run=self.id)

    def abort(self) -> None:
        """Stop the run; what is committed stays, and it can be resumed."""
        running = self.backend.alive()
        self.backend.abort()
        if running and self.status() == "interrupted":  # what ran it was stopped the hard way, or is dead
            record_abort(self.journal, "aborted")

    def logs(self, site: str | None = None) -> Iterator[str]:
        """Log lines so far, oldest first; of one site if named."""
        return self.backend.logs(site)

    def _tail(self, lines: int = 15) -> str:
        return "\n".join(list(self.logs())[-lines:])


class Environment(Protocol):
    """Where a recipe runs."""

    def execute(self, recipe: Recipe, *, run_id: str | None = None, **options: Any) -> Run:
        """Start `recipe` and return at once, or, where it is trained in this process, when it has ended. run_id: a name for the run; one that is there with this recipe is resumed.

        Raises RunExists, RecipeError, ResolveError, UnreachableError: before any training.
        """
        ...

    def resume(self, run_id: str) -> Run:
        """Go on with a run from its last committed round, under a new opening. Raises RunMissing."""
        ...

    def attach(self, run_id: str) -> Run:
        """A handle on a run that was started before, by anybody. Raises RunMissing."""
        ...
