"""FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639, Algorithm 1.

    site i:  Δᵢ ← yᵢ − x^(t−τᵢ): K optimizer steps from the model of τᵢ rounds ago
    server:  once K updates are there:  x ← x + η_g (1/K) Σ s(τᵢ) Δᵢ        s(τ) = 1/√(1 + τ)

Divided by K, and not by Σ s(τᵢ): stale updates move the model less. For use with `schedule: buffered`; where nobody is late, and in
every other schedule that drops late updates, it is FedAvg with uniform weights.
"""

from __future__ import annotations

import math
from typing import Literal

from fedflow.algorithms.averaging import Averaging, ModelState, Rate, averaged, moved
from fedflow.types import Aggregate, RoundContext, Update

__all__ = ["FedBuff"]


class FedBuff(Averaging):
    """Averaging in which an update weighs the less, the more rounds were committed since its site began."""

    kind: Literal["fedbuff"] = "fedbuff"

    server_learning_rate: Rate = 1.0
    """η_g; the paper tunes it per task."""
    staleness: Literal["polynomial", "constant"] = "polynomial"
    """s: polynomial: 1/√(1 + τ), the paper's; constant: 1, whatever the age."""

    def weight(self, update: Update) -> float:
        """s(τ): 1 for a fresh update."""
        return 1.0 if self.staleness == "constant" else 1 / math.sqrt(1 + update.staleness)

    def server_update(self, state: ModelState, aggregate: Aggregate, ctx: RoundContext) -> ModelState:
        share = aggregate.weight / aggregate.count  # Σ s / K: the mean is divided by Σ s
        return averaged(state, aggregate, params=moved(state.params, aggregate, self.server_learning_rate * share))
