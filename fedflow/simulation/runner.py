"""One process's part in a simulation: sites, one after the other, with nothing between the algorithm and its training."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fedflow.engine.updates import problem_of
from fedflow.errors import FedflowError
from fedflow.local.model import build_model
from fedflow.local.state import Memory
from fedflow.local.training import training_of
from fedflow.local.workload import Setup, check_workload
from fedflow.memory import tidy_after
from fedflow.recipe import Recipe
from fedflow.registry import call, resolve
from fedflow.simulation.kept import Encoded, Kept, decode, encode
from fedflow.store.records import finite
from fedflow.tensors import non_finite
from fedflow.types import Groups, RoundContext, SiteId, Spec, Update, derive_seed

__all__ = ["Answer", "Phase", "SiteRunner", "Task"]

_SMALL = 32 << 20  # bytes of a module of which a copy is kept, from which each site's is made


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


@dataclass(frozen=True)
class Answer:
    """What came of it: an update, its tensors apart, with what the site remembers if it counts; or why there is none."""

    site: SiteId
    update: Update | None
    tensors: Groups = field(default_factory=dict)
    kept: Encoded | None = None
    reason: str | None = None
    seconds: float = 0.0
    training_state: str | None = None


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
        self._model = _Copies(model or self._build)
        self._factory: Any = None
        self._trainings = {site: recipe.training_at(site) for site in recipe.overrides}

    def _build(self) -> nn.Module:
        return build_model(self.recipe.model.path, self.recipe.model.args, seed=self.recipe.seed)

    def answer(self, task: Task, phase: Phase, pack: Callable[[Groups], Groups]) -> Answer:
        """What a site's step gives, and to the same bits.

        pack: puts an update's tensors where they stay as they are during the next call
        """
        started = time.monotonic()
        try:
            update, kept, note = self._done(task, phase)
        except FedflowError as error:
            return Answer(task.site, None, reason=str(error))
        except Exception:
            return Answer(task.site, None, reason=f"training failed:\n{traceback.format_exc()}")
        finally:
            tidy_after(phase.round, self._training(task.site).tidy_every)
        if problem := problem_of(update, phase.expects, self.algorithm):
            return Answer(task.site, None, reason=problem)
        tensors = pack(update.tensors)
        if bad := non_finite(tensors):
            return Answer(task.site, None, reason=f"not finite: {bad}")
        update = replace(update, tensors={})
        return Answer(task.site, update, tensors, kept, seconds=time.monotonic() - started, training_state=note)

    def _done(self, task: Task, phase: Phase) -> tuple[Update, Encoded | None, str | None]:
        algorithm, recipe = self.algorithm, self.recipe
        context = RoundContext(
            run=phase.run,
            round=phase.round,
            phase=phase.phase,
            site=task.site,
            num_sites=phase.num_sites,
            seed=derive_seed(recipe.seed, phase.round, phase.phase, task.site),
            overrides=task.overrides,
        )
        before = decode(task.kept, algorithm) if task.kept else None
        memory = Memory(lambda: before.training if before else None)
        setup = Setup(self._model, self._training(task.site), recipe.numerics, lambda done, planned: None, memory)
        training = training_of(self._workload(task.site), setup)
        state = before.state if before else algorithm.init_site(phase.broadcast, training, context)
        update, after = algorithm.site_update(phase.broadcast, state, training, context)
        finite(update.metrics)  # raises where one is no number
        return update, encode(Kept(after, memory.after)), memory.note

    def _training(self, site: SiteId) -> Any:
        return self._trainings.get(site, self.recipe.training)

    def _workload(self, site: SiteId) -> Any:
        if site in self._given:
            return self._given[site]
        if self._factory is None:
            self._factory = resolve("workloads", self.recipe.workload.path, field="workload")
        args = self.recipe.workload_args_at(site)
        found = call(self._factory, args, field="workload.args", site=site, sites=self.sites)
        return check_workload(found, "workload")


class _Copies:
    """Makes modules as `build` does: small ones as copies of the first, before anything was done to it."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build
        self._first: nn.Module | None = None
        self._copied = False

    def __call__(self) -> nn.Module:
        if self._first is not None:
            return copy.deepcopy(self._first)
        module = self._build()
        if (
            not self._copied
            and sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) <= _SMALL
        ):
            self._copied = True
            with contextlib.suppress(Exception):  # what cannot be copied is built again
                self._first = copy.deepcopy(module)
        return module
