"""Who trains the sites of a simulation: this process, or worker processes that are started once."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from fedflow.engine.forks import threads
from fedflow.errors import FedflowError
from fedflow.local.numerics import own_generators
from fedflow.memory import settle
from fedflow.recipe import Recipe
from fedflow.simulation.kept import Encoded
from fedflow.simulation.runner import Answer, Phase, SiteRunner, Task, known, split
from fedflow.simulation.shared import Layout, Names, SharedBuffer, fill, named, names_of
from fedflow.tensors import BLOCK, Packed, WeightedMean
from fedflow.types import Groups, SiteId, Spec, Update, spec_of

__all__ = ["LIVES", "SLOTS", "Answers", "Crew", "Here", "Processes", "die_with", "died"]

log = logging.getLogger(__name__)

T = TypeVar("T")

LIVES = 3
"""Processes that may die over one site, or one after the other at their start."""
SLOTS = 4
"""Units a worker that may be in work, or wait to be reduced."""
_WORTH = 5e-4
"""Seconds of work that are worth a message."""


@dataclass(frozen=True)
class Answers:
    """Those to consecutive tasks, without tensors.

    tensors: position -> those of that update, which change when the next answers are asked for
    sums:    Σ weight·tensor over the updates, by group, where all of a whole block count and can be summed
    """

    answers: Sequence[Answer]
    tensors: Callable[[int], Groups]
    sums: Mapping[str, Packed] | None = None


class Crew(Protocol):
    """Trains cohorts."""

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answers, None, None]:
        """One answer a task, in the order of `tasks`, some at a time; of updates, memory holds a few, however many there are.

        Each task is taken from `tasks` when it is its turn; those of a process that died once more.
        """
        ...

    def close(self) -> None:
        """Stop whatever was started."""
        ...


@dataclass(frozen=True)
class Here:
    """One site after the other in this process: breakpoints work."""

    runner: SiteRunner

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answers, None, None]:
        layout = Layout(phase.expects)
        for task in tasks:
            answer, tensors = split(self.runner.answer(task, phase, lambda groups: fill(layout.empty(), groups)))
            yield Answers([answer], lambda _, tensors=tensors: tensors)  # type: ignore[misc]

    def close(self) -> None:
        """Nothing was started."""


# -- what both sides know of the memory that they share ------------------------------------------------------------------
@dataclass(frozen=True)
class _Space:
    """Slots in shared memory, one a unit of work: which site it is at, its updates, their sums.

    most: sites a unit
    """

    layout: Layout
    most: int

    @property
    def size(self) -> int:
        """Bytes of a slot."""
        return _LINE + self.most * self.layout.size + (self.layout.sums if self.most == BLOCK else 0)

    def at(self, buffer: mmap.mmap, slot: int) -> _Slot:
        return _Slot(self, buffer, slot * self.size)


_LINE = 64  # bytes
_NOBODY, _SEVERAL = -1, -2  # sites in work


@dataclass(frozen=True)
class _Slot:
    space: _Space
    buffer: mmap.mmap
    start: int
    _views: dict[int, dict[str, Packed]] = field(default_factory=dict)

    @property
    def current(self) -> int:
        """Which site of the unit is in work."""
        return int.from_bytes(self.buffer[self.start : self.start + 8], "little", signed=True)

    def begin(self, position: int) -> None:
        """That site is in work now."""
        self.buffer[self.start : self.start + 8] = position.to_bytes(8, "little", signed=True)

    def update(self, position: int) -> dict[str, Packed]:
        """Where the update of that site of the unit is."""
        if position not in self._views:
            layout = self.space.layout
            self._views[position] = layout.views(self.buffer, self.start + _LINE + position * layout.size)
        return self._views[position]

    def sums(self) -> dict[str, Packed]:
        """Where their sums are."""
        layout = self.space.layout
        return layout.views_of_sums(self.buffer, self.start + _LINE + self.space.most * layout.size)


# -- worker processes ----------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class _Unit:
    """Consecutive tasks for one worker.

    dead: position -> why that site is not asked again; careful: a process died over it; rows: position -> what came of it;
    None: not yet
    """

    first: int
    count: int
    slot: int
    sites: list[SiteId] = field(default_factory=list)
    dead: dict[int, str] = field(default_factory=dict)
    careful: bool = False
    rows: dict[int, Any] | None = None
    summed: bool = False

    def left(self) -> list[int]:
        return [position for position in range(self.count) if position not in self.dead]


@dataclass(eq=False)
class _Worker:
    """A process, and the units that it has, in order. told: the last phase and spec that it knows of."""

    process: Any
    connection: Any
    units: deque[_Unit] = field(default_factory=deque)
    told: tuple[int, int] = (-1, -1)


class Processes:
    """`count` processes, each with a model of its own. They get the recipe once, then what every site needs and no more.

    Broadcast and updates travel in shared memory. A process that dies is replaced and its sites are done again; a site over
    which three died is excluded. budget: bytes of updates that wait to be reduced.
    """

    def __init__(self, recipe: Recipe, sites: list[SiteId], count: int, *, budget: int) -> None:
        self._recipe, self._sites, self._budget = recipe, sites, budget
        self._broadcast, self._arena = _Shared(), _Shared()
        self._phases, self._specs = itertools.count(), itertools.count()
        self._spec: tuple[int, Spec, Spec] | None = None
        self._layouts: tuple[Layout, ...] = ()
        self._failed_starts, self._seconds = 0, float("inf")  # of a site, in the newest answers
        self._together = recipe.numerics.deterministic == "fast"
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Worker:
        context: Any = multiprocessing.get_context("fork" if _may_fork() else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["fedflow.simulation.crew"])
        ours, theirs = context.Pipe()
        spec = (self._recipe.model_dump_json(), self._sites, os.getpid())
        process = context.Process(target=_work, args=(theirs, *spec))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answers, None, None]:
        sent, expected = self._layouts = self._laid_out(spec_of(phase.broadcast)), self._laid_out(phase.expects)
        space, count = self._divided(expected)
        slots = self._arena.laid(
            (space, count), count * space.size, lambda buffer: [space.at(buffer, number) for number in range(count)]
        )
        cohort = _Cohort(tasks, space, slots, len(self._workers))
        told = self._published(phase, sent, space)
        try:
            while cohort.waiting():
                self._deal(cohort, told)
                while not cohort.is_next_there():
                    self._receive(cohort, told)
                    self._deal(cohort, told)
                yield cohort.next_answers()
                cohort.free()
        finally:
            for worker in [w for w in self._workers if w.units]:  # whoever asked has gone away
                self._replace(worker)

    def _divided(self, layout: Layout) -> tuple[_Space, int]:
        """How large units may be, and how many there may be at a time."""
        workers = len(self._workers)
        most = max(1, min(BLOCK, self._budget // max(layout.size * SLOTS * workers, 1)))
        space = _Space(layout, most)
        return space, max(workers + 1, min(SLOTS * workers, self._budget // space.size))

    def _laid_out(self, spec: Spec) -> Layout:
        """That of the phase before where it is the same."""
        return next((layout for layout in self._layouts if layout.spec == spec), None) or Layout(spec)

    def _published(self, phase: Phase, of: Layout, space: _Space) -> _Told:
        """Let all workers see the broadcast."""
        fill(self._broadcast.laid(of, of.size, of.views), phase.broadcast)
        if self._spec is None or self._spec[1:] != (of.spec, space.layout.spec):
            self._spec = next(self._specs), of.spec, space.layout.spec
        place = (phase.run, phase.round, phase.phase, phase.num_sites)
        return _Told(next(self._phases), self._spec, (place, self._broadcast.place, self._arena.place, space.most))

    def _deal(self, cohort: _Cohort, told: _Told) -> None:
        """Hand out units in their order, to whoever has least to do."""
        while cohort.may_deal():
            worker = min(self._workers, key=lambda w: len(w.units))
            if len(worker.units) > 1:
                return
            least = math.ceil(_WORTH / self._seconds) if self._seconds else BLOCK
            self._send(worker, cohort.dealt(least, self._together), cohort, told)

    def _send(self, worker: _Worker, unit: _Unit, cohort: _Cohort, told: _Told) -> None:
        """A death is seen when something is received."""
        worker.units.append(unit)
        cohort.slot(unit).begin(_NOBODY)
        summed = unit.count == BLOCK and not unit.dead
        with suppress(OSError):
            asked = ("unit", unit.slot, cohort.asked(unit), summed, unit.careful)
            worker.connection.send([*told.to(worker), asked])

    def _receive(self, cohort: _Cohort, told: _Told) -> None:
        """At least one unit, or one death."""
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers if worker.units}
        ready: list[Any] = multiprocessing.connection.wait(list(by_connection))
        for connection in ready:
            worker = by_connection[connection]
            try:
                rows, summed, self._together, seconds = connection.recv()
            except (EOFError, OSError):
                self._bury(worker, cohort, told)
                continue
            unit, self._failed_starts = worker.units.popleft(), 0
            unit.rows, unit.summed, self._seconds = rows, summed, seconds / max(len(rows), 1)

    def _bury(self, worker: _Worker, cohort: _Cohort, told: _Told) -> None:
        """Another process for one that died, with the same units, but without a site that killed several."""
        worker.process.join()
        code, units = worker.process.exitcode, list(worker.units)
        position = cohort.slot(units[0]).current
        units[0].careful |= position != _NOBODY
        if position == _NOBODY:
            self._failed_starts += 1
            log.warning("a worker process died before it began (exit code %s)", code)
            if self._failed_starts >= LIVES * len(self._workers):
                raise FedflowError(
                    f"{self._failed_starts} worker processes died at their start, one after the other (exit code {code}); see the log"
                )
        elif position != _SEVERAL:
            cohort.blame(units[0], position, code)
        successor = self._replace(worker)
        for unit in units:
            if unit.left():
                self._send(successor, unit, cohort, told)
            else:
                unit.rows = {}

    def _replace(self, worker: _Worker) -> _Worker:
        self._stop(worker)
        successor = self._start()
        self._workers[self._workers.index(worker)] = successor
        return successor

    def _stop(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def close(self) -> None:
        for worker in self._workers:
            self._stop(worker)
        self._broadcast.close()
        self._arena.close()


class _Shared:
    """A shared buffer that is made anew where it is too small, and what lies in it."""

    def __init__(self) -> None:
        self._buffer: SharedBuffer | None = None
        self._what: Any = None
        self._there: Any = None

    def laid(self, what: Any, size: int, lay: Callable[[mmap.mmap], T]) -> T:
        """`lay` of at least `size` bytes; of the same `what` as before, the same object, whose tensors need not be made anew."""
        if self._buffer is None or self._buffer.size < size:
            self.close()
            self._buffer, self._what = SharedBuffer(size), None
        if self._what != what:
            self._what, self._there = what, lay(self._buffer.map)
        found: T = self._there
        return found

    @property
    def place(self) -> tuple[str, int]:
        assert self._buffer
        return self._buffer.place

    def close(self) -> None:
        if self._buffer:
            self._buffer.close()


@dataclass(frozen=True)
class _Told:
    """What a worker is told of a phase, unless it knows."""

    number: int
    spec: tuple[int, Spec, Spec]
    phase: tuple[Any, ...]

    def to(self, worker: _Worker) -> list[Any]:
        messages: list[Any] = []
        if worker.told[1] != self.spec[0]:
            messages.append(("spec", *self.spec[1:]))
        if worker.told[0] != self.number:
            messages.append(("phase", *self.phase))
        worker.told = self.number, self.spec[0]
        return messages


class _Cohort:
    """The tasks of a phase: which are dealt out, and which units have come back."""

    def __init__(self, tasks: Sequence[Task], space: _Space, slots: Sequence[_Slot], workers: int) -> None:
        self.tasks, self._space, self._slots, self._workers = tasks, space, slots, workers
        self._free, self._dealt = list(range(len(slots))), deque[_Unit]()
        self._next = 0
        self._deaths: dict[int, int] = {}

    def slot(self, unit: _Unit) -> _Slot:
        return self._slots[unit.slot]

    # -- out
    def waiting(self) -> bool:
        """Whether something is still to come."""
        return bool(self._dealt) or self._next < len(self.tasks)

    def may_deal(self) -> bool:
        return bool(self._free) and self._next < len(self.tasks)

    def dealt(self, least: int, together: bool) -> _Unit:
        """The next unit: whole blocks as long as there are many, fewer sites towards the end, so that all workers end at once.

        least: sites that are worth a message, if there are as many for each worker; together: sites of a unit are trained together, and so are not spread over more units than there are workers
        """
        left = len(self.tasks) - self._next
        share = -(-left // self._workers)
        wanted = share if together else max(left // (2 * self._workers), min(least, share))
        unit = _Unit(self._next, max(1, min(self._space.most, wanted)), self._free.pop())
        self._next += unit.count
        self._dealt.append(unit)
        return unit

    def asked(self, unit: _Unit) -> dict[int, Task]:
        """Position -> task, of those that are left."""
        tasks = {position: self.tasks[unit.first + position] for position in unit.left()}
        unit.sites = unit.sites or [task.site for task in tasks.values()]
        return tasks

    def blame(self, unit: _Unit, position: int, code: int | None) -> None:
        """A process died over that site."""
        number = unit.first + position
        self._deaths[number] = self._deaths.get(number, 0) + 1
        log.warning("[%s] its process died (exit code %s)", unit.sites[position], code)
        if self._deaths[number] >= LIVES:
            unit.dead[position] = died(f"exit code {code}")

    # -- and back
    def is_next_there(self) -> bool:
        return self._dealt[0].rows is not None

    def next_answers(self) -> Answers:
        unit = self._dealt[0]
        slot = self.slot(unit)
        rows: dict[int, Any] = {**(unit.rows or {}), **unit.dead}
        answers = [_answer(site, rows[position]) for position, site in enumerate(unit.sites)]
        return Answers(answers, lambda i: named(slot.update(i), rows[i].names), slot.sums() if unit.summed else None)

    def free(self) -> None:
        """The next answers were taken in."""
        self._free.append(self._dealt.popleft().slot)


def died(how: str) -> str:
    """Why a site is excluded over which so many processes ended."""
    return f"its process died {LIVES} times ({how}): out of memory, or a crash in native code"


def _may_fork() -> bool:
    """Whether nothing runs in this process that a fork would lose."""
    return sys.platform == "linux" and threads() == 1


# -- what a worker sends back of a site: why there is no update, or this -------------------------------------------------
class _Row(NamedTuple):
    """names: of the tensors that came"""

    base_round: int
    examples: int
    steps: int
    lr_sum: float
    scalars: Mapping[str, float]
    metrics: Mapping[str, float | None]
    numerics: Mapping[str, Any]
    weight: float
    kept: Encoded | None
    seconds: float
    training_state: str | None
    names: Names


def _row(answer: Answer, numerics: Mapping[str, Any]) -> Any:
    update = answer.update
    if update is None:
        return answer.reason
    return _Row(
        update.base_round,
        update.examples,
        update.steps,
        update.lr_sum,
        update.scalars,
        answer.metrics,
        numerics,
        answer.weight,
        answer.kept,
        answer.seconds,
        answer.training_state,
        names_of(answer.tensors),
    )


def _answer(site: SiteId, row: Any) -> Answer:
    if isinstance(row, str):
        return Answer(site, row)
    base_round, examples, steps, lr_sum, scalars, metrics, numerics, weight, kept, seconds, note, _ = row
    update = Update(
        site, base_round, examples, steps, lr_sum, {}, scalars=scalars, metrics=known(metrics), numerics=numerics
    )
    return Answer(site, None, update, {}, weight, metrics, kept, seconds, note)


# -- in a worker ---------------------------------------------------------------------------------------------------------
def _work(connection: Any, recipe: str, sites: list[SiteId], parent: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinating process stops its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    settle()
    own_generators()
    torch.set_num_threads(1)
    work = _Work(SiteRunner(Recipe.model_validate_json(recipe), sites))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    while True:
        for kind, *message in inbox.get():
            if kind == "spec":
                work.layouts(*message)
            elif kind == "phase":
                work.phase(*message)
            else:
                connection.send(work.unit(*message))


def _listen(connection: Any, inbox: SimpleQueue[Any]) -> None:
    """Take whatever comes at once: else this process might wait to be rid of an answer, and the other one of a task."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


class _Work:
    """What a worker does, message by message."""

    def __init__(self, runner: SiteRunner) -> None:
        self._runner = runner
        self._mapped: dict[tuple[str, int], mmap.mmap] = {}
        self._slots: dict[int, _Slot] = {}
        self._slots_of: tuple[Any, ...] = ()
        self._numerics: Mapping[str, Any] = {}

    def layouts(self, broadcast: Spec, update: Spec) -> None:
        """What is sent, and what is to come back."""
        self._broadcast, self._update = Layout(broadcast), Layout(update)

    def phase(self, of: tuple[str, int, str, int], broadcast: Any, arena: Any, most: int) -> None:
        self._mapped = {place: self._mapped.get(place) or SharedBuffer.attach(*place) for place in (broadcast, arena)}
        if self._slots_of != (self._update, arena, most):
            self._slots_of, self._slots = (self._update, arena, most), {}
        self._space, self._arena = _Space(self._update, most), self._mapped[arena]
        self._phase = Phase(*of, self._broadcast.views(self._mapped[broadcast]), self._update.spec)

    def unit(
        self, number: int, tasks: Mapping[int, Task], summed: bool, careful: bool
    ) -> tuple[Any, bool, bool, float]:
        """Position -> row; whether the sums are there; whether sites are trained together; seconds. careful: to see which site
        kills"""
        began = time.monotonic()
        slot, rows = self._slots.get(number) or self._space.at(self._arena, number), {}
        self._slots[number] = slot
        means: dict[str, WeightedMean] = {}
        for position, answer in self._answers(slot, tasks, careful):
            if answer.update is not None and answer.update.numerics != self._numerics:
                self._numerics = answer.update.numerics  # the same object for all of them is sent once
            rows[position] = _row(answer, self._numerics)
            summed = summed and _add(means, answer)
        return rows, summed and _keep(means, slot.sums()), self._runner.together, time.monotonic() - began

    def _answers(self, slot: _Slot, tasks: Mapping[int, Task], careful: bool) -> Iterator[tuple[int, Answer]]:
        if self._runner.together and len(tasks) > 1 and not careful:
            slot.begin(_SEVERAL)
            packs = [partial(fill, slot.update(position)) for position in tasks]
            yield from zip(tasks, self._runner.answers(list(tasks.values()), self._phase, packs), strict=True)
            return
        for position, task in tasks.items():
            slot.begin(position)
            yield position, self._runner.answer(task, self._phase, partial(fill, slot.update(position)))


def _add(means: dict[str, WeightedMean], answer: Answer) -> bool:
    """Whether the update could be added."""
    if answer.update is None or not all(isinstance(tensors, Packed) for tensors in answer.tensors.values()):
        return False
    for group, tensors in answer.tensors.items():
        means.setdefault(group, WeightedMean()).add(tensors, answer.weight)
    return True


def _keep(means: Mapping[str, WeightedMean], there: Mapping[str, Packed]) -> bool:
    for group, mean in means.items():
        sums = mean.sums()
        assert sums is not None
        for dtype, flat in sums.flats.items():
            there[group].flats[dtype].copy_(flat)
    return True


def die_with(parent: int) -> None:
    """End this process once the process `parent` has: a worker waits for work on a pipe that its like hold open, and would outlive
    a parent that was killed."""

    def watch() -> None:
        _wait_for(parent)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for(process: int) -> None:
    """Return when it has ended."""
    with suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(process)], [], [])
        else:
            while True:
                os.kill(process, 0)
                time.sleep(1)
