"""How much memory a simulation takes, said before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedflow.errors import UserError, field_error
from fedflow.memory import available
from fedflow.recipe import Recipe
from fedflow.simulation.crew import SLOTS
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectRef
from fedflow.store.records import Manifest
from fedflow.store.state import read_state
from fedflow.tensors import BLOCK
from fedflow.types import SiteView

__all__ = ["Need", "check_memory", "needs"]

_MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}  # of the size of the model, that an optimizer keeps; plain SGD none


@dataclass(frozen=True)
class Need:
    """Bytes of tensors, at least; which field they follow from, what was found there, and what makes them fewer."""

    size: int
    field: str
    found: object
    fix: str


def needs(journal: Journal, head: Manifest, workers: int, *, budget: int, journal_every: int) -> Iterator[Need]:
    """What a run takes on this machine from `head` on, without data, activations and libraries.

    workers: that train on this machine: one in the coordinating process, none where the actors of a Ray cluster do it, whose
             memory is the cluster's matter
    budget:  bytes of updates that may wait to be reduced
    """
    recipe = journal.recipe()
    model, state, broadcast = map(_size, (head.model.values(), head.state.tensors.values(), head.broadcast.values()))
    optimizer = recipe.training.optimizer
    moments = 0 if optimizer.kind == "sgd" and not optimizer.momentum else _MOMENTS[optimizer.kind]
    each = model * (4 + moments)  # module, gradients, moments, the update, and the one before, which waits
    one = min(workers, 1) * each + 2 * state + 5 * model + broadcast  # the state before and after; sums in float64
    yield Need(one, "model", _told(model), "take a smaller one, or a machine with more memory")
    yield Need(max(workers - 1, 0) * each, "workers", workers, "lower it, or free memory")
    waiting = min(budget, SLOTS * BLOCK * workers * model) - (workers + 1) * model
    yield Need(max(waiting, 0), "memory_budget", budget, "lower it, or free memory")
    if recipe.computation.gathers or recipe.computation.measures:
        cohort = len(recipe.schedule.plan(0, {site: SiteView() for site in journal.sites()}, recipe.seed).tasks)
        fix = f"ask fewer of them: algorithm {recipe.algorithm.kind} with these settings holds all updates of a round at once"
        yield Need(cohort * _update(journal, recipe, head), "schedule", f"{cohort} sites a round", fix)
    stop = recipe.early_stop
    if journal.store.url.startswith("memory://") and stop.patience is None and stop.target is None:
        rounds = (
            recipe.rounds // journal_every + (recipe.rounds % journal_every > 0) - (head.round + 1) // journal_every
        )
        fix = f"give store=, a folder, or raise journal_every: the models of {rounds} rounds stay in it"
        yield Need(rounds * _written(head), "store", journal.store.url, fix)


def _size(refs: Iterable[ObjectRef]) -> int:
    return sum(ref.size for ref in refs)


def _update(journal: Journal, recipe: Recipe, head: Manifest) -> int:
    """Bytes of a complete one, without what may have fewer rows."""
    algorithm = recipe.computation
    expects = algorithm.expects(read_state(journal.store, algorithm.State, head.state), algorithm.phases[0])
    specs = [spec for group in expects.values() for spec in group.values() if not spec.up_to]
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def _written(head: Manifest) -> int:
    """Bytes that a round leaves in the store: each object once, and none that stays what it was."""
    parts = (head.state.tensors, head.model, head.broadcast)
    return sum({ref.key: ref.size for refs in parts for name, ref in refs.items() if name != "frozen"}.values())


def check_memory(journal: Journal, head: Manifest, workers: int, *, budget: int, journal_every: int) -> None:
    """Raises UserError where what the tensors need is more than this machine has left, by what takes most of it."""
    found, has = list(needs(journal, head, workers, budget=budget, journal_every=journal_every)), available()
    wants = sum(need.size for need in found)
    if has is not None and wants > has:
        most = max(found, key=lambda need: need.size)
        parts = f"it takes {_told(most.size)} of the at least {_told(wants)} that the run needs"
        expected = f"what fits into the {_told(has)} of memory that are left on this machine: {parts}"
        raise UserError(field_error(most.field, most.found, expected, most.fix))


def _told(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
