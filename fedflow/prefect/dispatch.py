"""Sending a round's work to the sites, and collecting what comes back."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from fedflow.engine.rounds import Survey, close_round, is_quorate, may_close, survey
from fedflow.errors import SiteError, StoreUnavailable
from fedflow.prefect.api import OUTAGE, cancel, read_runs, run_tag, training_tag
from fedflow.recipe import MAX_BACKOFF, Recipe, backoff
from fedflow.store.journal import Journal
from fedflow.store.records import Attempt, Closing, Opening, Plan, utc_now
from fedflow.types import SiteId

__all__ = ["SITE_FLOW", "Collector", "send"]

SITE_FLOW = "fedflow-site"
"""Name of the flow that runs at a site; each site has one deployment of it, named like the site."""

STORE_PATIENCE = timedelta(minutes=10)
"""How long after its deadline a round waits for a store that does not answer."""


def send(journal: Journal, plan: Plan, opening: Opening, site: SiteId, attempt: int, *, training: str | None) -> UUID:
    """Have `site` start attempt `attempt`; its flow run's id. Journalled first, and sent once however often it is called."""
    key = f"{plan.nonce}/{plan.round}/{opening.number}/{plan.phase}/{site}/{attempt}"
    wanted = Attempt(opening=opening.number, site=site, attempt=attempt, key=key, at=utc_now())
    known = journal.put_attempt(plan, wanted) is not wanted
    try:
        run = run_deployment(
            f"{SITE_FLOW}/{site}",
            parameters={
                "run": plan.run,
                "round": plan.round,
                "phase": plan.phase,
                "opening": opening.number,
                "attempt": attempt,
                "site": site,
            },
            flow_run_name=f"{plan.run} · round {plan.round:03d} · {site}"
            + (f" · attempt {attempt}" if attempt > 1 else ""),
            tags=["fedflow", run_tag(plan.nonce), training_tag(training), f"round:{plan.round}", f"site:{site}"],
            timeout=0,
            idempotency_key=key,
            as_subflow=not known,  # linking a run for the second time would leave a pending task run behind
        )
    except ObjectNotFound as error:
        raise SiteError(
            f"no deployment {SITE_FLOW}/{site}; run `fedflow deploy` with the federation file", site=site
        ) from error
    assert isinstance(run, FlowRun)  # called without a running event loop, it returns no coroutine
    return run.id


@dataclass
class Watched:
    """One site's newest attempt. run: its flow run, None where there is none; again: when to send the next one; gone: why nothing more is expected of the site."""

    attempt: int
    run: UUID | None
    again: datetime | None = None
    gone: str | None = None


@dataclass
class Collector:
    """Watches one opening until it may close, and closes it. Holds nothing that a restart could not find again.

    The store decides what counts; the flow runs' states only tell when to look, and whom to ask again.
    """

    journal: Journal
    plan: Plan
    opening: Opening
    recipe: Recipe
    client: SyncPrefectClient
    log: logging.Logger | logging.LoggerAdapter[logging.Logger]
    sites: dict[SiteId, Watched]
    training: str | None
    poll: float = 0.5  # seconds between two looks at the flow runs
    survey_every: float = 10.0  # seconds between two looks into the store for sites whose flow runs say nothing
    found: Survey = field(default_factory=lambda: Survey({}, {}))
    quorum_since: datetime | None = None
    surveyed: float = 0.0
    outage: bool = False

    def run(self) -> Closing:
        """Returns the closing. Raises QuorumLost after it is written where the quorum is not met."""
        while True:
            try:
                self._tick()
                if why := self._may_close():
                    missing = self.missing()
                    return close_round(self.journal, self.plan, self.opening, self.found, why=why, missing=missing)
            except StoreUnavailable as error:
                if utc_now() >= self.opening.deadline + STORE_PATIENCE:
                    raise
                self.log.warning("the store does not answer: %s", error)
            time.sleep(self.poll)

    def _tick(self) -> None:
        finished = self._look_at_runs()
        due = time.monotonic() - self.surveyed >= self.survey_every
        waiting = [s for s in self.plan.tasks if s not in self.found.answered()]
        wanted = waiting if due else [s for s in waiting if s in finished]
        if wanted or due:
            self._survey(wanted)
        for site, state in finished.items():
            if site not in self.found.answered():
                self._failed(site, state)
        self._send_again()

    def _look_at_runs(self) -> dict[SiteId, FlowRun]:
        """Sites whose newest flow run is over. An API that does not answer ends nothing: the deadline does."""
        open_runs = {
            w.run: s
            for s, w in self.sites.items()
            if w.run and w.gone is None and w.again is None and s not in self.found.answered()
        }
        try:
            runs = read_runs(self.client, open_runs)
        except OUTAGE as error:
            if not self.outage:
                self.log.warning("the Prefect API does not answer (%r); the round goes on, its deadline stands", error)
            self.outage = True
            return {}
        if self.outage:
            self.log.info("the Prefect API answers again")
        self.outage = False
        return {open_runs[i]: r for i, r in runs.items() if r.state_type in _OVER}

    def _survey(self, sites: list[SiteId]) -> None:
        before = self.found
        self.found = survey(self.journal, self.plan, sites, before)
        self.surveyed = time.monotonic()
        for site in sorted(self.found.accepted.keys() - before.accepted.keys()):
            self.log.info("%s: update accepted (%d of %d)", site, len(self.found.accepted), len(self.plan.tasks))
        for site in sorted(self.found.rejected.keys() - before.rejected.keys()):
            self.log.warning("%s: update does not count: %s", site, self.found.rejected[site])
        if self.quorum_since is None and is_quorate(self.opening, self.found):
            self.quorum_since = utc_now()

    def _failed(self, site: SiteId, run: FlowRun) -> None:
        """Decide what becomes of a site whose flow run is over without an update."""
        watched = self.sites[site]
        failure = self.journal.failure(self.plan, site, self.opening.number, watched.attempt)
        state = run.state_name or "ended"
        reason = (
            failure.reason
            if failure
            else f"its flow run ended {state}: {run.state.message if run.state else ''}".strip()
        )
        detail = f"\n{failure.traceback}" if failure and failure.traceback else ""
        self.log.error("%s: attempt %d failed: %s%s", site, watched.attempt, reason, detail)
        pause = self._pause(watched.attempt)
        spent = watched.attempt >= self.recipe.attempts or utc_now() + pause >= self.opening.deadline
        if spent or (failure is not None and not failure.heals):
            watched.gone = f"{reason} (attempt {watched.attempt} of {self.recipe.attempts})"
        else:
            watched.again = utc_now() + pause

    def _pause(self, attempt: int) -> timedelta:
        """Exponential backoff with full jitter (half to all of it), capped at `MAX_BACKOFF`."""
        longest = max(backoff(self.recipe.attempts, self.recipe.timeouts.round_deadline), timedelta(seconds=0.1))
        return min(timedelta(seconds=2.0 ** (attempt - 1)), longest, MAX_BACKOFF) * random.uniform(0.5, 1.0)

    def _send_again(self) -> None:
        for site, watched in self.sites.items():
            if watched.again is not None and utc_now() >= watched.again:
                try:
                    run = send(self.journal, self.plan, self.opening, site, watched.attempt + 1, training=self.training)
                except (StoreUnavailable, *OUTAGE):
                    continue
                except SiteError as error:
                    self.sites[site] = Watched(watched.attempt + 1, None, gone=error.reason)
                    continue
                self.sites[site] = Watched(watched.attempt + 1, run)
                self.log.info("%s: attempt %d sent", site, watched.attempt + 1)

    def _may_close(self) -> str | None:
        gone = [s for s, w in self.sites.items() if w.gone is not None]
        grace = self.recipe.durations.quorum_grace
        assert grace is not None
        at = utc_now()
        why = may_close(
            self.plan, self.opening, self.found, given_up=gone, quorum_since=self.quorum_since, grace=grace, at=at
        )
        if why is not None:
            self._survey(
                [s for s in self.plan.tasks if s not in self.found.accepted]
            )  # nothing that is there is left out
        return why

    def missing(self) -> Mapping[SiteId, str]:
        """Why nothing came from a site."""
        late = f"no update by {'the deadline' if utc_now() >= self.opening.deadline else 'the closing'}"
        return {site: watched.gone or late for site, watched in self.sites.items()}

    def stop_stragglers(self) -> list[str]:
        """Cancel what is still running for this opening; names of the flow runs."""
        try:
            runs = read_runs(self.client, [w.run for w in self.sites.values() if w.run])
            return cancel(self.client, runs.values(), f"round {self.plan.round} closed without it")
        except OUTAGE as error:
            self.log.warning("stragglers could not be cancelled (%r); they stop by themselves at the deadline", error)
            return []


_OVER = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)
