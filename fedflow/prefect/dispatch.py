"""Sending a round's work to the sites, and collecting what comes back."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Pending
from prefect.tasks import Task

from fedflow.engine.rounds import (
    Survey,
    close_round,
    gave_up,
    is_quorate,
    may_close,
    next_attempt,
    no_update,
    survey,
)
from fedflow.engine.shares import Share
from fedflow.engine.starts import with_start
from fedflow.errors import SiteError, StoreUnavailable
from fedflow.prefect.api import ACTIVE, OUTAGE, cancel, find_runs, read_runs, run_tag, taker, training_tag
from fedflow.prefect.pace import Pace
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import Attempt, Closing, Opening, Plan, utc_now
from fedflow.types import SiteId

__all__ = [
    "AGGREGATION_FLOW",
    "OVER",
    "SITE_FLOW",
    "Collector",
    "Origin",
    "Watched",
    "at_work",
    "send",
    "send_share",
]

SITE_FLOW = "fedflow-site"
"""Name of the flow that runs at a site; each site has one deployment of it, named like the site."""

AGGREGATION_FLOW = "fedflow-aggregation"
"""Name of the flow that does a share of an aggregation; sites and regional aggregators have one deployment of it each."""


def send(
    client: SyncPrefectClient,
    journal: Journal,
    plan: Plan,
    opening: Opening,
    site: SiteId,
    attempt: int,
    of: Origin,
    after: str | None = None,
) -> UUID:
    """Have `site` start attempt `attempt`; its flow run's id. Journalled first, and sent once however often it is called.

    after: its update that counts in this round, with attempt 0: it is asked for another one
    """
    key = f"{plan.nonce}/{plan.round}/{opening.number}/{plan.phase}/{site}/{attempt}"
    journal.put_attempt(plan, Attempt(opening=opening.number, site=site, attempt=attempt, key=key, at=utc_now()))
    given = {"opening": opening.number, "attempt": attempt, "site": site, **({"after": after} if after else {})}
    return _start(client, plan, SITE_FLOW, site, f"{site}{_again(attempt)}", key, given, f"site:{site}", of)


def send_share(
    client: SyncPrefectClient, journal: Journal, plan: Plan, opening: int, share: Share, number: int, of: Origin
) -> tuple[str, UUID]:
    """Have the workplace whose turn it is do `share`, for the `number`-th time (from 1) that it is sent; the workplace, and its flow run's
    id. Journalled first, and sent once however often it is called."""
    workplace = share.workplaces[(number - 1) % len(share.workplaces)]
    key = f"{plan.nonce}/{plan.round}/{plan.phase}/{share.key}/{number}"
    noted = Attempt(opening=opening, site=workplace, attempt=number, key=key, at=utc_now())
    workplace = journal.put_delegation(plan, share.key, noted).site
    given = {"opening": opening, "share": share.name, "workplace": workplace}
    name, tag = f"{share.name} at {workplace}{_again(number)}", f"workplace:{workplace}"
    return workplace, _start(client, plan, AGGREGATION_FLOW, workplace, name, key, given, tag, of)


def _start(
    client: SyncPrefectClient,
    plan: Plan,
    flow: str,
    workplace: str,
    name: str,
    key: str,
    given: Mapping[str, Any],
    tag: str,
    of: Origin,
) -> UUID:
    """A flow run of the deployment of `flow` at `workplace`, or the one that was started under that key."""
    parent = client.create_task_run(
        _stand_in(flow, workplace), of.round, key, name=name, state=Pending(), task_inputs={}
    )
    for fresh in (False, True):
        try:
            run = client.create_flow_run_from_deployment(
                _deployment(client, flow, workplace, fresh),
                parameters={"run": plan.run, "round": plan.round, "phase": plan.phase, **given},
                name=f"{plan.run} · round {plan.round:03d} · {name}",
                tags=["fedflow", run_tag(plan.nonce), training_tag(of.training), f"round:{plan.round}", tag],
                idempotency_key=key,
                parent_task_run_id=parent.id,
            )
            return run.id
        except PrefectHTTPStatusError as error:  # made anew, perhaps, since it was looked up
            if fresh or error.response.status_code != 404:
                raise
    raise AssertionError


def _again(attempt: int) -> str:
    return f" · attempt {attempt}" if attempt > 1 else "" if attempt else " · again"


def _stand_in(flow: str, workplace: str) -> Task[..., None]:
    """What stands for a site's flow run among the tasks of its round: so the UI shows it there, with its state."""
    task = Task(name=f"{flow}/{workplace}", fn=lambda: None)
    task.task_key = f"{flow}/{workplace}"
    return task


_deployments: dict[tuple[str, str], UUID] = {}
"""API and name -> the deployment, as it was looked up."""


def _deployment(client: SyncPrefectClient, flow: str, workplace: str, fresh: bool) -> UUID:
    """The deployment of `flow` at `workplace`. Raises SiteError where there is none."""
    name = f"{flow}/{workplace}"
    key = (str(client.api_url), name)
    if fresh or key not in _deployments:
        try:
            _deployments[key] = client.read_deployment_by_name(name).id
        except ObjectNotFound as error:
            missing = f"no deployment {name}; run `fedflow deploy` with the federation file"
            raise SiteError(missing, site=workplace) from error
    return _deployments[key]


@dataclass(frozen=True)
class Origin:
    """Who sends: the flow runs of the round and of its training."""

    round: UUID
    training: str | None

    @classmethod
    def here(cls) -> Origin:
        """Of the round that runs here."""
        return cls(UUID(flow_run.id), flow_run.root_flow_run_id)


def at_work(client: SyncPrefectClient, nonce: str, round: int) -> dict[SiteId, tuple[int, FlowRun]]:
    """Sites that still make an update of a round before `round` -> that round, the newest, and the flow run."""
    found: dict[SiteId, tuple[int, FlowRun]] = {}
    for run in find_runs(client, run_tag(nonce), states=[s for s in ACTIVE if s != StateType.CANCELLING]):
        tags = dict(tag.split(":", 1) for tag in run.tags if tag.startswith(("site:", "round:")))
        if "site" in tags and (base := int(tags["round"])) < round and base >= found.get(tags["site"], (0, run))[0]:
            found[tags["site"]] = base, run
    return found


@dataclass
class Watched:
    """One site's newest attempt. run: its flow run, None where there is none; again: when to send the next one; gone: why nothing more is expected of the site.

    attempt: 0 where the site still works for an earlier round, which counts
    """

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
    origin: Origin
    survey_every: float = 10.0  # seconds between two looks into the store for sites whose flow runs say nothing
    found: Survey = field(default_factory=lambda: Survey({}, {}))
    quorum_since: datetime | None = None
    surveyed: float = 0.0
    over: set[UUID] = field(default_factory=set)
    again: set[SiteId] = field(default_factory=set)
    outage: bool = False

    def run(self) -> Closing:
        """Returns the closing. Raises QuorumLost after it is written where the quorum is not met, StoreUnavailable where the store, the
        recipe's transfer_timeout after the deadline, still does not do what it is asked."""
        assert self.recipe.durations.transfer_timeout
        patient_until = self.opening.deadline + self.recipe.durations.transfer_timeout
        pace = Pace(longest=2.0, shortest=0.1, since=time.monotonic())  # of looks at the flow runs
        while True:
            try:
                asked = time.monotonic()
                finished = self._look_at_runs()
                pace.answered(time.monotonic() - asked)
                self._tick(finished)
                if why := self._may_close():
                    missing = self.missing()
                    return close_round(self.journal, self.plan, self.opening, self.found, why=why, missing=missing)
                self._ask_again()
            except StoreUnavailable as error:
                if utc_now() >= patient_until:
                    raise
                self.log.warning("waiting for the store: %s", error)
            time.sleep(pace.wait())

    def _tick(self, finished: Mapping[SiteId, FlowRun]) -> None:
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
            runs = read_runs(self.client, open_runs, OVER)  # the others would be most of what is sent and parsed
        except OUTAGE as error:
            if not self.outage:
                self.log.warning("the Prefect API does not answer (%r); the round goes on, its deadline stands", error)
            self.outage = True
            return {}
        if self.outage:
            self.log.info("the Prefect API answers again")
        self.outage = False
        self.over |= runs.keys()
        return {open_runs[i]: r for i, r in runs.items()}

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
        if differs := self._other_version(run):
            reason = f"{reason} ({differs})"
        detail = f"\n{failure.traceback}" if failure and failure.traceback else ""
        self.log.error("%s: attempt %d failed: %s%s", site, watched.attempt, reason, detail)
        again = next_attempt(self.recipe, self.opening, watched.attempt, at=utc_now(), jitter=random.random())
        if again is None or (failure is not None and not failure.heals):
            watched.gone = gave_up(reason, watched.attempt, self.recipe)
        else:
            watched.again = again

    def _other_version(self, run: FlowRun) -> str | None:
        """That the site has another fedflow, where it has: it may be why it failed."""
        with contextlib.suppress(*OUTAGE):
            took = taker(self.client, run)
            return took.differs() if took else None
        return None

    def _send_again(self) -> None:
        for site, watched in self.sites.items():
            if watched.again is not None and utc_now() >= watched.again:
                try:
                    run = send(
                        self.client, self.journal, self.plan, self.opening, site, watched.attempt + 1, self.origin
                    )
                except (StoreUnavailable, *OUTAGE):
                    continue
                except SiteError as error:
                    self.sites[site] = Watched(watched.attempt + 1, None, gone=error.reason)
                    continue
                self.sites[site] = Watched(watched.attempt + 1, run)
                self.log.info("%s: attempt %d sent", site, watched.attempt + 1)

    def _ask_again(self) -> None:
        """Where the plan says so: another update of each site whose update counts, while the round waits for others."""
        for site, counted in self.found.accepted.items() if self.plan.again else ():
            if site in self.again:
                continue
            try:
                send(self.client, self.journal, self.plan, self.opening, site, 0, self.origin, after=counted.update)
            except (StoreUnavailable, *OUTAGE):
                continue
            except SiteError as error:
                self.log.warning("%s is not asked again: %s", site, error.reason)
            self.again.add(site)

    def _may_close(self) -> str | None:
        gone = [s for s, w in self.sites.items() if w.gone is not None]
        grace = self.recipe.durations.quorum_grace
        assert grace is not None
        at = utc_now()
        why = may_close(
            self.plan.tasks.keys(),
            self.opening,
            self.found,
            given_up=gone,
            quorum_since=self.quorum_since,
            grace=grace,
            at=at,
        )
        if why is not None:
            # nothing that is there is left out
            self._survey([s for s in self.plan.tasks if s not in self.found.accepted])
        return why

    def missing(self) -> Mapping[SiteId, str]:
        """Why nothing came from a site; of one that did not say so, with what it said of its last start."""
        late, store = no_update(self.opening, at=utc_now()), self.journal.store
        waited_for = self.sites.keys() - self.found.answered()
        return {s: self.sites[s].gone or with_start(late, store, s) for s in waited_for}

    def stop_stragglers(self) -> list[str]:
        """Cancel what is still running for this opening; names of the flow runs."""
        try:
            left = [w.run for w in self.sites.values() if w.run and w.run not in self.over]
            runs = read_runs(self.client, left) if left else {}
            return cancel(self.client, runs.values(), f"round {self.plan.round} closed without it")
        except OUTAGE as error:
            self.log.warning("stragglers could not be cancelled (%r); they stop by themselves at the deadline", error)
            return []


OVER = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
