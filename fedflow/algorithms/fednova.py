"""FedNova: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
arXiv:2007.07481, equations 4 to 6 and section 4.

    site i:  yᵢ ← K steps from x;  ‖aᵢ‖ ← K (SGD),  or  [K − ρ (1 − ρᴷ) / (1 − ρ)] / (1 − ρ)  (momentum ρ)
             dᵢ ← (x − yᵢ) / (η ‖aᵢ‖)
    server:  τ ← Σ pᵢ ‖aᵢ‖
             x ← x − τ η Σ pᵢ dᵢ
What travels is −η dᵢ = (yᵢ − x) / ‖aᵢ‖, so that η need not be known.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedflow.algorithm import Training
from fedflow.algorithms.averaging import ModelState, WeightedAveraging, averaged, mean_delta, wire
from fedflow.tensors import cast
from fedflow.types import Aggregate, Groups, RoundContext, Update

__all__ = ["FedNova"]


class FedNova(WeightedAveraging):
    """FedAvg for sites that take different numbers of steps: each counts by its direction, not by how far it went."""

    kind: Literal["fednova"] = "fednova"
    transfer: Literal["delta"] = "delta"
    """What travels back: (yᵢ − x) / ‖aᵢ‖, in the group "delta"."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """ρ, of the sites' SGD: what `training.optimizer.momentum` says."""

    def objections(self, training: Any) -> list[str]:
        optimizer = training.optimizer
        if optimizer.kind != "sgd" or optimizer.nesterov:
            found = "nesterov" if optimizer.nesterov else optimizer.kind
            return [
                f"training.optimizer: found {found}, expected plain or momentum SGD, which FedNova normalises; choose it"
            ]
        if optimizer.momentum != self.momentum:
            return [
                f"training.optimizer.momentum ({optimizer.momentum}) must equal algorithm.momentum ({self.momentum}); set both to one"
            ]
        return []

    def norm(self, K: int) -> float:
        """‖aᵢ‖₁ after K steps."""
        rho = self.momentum
        return (K - rho * (1 - rho**K) / (1 - rho)) / (1 - rho)

    # -- server
    def weight(self, update: Update) -> float:
        """As chosen; none where ‖aᵢ‖ is not what the steps say."""
        return super().weight(update) if update.scalars["a"] == self.norm(update.steps) > 0 else 0.0

    def server_update(self, state: ModelState, aggregate: Aggregate, ctx: RoundContext) -> ModelState:
        tau = aggregate.scalars["a"]
        params = dict(state.params)
        for name, step in mean_delta(state.params, aggregate).items():  # −η Σ pᵢ dᵢ
            params[name] = cast(params[name].double() + tau * step, params[name].dtype)
        return averaged(state, aggregate, params=params)

    # -- site
    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = self.start(broadcast, site_state)
        local = work.train(start, ctx)
        a = self.norm(local.steps)
        steps = {n: cast(d / a, wire(local.params[n].dtype)) for n, d in self.delta(start, local).items()}
        return local.update(ctx, {**self.payload(start, local), "delta": steps}, {"a": a}), self.kept(local)
