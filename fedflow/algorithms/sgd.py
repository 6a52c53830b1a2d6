"""SGD at the server: one step of `torch.optim.SGD` on one tensor, to the bit, as a function of its state."""

from __future__ import annotations

from torch import Tensor

from fedflow.algorithms.averaging import wire
from fedflow.tensors import cast

__all__ = ["sgd_step"]


def sgd_step(
    x: Tensor, g: Tensor, m: Tensor | None, *, lr: float, momentum: float, nesterov: bool, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x and m after one step along g (float64), with dampening and weight decay 0, each rounded once.

    y: where it is known that g is x − y. A plain step of rate 1 then ends at y to the bit, where x − (x − y) would miss it by
       what rounding took from the difference

    m: the momentum buffer, in what differences of x travel in; None before the first step, and always at momentum 0. The
       order of operations is that of torch.optim.SGD, whose bits it gives on float64 tensors; lr stands outside the buffer.
    """
    if y is not None and lr == 1.0 and not momentum:
        return cast(y.double(), x.dtype), m
    direction = g
    if momentum:
        buffer = g if m is None else m.double().mul(momentum).add(g)
        direction = g.add(buffer, alpha=momentum) if nesterov else buffer
        m = cast(buffer, wire(x.dtype))
    return cast(x.double().add(direction, alpha=-lr), x.dtype), m
