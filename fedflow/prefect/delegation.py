"""Having sites and regional aggregators aggregate, and passing the role on where one of them does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient

from fedflow.engine.shares import Share, reduced_of
from fedflow.errors import SiteError, StoreUnavailable
from fedflow.prefect.api import OUTAGE, absence, cancel, read_runs
from fedflow.prefect.dispatch import OVER, Origin, send_share
from fedflow.prefect.pace import Pace
from fedflow.recipe import MAX_BACKOFF, Federation, Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import Closing, Plan, utc_now

__all__ = ["Delegation"]

PRESENCE = 10.0  # seconds between two looks whether the worker of whoever aggregates is there


@dataclass
class _Try:
    """Where a share stands. number: of its newest sending, 0 before the first; left: how often it may still be sent"""

    share: Share
    number: int
    left: int
    workplace: str = ""
    run: UUID | None = None
    since: float = 0.0
    looked: float = 0.0
    again: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class Delegation:
    """Sends shares of an aggregation to whose turn it is, and to the next where nothing comes of it. Holds nothing that a restart could not
    find again: who was asked is in the journal, and what was done in the store. While the API or the store does not answer nothing is decided.

    An attempt is over when its flow run is, when its worker is gone, or after the recipe's train_timeout.
    """

    journal: Journal
    plan: Plan
    recipe: Recipe
    federation: Federation
    client: SyncPrefectClient
    log: logging.Logger | logging.LoggerAdapter[logging.Logger]
    origin: Origin

    def have_done(self, closing: Closing, wanted: Sequence[Share]) -> dict[Share, str]:
        """Have `wanted` done; those that nobody did, each after every workplace was asked `attempts` times, and why.

        Raises StoreUnavailable where the store has not answered for the recipe's transfer_timeout.
        """
        assert self.recipe.durations.transfer_timeout
        tries, answered = [self._begun(share) for share in wanted], utc_now()
        undone: dict[Share, str] = {}
        pace = Pace(longest=2.0, shortest=0.1, since=time.monotonic())
        while tries:
            for one in list(tries):
                try:
                    over = self._tick(one, closing)
                except OUTAGE as error:
                    self.log.warning("the Prefect API does not answer (%r); whoever aggregates goes on", error)
                    continue
                except StoreUnavailable as error:
                    if utc_now() >= answered + self.recipe.durations.transfer_timeout:
                        raise
                    self.log.warning("waiting for the store: %s", error)
                    continue
                answered = utc_now()
                if over is not None:
                    tries.remove(one)
                    undone |= {one.share: over} if over else {}
            if tries:
                time.sleep(pace.wait())
        return undone

    def _begun(self, share: Share) -> _Try:
        """Where an earlier coordinator left it: what it had sent is looked at again."""
        number = len(self.journal.delegations(self.plan, share.key))
        return _Try(share, max(number - 1, 0), self.recipe.attempts * len(share.workplaces) + (number > 0))

    def _tick(self, one: _Try, closing: Closing) -> str | None:
        """None while it is waited for; then why nothing came of it, empty where something did."""
        if reduced_of(self.journal, one.share, [one.workplace] if one.run else None) is not None:
            return ""
        if one.run is not None:
            why = self._failed(one)
            if why is None:
                return None
            if reduced_of(self.journal, one.share, [one.workplace]) is not None:
                return ""
            self._pass_on(one, why)
        if not one.left:
            return "; ".join(f"{workplace}: {why}" for workplace, why in one.reasons.items())
        if time.monotonic() >= one.again:
            self._send(one, closing)
        return None

    def _send(self, one: _Try, closing: Closing) -> None:
        number = one.number + 1
        one.workplace = one.share.workplaces[one.number % len(one.share.workplaces)]
        try:
            one.workplace, one.run = send_share(
                self.client, self.journal, self.plan, closing.opening, one.share, number, self.origin
            )
        except SiteError as error:
            one.reasons[one.workplace] = error.reason
        one.number, one.left = number, one.left - 1  # only now: what an outage kept from being sent is no attempt
        one.since = one.looked = time.monotonic()

    def _failed(self, one: _Try) -> str | None:
        """Why nothing more is expected of the newest sending; None where something is."""
        assert one.run is not None
        run, waited = read_runs(self.client, [one.run]).get(one.run), time.monotonic() - one.since
        limit = self.recipe.durations.train_timeout
        assert limit
        if run is None or run.state_type in OVER:
            said = run.state.message if run and run.state else "it is gone"
            return f"its flow run ended {run.state_name if run else ''}: {said}"
        if waited > limit.total_seconds():
            cancel(self.client, [run], "others aggregate in its place")
            return f"nothing came within {limit} (train_timeout)"
        if time.monotonic() - one.looked > PRESENCE:
            one.looked = time.monotonic()
            pools = {workplace.name: workplace.work_pool for workplace in self.federation.workplaces}
            if one.workplace in pools and (gone := absence(self.client, pools[one.workplace])):
                cancel(self.client, [run], "others aggregate in its place")
                return gone
        return None

    def _pass_on(self, one: _Try, why: str) -> None:
        """To the next workplace at once; to one that was asked before, after a pause."""
        self.log.warning("%s: %s did not aggregate: %s", one.share.name, one.workplace, why)
        one.reasons[one.workplace], one.run = why, None
        if one.number >= len(one.share.workplaces):
            pause = 2.0 ** min(one.number - len(one.share.workplaces), 6)
            one.again = time.monotonic() + min(pause, MAX_BACKOFF.total_seconds(), self._longest())

    def _longest(self) -> float:
        """Seconds; of rounds that are short, pauses are."""
        return self.recipe.timeouts.round_deadline.total_seconds() / 10
