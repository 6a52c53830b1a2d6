"""FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv:1602.05629, Algorithm 1.

    server:  x ← x + η_g Σ pᵢ (yᵢ − x)        pᵢ = wᵢ / Σ w over the contributors S
    site i:  yᵢ ← K optimizer steps from x
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedflow.algorithm import Algorithm, NoState, Training
from fedflow.tensors import cast, interpolate, subtract
from fedflow.types import Aggregate, Groups, RoundContext, SiteId, Spec, Tensors, Update, spec_of

__all__ = ["FedAvg", "FedAvgState"]


@dataclass(frozen=True)
class FedAvgState:
    """x: trainable parameters, frozen parameters, and the persistent rest (BatchNorm statistics, counters)."""

    params: Tensors
    frozen: Tensors
    buffers: Tensors


class FedAvg(Algorithm):
    """Federated averaging. Sites train from the global model; the server takes the weighted mean of what comes back.

    Buffers take the plain weighted mean: floats in float64, rounded once; integers half to even; booleans by majority of
    weight. Frozen parameters go out, are held at their value, and do not come back.
    """

    kind: Literal["fedavg"] = "fedavg"
    State: ClassVar[type[Any]] = FedAvgState

    server_learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """η_g; 1 in the paper."""
    weight_by: Literal["examples", "steps", "uniform"] = "examples"
    """wᵢ: examples at the site (the paper's n_k), completed optimizer steps, or 1."""
    aggregation_weights: dict[SiteId, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """A factor on wᵢ per site; 1 where a site is not named."""
    transfer: Literal["full", "delta"] = "full"
    """What travels back: y (one site at η_g = 1 gives back y to the bit), or y − x in float32, where x + (y − x) can differ
    from y by a unit in the last place of the larger of the two."""
    frozen: Literal["hold", "average"] = "hold"
    """Whether parameters with requires_grad False are held or averaged like the rest."""

    # -- server
    def init(self, model: Groups) -> FedAvgState:
        return FedAvgState(model["params"], model["frozen"], model["buffers"])

    def model(self, state: FedAvgState) -> Groups:
        return {"params": state.params, "frozen": state.frozen, "buffers": state.buffers}

    def expects(self, state: FedAvgState, phase: str) -> Spec:
        spec = spec_of({"params": state.params, "buffers": state.buffers})
        if self.transfer == "delta":
            spec["delta"] = {n: replace(s, dtype=torch.float32) for n, s in spec.pop("params").items()}
        if self.frozen == "average":
            spec |= spec_of({"frozen": state.frozen})
        return spec

    def weight(self, update: Update) -> float:
        by = {"examples": update.examples, "steps": update.steps, "uniform": 1}[self.weight_by]
        return by * self.aggregation_weights.get(update.site, 1.0)

    def server_update(self, state: FedAvgState, aggregate: Aggregate, ctx: RoundContext) -> FedAvgState:
        mean, lr = aggregate.tensors, self.server_learning_rate
        if self.transfer == "delta":
            delta = mean.get("delta", {})
            params = {
                n: cast(x.double() + lr * delta[n].double(), x.dtype) if n in delta else x
                for n, x in state.params.items()
            }
        else:
            y = mean.get("params", {})
            params = {n: cast(interpolate(x, y[n], lr), x.dtype) if n in y else x for n, x in state.params.items()}
        return FedAvgState(
            params, _replace(state.frozen, mean.get("frozen", {})), _replace(state.buffers, mean.get("buffers", {}))
        )

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Training, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        local = work.train(broadcast, ctx)
        if self.transfer == "delta":
            tensors = {"delta": subtract(local.params, broadcast["params"], torch.float32), "buffers": local.buffers}
        else:
            tensors = {"params": local.params, "buffers": local.buffers}
        if self.frozen == "average":
            tensors["frozen"] = local.frozen
        return local.update(ctx, tensors), site_state


def _replace(old: Tensors, mean: Tensors) -> Tensors:
    """`mean` in the dtypes of `old`; tensors that nobody sent stay."""
    return {name: cast(mean[name], tensor.dtype) if name in mean else tensor for name, tensor in old.items()}
