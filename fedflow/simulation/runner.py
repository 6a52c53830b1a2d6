"""One process's part in a simulation: sites, one after the other, with nothing between the algorithm and its training."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from fedflow.algorithm import Training
from fedflow.engine.updates import problem_of
from fedflow.errors import FedflowError
from fedflow.local.model import Copies, build_model
from fedflow.local.own import work_of
from fedflow.local.state import Memory, TrainingState
from fedflow.local.vectorised import FAILURES, Part, Together
from fedflow.local.workload import Setup
from fedflow.memory import tidy_after
from fedflow.recipe import Recipe
from fedflow.registry import call, resolve
from fedflow.simulation.kept import Encoded, Kept, decode, encode
from fedflow.store.records import finite
from fedflow.tensors import non_finite
from fedflow.types import Groups, RoundContext, SiteId, Spec, Update

__all__ = ["Answer", "Phase", "SiteRunner", "Task", "known", "split"]


@dataclass(frozen=True)
class Phase:
    """One phase of one round, as every site of the cohort sees it. expects: what a valid update consists of."""

    run: str
    round: int
    phase: str
    num_sites: int
    broadcast: Groups
    expects: Spec


@dataclass(frozen=True)
class Task:
    """What one site is asked for. kept: what it remembers; None at first participation."""

    site: SiteId
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kept: Encoded | None = None


@dataclass
class Answer:
    """What came of it: an update and what else is known of it, or `reason`, why there is none.

    tensors: the update's, where whoever asked wanted to have them; weight: the algorithm's
    metrics: the update's, None where one is no finite number
    kept:    what the site remembers if the update counts
    """

    site: SiteId
    reason: str | None = None
    update: Update | None = None
    tensors: Groups = field(default_factory=dict)
    weight: float = 0.0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    kept: Encoded | None = None
    seconds: float = 0.0
    training_state: str | None = None


def split(answer: Answer) -> tuple[Answer, Groups]:
    """The answer without tensors, and they."""
    update = answer.update
    if update is None:
        return answer, {}
    bare = replace(answer, update=replace(update, tensors={}, metrics=known(answer.metrics)), tensors={})
    return bare, answer.tensors


def known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers."""
    return {name: value for name, value in metrics.items() if value is not None}


class SiteRunner:
    """Does the parts of a recipe's sites in this process.

    sites:     every site of the federation, in order
    workloads: site -> its workload, used in place of the recipe's; model: makes the module, in place of the recipe's
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: list[SiteId],
        *,
        workloads: Mapping[SiteId, Any] | None = None,
        model: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.recipe, self.sites, self.algorithm = recipe, sites, recipe.computation
        self._given = workloads or {}
        self._model = Copies(model or self._build)
        self._factory: Any = None
        self._together = Together()
        self._trainings = {site: recipe.training_at(site) for site in recipe.overrides}

    def _build(self) -> nn.Module:
        return build_model(self.recipe.model.path, self.recipe.model.args, seed=self.recipe.seed)

    def answer(self, task: Task, phase: Phase, pack: Pack) -> Answer:
        """What a site's step gives, and to the same bits. pack: puts tensors where they stay as they are during the next call"""
        return self._answers([task], phase, [pack], lambda parts: [_done(part) for part in parts])[0]

    def answers(self, tasks: Sequence[Task], phase: Phase, packs: Sequence[Pack]) -> list[Answer]:
        """The same of several sites, trained together where the recipe's numerics are fast and that is quicker."""
        return self._answers(tasks, phase, packs, self._together.run)

    @property
    def together(self) -> bool:
        """Whether sites are trained together, or that is still to be tried."""
        wanted = self.recipe.numerics.deterministic == "fast" and self.algorithm.trains
        return wanted and self._together.quicker is not False

    def _answers(
        self, tasks: Sequence[Task], phase: Phase, packs: Sequence[Pack], do: Callable[[Sequence[Any]], list[Any]]
    ) -> list[Answer]:
        started = time.monotonic()
        steps = [self._begun(task, phase) for task in tasks]
        found = iter(do([step for step in steps if isinstance(step, _Step)]))
        answers = []
        for task, step, pack in zip(tasks, steps, packs, strict=True):
            result = next(found) if isinstance(step, _Step) else step
            answers.append(self._answered(task.site, phase, step, result, pack))
            tidy_after(phase.round, self._training(task.site).tidy_every)
        for answer in answers:
            answer.seconds = (time.monotonic() - started) / len(tasks)
        return answers

    def _begun(self, task: Task, phase: Phase) -> _Step | Exception | SystemExit:
        """A site's step, ready to be done."""
        algorithm, recipe = self.algorithm, self.recipe
        try:
            context = RoundContext.at(
                recipe.seed, phase.run, phase.round, phase.phase, task.site, phase.num_sites, task.overrides
            )
            before = decode(task.kept, algorithm) if task.kept else None
            memory = Memory(lambda: before.training if before else None)
            setup = Setup(self._model, self._training(task.site), recipe.numerics, lambda done, planned: None, memory)
            training: Any = work_of(recipe.algorithm, self._workload(task.site), setup, _tasks)
        except FAILURES as error:
            return error

        def run(work: Training) -> tuple[Update, Any]:
            state = before.state if before else algorithm.init_site(phase.broadcast, work, context)
            return algorithm.site_update(phase.broadcast, state, work, context)

        return _Step(training, run, memory, before.training if before else None)

    def _answered(self, site: SiteId, phase: Phase, step: Any, result: Any, pack: Pack) -> Answer:
        try:
            if isinstance(result, FAILURES):
                raise result
            update, after = result
            if problem := problem_of(update, phase.expects, self.algorithm):
                return Answer(site, problem)
            kept = encode(Kept(after, step.memory.after if update.steps else step.memory.after or step.before))
            metrics, weight, tensors = finite(update.metrics), self.algorithm.weight(update), pack(update.tensors)
        except FedflowError as error:
            return Answer(site, str(error))
        except FAILURES:
            return Answer(site, f"training failed:\n{traceback.format_exc()}")
        if bad := non_finite(tensors):
            return Answer(site, f"not finite: {bad}")
        return Answer(site, None, update, tensors, weight, metrics, kept, 0.0, step.memory.note)

    def _training(self, site: SiteId) -> Any:
        return self._trainings.get(site, self.recipe.training)

    def _workload(self, site: SiteId) -> Any:
        if site in self._given:
            return self._given[site]
        if self._factory is None:
            self._factory = resolve("workloads", self.recipe.workload.path, field="workload")
        args = self.recipe.workload_args_at(site)
        return call(self._factory, args, field="workload.args", site=site, sites=self.sites)


_tasks = partial(resolve, "tasks", field="algorithm.function")
"""Functions that tasks may call here: any that is installed."""

Pack = Callable[[Groups], Groups]


@dataclass
class _Step(Part[tuple[Update, Any]]):
    """One site's step: its update, and the algorithm's state there. before: what training kept, which stays where nothing is trained"""

    memory: Memory
    before: TrainingState | None = None


def _done(step: _Step) -> Any:
    """What it gave, or raised."""
    try:
        return step.run(step.training)
    except FAILURES as error:
        return error
