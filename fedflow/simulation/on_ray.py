"""Simulations on Ray, on one machine or on a cluster: a cohort's sites in blocks, which actors train."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedflow.errors import FedflowError, UserError, field_error
from fedflow.memory import settle
from fedflow.recipe import Recipe
from fedflow.simulation.crew import LIVES, Answers, died
from fedflow.simulation.runner import Answer, Phase, SiteRunner, Task, split
from fedflow.simulation.shared import Layout, Names, fill, named, names_of
from fedflow.tensors import BLOCK
from fedflow.types import Groups, SiteId, spec_of

__all__ = ["OnRay", "installed", "starts_here"]

log = logging.getLogger(__name__)

_AT_ONCE = 2  # blocks that an actor has: one to train, and the next

Block = tuple[int, ...]
"""Numbers of tasks, in order."""


def installed() -> Any:
    """The module `ray`. Raises UserError naming the extra where it is not there."""
    try:
        import ray
    except ImportError as error:
        raise UserError(field_error("backend", "ray", "Ray installed", "pip install 'fedflow[ray]'")) from error
    return ray


def starts_here() -> bool:
    """Whether a cluster is to be started on this machine: this process is connected to none, and RAY_ADDRESS names none."""
    return not os.environ.get("RAY_ADDRESS") and not installed().is_initialized()


# -- in an actor -------------------------------------------------------------------------------------------------------
class _Sites:
    """An actor: it has the recipe from its start, and the broadcast of the phase that it was asked about last."""

    def __init__(self, recipe: str, sites: list[SiteId]) -> None:
        settle()
        torch.set_num_threads(1)
        self._runner = SiteRunner(Recipe.model_validate_json(recipe), sites)
        self._place: tuple[Any, ...] = ()

    def train(self, told: tuple[Any, ...], broadcast: NDArray[np.uint8], tasks: Sequence[Task]) -> Any:
        """The answers, each with the names of its update's tensors; and these, as bytes of `Layout`, one after the other."""
        place, spec, expects = told
        if self._place != place:
            run, round, name, num_sites = place
            groups = Layout(spec).views(bytearray(broadcast))  # shared by all actors, read-only there
            self._place, self._phase = place, Phase(run, round, name, num_sites, groups, expects)
        layout = Layout(expects)
        space = bytearray(max(1, layout.size * len(tasks)))
        answers = []
        for slot, task in enumerate(tasks):
            there = layout.views(space, slot * layout.size)
            answer, tensors = split(self._runner.answer(task, self._phase, partial(fill, there)))
            answers.append((answer, names_of(tensors)))
        return answers, np.frombuffer(space, dtype=np.uint8)


# -- at the coordinator ------------------------------------------------------------------------------------------------
@dataclass
class _Actor:
    """handle: Ray's; blocks: what it was given and has not answered, by the reference of the answer, in order."""

    handle: Any
    blocks: dict[Any, Block] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        return sum(map(len, self.blocks.values()))


class OnRay:
    """`count` actors of a processor each; default: as many as the cluster has processors.

    They get the recipe once. A broadcast is put into the object store once a phase, updates come back a block at a time, both
    as plain bytes. An actor that dies is replaced and its sites are done again, one by one; a site over which three died is
    excluded. The cluster is the one that this process is connected to or `RAY_ADDRESS` names; else one is started here and
    stopped by `close`. budget: bytes of updates that wait to be reduced.
    """

    def __init__(self, recipe: Recipe, sites: list[SiteId], count: int | None, *, budget: int) -> None:
        self._ray, self._budget = installed(), budget
        self._actors: list[_Actor] = []
        self._connected = _connect(self._ray, count)
        try:
            resources = self._ray.cluster_resources()
            count = count or int(resources.get("CPU", 1))
            if count > resources.get("CPU", 0):
                found = f"{resources.get('CPU', 0):g} processors in the Ray cluster"
                raise UserError(field_error("workers", count, f"at most the {found}", "lower it, or add nodes"))
            options = {"num_cpus": 1, "num_gpus": _gpus(recipe, resources, count), "max_restarts": 0}
            self._actor = self._ray.remote(**options)(_Sites)
            self._spec = recipe.model_dump_json(), self._ray.put(sites)
            self._deaths: dict[SiteId, int] = {}
            self._actors = [self._start() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Actor:
        return _Actor(self._actor.remote(*self._spec))

    def answers(self, phase: Phase, tasks: Sequence[Task]) -> Generator[Answers, None, None]:
        layout, of = Layout(phase.expects), Layout(spec_of(phase.broadcast))
        self._deaths.clear()
        buffer = bytearray(max(1, of.size))
        fill(of.views(buffer), phase.broadcast)
        broadcast = self._ray.put(np.frombuffer(buffer, dtype=np.uint8))
        told = (phase.run, phase.round, phase.phase, phase.num_sites), of.spec, layout.spec
        ahead = max(2, min(2 * _AT_ONCE * BLOCK, self._budget // max(layout.size * len(self._actors), 1)))
        undealt, again, found = deque(range(len(tasks))), deque[Block](), dict[int, Answers]()
        try:
            for wanted in range(len(tasks)):
                while wanted not in found:
                    for actor, block in self._deal(undealt, again, ahead, wanted):
                        answer = actor.handle.train.remote(told, broadcast, [tasks[i] for i in block])
                        actor.blocks[answer] = block
                    self._receive(tasks, layout, found, again)
                yield found.pop(wanted)
        finally:
            for actor in [a for a in self._actors if a.blocks]:  # whoever asked has gone away
                self._replace(actor)

    def _deal(
        self, undealt: deque[int], again: deque[Block], ahead: int, wanted: int
    ) -> Generator[tuple[_Actor, Block], None, None]:
        """What each actor is given now: what is done again first, else the next sites, more at once as long as there are many."""
        limit = wanted + ahead * len(self._actors)
        while undealt or again:
            actor = min(self._actors, key=lambda a: a.tasks)
            size = max(1, min(BLOCK, ahead // _AT_ONCE, len(undealt) // (4 * len(self._actors))))
            if len(actor.blocks) >= _AT_ONCE or (not again and undealt[0] + size > limit):
                return
            yield actor, again.popleft() if again else tuple(undealt.popleft() for _ in range(min(size, len(undealt))))

    def _receive(self, tasks: Sequence[Task], layout: Layout, found: dict[int, Answers], again: deque[Block]) -> None:
        """The answers to at least one block, or one death."""
        by_answer = {answer: actor for actor in self._actors for answer in actor.blocks}
        for ready in self._ray.wait(list(by_answer), num_returns=1)[0]:
            actor = by_answer[ready]
            try:
                answers, bytes_ = self._ray.get(ready)
            except self._ray.exceptions.RayTaskError as error:
                raise FedflowError(f"an actor of the simulation failed; found {error}") from error
            except self._ray.exceptions.RayError as error:
                self._bury(actor, error, tasks, found, again)
                continue
            for slot, (number, (answer, names)) in enumerate(zip(actor.blocks.pop(ready), answers, strict=True)):
                found[number] = Answers([answer], partial(_tensors, names, bytes_, layout, slot))

    def _bury(
        self, actor: _Actor, error: Any, tasks: Sequence[Task], found: dict[int, Answers], again: deque[Block]
    ) -> None:
        """Another actor for one that died; its sites are done again, the first block's one by one, to see which it is."""
        if getattr(error, "actor_init_failed", False):
            raise FedflowError(f"an actor of the simulation could not start: {error}") from error
        (first, *others), why = actor.blocks.values(), str(error).split("\n", 1)[0]
        log.warning("an actor died: %s; %d sites are done again", why, actor.tasks)
        alone = [(number,) for number in first]
        if len(first) == 1:
            site = tasks[first[0]].site
            self._deaths[site] = self._deaths.get(site, 0) + 1
            if self._deaths[site] >= LIVES:
                found[first[0]], alone = Answers([Answer(site, died(why))], lambda _: {}), []
        again.extendleft(reversed([*alone, *others]))
        self._replace(actor)

    def _replace(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._start()

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if self._connected:
            self._ray.shutdown()


def _connect(ray: Any, count: int | None) -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or to one started here. Returns whether it was needed."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False}
    if starts_here():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: whatever else runs goes before
        options |= {"address": "local", "num_cpus": count, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if main:
        signal.signal(signal.SIGTERM, before)  # Ray's own ends the process without a word
    return True


def _gpus(recipe: Recipe, resources: dict[str, float], count: int) -> float:
    """An actor's share of the cluster's GPUs; it sees none that it did not ask for."""
    return min(1.0, resources.get("GPU", 0) / count) if recipe.numerics.device == "cuda" else 0.0


def _tensors(names: Names, bytes_: NDArray[np.uint8], layout: Layout, slot: int, position: int) -> Groups:
    """Those of one update, in memory of their own; all of a group, or those that the actor named."""
    space = bytearray(bytes_[slot * layout.size : (slot + 1) * layout.size]) or bytearray(1)
    return named(layout.views(space), names)
