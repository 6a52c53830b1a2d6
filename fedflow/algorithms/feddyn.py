"""FedDyn: Acar et al., "Federated Learning Based on Dynamic Regularization", arXiv:2111.04263, Algorithm 1.

    site i:  yᵢ ← K optimizer steps from x on Lᵢ(y) − ⟨gᵢ, y⟩ + α/2 ‖y − x‖²
             gᵢ ← gᵢ − α (yᵢ − x)
    server:  h ← h − α/N · Σ over S of (yᵢ − x)        N: the whole federation, S: the contributors
             x ← mean over S of yᵢ − h/α
All start at 0, so that h is the mean of all N gᵢ, always. gᵢ is the gradient of Lᵢ at the site's last optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedflow.algorithm import Correction, Training
from fedflow.algorithms.averaging import Averaging, ModelState, averaged, mean_delta, model_groups
from fedflow.tensors import cast
from fedflow.types import Aggregate, Groups, RoundContext, Tensors, Update

__all__ = ["FedDyn", "FedDynSite", "FedDynState"]


@dataclass(frozen=True)
class FedDynState(ModelState):
    """x, and h in float64."""

    h: Tensors


@dataclass(frozen=True)
class FedDynSite:
    """gᵢ in float64, and what is personal."""

    g: Tensors
    personal: Tensors


class FedDyn(Averaging):
    """Averaging whose local objectives are bent so that what is stationary at every site is stationary for the sum.

    Contributors weigh the same. Sites should come near their optimum in a round: many local steps.
    """

    kind: Literal["feddyn"] = "feddyn"
    State: ClassVar[type[Any]] = FedDynState
    SiteState: ClassVar[type[Any]] = FedDynSite

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    """α; the paper tunes it over 0.1, 0.01 and 0.001."""

    # -- server
    def init(self, model: Groups) -> FedDynState:
        self.check(model)
        h = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in self.shared(model["params"]).items()}
        return FedDynState(model["params"], model["frozen"], model["buffers"], h)

    def server_update(self, state: FedDynState, aggregate: Aggregate, ctx: RoundContext) -> FedDynState:
        params, h = dict(state.params), dict(state.h)
        for name, delta in mean_delta(state.params, aggregate).items():
            x = params[name].double()
            h[name] = h[name] - self.alpha * aggregate.count / ctx.num_sites * delta
            params[name] = cast(x + delta - h[name] / self.alpha, params[name].dtype)
        return averaged(state, aggregate, params=params, h=h)

    # -- site
    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> FedDynSite:
        zero = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in self.shared(broadcast["params"]).items()}
        return FedDynSite(zero, self.own(model_groups(broadcast)))

    def site_update(
        self, broadcast: Groups, site_state: FedDynSite, work: Training, ctx: RoundContext
    ) -> tuple[Update, FedDynSite]:
        start, g = self.start(broadcast, site_state), site_state.g
        correction = Correction(offset={n: -t for n, t in g.items()}, proximal=self.alpha)
        local = work.train(start, ctx, correction=correction)
        sent = self.payload(start, local)
        moved = sent["delta"] if self.transfer == "delta" else self.delta(start, local)
        g = {n: t - self.alpha * moved[n].double() for n, t in g.items()}
        return local.update(ctx, sent), FedDynSite(g, self.own(local.groups))
