"""Hugging Face `Trainer`, with PEFT adapters where the model has them. Needs the extra `fedflow[huggingface]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback

from fedflow.local.function import Config, config_for, numbers
from fedflow.local.session import Session
from fedflow.local.trainer import Request, SessionTrainer
from fedflow.local.workload import Setup

__all__ = ["FederatedCallback", "HuggingFaceWorkload"]


class FederatedCallback(TrainerCallback):  # type: ignore[misc]
    """Ends the training once its steps are complete; the schedule stays that of the `TrainingArguments`."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.session.done == self.session.planned:
            control.should_training_stop = True
        return control


class HuggingFaceWorkload:
    """One site's `transformers.Trainer` for the model that the recipe names.

    trainer:  `trainer(model, config) -> transformers.Trainer`, with its arguments and its data. Where a round has a number of
              steps, `max_steps` or `num_train_epochs` of its arguments are those of the whole run: the schedule's length
    examples: in the training data
    evaluate: `evaluate(model) -> metrics`; default: none

    Of a PEFT model only the adapter's tensors travel: the rest is frozen.
    """

    def __init__(
        self,
        trainer: Callable[[Any, Config], HuggingFaceTrainer],
        *,
        examples: int,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.trainer, self._examples, self._evaluate = trainer, examples, evaluate

    def __len__(self) -> int:
        return self._examples

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {} if self._evaluate is None else self._evaluate(model)

    def training(self, setup: Setup) -> HuggingFaceSiteTrainer:
        return HuggingFaceSiteTrainer(**setup.options(self))


class HuggingFaceSiteTrainer(SessionTrainer):
    """Lets a Hugging Face Trainer train in a session."""

    workload: HuggingFaceWorkload

    def run(self, session: Session, request: Request) -> dict[str, float]:
        config = config_for(self.settings, request.ctx, request.steps)
        trainer = self.workload.trainer(session.model, config)
        trainer.add_callback(FederatedCallback(session))
        if request.steps is not None or request.memory is not None:
            loader = trainer.get_train_dataloader()
            stream = session.data(getattr(loader, "base_dataloader", loader))  # as it is below accelerate's
            trainer.get_train_dataloader = lambda: stream
        output = trainer.train()
        return {"loss": float(output.training_loss), **numbers({"epoch": output.metrics.get("epoch")})}
