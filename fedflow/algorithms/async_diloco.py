"""Asynchronous DiLoCo: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv:2401.09135, Algorithm 3.

    site i:  yᵢ ← H steps of the inner optimizer from the x that it was sent; it goes on where it stopped
    server:  with every round's outer gradient  g ← − Σ pᵢ (yᵢ − x):   Δ ← Δ + g
             in every N-th:  m ← β m + Δ/N;  Δ ← 0;  x ← x − lr ((1 − cN + c) β m + g/N)
             in the others:                          x ← x − lr (c β m + g/N)

The gradients of N rounds have the effect of one Nesterov step with their mean: momentum, which stale gradients would drive too far, is
applied N times less often (Delayed Nesterov). For `schedule: buffered` with size 1, where every update is a round, as in the paper. With
N = 1 it is DiLoCo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedflow.algorithms.averaging import averaged, wire
from fedflow.algorithms.diloco import DiLoCo, DiLoCoState
from fedflow.tensors import cast
from fedflow.types import Aggregate, Groups, RoundContext, Tensors

__all__ = ["AsyncDiLoCo", "AsyncDiLoCoState"]


@dataclass(frozen=True)
class AsyncDiLoCoState(DiLoCoState):
    """x and m; Δ by tensor name, and how many gradients are in it."""

    pending: Tensors
    count: int


class AsyncDiLoCo(DiLoCo):
    """DiLoCo whose outer momentum is applied with every N-th round only."""

    kind: Literal["async_diloco"] = "async_diloco"  # type: ignore[assignment]
    State: ClassVar[type[Any]] = AsyncDiLoCoState

    outer_optimizer: Literal["nesterov"] = "nesterov"
    """Delayed Nesterov."""
    momentum_every: Annotated[int, Field(ge=1, strict=True)] = 4
    """N: rounds whose gradients make one momentum step; as many as sites at work at a time is a good choice. Ours: the paper tunes it."""
    momentum_activation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """c, 0 … 1/N: the share of the momentum that every round applies; 0 in the paper: the N-th applies all of it."""

    @model_validator(mode="after")
    def _shared_out(self) -> Self:
        if self.momentum_activation * self.momentum_every > 1:
            raise ValueError(
                f"momentum_activation: found {self.momentum_activation:g}, expected at most 1/momentum_every "
                f"({1 / self.momentum_every:g}); lower it"
            )
        return self

    def init(self, model: Groups) -> AsyncDiLoCoState:
        self.check(model)
        return AsyncDiLoCoState(model["params"], model["frozen"], model["buffers"], momentum={}, pending={}, count=0)

    def server_update(self, state: DiLoCoState, aggregate: Aggregate, ctx: RoundContext) -> AsyncDiLoCoState:
        assert isinstance(state, AsyncDiLoCoState)
        N, c = self.momentum_every, self.momentum_activation
        due = state.count + 1 == N
        plain = averaged(state, aggregate)
        groups = {group: dict(tensors) for group, tensors in self.model(plain).items()}
        momentum = self._still_fitting(state)
        pending = dict(state.pending)
        for group, name, g, _ in self._outer_gradients(state, aggregate):
            x = getattr(state, group)[name]
            before, m = pending.pop(name, None), momentum.get(name)
            total = g if before is None or before.shape != g.shape else before.double().add(g)
            if due:
                mean = total / N
                m = mean if m is None else m.double().mul(self.outer_momentum).add(mean)
                momentum[name] = cast(m, wire(x.dtype))
            else:
                pending[name] = cast(total, wire(x.dtype))
            direction = g / N
            if m is not None:
                direction = direction.add(m.double(), alpha=(1 - c * N + c if due else c) * self.outer_momentum)
            groups[group][name] = cast(x.double().add(direction, alpha=-self.outer_learning_rate), x.dtype)
        count = 0 if due else state.count + 1
        return replace(plain, **groups, momentum=momentum, pending=pending, count=count)

    def report(self, state: DiLoCoState, updates: int) -> str:
        assert isinstance(state, AsyncDiLoCoState)
        return f"{super().report(state, updates)}; momentum every {self.momentum_every} rounds, {state.count} since the last"
