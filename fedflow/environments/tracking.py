"""A simulation as one flow run on the Prefect server: `python -m fedflow.environments.tracking SPEC`, a process beside it.

SPEC: JSON with run and home. It looks at the run's store, as a display in a terminal does, and tells the API at most once a
second. The simulation knows nothing of it, and goes on whatever becomes of the API or of this process. What could not be told
is told later: until the API has not answered for `PATIENCE` after the run's end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, flow, get_run_logger, runtime, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Completed, Crashed, Failed

from fedflow.engine.summary import RoundSummary, Status, summarize, summarize_round
from fedflow.engine.watching import Watch
from fedflow.environments.base import Run
from fedflow.errors import UnreachableError, UserError, field_error
from fedflow.prefect.api import connect, find_runs, run_tag
from fedflow.prefect.artifacts import Progress, flat, publish_report, publish_round, publish_rounds

__all__ = ["PATIENCE", "SIMULATION", "check_api", "main"]

log = logging.getLogger(__name__)

SIMULATION = "fedflow-simulation"
"""The flow's name."""
EVERY = 1.0
"""Seconds between two looks."""
PATIENCE = 300.0
"""Seconds for which an API that does not answer is waited for after the run's end."""

_DRAIN = 20.0  # seconds for the last lines of the log
_GROWTH = 1.25  # the table of all rounds is published again when it has grown so much


def check_api() -> None:
    """Raises UserError where no API is configured; one that does not answer is a warning, and told later."""
    if not get_current_settings().api.url:
        fix = "set it to your server's URL, or leave out tracking"
        raise UserError(field_error("PREFECT_API_URL", None, "the Prefect API that shows the run", fix))
    try:
        with connect():
            pass
    except UnreachableError as error:
        log.warning("%s; the run goes on, and is shown as soon as something answers", error)


def main(spec: dict[str, Any]) -> int:
    from fedflow.environments import recall

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    home, run = Path(spec["home"]), str(spec["run"])
    os.nice(10)  # whoever trains goes first
    with (home / "runs" / f"{run}.tracking").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process beside an earlier start may have something left to tell
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        handle = recall(run, home).attach(run)
        return 0 if _track(handle, handle.backend.url) else 1


def _track(run: Run, url: Path) -> bool:
    """Whether everything was told. url: the file for the flow run's URL."""
    teller, until, warned = _Teller(run), None, False
    simulation = _flow(run, teller, url)
    record = run.journal.record()
    recipe = run.journal.recipe().model_dump(mode="json")
    while True:
        try:
            with tags("fedflow", "simulation", run_tag(record.nonce)):
                simulation(recipe=recipe, sites=len(run.journal.sites()), store=run.store.url, return_state=True)
            return True
        except Exception as error:
            if teller.begun:
                log.warning("tracking: what became of %s could not be told: %r", run.id, error)
                return False
            if not warned:
                log.warning("tracking: the Prefect API does not answer; it is tried again: %r", error)
            warned = True
        if not run.backend.alive():
            until = until or time.monotonic() + PATIENCE
            if time.monotonic() > until:
                log.warning("tracking: gave up; %s is in its store, and was not shown", run.id)
                return False
        time.sleep(EVERY)


def _flow(run: Run, teller: _Teller, url: Path) -> Flow[..., Any]:
    @flow(
        name=SIMULATION,
        flow_run_name=run.id,
        description="A simulation, all its rounds in one flow run.",
        persist_result=False,
        result_serializer="json",
        validate_parameters=False,
    )
    def simulation(recipe: dict[str, Any], sites: int, store: str) -> State[Any]:
        """Tell of the run until it ends; ends as it does."""
        teller.begun, teller.log = True, get_run_logger()
        url.write_text(str(runtime.flow_run.ui_url or ""))
        this = UUID(runtime.flow_run.id)
        teller.told(lambda: _bury(run, this))
        while run.backend.alive():
            teller.told(teller.tell)
            if _is_cancelled(this):
                teller.log.info("cancelled: stopping the simulation")
                run.abort()
            time.sleep(EVERY)
        until = time.monotonic() + PATIENCE
        while not teller.told(teller.conclude) and time.monotonic() < until:
            time.sleep(EVERY)
        return _ended(run)

    return simulation


def _bury(run: Run, this: UUID) -> None:
    """Flow runs of earlier starts that nobody could end: their processes are gone."""
    with connect() as client:
        states = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
        for old in find_runs(client, run_tag(run.journal.record().nonce), "simulation", states=states):
            if old.id != this:
                client.set_flow_run_state(old.id, Crashed(message="nobody looked at its end"), force=True)


def _is_cancelled(this: UUID) -> bool:
    """Whether a person asked for it in the UI."""
    with suppress(Exception):  # an API that does not answer has not been asked
        state = get_client(sync_client=True).read_flow_run(this).state
        return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)
    return False


def _ended(run: Run) -> State[Any]:
    status: Status = run.status()
    last = max(run.journal.outcomes(), key=lambda outcome: outcome.number, default=None)
    message = last.message if last else ""
    if status == "finished":
        return Completed(message="finished")
    if status == "failed":
        return Failed(message=message or "failed")
    return Cancelled(message=message or "aborted") if status == "aborted" else Crashed(message="its process died")


class _Teller:
    """Tells the API of the rounds of a run; what fails is told by the next call."""

    def __init__(self, run: Run) -> None:
        self.run, self.watch, self.progress = run, Watch(run.journal), Progress(run.id)
        self.begun = False
        self.log: Any = log
        self._rounds = self._table = 0  # of which was told
        self._failing = self._reported = False

    def told(self, what: Callable[[], object]) -> bool:
        """Whether `what` could be told; the first failure of several is a warning."""
        try:
            what()
        except Exception as error:
            if not self._failing:
                self.log.warning("the UI cannot be told, and will be later: %r", error)
            self._failing = True
            return False
        self._failing = False
        return True

    def tell(self, *, last: bool = False) -> None:
        """What is new: progress, the newest round's sites, and, from time to time, all rounds."""
        self.watch.look(last=last)
        recipe, done = self.watch.recipe, len(self.watch.rounds)
        if recipe is None or (done == self._rounds and not last):
            return
        self.progress.update(recipe, done)
        if done > self._rounds:
            newest = self._newest(done - 1)
            publish_round(self.run.id, recipe, newest, len(newest.sites) + len(newest.excluded))
            self.log.info("%d of %d rounds committed; round %d: %s", done, recipe.rounds, done - 1, flat(newest.shown))
            self._rounds = done
        if done > self._table and (last or done >= _GROWTH * self._table):
            publish_rounds(self.run.id, self.watch.rounds)
            self._table = done

    def _newest(self, round: int) -> RoundSummary:
        assert self.watch.recipe is not None
        return summarize_round(self.run.journal, self.watch.recipe, round)

    def conclude(self) -> None:
        """Whatever is left, and the report."""
        self.tell(last=True)
        if self.watch.rounds and not self._reported:
            publish_report(summarize(self.run.journal))
            self._reported = True


def _leave(code: int) -> None:
    """Exit; Prefect's threads may send what they have left, but not wait for a server that is gone."""
    timer = threading.Timer(_DRAIN, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.exit(code)


if __name__ == "__main__":
    _leave(main(json.loads(sys.argv[1])))
