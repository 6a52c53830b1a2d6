"""Aggregation and commit: a pure function of (committed state, closing), however often and by whomever it is run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedflow.algorithm import Algorithm, weighted_metrics
from fedflow.engine.reduction import Reduction
from fedflow.engine.updates import Contributor
from fedflow.errors import FedflowError
from fedflow.local.model import build_model, load_groups
from fedflow.local.numerics import applied
from fedflow.local.workload import check_evaluator
from fedflow.recipe import Recipe
from fedflow.registry import call, resolve
from fedflow.store.journal import INITIAL, Journal
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import (
    Closing,
    ContributorSummary,
    Evaluation,
    Manifest,
    Plan,
    SiteRecord,
    StateRecord,
    finite,
    utc_now,
)
from fedflow.store.state import read_outline, tensor_fields, write_state
from fedflow.store.tensors import read_tensors, write_tensors
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext, SiteId, derive_seed

_log = logging.getLogger(__name__)

__all__ = ["Evaluator", "aggregate_round", "commit_initial", "evaluate_model", "evaluate_round", "read_model"]


def commit_initial(
    journal: Journal, algorithm: Algorithm, model: Groups, others: Mapping[str, Groups] | None = None
) -> Manifest:
    """Commit the state before round 0, or find it committed. others: further models, by name"""
    found = journal.manifest(INITIAL, "initial")
    if found:
        return found
    state = algorithm.init(model)
    if others:
        state = algorithm.with_models(state, others)
    return journal.put_manifest(
        Manifest(
            run=journal.run,
            nonce=journal.record().nonce,
            round=INITIAL,
            phase="initial",
            parent=None,
            **written_state(journal, algorithm, state, algorithm.phases[0]),
            committed=utc_now(),
        )
    )


def written_state(journal: Journal, algorithm: Algorithm, state: Any, following: str) -> dict[str, Any]:
    """Write a state that is in memory, and what sites see of it in the phase `following`: those fields of a manifest."""
    store, objects = journal.store, dict[int, ObjectRef]()
    public = _write_groups(store, f"{journal.public}/objects", algorithm.broadcast(state, following), objects)
    record = write_state(store, f"{journal.server}/objects", state, objects)
    objects |= {id(tensors): record.tensors[field] for field, tensors in tensor_fields(state).items()}
    groups = algorithm.model(state)
    return {
        "state": record,
        "model": _write_groups(store, f"{journal.server}/objects", groups, objects),
        "broadcast": public,
        "model_digest": model_digest({name: t for tensors in groups.values() for name, t in tensors.items()}),
    }


def _write_groups(
    store: ObjectStore, prefix: str, groups: Groups, written: dict[int, ObjectRef]
) -> dict[str, ObjectRef]:
    refs = {}
    for group, tensors in groups.items():
        refs[group] = written.setdefault(id(tensors), written.get(id(tensors)) or write_tensors(store, prefix, tensors))
    return refs


def aggregate_round(
    journal: Journal, plan: Plan, closing: Closing, *, memory_budget: int | None = None, threads: int | None = None
) -> Manifest:
    """Reduce the updates of a quorate `closing`, step the server's state, commit. Returns the manifest in force.

    memory_budget: bytes that the tensors in memory take at most; default: the recipe's. Neither updates nor state are ever
                   in memory as a whole, unless they fit into it.
    threads:       parts in work at once; default: one a processor, and more where the store is far away
    No bit depends on either. Raises UpdateInvalid (with the site) where an update fails its digest or is not finite: then
    `exclude` it and call again with the new closing. Until the manifest is written nothing has happened.
    """
    recipe = journal.recipe()
    algorithm = recipe.computation
    head = journal.head(algorithm.phases)
    assert head is not None
    done = journal.manifest(
        plan.round, plan.phase
    )  # looked up after the head, else a commit in between passed for a foreign one
    if done is not None:
        return done
    started = time.monotonic()
    if head.digest() != plan.parent:
        raise FedflowError(
            f"the plan continues {plan.parent}, but the newest commit is {head.digest()}; resume the run",
            run=plan.run,
            round=plan.round,
        )
    updates = [Contributor(journal, plan, contribution) for _, contribution in sorted(closing.contributors.items())]
    context = RoundContext.at(recipe.seed, plan.run, plan.round, plan.phase, None, plan.num_sites)
    budget = recipe.memory_budget if memory_budget is None else memory_budget
    reduction = Reduction(journal, algorithm, head, updates, context, budget, threads or _threads(journal.store))
    written = reduction.write(f"{journal.public}/objects", f"{journal.server}/objects", closing.digest())
    record = StateRecord(tensors=written.of("state"), scalars=reduction.scalars(written))
    outline = read_outline(journal.store, algorithm.State, record, written.spec("state"))
    if record != head.state and (line := algorithm.report(outline, len(updates))):
        _log.info("run %s, round %d: %s", plan.run, plan.round, line)
    weights = {u.manifest.site: algorithm.weight(u.bare) for u in updates}
    contributors = {u.manifest.site: u.summary(weights[u.manifest.site]) for u in updates}
    return journal.put_manifest(
        Manifest(
            run=journal.run,
            nonce=journal.record().nonce,
            round=plan.round,
            phase=plan.phase,
            parent=head.digest(),
            closing=journal.closing_key(plan, closing),
            closing_digest=closing.digest(),
            contributors=contributors,
            excluded=closing.excluded,
            partial=_partial(updates),
            numerics_differ=_numerics_differ(contributors),
            state=record,
            model=written.of("model"),
            broadcast=written.of("broadcast"),
            model_digest=written.model_digest,
            metrics=weighted_metrics([(c.weight, c.metrics) for c in contributors.values()]),
            sites=_site_records(head, plan, contributors, closing),
            opened=next((o.opened for o in journal.openings(plan)), None),
            committed=utc_now(),
            seconds=time.monotonic() - started,
        )
    )


def _threads(store: ObjectStore) -> int:
    near = store.url.startswith(("file://", "memory://"))
    return len(os.sched_getaffinity(0)) if near else max(REMOTE, len(os.sched_getaffinity(0)))


REMOTE = 8
"""Parts in work at once where most of the time is waiting for the store."""


def _partial(updates: list[Contributor]) -> dict[str, list[SiteId]]:
    """ "name" -> the sites that sent it, where not all did."""
    everywhere = {name for u in updates for name in u.names}
    senders = {name: [u.manifest.site for u in updates if name in u.names] for name in sorted(everywhere)}
    return {name: sites for name, sites in senders.items() if len(sites) < len(updates)}


def _numerics_differ(contributors: Mapping[SiteId, ContributorSummary]) -> list[SiteId]:
    """Sites whose numerics differ from the first contributor's."""
    first = next(iter(contributors.values()), None)
    return [site for site, c in contributors.items() if first is not None and c.numerics != first.numerics]


def _site_records(
    parent: Manifest, plan: Plan, contributors: Mapping[SiteId, ContributorSummary], closing: Closing
) -> dict[SiteId, SiteRecord]:
    records = dict(parent.sites)
    for site, c in contributors.items():
        records[site] = SiteRecord(accepted=c.update, last_round=plan.round, seconds=c.seconds, failures=0)
    for site in closing.excluded:
        before = records.get(site, SiteRecord())
        records[site] = before.model_copy(update={"failures": before.failures + 1})
    return dict(sorted(records.items()))


# -- the model of a round ----------------------------------------------------------------------------------------------
def read_model(journal: Journal, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """The global model that `manifest` commits, by group, verified."""
    return {group: read_tensors(journal.store, ref) for group, ref in manifest.model.items()}


class Evaluator:
    """The server's evaluation workload, with a model of its own. Only where the recipe has one."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.evaluation
        found = resolve("workloads", recipe.evaluation.path, field="evaluation")
        made = call(found, recipe.evaluation.args, field="evaluation.args", site="server")
        self._workload, self._recipe = check_evaluator(made, "evaluation"), recipe
        self._model = build_model(recipe.model.path, recipe.model.args, seed=recipe.seed)
        self._model.to(recipe.numerics.device).eval()

    def __call__(self, groups: Groups) -> dict[str, float]:
        """Metrics of a model."""
        load_groups(self._model, groups)
        with applied(self._recipe.numerics, derive_seed("evaluation", self._recipe.seed)), torch.no_grad():
            return {name: float(value) for name, value in self._workload.evaluate(self._model).items()}


def evaluate_model(recipe: Recipe, groups: Groups) -> dict[str, float]:
    """Metrics of a model on the server's evaluation workload; empty where the recipe has none."""
    return Evaluator(recipe)(groups) if recipe.evaluation else {}


def evaluate_round(journal: Journal, manifest: Manifest) -> Evaluation | None:
    """The server's evaluation of a committed round: made, or found made; None where the recipe has none, or the round has
    phases to come."""
    found = journal.evaluation(manifest.round)
    recipe = journal.recipe()
    if found is not None or recipe.evaluation is None or manifest.phase != recipe.phases[-1]:
        return found
    started = time.monotonic()
    metrics = evaluate_model(recipe, read_model(journal, manifest))
    return journal.put_evaluation(
        Evaluation(
            round=manifest.round,
            model_digest=manifest.model_digest,
            metrics=finite(metrics),
            seconds=time.monotonic() - started,
        )
    )
