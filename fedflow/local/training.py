"""The built-in training loop: model, batches, loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import Training
from fedflow.local import numerics
from fedflow.local.session import Session
from fedflow.local.trainer import Request, SessionTrainer
from fedflow.local.workload import Setup, TorchWorkload, is_adapted
from fedflow.recipe import Optimizer
from fedflow.types import Groups, RoundContext, Tensors, derive_seed

__all__ = ["LocalTrainer", "training_of"]


def training_of(workload: Any, setup: Setup) -> Training:
    """How `workload` is trained: as it says itself, or by the built-in loop."""
    if is_adapted(workload):
        return workload.training(setup)
    return LocalTrainer(**setup.options(workload))


class LocalTrainer(SessionTrainer):
    """Trains on a `TorchWorkload`: the recipe's optimizer, its epochs or steps, with clipping."""

    workload: TorchWorkload
    hooks = False

    def run(self, session: Session, request: Request) -> dict[str, float]:
        model, clip = session.model, self.settings.clip_norm
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.settings.optimizer, parameters)
        model.train()
        losses = 0.0
        for batch in self._batches(session, request.ctx.seed):
            optimizer.zero_grad(set_to_none=True)
            loss = self.workload.loss(model, self.to_device(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            session.before_step(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            losses += float(loss.detach())
            session.after_step(optimizer)
        return {"loss": losses / session.done} if session.done else {}

    def _batches(self, session: Session, seed: int) -> Iterable[Any]:
        """Batches for exactly the steps planned, or for the epochs of the settings."""
        generator = torch.Generator().manual_seed(derive_seed("data", seed))
        epochs = None if session.planned is not None else self.settings.epochs or 1
        return session.stream(lambda: self.workload.batches(self.settings.batch_size, generator), generator, epochs)

    def gradient(self, broadcast: Groups, ctx: RoundContext) -> Tensors:
        """The gradient of the mean loss over all data at `broadcast`, in eval mode."""
        model = self.load_model(broadcast)
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in names.items()}
        with numerics.applied(self.numerics, ctx.seed):
            for share, loss in self._full_pass(model, ctx):
                model.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                for name, p in names.items():
                    if p.grad is not None:
                        total[name] += share * p.grad.double()
        return {name: t.to(names[name].dtype).cpu() for name, t in total.items()}

    def loss(self, broadcast: Groups, ctx: RoundContext) -> float:
        """The mean loss over all data at `broadcast`, in eval mode."""
        model = self.load_model(broadcast)
        with numerics.applied(self.numerics, ctx.seed), torch.no_grad():
            return sum(share * float(loss) for share, loss in self._full_pass(model, ctx))

    def _full_pass(self, model: nn.Module, ctx: RoundContext) -> Iterator[tuple[float, Tensor]]:
        """(share of the data, mean loss) of every batch of one epoch."""
        model.eval()
        batches = self.workload.batches(self.settings.batch_size, torch.Generator().manual_seed(ctx.seed))
        left = len(self.workload)
        for batch in batches:
            size = min(self.settings.batch_size, left)
            left -= size
            yield size / len(self.workload), self.workload.loss(model, self.to_device(batch))


def make_optimizer(spec: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that `spec` describes."""
    if spec.kind == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay
        )
    adam: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.kind]
    return adam(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
