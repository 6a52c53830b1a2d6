"""Models that are a few NumPy arrays, and a function that fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedflow.algorithm import LocalResult
from fedflow.errors import TrainingInvalid, field_error
from fedflow.local import numerics
from fedflow.local.function import Config, config_for, numbers
from fedflow.local.model import mismatches, model_groups
from fedflow.local.trainer import Request, Trainer
from fedflow.local.workload import Setup
from fedflow.types import Groups

__all__ = ["ArrayModel", "ArrayWorkload", "Arrays", "Fitted"]

Arrays = dict[str, NDArray[Any]]


class ArrayModel(nn.Module):
    """Named arrays of given shapes, zero at first: `ArrayModel(coef=[10, 64], intercept=[10])`. dtype: of all of them."""

    def __init__(self, dtype: str = "float64", **shapes: Sequence[int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, dtype=getattr(torch, dtype))))

    def arrays(self) -> Arrays:
        """Copies, by name."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.named_parameters()}


@dataclass(frozen=True)
class Fitted:
    """What a function may return instead of bare arrays. steps, lr_sum: where it can say how far it went."""

    arrays: Arrays
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 1
    lr_sum: float = 0.0


class ArrayWorkload:
    """One site's function over NumPy arrays with its data.

    fit:      `fit(arrays, data, config) -> arrays`, or a `Fitted`; it may change the arrays that it is given
    data:     whatever the function takes; examples: in it (the FedAvg weight); default: `len(data)`
    evaluate: `evaluate(arrays) -> metrics`; default: none

    Its steps cannot be seen from outside: an algorithm that corrects gradients or preserves the training's state is refused,
    and one that sets the number of steps where the function does not say that it took as many.
    """

    def __init__(
        self,
        fit: Callable[[Arrays, Any, Config], Arrays | Fitted],
        data: Any,
        *,
        examples: int | None = None,
        evaluate: Callable[[Arrays], Mapping[str, float]] | None = None,
    ) -> None:
        self.fit, self.data = fit, data
        self._examples = len(data) if examples is None else examples
        self._evaluate = evaluate

    def __len__(self) -> int:
        return self._examples

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        arrays = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
        return {} if self._evaluate is None else self._evaluate(arrays)

    def training(self, setup: Setup) -> ArrayTrainer:
        return ArrayTrainer(**setup.options(self))


class ArrayTrainer(Trainer):
    """Calls the function, and checks what comes back."""

    workload: ArrayWorkload

    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        self._check_request(request)
        model = self.load_model(broadcast)
        with numerics.applied(self.numerics, request.ctx.seed):
            metrics = self.evaluation(model, "before")
            given = {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
            returned = self.workload.fit(
                given, self.workload.data, config_for(self.settings, request.ctx, request.steps)
            )
            fitted = returned if isinstance(returned, Fitted) else Fitted(returned)
            self._take(model, fitted, request)
            metrics |= numbers(fitted.metrics) | self.evaluation(model, "after")
        self.on_step(fitted.steps, request.steps)
        return LocalResult(
            **{group: dict(tensors) for group, tensors in model_groups(model).items()},
            examples=len(self.workload),
            steps=fitted.steps,
            lr_sum=fitted.lr_sum,
            metrics=metrics,
            numerics=numerics.recorded(self.numerics),
        )

    def _check_request(self, request: Request) -> None:
        asked = {
            "a gradient correction": bool(request.correction),
            "a merge between its steps": bool(request.merge),
            "a preserved state": request.memory is not None,
        }
        for what, wanted in asked.items():
            if wanted:
                raise TrainingInvalid(
                    field_error(
                        "workload", type(self.workload).__name__, f"code that takes {what}", "use FedAvg or FedOpt"
                    ),
                    **request.ctx.place,
                )

    def _take(self, model: nn.Module, fitted: Fitted, request: Request) -> None:
        own = {name: p.detach() for name, p in model.named_parameters()}
        given = {n: torch.from_numpy(np.array(a, order="C")) for n, a in fitted.arrays.items()}
        if problems := mismatches(own, given):
            raise TrainingInvalid(
                f"the arrays do not fit the model: {'; '.join(problems)}; return those that were given, changed",
                **request.ctx.place,
            )
        if request.steps is not None and fitted.steps != request.steps:
            raise TrainingInvalid(
                field_error(
                    "steps", fitted.steps, f"exactly {request.steps}", "return Fitted(arrays, steps=config.steps)"
                ),
                **request.ctx.place,
            )
        for name, tensor in own.items():
            tensor.copy_(given[name])
