"""A share of an aggregation at a site or at a regional aggregator. May run twice, or be killed anywhere."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from fedflow.engine.aggregation import reduce_elsewhere
from fedflow.engine.shares import shares
from fedflow.engine.site import killed_after
from fedflow.errors import SiteError
from fedflow.memory import keep_freed
from fedflow.recipe import Recipe, SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Reduced

__all__ = ["ShareWork", "aggregation_step", "time_limit"]


@dataclass(frozen=True)
class ShareWork:
    """A share as it is sent: names only. share: "round", or "region-<name>"; opening: whose closing in force is aggregated"""

    run: str
    round: int
    phase: str
    opening: int
    share: str


def aggregation_step(work: ShareWork, config: SiteConfig) -> Reduced:
    """Do `work` at the workplace of `config`; its record is in the store when this returns. If it is there already, nothing is done."""
    keep_freed()
    recipe = _recipe(work, config)
    assert recipe.durations.transfer_timeout
    store = ObjectStore(config.store, config.store_options).patient(recipe.durations.transfer_timeout)
    journal = Journal(store, work.run)
    plan = journal.plan(work.round, work.phase)
    closing = journal.closing(plan, work.opening) if plan else None
    place = {"run": work.run, "round": work.round, "site": config.name}
    if plan is None or closing is None:
        raise SiteError(f"found no closing of opening {work.opening}, expected one", **place)  # type: ignore[arg-type]
    ours = [s for s in shares(plan, closing) if s.name == work.share and config.name in s.workplaces]
    if not ours:
        raise SiteError(f"share: found {work.share!r}, expected one that this workplace may do", **place)  # type: ignore[arg-type]
    return reduce_elsewhere(journal, plan, closing, ours[0], config.name, recipe=recipe)


def _recipe(work: ShareWork, config: SiteConfig) -> Recipe:
    journal = Journal(ObjectStore(config.store, config.store_options), work.run)
    return journal.recipe({"allowed_imports": config.allowed_imports})


@contextlib.contextmanager
def time_limit(work: ShareWork, config: SiteConfig) -> Iterator[None]:
    """Kill this process if the body outlives train_timeout: the role has passed on by then."""
    limit = _recipe(work, config).durations.train_timeout
    assert limit

    def expire() -> None:
        print(f"killed after {limit} (train_timeout)", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with killed_after(limit, expire):
        yield
