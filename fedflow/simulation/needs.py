"""How much memory a simulation takes, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable

from fedflow.errors import UserError, field_error
from fedflow.memory import available
from fedflow.recipe import Recipe
from fedflow.simulation.crew import SLOTS
from fedflow.store.objects import ObjectRef
from fedflow.store.records import Manifest
from fedflow.tensors import BLOCK

__all__ = ["check_memory", "needed"]

_MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}  # of the size of the model, that an optimizer keeps; plain SGD none


def needed(recipe: Recipe, head: Manifest, workers: int) -> int:
    """Bytes of tensors, at least: in each worker a module, its gradients, the optimizer's moments and the update; in the
    coordinating process the state before and after a round and the sums in float64; between them the broadcast and the updates
    that wait. What data, activations and libraries take comes to it."""
    model, state, broadcast = map(_size, (head.model.values(), head.state.tensors.values(), head.broadcast.values()))
    optimizer = recipe.training.optimizer
    moments = 0 if optimizer.kind == "sgd" and not optimizer.momentum else _MOMENTS[optimizer.kind]
    each = model * (3 + moments)
    waiting = max((workers + 1) * model, min(recipe.memory_budget, SLOTS * BLOCK * workers * model))
    return workers * each + 2 * state + 4 * model + broadcast + waiting


def _size(refs: Iterable[ObjectRef]) -> int:
    return sum(ref.size for ref in refs)


def check_memory(recipe: Recipe, head: Manifest, workers: int) -> None:
    """Raises UserError where what the tensors need is more than this machine has left."""
    wants, has = needed(recipe, head, workers), available()
    if has is not None and wants > has:
        found = f"{workers}, which with this model need at least {_told(wants)} of memory"
        expected = f"at most the {_told(has)} that are left on this machine"
        raise UserError(field_error("workers", found, expected, "lower it, or free memory"))


def _told(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
