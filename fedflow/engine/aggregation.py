"""Aggregation and commit: a pure function of (committed state, closing), however often and by whomever it is run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedflow.algorithm import Algorithm
from fedflow.engine.updates import Contributor, as_update
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
    finite,
    utc_now,
)
from fedflow.store.state import merge, read_state, restrict, tensor_fields, write_state
from fedflow.store.tensors import read_tensors, write_tensors
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext, SiteId, Tensors, Update, derive_seed

_log = logging.getLogger(__name__)

__all__ = ["aggregate_round", "commit_initial", "evaluate_model", "evaluate_round", "read_model"]


def commit_initial(journal: Journal, algorithm: Algorithm, model: Groups) -> Manifest:
    """Commit the state before round 0, or find it committed."""
    found = journal.manifest(INITIAL, "initial")
    return found or _commit(
        journal, algorithm, algorithm.init(model), round=INITIAL, phase="initial", parent=None, seconds=0.0
    )


def aggregate_round(journal: Journal, plan: Plan, closing: Closing, *, bucket_bytes: int | None = None) -> Manifest:
    """Reduce the updates of a quorate `closing`, step the server's state, commit. Returns the manifest in force.

    bucket_bytes: tensor names are taken in buckets of about so many bytes of state; None = all at once. No bit depends on it.
    Raises UpdateInvalid (with the site) where an update fails its digest or is not finite: then `exclude` it and
    call again with the new closing. Until the manifest is written nothing has happened.
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
    state = read_state(journal.store, algorithm.State, head.state)
    context = RoundContext(
        plan.run, plan.round, plan.phase, None, plan.num_sites, derive_seed(recipe.seed, plan.round, plan.phase, None)
    )
    buckets = list(_buckets(state, updates, bucket_bytes))
    measured = _measure(algorithm, state, updates, buckets, context)
    context = RoundContext(**{**vars(context), "measured": measured})
    parts = []
    for names in buckets:
        part = restrict(state, names)
        aggregate = algorithm.aggregate(_decoded(algorithm, part, updates, names, context), context)
        parts.append(algorithm.server_update(part, aggregate, context))
    new = merge(parts) if parts else state
    if line := algorithm.report(new, len(updates)):
        _log.info("run %s, round %d: %s", plan.run, plan.round, line)
    return _commit(
        journal,
        algorithm,
        new,
        round=plan.round,
        phase=plan.phase,
        parent=head,
        seconds=time.monotonic() - started,
        plan=plan,
        closing=closing,
        updates=updates,
    )


def _measure(
    algorithm: Algorithm, state: Any, updates: list[Contributor], buckets: list[list[str]], context: RoundContext
) -> Tensors:
    """Σ over the buckets of what `algorithm.measure` finds, in their order."""
    if not algorithm.measures:
        return {}
    total: dict[str, Tensor] = {}
    for names in buckets:
        part = _decoded(algorithm, restrict(state, names), updates, names, context)
        for name, value in algorithm.measure(part, context).items():
            total[name] = total[name] + value if name in total else value
    return total


def _decoded(
    algorithm: Algorithm, part: Any, updates: list[Contributor], names: list[str], context: RoundContext
) -> Iterator[Update]:
    """Those tensors of every update, as the algorithm reads them; one in memory at a time."""
    return (algorithm.decode(u.load(names), part, context.phase) for u in updates)


def _buckets(state: Any, updates: list[Contributor], bucket_bytes: int | None) -> Iterator[list[str]]:
    """All tensor names of state and updates, in order, in buckets of about `bucket_bytes` of state."""
    sizes: dict[str, int] = {name: 0 for update in updates for name in update.names}
    for tensors in tensor_fields(state).values():
        for name, tensor in tensors.items():
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
    bucket: list[str] = []
    filled = 0
    for name in sorted(sizes):
        if bucket and bucket_bytes is not None and filled + sizes[name] > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(name)
        filled += sizes[name]
    if bucket or not sizes:  # a payload of scalars alone is one bucket without names
        yield bucket


# -- commit ------------------------------------------------------------------------------------------------------------
def _commit(
    journal: Journal,
    algorithm: Algorithm,
    state: Any,
    *,
    round: int,
    phase: str,
    parent: Manifest | None,
    seconds: float,
    plan: Plan | None = None,
    closing: Closing | None = None,
    updates: list[Contributor] | None = None,
) -> Manifest:
    """Write the state's objects, then the manifest. Groups that sites may see are stored once, under public/."""
    store, updates = journal.store, updates or []
    following = (
        algorithm.phases[(algorithm.phases.index(phase) + 1) % len(algorithm.phases)]
        if phase in algorithm.phases
        else algorithm.phases[0]
    )
    broadcast, model = algorithm.broadcast(state, following), algorithm.model(state)
    written: dict[int, ObjectRef] = {}
    public = _write_groups(store, f"{journal.public}/objects", broadcast, written)
    record = write_state(store, f"{journal.server}/objects", state, written)
    written |= {id(tensors): record.tensors[field] for field, tensors in tensor_fields(state).items()}
    of_model = _write_groups(store, f"{journal.server}/objects", model, written)
    weights = {u.manifest.site: algorithm.weight(as_update(u.manifest, {})) for u in updates}
    contributors = {u.manifest.site: u.summary(weights[u.manifest.site]) for u in updates}
    manifest = Manifest(
        run=journal.run,
        nonce=journal.record().nonce,
        round=round,
        phase=phase,
        parent=parent.digest() if parent else None,
        closing=journal.closing_key(plan, closing) if plan and closing else None,
        closing_digest=closing.digest() if closing else None,
        contributors=contributors,
        excluded=closing.excluded if closing else {},
        partial=_partial(updates),
        numerics_differ=_numerics_differ(contributors),
        state=record,
        model=of_model,
        broadcast=public,
        model_digest=model_digest({name: t for tensors in model.values() for name, t in tensors.items()}),
        metrics=weighted_metrics(contributors),
        sites=_site_records(parent, plan, contributors, closing),
        opened=next((o.opened for o in journal.openings(plan)), None) if plan else None,
        committed=utc_now(),
        seconds=seconds,
    )
    return journal.put_manifest(manifest)


def _write_groups(
    store: ObjectStore, prefix: str, groups: Groups, written: dict[int, ObjectRef]
) -> dict[str, ObjectRef]:
    refs = {}
    for group, tensors in groups.items():
        refs[group] = written.setdefault(id(tensors), written.get(id(tensors)) or write_tensors(store, prefix, tensors))
    return refs


def _partial(updates: list[Contributor]) -> dict[str, list[SiteId]]:
    """ "name" -> the sites that sent it, where not all did."""
    everywhere = {name for u in updates for name in u.names}
    senders = {name: [u.manifest.site for u in updates if name in u.names] for name in sorted(everywhere)}
    return {name: sites for name, sites in senders.items() if len(sites) < len(updates)}


def _numerics_differ(contributors: Mapping[SiteId, ContributorSummary]) -> list[SiteId]:
    """Sites whose numerics differ from the first contributor's."""
    first = next(iter(contributors.values()), None)
    return [site for site, c in contributors.items() if first is not None and c.numerics != first.numerics]


def weighted_metrics(contributors: Mapping[SiteId, ContributorSummary]) -> dict[str, float | None]:
    """Weighted mean of every metric over the sites that reported it."""
    names = sorted({name for c in contributors.values() for name in c.metrics})
    means = {}
    for name in names:
        known = [(c.weight, v) for c in contributors.values() if (v := c.metrics.get(name)) is not None]
        means[name] = sum(w * v for w, v in known) / sum(w for w, _ in known) if known else float("nan")
    return finite(means)


def _site_records(
    parent: Manifest | None,
    plan: Plan | None,
    contributors: Mapping[SiteId, ContributorSummary],
    closing: Closing | None,
) -> dict[SiteId, SiteRecord]:
    records = dict(parent.sites) if parent else {}
    for site, c in contributors.items():
        assert plan is not None
        records[site] = SiteRecord(accepted=c.update, last_round=plan.round, seconds=c.seconds, failures=0)
    for site in closing.excluded if closing else ():
        before = records.get(site, SiteRecord())
        records[site] = before.model_copy(update={"failures": before.failures + 1})
    return dict(sorted(records.items()))


# -- the model of a round ----------------------------------------------------------------------------------------------
def read_model(journal: Journal, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """The global model that `manifest` commits, by group, verified."""
    return {group: read_tensors(journal.store, ref) for group, ref in manifest.model.items()}


def evaluate_model(recipe: Recipe, groups: Groups) -> dict[str, float]:
    """Metrics of a model on the server's evaluation workload; empty where the recipe has none."""
    if recipe.evaluation is None:
        return {}
    found = resolve("workloads", recipe.evaluation.path, field="evaluation")
    workload = check_evaluator(
        call(found, recipe.evaluation.args, field="evaluation.args", site="server"), "evaluation"
    )
    model = build_model(recipe.model.path, recipe.model.args, seed=recipe.seed)
    load_groups(model, groups)
    model.to(recipe.numerics.device).eval()
    with applied(recipe.numerics, derive_seed("evaluation", recipe.seed)), torch.no_grad():
        return {name: float(value) for name, value in workload.evaluate(model).items()}


def evaluate_round(journal: Journal, manifest: Manifest) -> Evaluation | None:
    """The server's evaluation of a committed round: made, or found made; None where the recipe has none, or the round has
    phases to come."""
    found = journal.evaluation(manifest.round)
    recipe = journal.recipe()
    if found is not None or recipe.evaluation is None or manifest.phase != recipe.algorithm.phases[-1]:
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
