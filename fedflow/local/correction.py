"""What an algorithm adds to the gradients of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

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
        if self.correction.apply != "gradient":
            return
        names = [n for n, p in self._parameters.items() if only is None or id(p) in only]
        terms = self.terms(names)
        if scale is not None:
            terms = {name: term * scale for name, term in terms.items()}
        gradients = []
        for name in terms:
            p = self._parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        if gradients:
            torch._foreach_add_(gradients, list(terms.values()))

    @torch.no_grad()
    def after_step(self, lr: Callable[[nn.Parameter], float | None]) -> None:
        """w ← w − lr·(offset + μ(w − x)), where that is when the correction applies. lr: per parameter, None = not stepped."""
        if self.correction.apply == "after_step":
            for name, term in self.terms().items():
                p = self._parameters[name]
                if (rate := lr(p)) is not None:
                    p.sub_(term, alpha=rate)

    @torch.no_grad()
    def terms(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """offset + μ(w − x) by parameter, at this moment; read only. A few calls for all tensors: a step may be short."""
        names = list(self._parameters if names is None else names)
        if not self.correction.proximal or not names:
            return {n: self._at_home(n, self._offset) for n in names if n in self._offset}
        pulls = torch._foreach_sub([self._parameters[n] for n in names], [self._at_home(n, self._start) for n in names])
        torch._foreach_mul_(pulls, self.correction.proximal)
        terms = dict(zip(names, pulls, strict=True))
        if both := [n for n in names if n in self._offset]:
            torch._foreach_add_([terms[n] for n in both], [self._at_home(n, self._offset) for n in both])
        return terms

    def _at_home(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """The tensor where its parameter now is: the code may have moved or cast the model."""
        tensor, p = tensors[name], self._parameters[name]
        if tensor.device != p.device or tensor.dtype != p.dtype:
            tensor = tensors[name] = tensor.to(p)
        return tensor
