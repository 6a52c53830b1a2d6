"""FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv:1602.05629, Algorithm 1.

    server:  x ← x + η_g Σ pᵢ (yᵢ − x)        pᵢ = wᵢ / Σ w over the contributors S
    site i:  yᵢ ← K optimizer steps from x
"""

from __future__ import annotations

from typing import Literal

from fedflow.algorithms.averaging import ModelState, Rate, WeightedAveraging, averaged, moved
from fedflow.types import Aggregate, RoundContext

__all__ = ["FedAvg"]


class FedAvg(WeightedAveraging):
    """Federated averaging. Sites train from the global model; the server takes the weighted mean of what comes back."""

    kind: Literal["fedavg"] = "fedavg"

    server_learning_rate: Rate = 1.0
    """η_g; 1 in the paper."""

    def server_update(self, state: ModelState, aggregate: Aggregate, ctx: RoundContext) -> ModelState:
        return averaged(state, aggregate, params=moved(state.params, aggregate, self.server_learning_rate))
