"""What every kind of local training has in common: the model, the numerics, the session around it, and what comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedflow.algorithm import NO_CORRECTION, NO_MERGE, Correction, Evaluated, LocalResult, Merge
from fedflow.errors import SiteError, TrainingInvalid
from fedflow.local import numerics
from fedflow.local.generators import generators, set_generators
from fedflow.local.model import load_groups
from fedflow.local.session import Session
from fedflow.local.state import Memory
from fedflow.local.workload import evaluated_examples, evaluates
from fedflow.recipe import LocalTraining, Numerics
from fedflow.tensors import model_digest
from fedflow.types import MODEL_GROUPS, Groups, RoundContext, Tensors

__all__ = ["Request", "SessionTrainer", "Trainer", "mapped"]


@dataclass(frozen=True)
class Request:
    """What one training is asked for. steps: exactly so many, None = as the code decides; memory: None = keep nothing."""

    ctx: RoundContext
    correction: Correction
    steps: int | None
    memory: Memory | None
    merge: Merge = NO_MERGE


@dataclass(frozen=True)
class Trainer(ABC):
    """Trains a model on a workload: the `Training` that algorithms are given.

    model:    makes a module; its values are replaced by the broadcast
    settings: length, batch size, optimizer
    on_step:  called after every optimizer step with (steps done, steps planned or None); may raise to stop
    memory:   where a training that preserves its state finds and leaves it
    """

    model: Callable[[], nn.Module]
    workload: Any
    settings: LocalTraining
    numerics: Numerics
    on_step: Callable[[int, int | None], None] = lambda done, planned: None
    memory: Memory = field(default_factory=Memory)

    def train(
        self,
        broadcast: Groups,
        ctx: RoundContext,
        *,
        correction: Correction = NO_CORRECTION,
        steps: int | None = None,
        preserve: bool = False,
        merge: Merge = NO_MERGE,
    ) -> LocalResult:
        """Train from `broadcast`: `steps` (or the settings') optimizer steps, or as many as the settings' epochs have.

        The bits depend on `broadcast`, `correction`, `ctx.seed`, the data, the numerics, and with `preserve` on what was
        kept. Raises SiteError where no step was taken, frozen parameters were changed, or the code cannot take part.
        """
        if len(self.workload) == 0:
            raise SiteError("the workload has no examples; give this site data or leave it out", **ctx.place)
        planned = ctx.overrides.get("steps", steps or self.settings.steps)
        result = self.perform(broadcast, Request(ctx, correction, planned, self.memory if preserve else None, merge))
        frozen = broadcast["frozen"]
        if (frozen or result.frozen) and model_digest(result.frozen) != model_digest(frozen):
            raise SiteError(
                "frozen parameters were changed by the training; mark them trainable, or leave them alone",
                **ctx.place,
            )
        return result

    @abstractmethod
    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        """The training itself."""

    def gradient(self, broadcast: Groups, ctx: RoundContext) -> Tensors:
        """Raises SiteError: only a workload with a loss can be asked."""
        raise self._cannot("the gradient over all of its data", ctx)

    def loss(self, broadcast: Groups, ctx: RoundContext) -> float:
        """Raises SiteError: only a workload with a loss can be asked."""
        raise self._cannot("the loss over all of its data", ctx)

    def evaluate(self, broadcast: Groups, ctx: RoundContext) -> Evaluated:
        """Metrics of `broadcast` by the workload's `evaluate`. Raises SiteError where it has nothing to evaluate on."""
        examples = evaluated_examples(self.workload)
        if not evaluates(self.workload) or examples < 1:
            raise TrainingInvalid(
                f"{type(self.workload).__name__}: found nothing to evaluate on, expected evaluate(model) and held-out examples; "
                "give it some, or leave this site out",
                **ctx.place,
            )
        model = self.load_model(broadcast).eval()
        with numerics.applied(self.numerics, ctx.seed), torch.no_grad():
            metrics = {name: float(value) for name, value in self.workload.evaluate(model).items()}
        return Evaluated(metrics, examples, numerics.recorded(self.numerics))

    def _cannot(self, what: str, ctx: RoundContext) -> SiteError:
        return TrainingInvalid(
            f"{type(self.workload).__name__} cannot be asked for {what}, which the algorithm needs; use a TorchWorkload, or "
            "another setting of the algorithm",
            **ctx.place,
        )

    def load_model(self, broadcast: Groups) -> nn.Module:
        """A model with the broadcast's values, where it will be used."""
        with torch.random.fork_rng(devices=[]):
            model = self.model()
        load_groups(model, {group: broadcast[group] for group in MODEL_GROUPS})
        device = self.numerics.device
        there = all(t.device.type == device for t in chain(model.parameters(), model.buffers()))
        return model if there else model.to(device)

    def evaluation(self, model: nn.Module, when: Literal["before", "after"]) -> dict[str, float]:
        """The workload's metrics of `model`, where the settings want them; no random draw of the training depends on it.

        Those of the received model have "before." in front.
        """
        if self.settings.evaluate not in (when, "both") or not evaluates(self.workload):
            return {}
        states, training = generators(), model.training
        model.eval()
        with torch.no_grad():
            found = {name: float(value) for name, value in self.workload.evaluate(model).items()}
        model.train(training)
        set_generators(states)
        return {f"before.{name}": value for name, value in found.items()} if when == "before" else found

    def to_device(self, batch: Any) -> Any:
        """The batch's tensors, in tuples, lists and mappings too, where the model is."""
        if self.numerics.device == "cpu":
            return batch
        return mapped(lambda tensor: tensor.to(self.numerics.device), batch)


class SessionTrainer(Trainer):
    """A training in this process, in a session. A kind of workload says how it runs."""

    hooks = True
    """Whether optimizer steps are seen through torch's hooks; a loop of our own tells the session itself."""

    @abstractmethod
    def run(self, session: Session, request: Request) -> Mapping[str, float]:
        """Train `session.model`, and return metrics."""

    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        model = self.load_model(broadcast)
        with numerics.applied(self.numerics, request.ctx.seed):
            metrics = self.evaluation(model, "before")
            session = Session(
                model,
                correction=request.correction,
                merge=request.merge,
                steps=request.steps,
                strict=self.settings.strict,
                hooks=self.hooks,
                memory=request.memory,
                on_step=self.on_step,
                place=request.ctx.place,
            )
            with session:
                metrics |= self.run(session, request)
            metrics |= self.evaluation(model, "after")
        return LocalResult(
            **session.groups(),
            examples=len(self.workload),
            steps=session.done,
            lr_sum=session.lr_sum,
            metrics=metrics,
            numerics=numerics.recorded(self.numerics) | session.numerics,
        )


def mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """`batch` with `function` of each of its tensors, in tuples, lists and mappings too."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, (tuple, list)):
        parts = [mapped(function, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, Mapping):
        return {name: mapped(function, part) for name, part in batch.items()}
    return batch
