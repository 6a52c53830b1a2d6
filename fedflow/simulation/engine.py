"""Rounds of a simulation: those of the engine, with everything between two commits in memory."""

from __future__ import annotations

import heapq
import logging
import math
import multiprocessing
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter
from torch import Tensor, nn

from fedflow.algorithm import Averager, weighted_metrics
from fedflow.engine.aggregation import Evaluator, evaluate_round, written_state
from fedflow.engine.best import key_metrics, stops_early
from fedflow.engine.reduction import following
from fedflow.engine.rounds import (
    Step,
    amend_run,
    check_cohort,
    lateness,
    quorum_lost,
    quorum_of,
    start_run,
)
from fedflow.engine.updates import rebased
from fedflow.engine.walk import one_thread, segments_of, sizes_of
from fedflow.errors import FedflowError, QuorumLost, RoundError, UpdateInvalid, UserError, field_error, one_line
from fedflow.memory import processors, seldom_searched
from fedflow.recipe import Recipe
from fedflow.simulation.book import Entry, SiteBook
from fedflow.simulation.clock import EPOCH, Clock, Flight, Work, note_flights, noted_trace
from fedflow.simulation.crew import Answers, Crew, Here, Processes
from fedflow.simulation.needs import check_memory
from fedflow.simulation.on_ray import OnRay, installed, starts_here
from fedflow.simulation.runner import Answer, Phase, SiteRunner, Task
from fedflow.simulation.shared import copied
from fedflow.simulation.traces import Trace
from fedflow.store.journal import INITIAL, Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import ContributorSummary, Evaluation, Manifest, Plan, TaskRecord, finite, utc_now
from fedflow.store.state import read_state, tensor_fields
from fedflow.store.tensors import Part, read_tensors
from fedflow.tensors import BLOCK, Packed
from fedflow.types import (
    MODEL_GROUPS,
    Aggregate,
    Groups,
    RoundContext,
    SiteId,
    SiteTask,
    SiteView,
    Spec,
    Tensors,
    Update,
    spec_of,
)

__all__ = ["BACKENDS", "Backend", "Simulation", "check_options", "simulate"]

Backend = Literal["processes", "ray", "debug"]
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
    trace: Trace | None = None,
    journal_every: int = 1,
    on_commit: Callable[[Manifest], None] = lambda manifest: None,
) -> Journal:
    """Run `recipe` to its end and return its journal; a run that was interrupted is continued from its last commit.

    sites:     names; or site -> workload, used in place of the recipe's. Sites of an earlier start that are not among them
               are absent.
    store:     URL of the store, with its options; default: in memory, gone with this process
    book:      the local file with what sites remember; default: a temporary one. A run is continued with both.
    model:     makes the module, in place of the recipe's
    backend:   "processes": sites train in worker processes; "ray": in actors of a Ray cluster; "debug": in this process, one
               after the other
    workers:   how many processes or actors; default: one a processor
    trace:     how the sites fare over simulated time, which decides who counts; noted at the run's start, and kept to.
               Default: everyone answers
    journal_every: every so many rounds what a run goes on from is written, and after the last; other rounds leave their
               records, and no model. A run that is interrupted does those since again
    on_commit: called after every commit, in their order, by a thread
    The bits are those of every other environment, for any number of workers. Raises QuorumLost where a phase cannot be
    committed, RoundError where the server's part of it fails; what was committed stays, and a second call goes on from there.
    """
    check_options(backend, workers)
    given = dict(sites) if isinstance(sites, Mapping) else {}
    if backend != "debug" and (given or model):
        raise UserError(
            field_error(
                "backend", backend, "'debug' where workloads or model are given as objects", "name them in the recipe"
            )
        )
    if backend != "processes" and recipe.computation.together:
        expected = f"'processes' with algorithm {recipe.algorithm.kind}, whose sites work at the same time"
        raise UserError(field_error("backend", backend, expected, "leave it out"))
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "simulate: found a call while a worker process imports the script; call it below `if __name__ == '__main__':`"
        )
    names = sorted(sites)
    with one_thread():  # and so no threads of torch's, which a fork would lose
        objects = ObjectStore(store or f"memory://fedflow-{uuid.uuid4().hex}", store_options)
        journal = start_run(objects, run or f"{recipe.name}-{uuid.uuid4().hex[:8]}", recipe, names)
        recipe = amend_run(journal, recipe, sites=names)
        check_options(backend, workers, journal_every=journal_every, trace=noted_trace(journal, trace))
        everyone, count = journal.sites(), workers or processors()
        if recipe.computation.together:
            count = max(count, len(names))  # they wait for each other
        head = _whole_head(journal, recipe.computation.phases)
        crew: Crew
        here = 1 if backend == "debug" else 0 if backend == "ray" and not starts_here() else count
        budget = 0 if backend == "debug" else recipe.memory_budget
        check_memory(journal, head, here, budget=budget, journal_every=journal_every)
        if backend == "debug":
            crew = Here(SiteRunner(recipe, everyone, workloads=given, model=model))
        elif backend == "ray":
            crew = OnRay(recipe, everyone, workers, budget=recipe.memory_budget)
        else:
            crew = Processes(recipe, everyone, count, budget=recipe.memory_budget)
        with closing(crew), nullcontext() if backend == "debug" else seldom_searched():
            Simulation(journal, recipe, head, names, everyone, crew, on_commit, journal_every).run(book)
    return journal


def check_options(backend: str, workers: int | None, *, journal_every: int = 1, trace: Trace | None = None) -> None:
    """Raises UserError where there is no such backend here, no such number of workers, or the journal would lack what late
    updates rest upon."""
    if journal_every < 1:
        raise UserError(field_error("journal_every", journal_every, "a count of rounds, at least 1", "raise it"))
    if journal_every > 1 and trace is not None:
        expected = "1 with a trace, where late updates rest upon earlier rounds"
        raise UserError(field_error("journal_every", journal_every, expected, "leave it out"))
    if backend not in BACKENDS:
        raise UserError(field_error("backend", backend, f"one of {', '.join(BACKENDS)}", "choose one of them"))
    if workers is not None and workers < 1:
        raise UserError(field_error("workers", workers, "a count of at least 1", "leave it out for one a processor"))
    if backend == "ray":
        installed()


def _whole_head(journal: Journal, phases: tuple[str, ...]) -> Manifest:
    """The newest commit of which all is there; where none is, the newest one."""
    steps = sorted(journal.committed(), key=lambda step: (step[0], phases.index(step[1])), reverse=True)
    for round, phase in (*steps, (INITIAL, "initial")):
        found = journal.manifest(round, phase)
        if found and all(journal.store.exists(ref.key) for ref in found.objects()):
            return found
    newest = journal.head(phases)
    assert newest is not None
    return newest


class Simulation:
    """One start of a run over `sites`, of `everyone` who ever was to take part. head: the commit that it goes on from."""

    def __init__(
        self,
        journal: Journal,
        recipe: Recipe,
        head: Manifest,
        sites: Sequence[SiteId],
        everyone: Sequence[SiteId],
        crew: Crew,
        on_commit: Callable[[Manifest], None],
        journal_every: int = 1,
    ) -> None:
        self.journal, self.recipe, self.algorithm, self.crew = journal, recipe, recipe.computation, crew
        self._head, self._everyone, self._on_commit = head, everyone, on_commit
        self._absent = dict.fromkeys(sorted(set(everyone) - set(sites)), "not among the sites")
        self._every, self._last_whole = journal_every, self._number(head.round, head.phase)
        self._evaluator = Evaluator(recipe) if recipe.evaluation else None

    def run(self, book: Path | None) -> None:
        """Every phase that is left, from the newest commit on."""
        algorithm, head = self.algorithm, self._head
        self._nonce = self.journal.record().nonce
        self._state = read_state(self.journal.store, algorithm.State, head.state)
        with self._naming(head.round):
            evaluate_round(self.journal, head)  # whoever was killed right after a commit has not done it
        ended = head.round + (head.phase == algorithm.phases[-1])
        self._values = key_metrics(self.journal, self.recipe)[: max(ended, 0)]
        self._clock = Clock.of(self.journal, self.recipe, head)
        self._lateness: tuple[Literal["drop", "carry"], int] = ("drop", 0)
        self._asks_again = False
        self._regions: Mapping[str, Sequence[SiteId]] = {}
        self._broadcasts: dict[int, Phase] = {}  # of earlier rounds, from which sites are still at work
        needed = bool(algorithm.SiteState.__dataclass_fields__) and not algorithm.renewable
        number = self._number(head.round, head.phase)
        newest = self.journal.head(algorithm.phases) or head
        self._book = SiteBook(
            book,
            self.journal.run,
            self._nonce,
            head=number,
            needed=needed,
            newest=self._number(newest.round, newest.phase),
        )
        with closing(self._book):
            self._entries = self._book.entries()
            with _Writer(self) as writer:
                self._advance(writer)

    def _number(self, round: int, phase: str) -> int:
        """Of the commit of that phase; -1: the initial one."""
        phases = self.algorithm.phases
        return round * len(phases) + phases.index(phase) if round >= 0 else -1

    def _advance(self, writer: _Writer) -> None:
        head = self._head
        step = self._after(Step(head.round, head.phase)) if head.round >= 0 else Step(0, self.algorithm.phases[0])
        chosen, quorum = self._begun(step) if step else ({}, 0)
        contributors = set(self._head.contributors)
        while step:
            with self._naming(step.round):
                if step.phase == self.algorithm.phases[0]:
                    chosen, quorum = self._planned(step)
                    closes = quorum
                else:
                    chosen = {site: task for site, task in chosen.items() if site in contributors}
                    closes = min(self.algorithm.enough(step.phase, quorum), len(chosen))
                    chosen, closes = self._checked(step, chosen, closes, self._absent)
                done = self._phase(step, chosen, closes)
            contributors = set(done.contributors)
            step = self._after(step)
            done.whole = step is None or step.round % self._every == 0
            writer.put(done)

    def _after(self, step: Step) -> Step | None:
        phases = self.algorithm.phases
        if step.phase != phases[-1]:
            return Step(step.round, following(self.algorithm, step.phase))
        ended = step.round + 1 >= self.recipe.rounds or stops_early(self._values, self.recipe)
        return None if ended else Step(step.round + 1, phases[0])

    @contextmanager
    def _naming(self, round: int) -> Iterator[None]:
        """What is raised inside, by schedule, algorithm or evaluation, names the run and `round`."""
        try:
            yield
        except FedflowError as error:
            error.run, error.round = error.run or self.journal.run, round if error.round is None else error.round
            raise
        except Exception as error:
            text = f"the server's part failed: {type(error).__name__}: {error}"
            raise RoundError(text, run=self.journal.run, round=round) from error

    # -- who takes part
    def _planned(self, step: Step) -> tuple[Mapping[SiteId, SiteTask], int]:
        clock, since = self._clock, self._clock.now if self._clock else EPOCH
        while True:
            absent = clock.offline(self._everyone) | self._absent if clock else self._absent
            view = _View(self._everyone, self._entries, absent, clock.flights if clock else {})
            try:
                wanted = self.recipe.schedule.plan(step.round, view, self.recipe.seed)
                self._lateness, self._regions = lateness(self.recipe, wanted), wanted.regions
                self._asks_again = wanted.again and self._lateness[0] == "carry" and self._lateness[1] > 0
                return self._checked(step, wanted.tasks, wanted.quorum, absent)
            except QuorumLost:
                if clock is None or not clock.wait([s for s in self._everyone if s not in self._absent], since):
                    raise

    def _checked(
        self, step: Step, chosen: Mapping[SiteId, SiteTask], quorum: int, absent: Mapping[SiteId, str]
    ) -> tuple[Mapping[SiteId, SiteTask], int]:
        """Those of the chosen that are there, and the quorum. Raises QuorumLost where they are too few. absent: site -> why."""
        there = {site: task for site, task in chosen.items() if site not in absent}
        quorum = quorum_of(self.recipe, step.phase, quorum)
        first = step.phase == self.algorithm.phases[0]
        online = len(self._everyone) - len(absent) if first else len(there)
        check_cohort(self.recipe, len(there), online, quorum, absent, run=self.journal.run, round=step.round)
        return there, quorum

    def _begun(self, step: Step) -> tuple[Mapping[SiteId, SiteTask], int]:
        """The same of a round whose first phase is committed; nothing of another."""
        first = self.algorithm.phases[0]
        plan = self.journal.plan(step.round, first) if step.phase != first else None
        tasks = plan.tasks if plan else {}
        self._regions = plan.regions if plan else {}
        return {site: SiteTask(task.steps, task.overrides) for site, task in tasks.items()}, plan.quorum if plan else 0

    # -- one phase
    def _phase(self, step: Step, chosen: Mapping[SiteId, SiteTask], quorum: int) -> _Done:
        algorithm, state = self.algorithm, self._state
        broadcast, expects = algorithm.broadcast(state, step.phase), algorithm.expects(state, step.phase)
        phase = Phase(self.journal.run, step.round, step.phase, len(self._everyone), broadcast, expects)
        done = _Done(step, self._number(step.round, step.phase), _bytes(spec_of(broadcast)), expects)
        with closing(self._answers(phase, chosen, quorum, done)) as answers:
            aggregate, context = self._aggregated(answers, done, quorum)
        began = time.monotonic()
        self._state = done.state = algorithm.server_update(state, aggregate, context)
        done.seconds = time.monotonic() - began
        self._note(done)
        if step.phase == algorithm.phases[-1]:
            if self._evaluator:
                done.evaluation = finite(self._evaluator(algorithm.model(done.state)))
            shown = done.metrics if done.evaluation is None else done.evaluation
            self._values.append(shown.get(self.recipe.key_metric.name))
        done.plan = self._plan_of(step, chosen, quorum) if len(algorithm.phases) > 1 else None
        return done

    # -- in simulated time
    def _answers(
        self, phase: Phase, chosen: Mapping[SiteId, SiteTask], quorum: int, done: _Done
    ) -> Generator[Answers, None, None]:
        """Those of all who were chosen; where there is a clock, of those who count, and `done` has how it went."""
        if self._clock is None:
            return self.crew.answers(phase, _Tasks(chosen, self._book))
        late, back = self._lateness
        up = _bytes(phase.expects)
        works = {s: Work(self._steps(s, task), done.received, up, task.settings) for s, task in chosen.items()}
        away = self._clock.offline(s for s in self._everyone if s not in chosen and s not in self._absent)
        bases = range(phase.round - back, phase.round + 1)
        held = self._clock.hold(
            done.step, works, away, quorum=quorum, bases=bases, carry=late == "carry", again=self._asks_again
        )
        done.opened, done.closed, done.excluded = held.opened, held.closed, dict(held.missing)
        done.flights = dict(self._clock.flights)
        return self._counted(held.answered, phase)

    def _steps(self, site: SiteId, task: SiteTask) -> int | None:
        """Those that the site will take; None where its epochs decide."""
        asked = task.settings.get("steps") or self.algorithm.local_steps
        steps: int | None = asked or self.recipe.training_at(site).steps
        return steps

    def _counted(self, flights: Mapping[SiteId, Flight], phase: Phase) -> Generator[Answers, None, None]:
        """The answers of the sites of `flights`, in their order: late ones from the broadcast of their round, moved to this
        one's."""
        fresh = {site: SiteTask(overrides=f.overrides) for site, f in flights.items() if f.base == phase.round}
        late = self._late({site: f for site, f in flights.items() if f.base != phase.round}, phase)
        with closing(self.crew.answers(phase, _Tasks(fresh, self._book))) as answers:
            there: Iterator[Answers] = answers
            if late:
                singly = heapq.merge(late, _singly(answers), key=lambda found: found[0].site)
                there = (Answers([answer], lambda _, tensors=tensors: tensors) for answer, tensors in singly)  # type: ignore[misc]
            for some in there:
                for answer in some.answers:
                    answer.seconds = flights[answer.site].seconds
                yield some
        needed = {flight.base for flight in self._clock.flights.values()} if self._clock else ()
        self._broadcasts = {r: p for r, p in {**self._broadcasts, phase.round: phase}.items() if r in needed}

    def _late(self, flights: Mapping[SiteId, Flight], phase: Phase) -> list[tuple[Answer, Groups]]:
        """Answers from earlier rounds' broadcasts, by site, moved to this phase's."""
        found: list[tuple[Answer, Groups]] = []
        for base in sorted({flight.base for flight in flights.values()}):
            then = self._broadcasts.get(base) or self._earlier(base, phase)
            tasks = {site: SiteTask(overrides=f.overrides) for site, f in flights.items() if f.base == base}
            with closing(self.crew.answers(then, _Tasks(tasks, self._book))) as answers:
                for answer, tensors in _singly(answers):
                    if answer.update is not None:
                        answer.update = replace(answer.update, staleness=phase.round - base)
                        answer.weight = self.algorithm.weight(answer.update)
                    found.append((answer, _moved(copied(tensors), then.broadcast, phase.broadcast)))
        return sorted(found, key=lambda one: one[0].site)

    def _earlier(self, round: int, now: Phase) -> Phase:
        """The phase of an earlier round, from the store."""
        head = self.journal.manifest(round - 1, now.phase if round else "initial")
        assert head
        broadcast = {group: read_tensors(self.journal.store, ref) for group, ref in head.broadcast.items()}
        return replace(now, round=round, broadcast=broadcast)

    # -- what comes of it
    def _aggregated(self, answers: Iterator[Answers], done: _Done, quorum: int) -> tuple[Aggregate, RoundContext]:
        """What the algorithm makes of the updates, and in which context. Raises QuorumLost where they are too few."""
        algorithm, step = self.algorithm, done.step
        context = RoundContext.at(self.recipe.seed, self.journal.run, step.round, step.phase, None, len(self._everyone))
        if self._regions:
            averager = self._by_region(answers, done)
            self._check_quorum(done, quorum)
            return averager.aggregate(), context
        if algorithm.averages and not algorithm.measures:
            averager = self._averaged(answers, done)
            self._check_quorum(done, quorum)
            return averager.aggregate(), context
        updates: Iterable[tuple[Update, Update]] = self._decoded(answers, done)
        if algorithm.gathers or algorithm.measures:
            updates = list(updates)
            self._check_quorum(done, quorum)
        if algorithm.measures:
            context = replace(context, measured=self._measured([sent for sent, _ in updates], context))
        left = iter(updates)
        first = list(islice(left, 1))
        if not first:
            self._check_quorum(done, max(quorum, 1))
        aggregate = algorithm.aggregate((read for _, read in chain(first, left)), context)
        for _ in left:  # whatever the algorithm did with them
            pass
        self._check_quorum(done, quorum)
        return aggregate, context

    def _check_quorum(self, done: _Done, quorum: int) -> None:
        required = self.recipe.required_sites
        if len(done.contributors) < quorum or not done.contributors.keys() >= set(required):
            excluded = {**self._absent, **done.excluded}
            raise quorum_lost(
                len(done.contributors), quorum, required, excluded, run=self.journal.run, round=done.step.round
            )

    def _averaged(self, answers: Iterator[Answers], done: _Done) -> Averager:
        """The updates that count, summed; whole blocks as they were summed where they were made."""
        averager = Averager()
        for some in answers:
            whole = averager.count % BLOCK == 0 and some.sums is not None
            taken = self._taken(some, done, whole=whole)
            if some.sums is not None and whole:
                averager.add_block(some.sums, [(update, weight) for update, _, weight in taken])
                continue
            for update, _, weight in taken:
                if not averager.count:  # it may be the only one, and then is the mean
                    update = replace(update, tensors=copied(update.tensors))
                averager.add(update, weight)
        return averager

    def _by_region(self, answers: Iterator[Answers], done: _Done) -> Averager:
        """The updates that count, those of a region summed up apart, as its aggregator does."""
        regions = {site: region for region, sites in self._regions.items() for site in sites}
        averagers: dict[str | None, Averager] = {None: Averager()}
        for _, read in self._decoded(answers, done):
            averager = averagers.setdefault(regions.get(read.site), Averager())
            averager.add(read, self.algorithm.weight(read))
        whole = averagers.pop(None)
        for _, averager in sorted(averagers.items()):
            whole.add_partial(averager.partial())
        return whole

    def _decoded(self, answers: Iterator[Answers], done: _Done) -> Iterator[tuple[Update, Update]]:
        """The updates that count, as they were sent and as the algorithm reads them, in memory of their own."""
        for some in answers:
            own = replace(some, tensors=partial(_copied, some))
            yield from ((sent, read) for sent, read, _ in self._taken(own, done))

    def _taken(self, some: Answers, done: _Done, *, whole: bool = False) -> list[tuple[Update, Update, float]]:
        """Of the updates among `some` that count: as sent, as the algorithm reads it, weight. Everything else about them is noted.

        whole: their tensors are not looked at
        """
        taken, kept = [], {}
        for position, answer in enumerate(some.answers):
            sent, reason = answer.update, answer.reason
            if sent is not None and not whole:
                sent = replace(sent, tensors=some.tensors(position))
                try:
                    read = self.algorithm.decode(sent, self._state, done.step.phase)
                except UpdateInvalid as error:
                    reason = str(error)
            if sent is None or reason is not None:
                done.excluded[answer.site] = reason or ""
                place = answer.site, self.journal.run, done.step.round
                log.warning("[%s] run %s, round %d: it does not count: %s", *place, one_line(reason or ""))
                continue
            done.add(answer, sent.tensors)
            if answer.kept is not None:
                kept[answer.site], answer.kept = answer.kept, None
            taken.append((sent, sent if whole else read, answer.weight))
        if kept:
            self._book.keep(done.number, kept)
        return taken

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

    def _note(self, done: _Done) -> None:
        """What the phase says of its sites."""
        for site, answer in done.contributors.items():
            steps = answer.update.steps if answer.update else None
            done.entries[site] = Entry(done.number, done.step.round, answer.seconds, steps=steps)
        for site in (*self._absent, *done.excluded):
            before = self._entries.get(site, Entry(done.number))
            done.entries[site] = replace(before, step=done.number, failures=before.failures + 1)
        self._entries |= done.entries

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
            regions={region: list(sites) for region, sites in self._regions.items()},
        )

    # -- commits, written by another thread
    def commit(self, done: _Done) -> None:
        """Write what a phase left behind: what sites remember first, the manifest last."""
        self._book.write(done.number, done.entries, self._last_whole)
        note_flights(self.journal, done.step, done.flights)
        if done.plan is not None:
            self.journal.put_plan(done.plan(self._head))
        manifest = Manifest(
            run=self.journal.run,
            nonce=self._nonce,
            round=done.step.round,
            phase=done.step.phase,
            parent=self._head.digest(),
            contributors=done.summaries(),
            excluded={**self._absent, **done.excluded},
            partial=done.partial(),
            **written_state(
                self.journal, self.algorithm, done.state, following(self.algorithm, done.step.phase), write=done.whole
            ),
            metrics=done.metrics,
            opened=done.opened,
            committed=done.closed or utc_now(),
            seconds=0.0 if done.closed else done.seconds,
        )
        self._head = self.journal.put_manifest(manifest)
        if self._head.model_digest != manifest.model_digest:
            found = f"round {done.step.round}: found {manifest.model_digest} when it was done again"
            raise FedflowError(
                f"{found}, expected {self._head.model_digest} as in its commit; go on where it was begun, with the same numerics"
            )
        self._last_whole = done.number if done.whole else self._last_whole
        if done.evaluation is not None:
            self.journal.put_evaluation(
                Evaluation(round=done.step.round, model_digest=manifest.model_digest, metrics=done.evaluation)
            )
        self._on_commit(manifest)


class _Tasks(Sequence[Task]):
    """What the chosen sites are asked for, in their order; what one remembers is read when it is its turn."""

    def __init__(self, chosen: Mapping[SiteId, SiteTask], book: SiteBook) -> None:
        self._sites, self._chosen, self._book = sorted(chosen), chosen, book

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, number: int) -> Task:  # type: ignore[override]
        site = self._sites[number]
        return Task(site, self._chosen[site].settings, self._book.kept(site))


@dataclass
class _Done:
    """One phase: what is committed of it.

    number: of the commit; received: bytes of the broadcast; expects: a complete update; fewer: names of those that are not
    closed, flights: when it closed in simulated time, and what was under way then
    whole: whether the state is written, too
    """

    step: Step
    number: int
    received: int
    expects: Spec
    opened: datetime = field(default_factory=utc_now)
    contributors: dict[SiteId, Answer] = field(default_factory=dict)
    excluded: dict[SiteId, str] = field(default_factory=dict)
    entries: dict[SiteId, Entry] = field(default_factory=dict)
    fewer: dict[SiteId, tuple[int, set[str]]] = field(default_factory=dict)
    state: Any = None
    evaluation: Mapping[str, float | None] | None = None
    plan: Callable[[Manifest], Plan] | None = None
    seconds: float = 0.0
    whole: bool = True
    closed: datetime | None = None
    flights: Mapping[SiteId, Flight] = field(default_factory=dict)

    def add(self, answer: Answer, tensors: Groups) -> None:
        """An update that counts; its tensors are not kept."""
        self.contributors[answer.site] = answer
        if any(not isinstance(some, Packed) for some in tensors.values()):
            names = {name for some in tensors.values() for name in some}
            self.fewer[answer.site] = _bytes(spec_of(tensors)), names

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """The sites' weighted means, once all are there."""
        return weighted_metrics([(answer.weight, answer.metrics) for answer in self.contributors.values()])

    def summaries(self) -> dict[SiteId, ContributorSummary]:
        """What the manifest says of each."""
        complete = _bytes(self.expects)
        found = {}
        for site, answer in self.contributors.items():
            update = answer.update
            assert update
            found[site] = {
                "update": "",
                "base_round": update.base_round,
                "weight": answer.weight,
                "examples": update.examples,
                "steps": update.steps,
                "lr_sum": update.lr_sum,
                "metrics": answer.metrics,
                "seconds": answer.seconds,
                "bytes": self.fewer[site][0] if site in self.fewer else complete,
                "received": self.received,
                "numerics": update.numerics,
                "training_state": answer.training_state,
            }
        return _summaries().validate_python(found)

    def partial(self) -> dict[str, list[SiteId]]:
        """Which names not all sites sent, and who did."""
        if not self.fewer:
            return {}
        complete = {name for tensors in self.expects.values() for name in tensors}
        sent = {site: self.fewer[site][1] if site in self.fewer else complete for site in self.contributors}
        senders = {
            name: [site for site, found in sent.items() if name in found]
            for name in sorted(set().union(*sent.values()))
        }
        return {name: sites for name, sites in senders.items() if len(sites) < len(sent)}


@cache
def _summaries() -> TypeAdapter[dict[SiteId, ContributorSummary]]:
    return TypeAdapter(dict[SiteId, ContributorSummary])


class _View(Mapping[SiteId, SiteView]):
    """Every site, as a schedule sees it; made when it is looked at."""

    def __init__(
        self,
        sites: Sequence[SiteId],
        entries: Mapping[SiteId, Entry],
        absent: Mapping[SiteId, str],
        flights: Mapping[SiteId, Flight],
    ) -> None:
        self._sites, self._entries, self._absent, self._flights = dict.fromkeys(sites), entries, absent, flights

    def __getitem__(self, site: SiteId) -> SiteView:
        if site not in self._sites:
            raise KeyError(site)
        entry = self._entries.get(site)
        view = entry.view() if entry else SiteView()
        if site in self._flights:
            view = replace(view, in_flight=self._flights[site].base)
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


def _singly(answers: Iterable[Answers]) -> Iterator[tuple[Answer, Groups]]:
    """One by one; an update's tensors are there until the next is asked for."""
    for some in answers:
        yield from ((answer, some.tensors(i) if answer.update else {}) for i, answer in enumerate(some.answers))


def _moved(tensors: Groups, then: Groups, now: Groups) -> Groups:
    """An update whose model is moved from one broadcast to another; all other groups are differences, and stay."""
    both = [group for group in MODEL_GROUPS if group in tensors and group in then]
    return {**tensors, **{group: rebased(tensors[group], then[group], now[group]) for group in both}}


def _copied(answers: Answers, position: int) -> Groups:
    return copied(answers.tensors(position))


def _part(tensors: Tensors, part: Part) -> dict[str, Tensor]:
    """Those of `tensors` that are in the part, or those rows of them."""
    found = {}
    for name in part:
        if name in tensors:
            rows = part[name]
            found[name] = tensors[name] if rows is None else tensors[name][rows[0] : rows[1]]
    return found
