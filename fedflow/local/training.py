"""The built-in training loop: model, batches, loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import LocalResult, Training
from fedflow.local import numerics
from fedflow.local.optimizers import make_optimizer
from fedflow.local.session import Session
from fedflow.local.trainer import Request, SessionTrainer, mapped
from fedflow.local.workload import Setup, TorchWorkload, is_adapted
from fedflow.types import Groups, RoundContext, Tensors, derive_seed

__all__ = ["LocalTrainer", "batches_of", "training_of"]

log = logging.getLogger(__name__)

_ORDINARY = set[type[nn.Module]]()


class _OrdinaryLayout(Exception):
    """A model, by its type, cannot be trained in another one."""


def training_of(workload: Any, setup: Setup) -> Training:
    """How `workload` is trained: as it says itself, or by the built-in loop."""
    if is_adapted(workload):
        return workload.training(setup)
    return LocalTrainer(**setup.options(workload))


class LocalTrainer(SessionTrainer):
    """Trains on a `TorchWorkload`: the recipe's optimizer, its epochs or steps, with clipping."""

    workload: TorchWorkload
    hooks = False

    def perform(self, broadcast: Groups, request: Request) -> LocalResult:
        try:
            return super().perform(broadcast, request)
        except _OrdinaryLayout as refused:
            _ORDINARY.add(refused.args[0])
            log.info("%s takes views that need the ordinary layout: it is trained without channels_last", *refused.args)
            return super().perform(broadcast, request)

    def run(self, session: Session, request: Request) -> dict[str, float]:
        model = session.model
        if type(model) in _ORDINARY or not numerics.wants_channels_last(self.numerics, model):
            return self._loop(session, request, lambda batch: batch)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        session.numerics["memory_format"] = "channels_last"
        try:
            return self._loop(session, request, _channels_last)
        except RuntimeError as error:
            if "view size is not compatible" in str(error):
                raise _OrdinaryLayout(type(model)) from error
            raise

    def _loop(self, session: Session, request: Request, laid_out: Callable[[Any], Any]) -> dict[str, float]:
        model, clip = session.model, self.settings.clip_norm
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.settings.optimizer, parameters)
        model.train()
        losses: Any = 0.0
        for batch in self._batches(session, request.ctx.seed):
            optimizer.zero_grad()
            loss = self.workload.loss(model, laid_out(self.to_device(batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            session.before_step(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            losses += loss.detach().double() if loss.is_cuda else loss.item()  # a GPU is not waited for
            session.after_step(optimizer)
        return {"loss": float(losses) / session.done} if session.done else {}

    def _batches(self, session: Session, seed: int) -> Iterable[Any]:
        """Batches for exactly the steps planned, or for the epochs of the settings."""
        epochs = None if session.planned is not None else self.settings.epochs or 1
        return session.stream(*batches_of(self, seed), epochs)

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


def batches_of(trainer: LocalTrainer, seed: int) -> tuple[Callable[[], Iterable[Any]], torch.Generator]:
    """What makes an epoch of the workload's batches, and the generator that shuffles them in a training with `seed`."""
    generator = torch.Generator().manual_seed(derive_seed("data", seed))
    return lambda: trainer.workload.batches(trainer.settings.batch_size, generator), generator


def _channels_last(batch: Any) -> Any:
    """The batch's images, (N, C, H, W), with the channels innermost; in tuples, lists and mappings too."""
    return mapped(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and t.is_floating_point() else t,
        batch,
    )
