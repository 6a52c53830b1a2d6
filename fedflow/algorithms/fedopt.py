"""FedOpt: Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, Algorithm 2; FedAvgM: Hsu et al.,
arXiv:1909.06335.

    site i:  yᵢ ← K optimizer steps from x
    server:  D ← Σ pᵢ (yᵢ − x)
             m ← β₁ m + (1 − β₁) D
             v ← v + D²                               FedAdagrad
             v ← v − (1 − β₂) D² sign(v − D²)         FedYogi
             v ← β₂ v + (1 − β₂) D²                   FedAdam
             x ← x + η m / (√v + τ)
    or, with SGD:  one step of torch.optim.SGD with the gradient −D
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from fedflow.algorithms.averaging import ModelState, Rate, WeightedAveraging, averaged, mean_delta, wire
from fedflow.algorithms.sgd import sgd_step
from fedflow.described import Described
from fedflow.tensors import cast
from fedflow.types import Aggregate, Groups, RoundContext, Tensors

__all__ = ["Adagrad", "Adam", "Constant", "Cosine", "FedOpt", "FedOptState", "Sgd", "Step", "Yogi"]

Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class FedOptState(ModelState):
    """x, the moments m and v by parameter name (empty before the first step, and v with SGD), and server steps done."""

    m: Tensors
    v: Tensors
    steps: int


# -- server learning rate ----------------------------------------------------------------------------------------------
class Constant(Described):
    """η throughout."""

    kind: Literal["constant"] = "constant"

    def factor(self, steps: int) -> float:
        return 1.0


class Cosine(Described):
    """From η to `final`·η along half a cosine in `rounds` server steps, and there it stays (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    rounds: Annotated[int, Field(ge=1, strict=True)]
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of η at the end; 0 in the paper."""

    def factor(self, steps: int) -> float:
        done = min(steps / self.rounds, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class Step(Described):
    """η·γ^⌊steps/every⌋."""

    kind: Literal["step"] = "step"
    every: Annotated[int, Field(ge=1, strict=True)]
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """γ; torch's default."""

    def factor(self, steps: int) -> float:
        return float(self.gamma ** (steps // self.every))


# -- server optimizers -------------------------------------------------------------------------------------------------
class Sgd(Described):
    """torch.optim.SGD with the gradient −D. With momentum it is FedAvgM."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 1.0
    """η; 1 makes it FedAvg."""
    momentum: Decay = 0.0
    """β; 0.9 in FedAvgM's paper."""
    nesterov: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self

    def step(
        self, x: Tensor, D: Tensor, m: Tensor | None, v: Tensor | None, lr: float, t: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        new, m = sgd_step(x, -D, m, lr=lr, momentum=self.momentum, nesterov=self.nesterov)
        return new, m, None


class _Adaptive(Described):
    """x ← x + η m / (√v + τ), where the paper corrects no bias and starts v at τ²."""

    lr: Rate = 0.1
    """η; ours: the paper tunes it per task."""
    b1: Decay = 0.9
    """β₁; 0.9 in the paper, 0 for Adagrad."""
    tau: Positive = 1e-3
    """τ, the degree of adaptivity; 0.001 in the paper."""
    v_init: Rate | None = None
    """v before the first step; τ² in the paper."""

    def second_moment(self, v: Tensor, D: Tensor) -> Tensor:
        raise NotImplementedError

    def unbiased(self, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """m and v as they are used in step t = 1, 2, ..."""
        return m, v

    def step(
        self, x: Tensor, D: Tensor, m: Tensor | None, v: Tensor | None, lr: float, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        start = self.tau**2 if self.v_init is None else self.v_init
        m = torch.zeros_like(D) if m is None else m.double()
        v = torch.full_like(D, start) if v is None else v.double()
        m = self.b1 * m + (1 - self.b1) * D
        v = self.second_moment(v, D)
        m_used, v_used = self.unbiased(m, v, t)
        x = cast(x.double() + lr * m_used / (v_used.sqrt() + self.tau), x.dtype)
        return x, cast(m, wire(x.dtype)), cast(v, wire(x.dtype))


class Adagrad(_Adaptive):
    """FedAdagrad."""

    kind: Literal["adagrad"] = "adagrad"
    b1: Decay = 0.0
    """β₁; 0 in the paper."""

    def second_moment(self, v: Tensor, D: Tensor) -> Tensor:
        return v + D.square()


class _Decaying(_Adaptive):
    b2: Decay = 0.99
    """β₂; 0.99 in the paper."""
    bias_correction: bool = False
    """Divide m by 1 − β₁ᵗ and v by 1 − β₂ᵗ, t = 1 in the first step, as Adam does (arXiv:1412.6980), best with `v_init: 0`;
    not in the paper."""

    def unbiased(self, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return (m / (1 - self.b1**t), v / (1 - self.b2**t)) if self.bias_correction else (m, v)


class Adam(_Decaying):
    """FedAdam."""

    kind: Literal["adam"] = "adam"

    def second_moment(self, v: Tensor, D: Tensor) -> Tensor:
        return self.b2 * v + (1 - self.b2) * D.square()


class Yogi(_Decaying):
    """FedYogi."""

    kind: Literal["yogi"] = "yogi"

    def second_moment(self, v: Tensor, D: Tensor) -> Tensor:
        return v - (1 - self.b2) * D.square() * torch.sign(v - D.square())


def _named(value: Any) -> Any:
    """A bare name stands for its defaults."""
    return {"kind": value} if isinstance(value, str) else value


ServerOptimizer = Annotated[Sgd | Adagrad | Adam | Yogi, Field(discriminator="kind"), BeforeValidator(_named)]
ServerSchedule = Annotated[Constant | Cosine | Step, Field(discriminator="kind"), BeforeValidator(_named)]


# -- the algorithm -----------------------------------------------------------------------------------------------------
class FedOpt(WeightedAveraging):
    """FedAvg with an optimizer at the server. Buffers take the plain mean; moments belong to parameters alone."""

    kind: Literal["fedopt"] = "fedopt"
    State: ClassVar[type[Any]] = FedOptState

    server_optimizer: ServerOptimizer = Adam()
    """Which, with its hyperparameters."""
    server_schedule: ServerSchedule = Constant()
    """η over the server's steps; constant in the paper."""

    def init(self, model: Groups) -> FedOptState:
        self.check(model)
        return FedOptState(model["params"], model["frozen"], model["buffers"], m={}, v={}, steps=0)

    def server_update(self, state: FedOptState, aggregate: Aggregate, ctx: RoundContext) -> FedOptState:
        lr = self.server_optimizer.lr * self.server_schedule.factor(state.steps)
        params, m, v = dict(state.params), dict(state.m), dict(state.v)
        for name, D in mean_delta(state.params, aggregate).items():
            params[name], new_m, new_v = self.server_optimizer.step(
                params[name], D, m.get(name), v.get(name), lr, state.steps + 1
            )
            m |= {} if new_m is None else {name: new_m}
            v |= {} if new_v is None else {name: new_v}
        return averaged(state, aggregate, params=params, m=m, v=v, steps=state.steps + 1)
