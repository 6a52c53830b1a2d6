"""The reference run: every round of a recipe in this process, without a workflow engine."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import nn

from fedflow.engine.aggregation import evaluate_round, reduce_elsewhere
from fedflow.engine.rounds import (
    amend_run,
    close_round,
    commit_round,
    delegate,
    next_step,
    open_round,
    start_run,
    survey,
)
from fedflow.engine.shares import Share
from fedflow.engine.site import SiteWork, site_step
from fedflow.errors import FedflowError
from fedflow.recipe import Recipe, SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Closing, Manifest, Plan
from fedflow.types import SiteId

__all__ = ["simulate"]


def simulate(
    recipe: Recipe,
    workloads: Mapping[SiteId, Any] | Sequence[SiteId],
    *,
    store: str | None = None,
    store_options: Mapping[str, Any] | None = None,
    run: str | None = None,
    state: str | None = None,
    model: Callable[[], nn.Module] | None = None,
    order: Callable[[int, list[SiteId]], list[SiteId]] = lambda round, sites: sites,
    on_round: Callable[[Manifest], None] = lambda manifest: None,
) -> Journal:
    """Run `recipe` to its end and return its journal; a run that was interrupted is continued.

    workloads: site -> its workload, used in place of the recipe's; or only the sites' names. Sites of an earlier start that
               are not among them are absent.
    store:     URL of the store, with its options; default: in memory, gone with this process
    state:     URL below which the sites' states lie; default: beside the store
    order:     (round, sites) -> the order in which they train; no bit depends on it
    Raises QuorumLost where a round cannot be committed; what was committed stays, and a second call goes on from there.
    """
    objects = ObjectStore(store or f"memory://fedflow-{uuid.uuid4().hex}", store_options)
    given = dict(workloads) if isinstance(workloads, Mapping) else {}
    base = ObjectStore(state).url if state else f"{objects.url}-states"
    configs = {
        s: SiteConfig(
            name=s,
            store=objects.url,
            store_options=dict(store_options or {}),
            state=f"{base}/{s}",
            allowed_imports=["*"],
        )
        for s in workloads
    }
    journal = start_run(objects, run or f"{recipe.name}-{uuid.uuid4().hex[:8]}", recipe, sorted(configs))
    recipe = amend_run(journal, recipe, sites=sorted(configs))
    if head := journal.head(recipe.phases):
        evaluate_round(journal, head)  # whoever was killed right after a commit has not done it
    resumed = True
    while step := next_step(journal, recipe):
        absent = dict.fromkeys(set(journal.sites()) - configs.keys(), "not among the workloads")
        plan, opening = open_round(journal, step, absent=absent, reopen=resumed)
        resumed = False
        chosen = order(plan.round, sorted(plan.tasks.keys() - absent.keys()))
        works = [(SiteWork(plan.run, plan.round, plan.phase, opening.number), configs[s], given.get(s)) for s in chosen]
        failures = _attempts(works, objects, model, at_once=recipe.computation.together)
        closing = close_round(
            journal, plan, opening, survey(journal, plan), why="every site answered", missing=absent | failures
        )
        closing = delegate(journal, plan, closing, partial(_aggregated, journal, plan))
        manifest = commit_round(journal, plan, closing)
        evaluate_round(journal, manifest)
        on_round(manifest)
    return journal


def _aggregated(journal: Journal, plan: Plan, closing: Closing, wanted: Sequence[Share]) -> dict[Share, str]:
    """Do `wanted`, each at the first of its workplaces at which that is possible; those that it is at none of, and why."""
    undone = {}
    for share in wanted:
        why = []
        for workplace in share.workplaces:
            try:
                reduce_elsewhere(journal, plan, closing, share, workplace)
                break
            except FedflowError as error:
                why.append(f"{workplace}: {error.reason}")
        else:
            undone[share] = "; ".join(why)
    return undone


def _attempts(
    works: list[tuple[SiteWork, SiteConfig, Any]],
    store: ObjectStore,
    model: Callable[[], nn.Module] | None,
    *,
    at_once: bool,
) -> dict[SiteId, str]:
    """Site -> why it failed. One after the other, or all at once."""

    def attempt(one: tuple[SiteWork, SiteConfig, Any]) -> tuple[SiteId, str | None]:
        work, config, workload = one
        return config.name, _attempt(work, config, workload=workload, model=model, store=store)

    if not at_once:
        return {site: why for site, why in map(attempt, works) if why}
    with ThreadPoolExecutor(max(len(works), 1)) as pool:
        return {site: why for site, why in pool.map(attempt, works) if why}


def _attempt(work: SiteWork, config: SiteConfig, **given: Any) -> str | None:
    """Why the site failed, with its traceback where fedflow did not foresee it; None if it did not."""
    try:
        site_step(work, config, unhurried=True, **given)
    except FedflowError as error:
        return str(error)
    except Exception:
        return f"training failed:\n{traceback.format_exc()}"
    return None
