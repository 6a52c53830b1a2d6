"""Aggregation and commit: a pure function of (committed state, closing), however often and by whomever it is run."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedflow.algorithm import Algorithm, weighted_metrics
from fedflow.engine.outputs import Written
from fedflow.engine.reduction import PartialReduction, Reduction, RegionalSum
from fedflow.engine.shares import Share, reduced_of, shares
from fedflow.engine.updates import Contributor
from fedflow.errors import FedflowError, ObjectMissing, RoundError, UpdateInvalid
from fedflow.local.model import build_model, load_groups
from fedflow.local.numerics import applied
from fedflow.local.workload import check_evaluator
from fedflow.memory import processors
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
    Reduced,
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

__all__ = [
    "Evaluator",
    "aggregate_round",
    "commit_initial",
    "evaluate_model",
    "evaluate_round",
    "read_model",
    "reduce_elsewhere",
]


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


def written_state(
    journal: Journal, algorithm: Algorithm, state: Any, following: str, *, write: bool = True
) -> dict[str, Any]:
    """Write a state that is in memory, and what sites see of it in the phase `following`: those fields of a manifest.

    write: False: they say what would be written
    """
    store, objects = journal.store if write else None, dict[int, ObjectRef]()
    broadcast, groups = algorithm.broadcast(state, following), algorithm.model(state)  # kept: their ids stay theirs
    public = _write_groups(store, f"{journal.public}/objects", broadcast, objects)
    record = write_state(store, f"{journal.server}/objects", state, objects)
    objects |= {id(tensors): record.tensors[field] for field, tensors in tensor_fields(state).items()}
    return {
        "state": record,
        "model": _write_groups(store, f"{journal.server}/objects", groups, objects),
        "broadcast": public,
        "model_digest": model_digest({name: t for tensors in groups.values() for name, t in tensors.items()}),
    }


def _write_groups(
    store: ObjectStore | None, prefix: str, groups: Groups, written: dict[int, ObjectRef]
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
    No bit depends on either. What the plan has aggregated elsewhere must be there. Raises UpdateInvalid (with the site) where an update
    fails its digest or is not finite: then `exclude` it and call again with the new closing. Until the manifest is written nothing has
    happened.
    """
    recipe = journal.recipe()
    head = journal.head(recipe.phases)
    assert head is not None
    # looked up after the head, else a commit in between passed for a foreign one
    done = journal.manifest(plan.round, plan.phase)
    if done is not None:
        return done
    return _Phase(journal, plan, closing, recipe, head).commit(memory_budget, threads)


@dataclass(frozen=True)
class _Phase:
    """A closed phase, and the commit that it continues."""

    journal: Journal
    plan: Plan
    closing: Closing
    recipe: Recipe
    head: Manifest

    def __post_init__(self) -> None:
        if self.head.digest() != self.plan.parent:
            raise FedflowError(
                f"the plan continues {self.plan.parent}, but the newest commit is {self.head.digest()}; resume the run",
                run=self.plan.run,
                round=self.plan.round,
            )

    @cached_property
    def algorithm(self) -> Algorithm:
        return self.recipe.computation

    @cached_property
    def updates(self) -> list[Contributor]:
        contributors = sorted(self.closing.contributors.items())
        return [Contributor(self.journal, self.plan, contribution) for _, contribution in contributors]

    def _of(self, sites: Collection[SiteId]) -> list[Contributor]:
        return [u for u, site in zip(self.updates, sorted(self.closing.contributors), strict=True) if site in sites]

    def _arguments(self, memory_budget: int | None, threads: int | None) -> dict[str, Any]:
        plan = self.plan
        return {
            "journal": self.journal,
            "algorithm": self.algorithm,
            "head": self.head,
            "context": RoundContext.at(self.recipe.seed, plan.run, plan.round, plan.phase, None, plan.num_sites),
            "budget": self.recipe.memory_budget if memory_budget is None else memory_budget,
            "threads": threads or _threads(self.journal.store),
        }

    # -- where it runs
    def summed(
        self, part: Share, workplace: str, memory_budget: int | None = None, threads: int | None = None
    ) -> Reduced:
        """The sum of a region's updates, made at `workplace`."""
        started = time.monotonic()
        reduction = PartialReduction(updates=self._of(part.sites), **self._arguments(memory_budget, threads))
        written = reduction.write({"sum": f"{self.journal.workshop(workplace)}/objects"}, part.of)
        weights = {group: reduction.weights.get(group, {}) for group in written.of("sum")}
        spent = time.monotonic() - started
        return Reduced(workplace=workplace, of=part.of, sums=written.of("sum"), weights=weights, seconds=spent)

    def whole(
        self, of: str, workplace: str | None, memory_budget: int | None = None, threads: int | None = None
    ) -> tuple[Reduced, Written]:
        """Everything that the phase comes to, made at `workplace`, or at the coordinator."""
        started, regional = time.monotonic(), [s for s in shares(self.plan, self.closing) if s.region]
        sums = [self._regional_sum(share) for share in regional]
        apart = {site for share in regional for site in share.sites}
        direct = self._of(self.closing.contributors.keys() - apart)
        reduction = Reduction(updates=direct, sums=sums, **self._arguments(memory_budget, threads))
        public, server = f"{self.journal.public}/objects", f"{self.journal.server}/objects"
        own = f"{self.journal.workshop(workplace)}/objects" if workplace else None
        prefixes = {"broadcast": own or public, "state": own or server, "model": own or server}
        written = reduction.write(prefixes, self.closing.digest())
        reduced = Reduced(
            workplace=workplace or "",
            of=of,
            state=StateRecord(tensors=written.of("state"), scalars=reduction.scalars(written)),
            model=written.of("model"),
            broadcast=written.of("broadcast"),
            model_digest=written.model_digest,
            seconds=time.monotonic() - started,
        )
        return reduced, written

    def _regional_sum(self, share: Share) -> RegionalSum:
        found = reduced_of(self.journal, share)
        if found is None or found.invalid:
            raise RoundError(
                f"region {share.region}: found no sum of its updates, expected one; resume the run",
                run=self.plan.run,
                round=self.plan.round,
            )
        weighed = [(u.bare, self.algorithm.weight(u.bare)) for u in self._of(share.sites)]
        return RegionalSum(self.journal, found, weighed)

    # -- what is committed
    def commit(self, memory_budget: int | None, threads: int | None) -> Manifest:
        journal, plan, closing, head, algorithm = self.journal, self.plan, self.closing, self.head, self.algorithm
        whole = next((s for s in shares(plan, closing) if s.region is None), None)
        if whole is None:
            reduced, written = self.whole("", None, memory_budget, threads)
            outline = read_outline(journal.store, algorithm.State, reduced.state, written.spec("state"))
        else:
            found = reduced_of(journal, whole)
            if found is None or found.invalid:
                raise RoundError(
                    "found no aggregation of the round, expected one; resume the run", run=plan.run, round=plan.round
                )
            reduced, outline = found, read_outline(journal.store, algorithm.State, found.state)
        if reduced.state != head.state and (line := algorithm.report(outline, len(self.updates))):
            _log.info("run %s, round %d: %s", plan.run, plan.round, line)
        weights = {u.manifest.site: algorithm.weight(u.bare) for u in self.updates}
        contributors = {u.manifest.site: u.summary(weights[u.manifest.site]) for u in self.updates}
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
                partial=_partial(self.updates),
                numerics_differ=_numerics_differ(contributors),
                state=reduced.state,
                model=reduced.model,
                broadcast=reduced.broadcast,
                model_digest=reduced.model_digest,
                metrics=weighted_metrics([(c.weight, c.metrics) for c in contributors.values()]),
                sites=_site_records(head, plan, contributors, closing),
                opened=next((o.opened for o in journal.openings(plan)), None),
                committed=utc_now(),
                aggregator=reduced.workplace or None,
                seconds=reduced.seconds,
            )
        )


def reduce_elsewhere(
    journal: Journal,
    plan: Plan,
    closing: Closing,
    share: Share,
    workplace: str,
    *,
    recipe: Recipe | None = None,
    memory_budget: int | None = None,
    threads: int | None = None,
) -> Reduced:
    """Do `share` of the aggregation of a phase at a site or a regional aggregator, `workplace`, which writes below its own prefix only.

    recipe: as that place reads it; default: the run's. An update that is unreadable or not finite is named in what is returned, and in
    the record, which is written last; then there is nothing else. A second call finds it done.
    """
    if done := reduced_of(journal, share, (workplace,)):
        return done
    recipe = recipe or journal.recipe()
    head = journal.head(recipe.phases)
    assert head is not None
    phase = _Phase(journal, plan, closing, recipe, head)
    try:
        if share.region is None:
            reduced = phase.whole(share.of, workplace, memory_budget, threads)[0]
        else:
            reduced = phase.summed(share, workplace, memory_budget, threads)
    except UpdateInvalid as error:
        assert error.site is not None
        reduced = Reduced(workplace=workplace, of=share.of, invalid={error.site: error.reason})
    return journal.put_reduced(reduced)


def _threads(store: ObjectStore) -> int:
    near = store.url.startswith(("file://", "memory://"))
    return processors() if near else max(REMOTE, processors())


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
        records[site] = SiteRecord(
            accepted=c.update, last_round=plan.round, seconds=c.seconds, failures=0, steps=c.steps
        )
    for site in closing.excluded:
        before = records.get(site, SiteRecord())
        records[site] = before.model_copy(update={"failures": before.failures + 1})
    return dict(sorted(records.items()))


# -- the model of a round ----------------------------------------------------------------------------------------------
def read_model(journal: Journal, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """The global model that `manifest` commits, by group, verified. Raises ObjectMissing where that round's is not kept."""
    try:
        return {group: read_tensors(journal.store, ref) for group, ref in manifest.model.items()}
    except ObjectMissing as error:
        raise ObjectMissing(
            f"{manifest.run}: found no model of round {manifest.round}, expected one: it was removed by `fedflow store gc`, "
            f"or a simulation with `journal_every` did not write it; choose another round, the last always has one ({error})"
        ) from error


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
