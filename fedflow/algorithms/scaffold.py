"""SCAFFOLD: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv:1910.06378,
Algorithm 1.

    site i:  yᵢ ← K steps from x with  y ← y − η_l (gᵢ(y) − cᵢ + c)
             cᵢ⁺ ← gᵢ(x)  (option I),  or  cᵢ − c + (x − yᵢ) / (K η_l)  (option II)
    server:  x ← x + η_g · mean over S of (yᵢ − x)
             c ← c + 1/N · Σ over S of (cᵢ⁺ − cᵢ)        N: the whole federation, S: the contributors
All c start at 0, so that c is the mean of all N cᵢ, always. The server keeps Σ cᵢ; c = Σ cᵢ / N where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedflow.algorithm import Correction, LocalResult, Training
from fedflow.algorithms.averaging import Averaging, ModelState, Rate, averaged, model_groups, moved, wire
from fedflow.errors import SiteError
from fedflow.tensors import cast, non_finite
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, TensorSpec, Update

__all__ = ["Scaffold", "ScaffoldSite", "ScaffoldState"]


@dataclass(frozen=True)
class ScaffoldState(ModelState):
    """x, and Σ cᵢ over all sites in float64 (as NVFlare: c itself)."""

    control: Tensors


@dataclass(frozen=True)
class ScaffoldSite:
    """cᵢ in float64, and what is personal."""

    control: Tensors
    personal: Tensors


class Scaffold(Averaging):
    """Averaging whose local gradients are corrected by control variates, so that sites do not drift apart.

    Contributors weigh the same. Only trainable parameters have control variates. A varying learning rate is exact for SGD:
    K η_l is the sum over the steps.
    """

    kind: Literal["scaffold"] = "scaffold"
    State: ClassVar[type[Any]] = ScaffoldState
    SiteState: ClassVar[type[Any]] = ScaffoldSite

    server_learning_rate: Rate = 1.0
    """η_g; 1 in the paper's experiments."""
    option: Literal[1, 2] = 2
    """How cᵢ⁺ is found: 1 takes another pass over all of the site's data, 2 does not; the paper's experiments use 2."""
    apply: Literal["gradient", "after_step"] = "gradient"
    """Where the correction acts: on gradients before the optimizer reads them, as in the paper, or on parameters after its
    step. The same for plain SGD."""
    compat: Literal["paper", "nvflare"] = "paper"
    """nvflare: as NVFlare computes it. Differences of model and controls weighted by steps over the contributors, c without
    |S|/N, and the correction after the step."""
    allow_adaptive: bool = False
    """Let sites train with Adam and the like, for which the mathematics do not hold."""

    # -- server
    def init(self, model: Groups) -> ScaffoldState:
        self.check(model)
        control = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in self.shared(model["params"]).items()}
        return ScaffoldState(model["params"], model["frozen"], model["buffers"], control)

    def broadcast(self, state: ScaffoldState, phase: str) -> Groups:
        control = {n: cast(c, wire(state.params[n].dtype)) for n, c in state.control.items()}
        return {**self.model(state), "control": control}

    def expects(self, state: ScaffoldState, phase: str) -> Spec:
        control = {n: TensorSpec(tuple(c.shape), wire(state.params[n].dtype)) for n, c in state.control.items()}
        return {**super().expects(state, phase), "control": control}

    def weight(self, update: Update) -> float:
        return update.steps if self.compat == "nvflare" else 1.0

    def server_update(self, state: ScaffoldState, aggregate: Aggregate, ctx: RoundContext) -> ScaffoldState:
        change = aggregate.tensors.get("control", {})  # mean over S of cᵢ⁺ − cᵢ
        share = 1.0 if self.compat == "nvflare" else float(aggregate.count)
        control = {n: c + share * change[n].double() if n in change else c for n, c in state.control.items()}
        params = moved(state.params, aggregate, self.server_learning_rate)
        return averaged(state, aggregate, params=params, control=control)

    # -- site
    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> ScaffoldSite:
        zero = {n: torch.zeros_like(c, dtype=torch.float64) for n, c in broadcast["control"].items()}
        return ScaffoldSite(zero, self.own(model_groups(broadcast)))

    def site_update(
        self, broadcast: Groups, site_state: ScaffoldSite, work: Training, ctx: RoundContext
    ) -> tuple[Update, ScaffoldSite]:
        start, c_i = self.start(broadcast, site_state), _fitting(site_state.control, broadcast["control"], ctx)
        share = 1.0 if self.compat == "nvflare" else float(ctx.num_sites)
        c = {n: total.double() / share for n, total in broadcast["control"].items()}
        local = work.train(start, ctx, correction=self._correction(c, c_i))
        new = work.gradient(start, ctx) if self.option == 1 else self._estimate(c, c_i, start, local, ctx)
        change = {n: cast(new[n].double() - c_i[n], total.dtype) for n, total in broadcast["control"].items()}
        if problem := non_finite({"control": change}):
            raise _error(f"the control variate is not finite: {problem}; lower the learning rate", ctx)
        kept = ScaffoldSite({n: c_i[n] + change[n] for n in c_i}, self.own(local.groups))
        return local.update(ctx, {**self.payload(start, local), "control": change}), kept

    def _correction(self, c: Tensors, c_i: Tensors) -> Correction:
        """g ← g + c − cᵢ"""
        return Correction(
            offset={n: c[n] - c_i[n] for n in c},
            apply="after_step" if self.compat == "nvflare" else self.apply,
            assumes_sgd=not self.allow_adaptive,
        )

    def _estimate(
        self, c: Tensors, c_i: Tensors, start: Groups, local: LocalResult, ctx: RoundContext
    ) -> dict[str, Tensor]:
        """Option II: cᵢ − c + (x − yᵢ) / (K η_l)"""
        if not local.lr_sum > 0:
            raise _error(f"lr_sum: found {local.lr_sum}, expected a learning rate above 0 in the round; raise it", ctx)
        return {n: c_i[n] - c[n] - d / local.lr_sum for n, d in self.delta(start, local).items()}

    def objections(self, training: Any) -> list[str]:
        kind = training.optimizer.kind
        if kind == "sgd" or self.allow_adaptive:
            return []
        return [
            f"training.optimizer.kind: found {kind!r}, expected 'sgd', for which SCAFFOLD's mathematics hold; "
            "choose it, or set algorithm.allow_adaptive: true"
        ]


def _fitting(c_i: Tensors, control: Tensors, ctx: RoundContext) -> Tensors:
    """What the site kept, if it is a finite control variate of this model."""
    shapes = [{n: tuple(t.shape) for n, t in tensors.items()} for tensors in (c_i, control)]
    for name in shapes[0].keys() | shapes[1].keys():
        found, expected = (s.get(name) for s in shapes)
        if found != expected:
            raise _error(
                f"the site's control variate of {name}: found {found}, expected {expected}; start it anew", ctx
            )
    if problem := non_finite({"control": c_i}):
        raise _error(f"the site's control variate is not finite: {problem}; start it anew", ctx)
    return c_i


def _error(message: str, ctx: RoundContext) -> SiteError:
    return SiteError(message, run=ctx.run, round=ctx.round, site=ctx.site)
