"""The built-in training loop: model, batches, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import LocalResult
from fedflow.errors import SiteError
from fedflow.local import numerics
from fedflow.local.model import load_groups, model_groups
from fedflow.local.workload import TorchWorkload
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext, derive_seed

__all__ = ["LocalTrainer"]


@dataclass(frozen=True)
class LocalTrainer:
    """Trains a model on a workload: the `Training` that algorithms are given.

    model:    makes a module; its values are replaced by the broadcast
    settings: length, batch size, optimizer
    on_step:  called after every optimizer step with (steps done, steps planned or None); may raise to stop
    """

    model: Callable[[], nn.Module]
    workload: TorchWorkload
    settings: LocalTraining
    numerics: Numerics
    on_step: Callable[[int, int | None], None] = lambda done, planned: None

    def train(self, broadcast: Groups, ctx: RoundContext) -> LocalResult:
        """Train from `broadcast`: `settings.steps` optimizer steps, or `settings.epochs` passes over the data.

        The bits depend on `broadcast`, `ctx.seed`, the data and the numerics alone. Raises SiteError where no step was
        taken or frozen parameters were changed.
        """
        if len(self.workload) == 0:
            raise SiteError(
                "the workload has no examples; give this site data or leave it out",
                run=ctx.run,
                round=ctx.round,
                site=ctx.site,
            )
        with torch.random.fork_rng(devices=[]):
            model = self.model()
        load_groups(model, broadcast)
        model.to(self.numerics.device)
        with numerics.applied(self.numerics, ctx.seed):
            steps, lr_sum, loss = self._loop(model, ctx)
            metrics = {"loss": loss, **self._evaluate(model)}
        groups = {g: {n: t.cpu() for n, t in tensors.items()} for g, tensors in model_groups(model).items()}
        if model_digest(groups["frozen"]) != model_digest(broadcast["frozen"]):
            raise SiteError(
                "frozen parameters were changed by the training; mark them trainable, or leave them alone",
                run=ctx.run,
                round=ctx.round,
                site=ctx.site,
            )
        return LocalResult(
            **groups,
            examples=len(self.workload),
            steps=steps,
            lr_sum=lr_sum,
            metrics=metrics,
            numerics=numerics.recorded(self.numerics),
        )

    def _loop(self, model: nn.Module, ctx: RoundContext) -> tuple[int, float, float]:
        """(steps, Σ lr, mean loss over the steps)."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.settings.optimizer, parameters)
        planned = ctx.overrides.get("steps", self.settings.steps)
        model.train()
        steps, lr_sum, losses = 0, 0.0, 0.0
        for batch in self._batches(planned, ctx.seed):
            optimizer.zero_grad(set_to_none=True)
            loss = self.workload.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
            optimizer.step()
            steps += 1
            lr_sum += optimizer.param_groups[0]["lr"]
            losses += float(loss.detach())
            self.on_step(steps, planned)
        if steps == 0:
            raise SiteError(
                "no optimizer step was taken; the workload gave no batch", run=ctx.run, round=ctx.round, site=ctx.site
            )
        return steps, lr_sum, losses / steps

    def _batches(self, steps: int | None, seed: int) -> Iterator[Any]:
        """Batches for exactly `steps` steps, or for the epochs of the settings."""
        generator = torch.Generator().manual_seed(derive_seed("data", seed))
        epochs = self.settings.epochs or 1
        done = epoch = 0
        while steps is not None or epoch < epochs:
            before = done
            for batch in self.workload.batches(self.settings.batch_size, generator):
                if done == steps:
                    return
                yield self._to_device(batch)
                done += 1
            epoch += 1
            if done in (before, steps):
                return

    def _to_device(self, batch: Any) -> Any:
        if self.numerics.device == "cpu":
            return batch
        if isinstance(batch, Tensor):
            return batch.to(self.numerics.device)
        if isinstance(batch, (tuple, list)):
            return type(batch)(self._to_device(part) for part in batch)
        return batch

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        evaluate = getattr(self.workload, "evaluate", None)
        if evaluate is None:
            return {}
        model.eval()
        with torch.no_grad():
            return {name: float(value) for name, value in evaluate(model).items()}


def make_optimizer(spec: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that `spec` describes."""
    if spec.kind == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay
        )
    adam: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.kind]
    return adam(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
