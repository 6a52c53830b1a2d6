"""A share of an aggregation at a site or at a regional aggregator. May run twice, or be killed anywhere."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedflow.engine.aggregation import reduce_elsewhere
from fedflow.engine.review import check_allowed
from fedflow.engine.shares import shares
from fedflow.engine.site import PhaseWork, check_pinned, killed_after, site_journal, time_allowed
from fedflow.errors import SiteError
from fedflow.memory import keep_freed
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.records import Reduced

__all__ = ["ShareWork", "aggregation_step", "time_limit"]


@dataclass(frozen=True)
class ShareWork(PhaseWork):
    """A share as it is sent. share: "round", or "region-<name>"; opening: whose closing in force is aggregated"""

    opening: int
    share: str


def aggregation_step(work: ShareWork, config: SiteConfig) -> Reduced:
    """Do `work` at the workplace of `config`; its record is in the store when this returns. If it is there already, nothing is done.

    Raises SignatureInvalid where the coordinator did not sign the round, RecipeRefused where the workplace's owner did not approve it,
    UserError where the run asks for the signature of another key, and whatever is wrong with the round.
    """
    keep_freed()
    journal = site_journal(config, work)
    recipe = journal.recipe(config.context)
    check_allowed(recipe, config, work.run)
    assert recipe.durations.transfer_timeout
    journal = Journal(journal.store.patient(recipe.durations.transfer_timeout), work.run, journal.keys)
    check_pinned(journal, config)
    plan = journal.plan(work.round, work.phase)
    closing = journal.closing(plan, work.opening) if plan else None
    place: dict[str, Any] = {"run": work.run, "round": work.round, "site": config.name}
    if plan is None or closing is None:
        raise SiteError(f"found no closing of opening {work.opening}, expected one", **place)
    ours = [s for s in shares(plan, closing) if s.name == work.share and config.name in s.workplaces]
    if not ours:
        raise SiteError(f"share: found {work.share!r}, expected one that this workplace may do", **place)
    return reduce_elsewhere(journal, plan, closing, ours[0], config.name, recipe=recipe)


@contextlib.contextmanager
def time_limit(work: ShareWork, config: SiteConfig) -> Iterator[None]:
    """Kill this process if the body outlives train_timeout, when the role passes on, or the workplace's own limit."""
    limit, whose = time_allowed(site_journal(config, work).recipe(config.context), config)

    def expire() -> None:
        print(f"killed after {limit} ({whose})", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with killed_after(limit, expire):
        yield
