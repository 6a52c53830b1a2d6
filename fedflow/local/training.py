"""The built-in training loop: model, batches, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import NO_CORRECTION, Correction, LocalResult
from fedflow.errors import SiteError
from fedflow.local import numerics
from fedflow.local.model import load_groups, model_groups
from fedflow.local.workload import TorchWorkload
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext, Tensors, derive_seed

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

    def train(
        self,
        broadcast: Groups,
        ctx: RoundContext,
        *,
        correction: Correction = NO_CORRECTION,
        steps: int | None = None,
        preserve: bool = False,
    ) -> LocalResult:
        """Train from `broadcast`: `steps` (or `settings.steps`) optimizer steps, or `settings.epochs` passes over the data.

        The bits depend on `broadcast`, `correction`, `ctx.seed`, the data and the numerics alone. Raises SiteError where no
        step was taken or frozen parameters were changed.
        """
        model = self._model(broadcast, ctx)
        with numerics.applied(self.numerics, ctx.seed):
            done, lr_sum, loss = self._loop(model, ctx, correction, steps)
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
            steps=done,
            lr_sum=lr_sum,
            metrics=metrics,
            numerics=numerics.recorded(self.numerics),
        )

    def gradient(self, broadcast: Groups, ctx: RoundContext) -> Tensors:
        """The gradient of the mean loss over all data at `broadcast`, in eval mode."""
        model = self._model(broadcast, ctx)
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
        model = self._model(broadcast, ctx)
        with numerics.applied(self.numerics, ctx.seed), torch.no_grad():
            return sum(share * float(loss) for share, loss in self._full_pass(model, ctx))

    def _model(self, broadcast: Groups, ctx: RoundContext) -> nn.Module:
        """A model with the broadcast's values, where it will be used."""
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
        return model.to(self.numerics.device)

    def _full_pass(self, model: nn.Module, ctx: RoundContext) -> Iterator[tuple[float, Tensor]]:
        """(share of the data, mean loss) of every batch of one epoch."""
        model.eval()
        batches = self.workload.batches(self.settings.batch_size, torch.Generator().manual_seed(ctx.seed))
        left = len(self.workload)
        for batch in batches:
            size = min(self.settings.batch_size, left)
            left -= size
            yield size / len(self.workload), self.workload.loss(model, self._to_device(batch))

    def _loop(
        self, model: nn.Module, ctx: RoundContext, correction: Correction, wanted: int | None
    ) -> tuple[int, float, float]:
        """(steps, Σ lr, mean loss over the steps)."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.settings.optimizer, parameters)
        planned = ctx.overrides.get("steps", wanted or self.settings.steps)
        correct = Corrector(model, correction) if correction else None
        model.train()
        steps, lr_sum, losses = 0, 0.0, 0.0
        for batch in self._batches(planned, ctx.seed):
            optimizer.zero_grad(set_to_none=True)
            loss = self.workload.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if correct:
                correct.before_step()
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
            optimizer.step()
            lr = optimizer.param_groups[0]["lr"]
            if correct:
                correct.after_step(lr)
            steps += 1
            lr_sum += lr
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


class Corrector:
    """Applies a correction to the trainable parameters of `model`, whose values now are the broadcast."""

    def __init__(self, model: nn.Module, correction: Correction) -> None:
        self.correction = correction
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in self._parameters.items()} if correction.proximal else {}
        self._offset = {n: t.to(self._parameters[n]) for n, t in correction.offset.items() if n in self._parameters}

    @torch.no_grad()
    def before_step(self) -> None:
        """g ← g + offset + μ(w − x), where that is when the correction applies."""
        if self.correction.apply == "gradient":
            for name, p in self._parameters.items():
                if (term := self._term(name, p)) is not None:
                    p.grad = term if p.grad is None else p.grad.add_(term)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """w ← w − lr·(offset + μ(w − x)), where that is when the correction applies."""
        if self.correction.apply == "after_step":
            for name, p in self._parameters.items():
                if (term := self._term(name, p)) is not None:
                    p.sub_(term, alpha=lr)

    def _term(self, name: str, p: Tensor) -> Tensor | None:
        offset = self._offset.get(name)
        if not self.correction.proximal:
            return None if offset is None else offset.clone()
        pull = (p - self._start[name]).mul_(self.correction.proximal)
        return pull if offset is None else pull.add_(offset)


def make_optimizer(spec: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that `spec` describes."""
    if spec.kind == "sgd":
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay
        )
    adam: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.kind]
    return adam(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
