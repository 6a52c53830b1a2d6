"""Keras 3, on whichever backend it runs. Needs the extra `fedflow[keras]`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedflow.algorithm import LocalResult
from fedflow.errors import TrainingInvalid, field_error
from fedflow.local import numerics
from fedflow.local.correction import Corrector
from fedflow.local.function import Config, config_for, numbers
from fedflow.local.model import model_groups
from fedflow.local.trainer import Request, Trainer
from fedflow.local.workload import Setup
from fedflow.types import Groups

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it when it is imported
import keras

__all__ = ["KerasModel", "KerasWorkload"]


class KerasModel(nn.Module):
    """A built Keras model as fedflow's engine sees one: trainable weights as parameters, the others as buffers.

    Names are "<place among the weights>/<name>": the same in every process, unlike Keras' own.
    """

    keras: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "keras", model)  # on the torch backend it is a module itself: not to be one twice
        trainable = {id(weight) for weight in model.trainable_weights}
        for number, weight in enumerate(model.weights):
            value, name = torch.from_numpy(np.array(_array(weight))), f"{number}/{weight.name}"
            if id(weight) in trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.keras(*inputs)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in the order of the Keras model's weights."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return dict(sorted(own.items(), key=lambda item: int(item[0].partition("/")[0])))

    def push(self) -> None:
        """These values into the Keras model."""
        self.keras.set_weights([t.detach().cpu().numpy() for t in self.tensors().values()])

    @torch.no_grad()
    def pull(self) -> None:
        """The Keras model's values into these."""
        for tensor, weight in zip(self.tensors().values(), self.keras.weights, strict=True):
            tensor.copy_(torch.from_numpy(np.array(_array(weight))))


class KerasWorkload:
    """One site's data for a recipe whose model is a `KerasModel`, trained by `fit`.

    compile:  `compile(model, config)`: calls `model.compile(...)` with optimizer, loss and metrics
    inputs, targets: the training data, as `fit` takes them
    held_out: inputs and targets for `evaluate`, which reports what the model was compiled with

    Corrections are applied after each step, which for plain SGD is the corrected gradient's step; other optimizers are
    refused under a correction. Optimizer state is not preserved.
    """

    def __init__(
        self,
        compile: Callable[[Any, Config], None],
        inputs: Any,
        targets: Any,
        *,
        held_out: tuple[Any, Any] | None = None,
    ) -> None:
        self.compile, self.inputs, self.targets, self.held_out = compile, inputs, targets, held_out

    def __len__(self) -> int:
        return len(self.inputs)

    def evaluate(self, model: KerasModel) -> dict[str, float]:
        if self.held_out is None:
            return {}
        model.push()
        if getattr(model.keras, "optimizer", None) is None:
            self.compile(model.keras, Config())
        return numbers(model.keras.evaluate(*self.held_out, verbose=0, return_dict=True))

    def training(self, setup: Setup) -> KerasTrainer:
        return KerasTrainer(**setup.options(self))


class KerasTrainer(Trainer):
    """Lets Keras fit the model, with a callback that counts, corrects and stops."""

    workload: KerasWorkload

    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        self._check_request(request)
        model, work = self.load_model(broadcast), self.workload
        assert isinstance(model, KerasModel)
        with numerics.applied(self.numerics, request.ctx.seed):
            config = config_for(self.settings, request.ctx, request.steps)
            work.compile(model.keras, config)
            self._check_optimizer(model, request)
            metrics = self.evaluation(model, "before")
            model.push()
            watch = _Watch(model, request, self.on_step)
            history = model.keras.fit(
                work.inputs,
                work.targets,
                batch_size=self.settings.batch_size,
                epochs=request.steps or self.settings.epochs or 1,
                verbose=0,
                callbacks=[watch],
            )
            model.pull()
            metrics |= numbers({name: values[-1] for name, values in history.history.items()})
            metrics |= self.evaluation(model, "after")
        return LocalResult(
            **{group: dict(tensors) for group, tensors in model_groups(model).items()},
            examples=len(work),
            steps=watch.done,
            lr_sum=watch.lr_sum,
            metrics=metrics,
            numerics=numerics.recorded(self.numerics),
        )

    def _check_request(self, request: Request) -> None:
        if request.merge:
            raise TrainingInvalid(
                field_error(
                    "workload", "KerasWorkload", "code that takes a merge between its steps", "set algorithm.tau: 0"
                ),
                **request.ctx.place,
            )
        if request.memory is not None:
            raise TrainingInvalid(
                field_error(
                    "workload", "KerasWorkload", "code whose optimizer state is preserved", "use another algorithm"
                ),
                **request.ctx.place,
            )

    def _check_optimizer(self, model: KerasModel, request: Request) -> None:
        optimizer = model.keras.optimizer
        plain = isinstance(optimizer, keras.optimizers.SGD) and not optimizer.momentum
        if request.correction and not plain:
            raise TrainingInvalid(
                field_error("optimizer", type(optimizer).__name__, "SGD without momentum under a correction", "use it"),
                **request.ctx.place,
            )


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts steps, adds the correction of the weights before a step after it, and stops after the last one."""

    def __init__(self, model: KerasModel, request: Request, on_step: Callable[[int, int | None], None]) -> None:
        super().__init__()
        self.own, self.planned, self.on_step = model, request.steps, on_step
        self.corrector = Corrector(model, request.correction) if request.correction else None
        self.after = request.correction.apply == "after_step"
        self.terms: dict[str, Tensor] = {}
        self.done, self.lr_sum = 0, 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.corrector is not None and not self.after:
            self._note()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        lr = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        if self.corrector is not None:
            if self.after:
                self._note()
            self._correct(lr)
        self.done += 1
        self.lr_sum += lr
        self.on_step(self.done, self.planned)
        if self.done == self.planned:
            self.model.stop_training = True

    def _note(self) -> None:
        assert self.corrector is not None
        self.own.pull()
        self.terms = self.corrector.terms()

    def _correct(self, lr: float) -> None:
        self.own.pull()
        with torch.no_grad():
            for name, p in self.own.named_parameters():
                if name in self.terms:
                    p.sub_(self.terms[name], alpha=lr)
        self.own.push()


def _array(weight: Any) -> Any:
    return keras.ops.convert_to_numpy(weight)
