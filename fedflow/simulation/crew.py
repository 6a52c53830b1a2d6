"""Who trains the sites of a simulation: this process, or worker processes that are started once."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from fedflow.errors import FedflowError
from fedflow.memory import settle
from fedflow.recipe import Recipe
from fedflow.simulation.runner import Answer, Phase, SiteRunner, Task
from fedflow.simulation.shared import Layout, SharedBuffer, copied, fill
from fedflow.tensors import Packed
from fedflow.types import SiteId, spec_of

__all__ = ["Crew", "Here", "Processes", "die_with"]

log = logging.getLogger(__name__)

_MOST = 16  # sites that are handed out at once
_LIVES = 3  # processes that may die over one site


class Crew(Protocol):
    """Trains cohorts."""

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answer, None, None]:
        """One answer a task, in the order of `tasks`; of updates, memory holds a few, however many there are."""
        ...

    def close(self) -> None:
        """Stop whatever was started."""
        ...


@dataclass(frozen=True)
class Here:
    """One site after the other in this process: breakpoints work."""

    runner: SiteRunner

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answer, None, None]:
        layout = Layout(phase.expects)
        return (self.runner.answer(task, phase, lambda groups: fill(layout.empty(), groups)) for task in tasks)

    def close(self) -> None:
        """Nothing was started."""


# -- worker processes --------------------------------------------------------------------------------------------------
@dataclass
class _Worker:
    """A process, and which tasks it has, in order. space: where its updates appear, room for `ahead` of them."""

    process: Any
    connection: Any
    space: SharedBuffer | None = None
    ahead: int = 1
    tasks: deque[int] = field(default_factory=deque)


class Processes:
    """`count` processes, each with a model of its own. They get the recipe once, then what every site needs and no more.

    Broadcast and updates travel in shared memory. A process that dies is replaced and its sites are done again; a site over
    which three died is excluded. budget: bytes of updates that wait to be reduced.
    """

    def __init__(self, recipe: Recipe, sites: list[SiteId], count: int, *, budget: int) -> None:
        self._recipe, self._sites, self._budget = recipe, sites, budget
        self._broadcast: SharedBuffer | None = None
        self._deaths: dict[SiteId, int] = {}
        self._told: tuple[Any, ...] = ()
        self._workers = [self._start() for _ in range(count)]

    def _start(self) -> _Worker:
        context: Any = multiprocessing.get_context("fork" if _may_fork() else "forkserver")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["fedflow.simulation.crew", "torch._dynamo"])
        ours, theirs = context.Pipe()
        spec = (self._recipe.model_dump_json(), self._sites, os.getpid())
        process = context.Process(target=_work, args=(theirs, *spec), daemon=True)  # killed with this process, at least
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answer, None, None]:
        layout = Layout(phase.expects)
        self._deaths.clear()
        self._publish(phase, layout)
        ahead = max(2, min(2 * _MOST, self._budget // max(layout.size * len(self._workers), 1)))
        for worker in list(self._workers):
            self._prepare(worker, layout, ahead)
        undealt, found = deque(range(len(tasks))), dict[int, Answer]()
        try:
            for wanted in range(len(tasks)):
                while wanted not in found:
                    self._deal(tasks, undealt, ahead, wanted)
                    self._receive(tasks, layout, found)
                self._deal(tasks, undealt, ahead, wanted)
                yield found.pop(wanted)
        finally:
            for worker in [w for w in self._workers if w.tasks]:  # whoever asked has gone away
                self._replace(worker)

    def _publish(self, phase: Phase, layout: Layout) -> None:
        """Let all workers see the broadcast."""
        of = Layout(spec_of(phase.broadcast))
        if self._broadcast is None or self._broadcast.size < of.size:
            if self._broadcast:
                self._broadcast.close()
            self._broadcast = SharedBuffer(of.size)
        fill(of.views(self._broadcast.map), phase.broadcast)
        place = (phase.run, phase.round, phase.phase, phase.num_sites)
        self._told = ("phase", place, self._broadcast.place, of.spec, layout.spec)

    def _prepare(self, worker: _Worker, layout: Layout, ahead: int) -> _Worker:
        """Give the worker, or another if it died meanwhile, room for its updates, and tell it of the phase."""
        for _ in range(_LIVES):
            try:
                self._tell(worker, layout, ahead)
                return worker
            except OSError:
                log.warning("a worker process died while it had nothing to do; another one takes its place")
                worker = self._replace(worker)
        raise FedflowError(f"{_LIVES} worker processes died at their start, one after the other; see the log")

    def _tell(self, worker: _Worker, layout: Layout, ahead: int) -> None:
        if worker.space is None or worker.space.size < layout.size * ahead:
            if worker.space:
                worker.space.close()
            worker.space = SharedBuffer(layout.size * ahead)
        worker.connection.send((*self._told, worker.space.place, ahead))
        worker.ahead = ahead

    def _deal(self, tasks: Sequence[Task], undealt: deque[int], ahead: int, wanted: int) -> None:
        """Hand out tasks in their order, more at once as long as there are many."""
        limit = wanted + ahead * len(self._workers)
        while undealt:
            worker = min(self._workers, key=lambda w: len(w.tasks))
            size = max(1, min(_MOST, ahead // 2, len(undealt) // (4 * len(self._workers))))
            if len(worker.tasks) > max(1, size // 2) or undealt[0] + size > limit or len(worker.tasks) + size > ahead:
                return
            chosen = [undealt.popleft() for _ in range(min(size, len(undealt)))]
            worker.tasks += chosen
            self._send(worker, tasks, chosen)

    def _send(self, worker: _Worker, tasks: Sequence[Task], chosen: Sequence[int]) -> None:
        try:
            worker.connection.send(("sites", [(i, tasks[i]) for i in chosen]))
        except OSError:
            log.debug("a worker died before it got its sites; its end is seen when something is received")

    def _receive(self, tasks: Sequence[Task], layout: Layout, found: dict[int, Answer]) -> None:
        """At least one answer, or one death."""
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers if worker.tasks}
        ready: list[Any] = multiprocessing.connection.wait(list(by_connection))
        for connection in ready:
            worker = by_connection[connection]
            try:
                number, slot, answer = connection.recv()
            except (EOFError, OSError):
                self._bury(worker, tasks, layout, found)
                continue
            worker.tasks.remove(number)
            if answer.update is not None:
                assert worker.space
                there = copied(layout.views(worker.space.map, slot * layout.size))
                answer = replace(answer, tensors={g: _named(there[g], names) for g, names in answer.tensors.items()})
            found[number] = answer

    def _bury(self, worker: _Worker, tasks: Sequence[Task], layout: Layout, found: dict[int, Answer]) -> None:
        """Another process for one that died, with the same sites, but without one that killed several."""
        left, first = list(worker.tasks), worker.tasks[0]
        worker.process.join()
        site, code = tasks[first].site, worker.process.exitcode
        self._deaths[site] = self._deaths.get(site, 0) + 1
        log.warning("[%s] its process died (exit code %s); %d sites are done again", site, code, len(left))
        if self._deaths[site] >= _LIVES:
            reason = f"its process died {_LIVES} times (exit code {code}): out of memory, or a crash in native code"
            found[first] = Answer(site, None, reason=reason)
            left.remove(first)
        successor = self._prepare(self._replace(worker), layout, worker.ahead)
        successor.tasks += left
        if left:
            self._send(successor, tasks, left)

    def _replace(self, worker: _Worker) -> _Worker:
        self._stop(worker)
        successor = self._start()
        self._workers[self._workers.index(worker)] = successor
        return successor

    def _stop(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        if worker.space:
            worker.space.close()

    def close(self) -> None:
        for worker in self._workers:
            self._stop(worker)
        if self._broadcast:
            self._broadcast.close()


def _may_fork() -> bool:
    """Whether nothing runs in this process that a fork would lose."""
    tasks = Path("/proc/self/task")
    return tasks.exists() and sum(1 for _ in tasks.iterdir()) == 1


def _work(connection: Any, recipe: str, sites: list[SiteId], parent: int) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinating process stops its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # loaders may have workers
    die_with(parent)
    settle()
    torch.set_num_threads(1)
    runner = SiteRunner(Recipe.model_validate_json(recipe), sites)
    mapped: dict[Any, Any] = {}
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    while True:
        message = inbox.get()
        if message[0] == "phase":
            _, (run, round, name, num_sites), path, spec, expects, space, ahead = message
            layout, slots = Layout(expects), itertools.cycle(range(ahead))
            mapped = {p: mapped.get(p) or SharedBuffer.attach(*p) for p in (path, space)}
            phase = Phase(run, round, name, num_sites, Layout(spec).views(mapped[path]), expects)
            continue
        for number, task in message[1]:
            slot = next(slots)
            answer = runner.answer(task, phase, partial(fill, layout.views(mapped[space], slot * layout.size)))
            if answer.update is not None:
                names: Any = {g: None if isinstance(ts, Packed) else list(ts) for g, ts in answer.tensors.items()}
                answer = replace(answer, tensors=names)
            connection.send((number, slot, answer))


def _listen(connection: Any, inbox: SimpleQueue[Any]) -> None:
    """Take whatever comes at once: else this process might wait to be rid of an answer, and the other one of a task."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _named(packed: Packed, names: Any) -> Any:
    """All of them, or those that a worker named."""
    return packed if names is None else {name: packed[name] for name in names}


def die_with(parent: int) -> None:
    """End this process once the process `parent` has: a worker waits for work on a pipe that its like hold open, and would outlive
    a parent that was killed."""

    def watch() -> None:
        while _lives(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _lives(pid: int) -> bool:
    """Whether that process has not ended; one that nobody has collected yet has."""
    if not Path("/proc").exists():
        return os.getppid() == pid
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
