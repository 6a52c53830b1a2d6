"""FedProx: Li et al., "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127, Algorithm 2.

server:  x ← Σ pᵢ yᵢ                       pᵢ = wᵢ / Σ w over the contributors S
site i:  yᵢ ← K optimizer steps from x on Fᵢ(y) + μ/2 ‖y − x‖²,  that is with gradients g + μ (y − x)
"""

from __future__ import annotations

from typing import Any, Literal

from fedflow.algorithm import Correction, Training
from fedflow.algorithms.averaging import ModelState, Rate, WeightedAveraging, averaged, moved
from fedflow.types import Aggregate, Groups, RoundContext, Update

__all__ = ["FedProx"]


class FedProx(WeightedAveraging):
    """FedAvg whose sites are held near the global model. At μ = 0 it is FedAvg to the bit."""

    kind: Literal["fedprox"] = "fedprox"

    mu: Rate = 0.01
    """μ, of the proximal term over trainable parameters. The paper tunes it over 0.001, 0.01, 0.1 and 1; too large a value
    stalls training."""

    def server_update(self, state: ModelState, aggregate: Aggregate, ctx: RoundContext) -> ModelState:
        return averaged(state, aggregate, params=moved(state.params, aggregate))

    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = self.start(broadcast, site_state)
        local = work.train(start, ctx, correction=Correction(proximal=self.mu))
        return local.update(ctx, self.payload(start, local)), self.kept(local)
