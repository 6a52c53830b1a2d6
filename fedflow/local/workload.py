"""What a data owner supplies: the data, and what the model is to do with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from fedflow.algorithm import Training
from fedflow.errors import ResolveError, field_error
from fedflow.local.state import Memory
from fedflow.recipe import LocalTraining, Numerics

__all__ = [
    "AdaptedWorkload",
    "Setup",
    "TensorWorkload",
    "TorchWorkload",
    "check_evaluator",
    "check_workload",
    "evaluated_examples",
    "evaluates",
    "is_adapted",
]


@dataclass(frozen=True)
class Setup:
    """What a site gives to any kind of training besides its workload.

    model:    makes the module that the recipe names
    settings: the recipe's `training`, with this site's overrides
    on_step:  called after every optimizer step with (steps done, steps planned or None); may raise to stop
    memory:   what the site's training remembers
    """

    model: Callable[[], nn.Module]
    settings: LocalTraining
    numerics: Numerics
    on_step: Callable[[int, int | None], None]
    memory: Memory

    def options(self, workload: Any) -> dict[str, Any]:
        """The arguments of a trainer."""
        return {"workload": workload, **{f.name: getattr(self, f.name) for f in fields(self)}}


class AdaptedWorkload(Protocol):
    """A workload that is no `TorchWorkload`: it says itself how it is trained."""

    def training(self, setup: Setup) -> Training:
        """The training that algorithms are given."""
        ...


def is_adapted(workload: Any) -> TypeGuard[AdaptedWorkload]:
    """Whether `workload` says itself how it is trained."""
    return callable(getattr(workload, "training", None))


class TorchWorkload(ABC):
    """Model-agnostic data and loss of one site.

    A recipe names a subclass (or a factory) by import path; it is built at the site with the recipe's arguments, and with
    `site` (this site's name) and `sites` (all names, sorted) where its signature asks for them.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Examples in the training data: the FedAvg weight."""

    @abstractmethod
    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        """One epoch of batches, shuffled by `generator` and by nothing else."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one batch: a scalar that can be differentiated."""

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Metrics of `model` (in eval mode, no gradients) on this site's evaluation data; none by default.

        The model is on the recipe's `numerics.device`; putting the data there is this method's part.
        Where they are means over other examples than the training's, a property `evaluated` says over how many.
        """
        return {}


class TensorWorkload(TorchWorkload):
    """A workload whose data fit in memory: `inputs` and `targets` with one row an example.

    loss: (model output, targets) -> scalar; default cross entropy
    held_out: (inputs, targets) for `evaluate`, which reports loss and accuracy; default none
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        held_out: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"inputs and targets: found {len(inputs)} and {len(targets)} rows, expected as many of each"
            )
        self.inputs, self.targets, self._loss, self.held_out = inputs, targets, loss, held_out

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        for rows in torch.split(torch.randperm(len(self.inputs), generator=generator), batch_size):
            yield self.inputs.index_select(0, rows), self.targets.index_select(0, rows)

    def padded(self, batch: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor] | None:
        """`batch` with so many rows and the same loss, if the model treats rows apart; None where the loss is not known to have that.

        Sites that are trained together can take steps on batches of different sizes at once with it.
        """
        if self._loss is not nn.functional.cross_entropy or type(self).loss is not TensorWorkload.loss:
            return None
        inputs, targets = batch
        if targets.dim() != 1 or targets.is_floating_point():
            return None
        more = rows - len(targets)
        ignored = targets.new_full((more,), -100)  # cross entropy's ignore_index
        return torch.cat([inputs, inputs[:1].expand(more, *inputs.shape[1:])]), torch.cat([targets, ignored])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return self._loss(model(inputs), targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.held_out is None:
            return {}
        there = next(chain(model.parameters(), model.buffers()), self.held_out[0]).device
        inputs, targets = (tensor.to(there) for tensor in self.held_out)
        output = model(inputs)
        return {
            "loss": float(self._loss(output, targets)),
            "accuracy": float((output.argmax(dim=1) == targets).double().mean()),
        }

    @property
    def evaluated(self) -> int:
        """Examples that are held out."""
        return 0 if self.held_out is None else len(self.held_out[0])


def evaluates(workload: Any) -> bool:
    """Whether `workload.evaluate` is there and has something to evaluate on."""
    own = getattr(type(workload), "evaluate", None)
    if own is TensorWorkload.evaluate:
        return workload.held_out is not None
    return own is not TorchWorkload.evaluate and callable(getattr(workload, "evaluate", None))


def evaluated_examples(workload: Any) -> int:
    """How many examples `workload.evaluate` takes means over: what it says as `evaluated`, else those that it trains on."""
    said = getattr(workload, "evaluated", None)
    return len(workload) if said is None else int(said)


def check_workload(found: Any, field: str) -> Any:
    """`found` if it can be trained on, else ResolveError."""
    if is_adapted(found):
        return found
    return _check(found, field, ("__len__", "batches", "loss"))


def check_evaluator(found: Any, field: str) -> Any:
    """`found` if it can evaluate a model, else ResolveError."""
    return _check(found, field, ("evaluate",))


def _check(found: Any, field: str, methods: tuple[str, ...]) -> Any:
    missing = [name for name in methods if not callable(getattr(found, name, None))]
    if missing:
        raise ResolveError(
            field_error(
                field, type(found).__name__, f"an object with {', '.join(methods)}", f"add {', '.join(missing)}"
            )
        )
    return found
