"""PyTorch Lightning: a `LightningModule` and its loader, trained by a `Trainer`. Needs the extra `fedflow[lightning]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from fedflow.local.function import numbers
from fedflow.local.session import Session
from fedflow.local.trainer import Request, SessionTrainer
from fedflow.local.workload import Setup

__all__ = ["FederatedCallback", "LightningWorkload"]


class FederatedCallback(pl.Callback):  # type: ignore[misc]
    """Corrects gradients where Lightning has them ready: after accumulation and unscaling, before clipping."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not (scaled and getattr(optimizer, "_step_supports_amp_scaling", False)):  # such a one unscales in its step
            self.session.correct_gradients(optimizer, again=True)


class LightningWorkload:
    """One site's data for the `LightningModule` that the recipe names as its model.

    data:     a DataLoader or a LightningDataModule
    trainer:  arguments of `lightning.Trainer`, over ours (no logger, no checkpoints, no progress bar)
    examples, evaluate: as in `FunctionWorkload`
    """

    def __init__(
        self,
        data: Any,
        *,
        trainer: Mapping[str, Any] | None = None,
        examples: int | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.loader, self.options = _loader(data), dict(trainer or {})
        self._examples = len(self.loader.dataset) if examples is None else examples
        self._evaluate = evaluate

    def __len__(self) -> int:
        return self._examples

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {} if self._evaluate is None else self._evaluate(model)

    def training(self, setup: Setup) -> LightningTrainer:
        return LightningTrainer(**setup.options(self))


class LightningTrainer(SessionTrainer):
    """Lets a Lightning Trainer fit the module in a session."""

    workload: LightningWorkload

    def run(self, session: Session, request: Request) -> dict[str, float]:
        streams = request.steps is not None or request.memory is not None
        data = session.data(self.workload.loader) if streams else self.workload.loader
        trainer = self._trainer(session, request)
        trainer.fit(session.model, train_dataloaders=data)
        return numbers(trainer.logged_metrics)

    def _trainer(self, session: Session, request: Request) -> pl.Trainer:
        length: dict[str, Any] = {"max_epochs": self.settings.epochs or 1}
        if request.steps is not None:
            length = {"max_steps": request.steps, "max_epochs": -1}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        device = {"accelerator": self.numerics.device, "devices": 1}
        callbacks = [*self.workload.options.get("callbacks", []), FederatedCallback(session)]
        return pl.Trainer(**{**quiet, **device, **length, **self.workload.options, "callbacks": callbacks})


def _loader(data: Any) -> Any:
    if not isinstance(data, pl.LightningDataModule):
        return data
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()
