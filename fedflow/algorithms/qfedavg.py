"""q-FedAvg: Li et al., "Fair Resource Allocation in Federated Learning", arXiv:1905.10497, Algorithm 2.

    site i:  Fᵢ ← loss at x over all of its data;  yᵢ ← K optimizer steps from x
             Δᵢ ← Fᵢ^q L (x − yᵢ)
             hᵢ ← q Fᵢ^(q−1) ‖L (x − yᵢ)‖² + L Fᵢ^q
    server:  x ← x − Σ over S of Δᵢ / Σ over S of hᵢ
With weights wᵢ = Fᵢ^q and rᵢ = hᵢ / (L wᵢ) = q L ‖x − yᵢ‖² / Fᵢ + 1 this is x + Σ wᵢ (yᵢ − x) / Σ wᵢ rᵢ, so that sites send
yᵢ, Fᵢ and rᵢ, and the server takes weighted means.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedflow.algorithm import LocalResult, Training
from fedflow.algorithms.averaging import Averaging, ModelState, Rate, averaged, moved
from fedflow.errors import SiteError
from fedflow.tensors import squared_norm
from fedflow.types import Aggregate, Groups, RoundContext, Update

__all__ = ["QFedAvg"]


class QFedAvg(Averaging):
    """Averaging that favours sites with a high loss, the more so the larger q; q = 0 is FedAvg with uniform weights.

    Sites must be able to say their loss at the model they were sent.
    """

    kind: Literal["qfedavg"] = "qfedavg"

    q: Rate = 1.0
    """q; the paper tunes it from 0.001 to 15 per task, and shows 1 for its synthetic data."""
    lipschitz: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """L, an estimate of the Lipschitz constant of the gradients. Default: 1/η_l as in the paper, from the mean learning rate
    of the site's steps."""

    # -- server
    def weight(self, update: Update) -> float:
        """Fᵢ^q; a site whose loss is 0 or no number does not count, nor one with r below 1."""
        return (
            float(update.scalars["loss"] ** self.q) if update.scalars["r"] >= 1 and update.scalars["loss"] > 0 else 0.0
        )

    def server_update(self, state: ModelState, aggregate: Aggregate, ctx: RoundContext) -> ModelState:
        return averaged(state, aggregate, params=moved(state.params, aggregate, 1 / aggregate.scalars["r"]))

    # -- site
    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = self.start(broadcast, site_state)
        F = work.loss(start, ctx)
        local = work.train(start, ctx)
        scalars = {"loss": F, "r": self._ratio(F, start, local, ctx)}
        return local.update(ctx, self.payload(start, local), scalars), self.kept(local)

    def _ratio(self, F: float, start: Groups, local: LocalResult, ctx: RoundContext) -> float:
        """rᵢ = q L ‖x − yᵢ‖² / Fᵢ + 1"""
        if not F > 0 or not local.lr_sum > 0:
            raise SiteError(
                f"loss ({F}) and lr_sum ({local.lr_sum}): expected both above 0, as q-FedAvg divides by them",
                run=ctx.run,
                round=ctx.round,
                site=ctx.site,
            )
        L = self.lipschitz or local.steps / local.lr_sum
        squared = sum(squared_norm(d) for d in self.delta(start, local).values())
        return self.q * L * squared / F + 1
