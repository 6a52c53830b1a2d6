"""Rounds of a simulation: those of the engine, with everything between two commits in memory."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fedflow.engine.aggregation import Evaluator, evaluate_round, weighted_metrics, written_state
from fedflow.engine.reduction import following
from fedflow.engine.rounds import (
    Step,
    amend_run,
    check_cohort,
    key_metrics,
    next_step,
    quorum_lost,
    start_run,
    stops_early,
)
from fedflow.engine.walk import one_thread, segments_of, sizes_of
from fedflow.errors import UpdateInvalid, UserError, field_error
from fedflow.recipe import Recipe
from fedflow.simulation.book import Entry, SiteBook
from fedflow.simulation.crew import Crew, Here, Processes
from fedflow.simulation.runner import Answer, Phase, SiteRunner, Task
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import ContributorSummary, Evaluation, Manifest, Plan, TaskRecord, finite, utc_now
from fedflow.store.state import read_state, tensor_fields
from fedflow.store.tensors import Part
from fedflow.tensors import Packed
from fedflow.types import RoundContext, SiteId, SiteTask, SiteView, Spec, Tensors, Update, derive_seed, spec_of

__all__ = ["BACKENDS", "Backend", "Simulation", "simulate"]

Backend = Literal["processes", "debug"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

log = logging.getLogger(__name__)

_BEHIND = 2  # commits that may wait to be written


def simulate(
    recipe: Recipe,
    sites: Sequence[SiteId] | Mapping[SiteId, Any],
    *,
    store: str | None = None,
    store_options: Mapping[str, Any] | None = None,
    run: str | None = None,
    book: Path | None = None,
    model: Callable[[], nn.Module] | None = None,
    backend: Backend = "processes",
    workers: int | None = None,
    on_commit: Callable[[Manifest], None] = lambda manifest: None,
) -> Journal:
    """Run `recipe` to its end and return its journal; a run that was interrupted is continued from its last commit.

    sites:     names; or site -> workload, used in place of the recipe's. Sites of an earlier start that are not among them
               are absent.
    store:     URL of the store, with its options; default: in memory, gone with this process
    book:      the local file with what sites remember; default: in memory. A run is continued with both.
    model:     makes the module, in place of the recipe's
    backend:   "processes": sites train in worker processes; "debug": in this one, one after the other
    workers:   how many processes; default: one a processor
    on_commit: called after every commit, in their order, by a thread
    The bits are those of every other environment, for any number of workers. Raises QuorumLost where a phase cannot be
    committed; what was committed stays, and a second call goes on from there.
    """
    given = dict(sites) if isinstance(sites, Mapping) else {}
    if backend == "processes" and (given or model):
        raise UserError(
            field_error(
                "backend", backend, "'debug' where workloads or model are given as objects", "name them in the recipe"
            )
        )
    if workers is not None and workers < 1:
        raise UserError(field_error("workers", workers, "a count of at least 1", "leave it out for one a processor"))
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "simulate: found a call while a worker process imports the script; call it below `if __name__ == '__main__':`"
        )
    names = sorted(sites)
    with one_thread():  # and so no threads of torch's, which a fork would lose
        objects = ObjectStore(store or f"memory://fedflow-{uuid.uuid4().hex}", store_options)
        journal = start_run(objects, run or f"{recipe.name}-{uuid.uuid4().hex[:8]}", recipe, names)
        recipe = amend_run(journal, recipe, sites=names)
        everyone = journal.sites()
        crew = _crew(
            recipe, everyone, backend, workers, lambda: SiteRunner(recipe, everyone, workloads=given, model=model)
        )
        with closing(crew):
            Simulation(journal, recipe, names, crew, book, on_commit).run()
    return journal


def _crew(
    recipe: Recipe, sites: list[SiteId], backend: Backend, workers: int | None, runner: Callable[[], SiteRunner]
) -> Crew:
    if backend == "debug":
        return Here(runner())
    return Processes(recipe, sites, workers or len(os.sched_getaffinity(0)), budget=recipe.memory_budget)


class Simulation:
    """One start of a run: `run` goes from its newest commit to its end."""

    def __init__(
        self,
        journal: Journal,
        recipe: Recipe,
        sites: Sequence[SiteId],
        crew: Crew,
        book: Path | None,
        on_commit: Callable[[Manifest], None],
    ) -> None:
        self.journal, self.recipe, self.algorithm, self.crew = journal, recipe, recipe.computation, crew
        head = journal.head(self.algorithm.phases)
        assert head is not None
        self._head, self._on_commit = head, on_commit
        self._nonce, self._everyone = journal.record().nonce, journal.sites()
        self._absent = dict.fromkeys(sorted(set(self._everyone) - set(sites)), "not among the sites")
        needed = bool(self.algorithm.SiteState.__dataclass_fields__) and not self.algorithm.renewable
        self._book = SiteBook(book, journal.run, self._nonce, head=self._number(head), needed=needed)
        self._entries = self._book.entries()
        self._state = read_state(journal.store, self.algorithm.State, head.state)
        evaluate_round(journal, head)  # whoever was killed right after a commit has not done it
        self._values = key_metrics(journal, recipe)
        self._evaluator = Evaluator(recipe) if recipe.evaluation else None

    def _number(self, manifest: Manifest) -> int:
        """Of its commit; -1: the initial one."""
        phases = self.algorithm.phases
        return manifest.round * len(phases) + phases.index(manifest.phase) if manifest.round >= 0 else -1

    def run(self) -> None:
        """Every phase that is left."""
        step = next_step(self.journal, self.recipe)
        chosen, quorum = self._begun(step) if step else ({}, 0)
        contributors = set(self._head.contributors)
        with ExitStack() as stack:
            stack.callback(self._book.close)
            writer = stack.enter_context(_Writer(self))
            while step:
                if step.phase == self.algorithm.phases[0]:
                    chosen, quorum = self._planned(step)
                else:
                    chosen = {site: task for site, task in chosen.items() if site in contributors}
                    chosen, quorum = self._checked(step, chosen, quorum)
                done = self._phase(step, chosen, quorum)
                contributors = {answer.site for answer in done.answers}
                writer.put(done)
                step = self._after(step)

    def _after(self, step: Step) -> Step | None:
        phases = self.algorithm.phases
        if step.phase != phases[-1]:
            return Step(step.round, following(self.algorithm, step.phase))
        ended = step.round + 1 >= self.recipe.rounds or stops_early(self._values, self.recipe)
        return None if ended else Step(step.round + 1, phases[0])

    # -- who takes part
    def _planned(self, step: Step) -> tuple[Mapping[SiteId, SiteTask], int]:
        view = _View(self._everyone, self._entries, self._absent)
        wanted = self.recipe.schedule.plan(step.round, view, self.recipe.seed)
        return self._checked(step, wanted.tasks, wanted.quorum)

    def _checked(
        self, step: Step, chosen: Mapping[SiteId, SiteTask], quorum: int
    ) -> tuple[Mapping[SiteId, SiteTask], int]:
        """Those of the chosen that are there, and the quorum. Raises QuorumLost where they are too few."""
        there = {site: task for site, task in chosen.items() if site not in self._absent}
        quorum = quorum if self.recipe.quorum is None else self.recipe.quorum
        check_cohort(self.recipe, len(there), quorum, self._absent, run=self.journal.run, round=step.round)
        return there, quorum

    def _begun(self, step: Step) -> tuple[Mapping[SiteId, SiteTask], int]:
        """The same of a round whose first phase is committed; nothing of another."""
        first = self.algorithm.phases[0]
        plan = self.journal.plan(step.round, first) if step.phase != first else None
        tasks = plan.tasks if plan else {}
        return {site: SiteTask(task.steps, task.overrides) for site, task in tasks.items()}, plan.quorum if plan else 0

    # -- one phase
    def _phase(self, step: Step, chosen: Mapping[SiteId, SiteTask], quorum: int) -> _Done:
        opened, algorithm, state = utc_now(), self.algorithm, self._state
        broadcast = algorithm.broadcast(state, step.phase)
        expects = algorithm.expects(state, step.phase)
        phase = Phase(self.journal.run, step.round, step.phase, len(self._everyone), broadcast, expects)
        tasks = [Task(site, _overrides(chosen[site]), self._book.kept(site)) for site in sorted(chosen)]
        seed = derive_seed(self.recipe.seed, step.round, step.phase, None)
        context = RoundContext(phase.run, phase.round, phase.phase, None, phase.num_sites, seed)
        names = {name for specs in expects.values() for name in specs}
        sizes = _bytes(spec_of(broadcast)), _bytes(expects)
        done = _Done(step, self._head_number(step), opened, *sizes, names)
        with closing(self.crew.answers(phase, tasks)) as answers:
            return self._reduced(answers, done, context, chosen, quorum)

    def _reduced(
        self,
        answers: Iterator[Answer],
        done: _Done,
        context: RoundContext,
        chosen: Mapping[SiteId, SiteTask],
        quorum: int,
    ) -> _Done:
        """`done`, with the state after it."""
        algorithm, state, step = self.algorithm, self._state, done.step
        updates = self._valid(answers, done)
        if algorithm.measures:
            raw = list(updates)
            context, updates = replace(context, measured=self._measured(raw, context)), iter(raw)
        began = time.monotonic()
        aggregate = algorithm.aggregate((algorithm.decode(u, state, step.phase) for u in updates), context)
        for _ in updates:  # whatever the algorithm did with them
            pass
        found = {answer.site for answer in done.answers}
        if len(found) < quorum or not found.issuperset(self.recipe.required_sites):
            excluded = {**self._absent, **done.excluded}
            raise quorum_lost(
                len(found), quorum, self.recipe.required_sites, excluded, run=context.run, round=context.round
            )
        self._state = done.state = algorithm.server_update(state, aggregate, context)
        done.seconds = time.monotonic() - began
        self._remember(done)
        if self._evaluator and step.phase == algorithm.phases[-1]:
            done.evaluation = finite(self._evaluator(algorithm.model(done.state)))
        if step.phase == algorithm.phases[-1]:
            shown = done.metrics() if done.evaluation is None else done.evaluation
            self._values.append(shown.get(self.recipe.key_metric.name))
        done.plan = self._plan_of(step, chosen, quorum) if len(algorithm.phases) > 1 else None
        return done

    def _head_number(self, step: Step) -> int:
        return step.round * len(self.algorithm.phases) + self.algorithm.phases.index(step.phase)

    def _valid(self, answers: Iterator[Answer], done: _Done) -> Iterator[Update]:
        """The updates that count; everything else about them is noted."""
        for answer in answers:
            reason = answer.reason
            if answer.update is not None:
                update = replace(answer.update, tensors=answer.tensors)
                try:
                    self.algorithm.decode(update, self._state, done.step.phase) if self.recipe.transforms else None
                except UpdateInvalid as error:
                    reason = str(error)
            if reason is not None:
                done.excluded[answer.site] = reason
                continue
            done.add(answer, update, self.algorithm.weight(update))
            known = {name: value for name, value in update.metrics.items() if math.isfinite(value)}
            yield update if len(known) == len(update.metrics) else replace(update, metrics=known)

    def _measured(self, updates: Sequence[Update], context: RoundContext) -> Tensors:
        """What `Reduction` finds, to the bit: figures are summed over the same segments."""
        algorithm, state = self.algorithm, self._state
        specs = [spec_of(update.tensors) for update in updates]
        sizes = sizes_of(spec_of(tensor_fields(state)), specs, kept=len(updates), by_rows=algorithm.by_rows)
        parts = segments_of(sizes, 1 << 62) if algorithm.partitionable else [dict.fromkeys(sizes)]
        total: dict[str, Tensor] = {}
        for part in parts:
            some = replace(state, **{name: _part(tensors, part) for name, tensors in tensor_fields(state).items()})
            sliced = (replace(u, tensors={g: _part(t, part) for g, t in u.tensors.items()}) for u in updates)
            found = algorithm.measure((algorithm.decode(u, some, context.phase) for u in sliced), context)
            for name, value in found.items():
                total[name] = total[name] + value if name in total else value
        return total

    def _remember(self, done: _Done) -> None:
        entries = {answer.site: Entry(done.number, done.step.round, answer.seconds) for answer in done.answers}
        for site in done.excluded:
            before = self._entries.get(site, Entry(done.number))
            entries[site] = replace(before, step=done.number, failures=before.failures + 1)
        self._entries |= entries
        self._book.note(entries, {answer.site: answer.kept for answer in done.answers if answer.kept is not None})

    def _plan_of(self, step: Step, chosen: Mapping[SiteId, SiteTask], quorum: int) -> Callable[[Manifest], Plan]:
        tasks = {site: TaskRecord(steps=t.steps, overrides=dict(t.overrides)) for site, t in chosen.items()}
        return lambda parent: Plan(
            run=self.journal.run,
            nonce=self._nonce,
            round=step.round,
            phase=step.phase,
            parent=parent.digest(),
            broadcast=parent.broadcast,
            tasks=tasks,
            absent=self._absent,
            quorum=quorum,
            accept_bases=[step.round],
            late="drop",
            amendments=len(self.journal.amendments()),
            num_sites=len(self._everyone),
        )

    # -- commits, written by another thread
    def commit(self, done: _Done) -> None:
        """Write what a phase left behind: what sites remember first, the manifest last."""
        self._book.write(done.number, done.number - 1)
        if done.plan is not None:
            self.journal.put_plan(done.plan(self._head))
        manifest = Manifest(
            run=self.journal.run,
            nonce=self._nonce,
            round=done.step.round,
            phase=done.step.phase,
            parent=self._head.digest(),
            contributors=done.contributors,
            excluded={**self._absent, **done.excluded},
            partial=done.partial(),
            **written_state(self.journal, self.algorithm, done.state, following(self.algorithm, done.step.phase)),
            metrics=done.metrics(),
            opened=done.opened,
            committed=utc_now(),
            seconds=done.seconds,
        )
        self._head = self.journal.put_manifest(manifest)
        if done.evaluation is not None:
            self.journal.put_evaluation(
                Evaluation(round=done.step.round, model_digest=manifest.model_digest, metrics=done.evaluation)
            )
        self._on_commit(manifest)


@dataclass
class _Done:
    """One phase: what is committed of it.

    number: of the commit; received, bytes: of broadcast and update; names: of a complete update; fewer: of those that are not
    """

    step: Step
    number: int
    opened: datetime
    received: int
    bytes: int
    names: set[str]
    answers: list[Answer] = field(default_factory=list)
    contributors: dict[SiteId, ContributorSummary] = field(default_factory=dict)
    excluded: dict[SiteId, str] = field(default_factory=dict)
    fewer: dict[SiteId, set[str]] = field(default_factory=dict)
    state: Any = None
    evaluation: Mapping[str, float | None] | None = None
    plan: Callable[[Manifest], Plan] | None = None
    seconds: float = 0.0

    def add(self, answer: Answer, update: Update, weight: float) -> None:
        """An update that counts; its tensors are not kept."""
        size = self.bytes
        if any(not isinstance(tensors, Packed) for tensors in update.tensors.values()):
            self.fewer[answer.site] = {name for tensors in update.tensors.values() for name in tensors}
            size = _bytes(spec_of(update.tensors))
        self.answers.append(replace(answer, update=None, tensors={}))
        self.contributors[answer.site] = ContributorSummary.model_construct(
            update="",
            base_round=update.base_round,
            weight=weight,
            examples=update.examples,
            steps=update.steps,
            lr_sum=update.lr_sum,
            metrics=finite(update.metrics),
            seconds=answer.seconds,
            bytes=size,
            received=self.received,
            numerics=dict(update.numerics),
            training_state=answer.training_state,
        )

    def metrics(self) -> dict[str, float | None]:
        """The sites' weighted means."""
        return weighted_metrics(self.contributors)

    def partial(self) -> dict[str, list[SiteId]]:
        """Which names not all sites sent, and who did."""
        if not self.fewer:
            return {}
        sent = {site: self.fewer.get(site, self.names) for site in self.contributors}
        senders = {
            name: [site for site, found in sent.items() if name in found]
            for name in sorted(set().union(*sent.values()))
        }
        return {name: sites for name, sites in senders.items() if len(sites) < len(sent)}


class _View(Mapping[SiteId, SiteView]):
    """Every site, as a schedule sees it; made when it is looked at."""

    def __init__(self, sites: Sequence[SiteId], entries: Mapping[SiteId, Entry], absent: Mapping[SiteId, str]) -> None:
        self._sites, self._entries, self._absent = dict.fromkeys(sites), entries, absent

    def __getitem__(self, site: SiteId) -> SiteView:
        if site not in self._sites:
            raise KeyError(site)
        entry = self._entries.get(site)
        view = entry.view() if entry else SiteView()
        return replace(view, online=False) if site in self._absent else view

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class _Writer:
    """Commits phases while the next ones are trained; at most `_BEHIND` wait."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._waiting: queue.Queue[_Done | None] = queue.Queue(_BEHIND)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="commits", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, done: _Done) -> None:
        """Commit it, soon. Raises what went wrong with one before."""
        self._check()
        self._waiting.put(done)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        while (done := self._waiting.get()) is not None:
            if self._failure is None:
                try:
                    self._simulation.commit(done)
                except BaseException as error:
                    self._failure = error


def _bytes(spec: Spec) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for specs in spec.values() for s in specs.values())


def _overrides(task: SiteTask) -> dict[str, Any]:
    return {**task.overrides, **({} if task.steps is None else {"steps": task.steps})}


def _part(tensors: Tensors, part: Part) -> dict[str, Tensor]:
    """Those of `tensors` that are in the part, or those rows of them."""
    found = {}
    for name in part:
        if name in tensors:
            rows = part[name]
            found[name] = tensors[name] if rows is None else tensors[name][rows[0] : rows[1]]
    return found
