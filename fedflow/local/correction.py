"""What an algorithm adds to the gradients of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import Correction
from fedflow.errors import TrainingInvalid, field_error

__all__ = ["Corrector"]


class Corrector:
    """Applies a correction to the trainable parameters of `model`, whose values now are the broadcast.

    Raises TrainingInvalid where the correction's tensors do not fit the model or are not finite.
    """

    def __init__(self, model: nn.Module, correction: Correction) -> None:
        self.correction = correction
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in self._parameters.items()} if correction.proximal else {}
        self._offset = {n: self._fitting(n, t) for n, t in correction.offset.items() if n in self._parameters}

    def _fitting(self, name: str, offset: Tensor) -> Tensor:
        p, field = self._parameters[name], f"correction of {name}"
        if offset.shape != p.shape:
            raise TrainingInvalid(
                field_error(
                    field, list(offset.shape), f"the parameter's shape {list(p.shape)}", "send one of this model"
                )
            )
        if not bool(torch.isfinite(offset).all()):
            raise TrainingInvalid(
                field_error(field, "NaN or infinity", "finite numbers", "lower the local learning rate")
            )
        return offset.to(p)

    @torch.no_grad()
    def before_step(self, only: Collection[int] | None = None, scale: Tensor | float | None = None) -> None:
        """g ← g + offset + μ(w − x), where that is when the correction applies.

        only:  ids of the parameters that are about to be stepped; None = all
        scale: what the gradients are multiplied with at this moment (an unfinished loss scaling)
        """
        if self.correction.apply == "gradient":
            for name, p in self._parameters.items():
                if (only is None or id(p) in only) and (term := self._term(name, p)) is not None:
                    if scale is not None:
                        term.mul_(scale)
                    p.grad = term if p.grad is None else p.grad.add_(term)

    @torch.no_grad()
    def after_step(self, lr: float | Callable[[nn.Parameter], float | None]) -> None:
        """w ← w − lr·(offset + μ(w − x)), where that is when the correction applies. lr: per parameter, None = not stepped."""
        if self.correction.apply == "after_step":
            for name, p in self._parameters.items():
                rate = lr(p) if callable(lr) else lr
                if rate is not None and (term := self._term(name, p)) is not None:
                    p.sub_(term, alpha=rate)

    def terms(self) -> dict[str, Tensor]:
        """offset + μ(w − x) by parameter, at this moment."""
        found: dict[str, Any] = {name: self._term(name, p) for name, p in self._parameters.items()}
        return {name: term for name, term in found.items() if term is not None}

    @torch.no_grad()
    def _term(self, name: str, p: Tensor) -> Tensor | None:
        offset = self._offset.get(name)
        if not self.correction.proximal:
            return None if offset is None else offset.to(p, copy=True)
        pull = (p - self._start[name].to(p)).mul_(self.correction.proximal)
        return pull if offset is None else pull.add_(offset.to(p))
