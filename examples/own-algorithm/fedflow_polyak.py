"""An algorithm in a package of its own: FedAvg whose model is the running average of the rounds' models.

Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30(4), 1992.

    sites train from x as in FedAvg;  a ← β a + (1 − β) x  is what is evaluated and exported
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedflow.algorithms import FedAvg
from fedflow.tensors import cast, interpolate
from fedflow.types import Aggregate, Groups, RoundContext, Tensors


@dataclass(frozen=True)
class PolyakState:
    """x as params, frozen, buffers; a as average."""

    params: Tensors
    frozen: Tensors
    buffers: Tensors
    average: Tensors


class Polyak(FedAvg):
    """Federated averaging with an averaged model."""

    kind: Literal["polyak"] = "polyak"
    State: ClassVar[type[Any]] = PolyakState

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """β; ours."""

    def init(self, model: Groups) -> PolyakState:
        return PolyakState(model["params"], model["frozen"], model["buffers"], average=model["params"])

    def model(self, state: PolyakState) -> Groups:
        return {"params": state.average, "frozen": state.frozen, "buffers": state.buffers}

    def broadcast(self, state: PolyakState, phase: str) -> Groups:
        return super().model(state)

    def server_update(self, state: PolyakState, aggregate: Aggregate, ctx: RoundContext) -> PolyakState:
        new = super().server_update(state, aggregate, ctx)
        average = {n: cast(interpolate(x, state.average[n], self.decay), x.dtype) for n, x in new.params.items()}
        return PolyakState(new.params, new.frozen, new.buffers, average)
