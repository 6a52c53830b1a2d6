"""An algorithm after whose last phase the sites evaluate the model that it committed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from fedflow.algorithm import weighted_mean
from fedflow.transforms.composed import Transformed
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update

__all__ = ["VALIDATE", "Validated"]

VALIDATE = "validate"
"""The phase. It changes nothing: the digest of the model in its commit is that of the phase before."""

_EXAMPLES = "evaluated"


class Validated(Transformed):
    """`algorithm` with the phase `VALIDATE` behind its own: the metrics of that commit are the sites' means, by held-out examples."""

    kind: Literal["validated"] = "validated"  # type: ignore[assignment]
    transforms: tuple[Any, ...] = ()

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.algorithm.phases, VALIDATE)

    def enough(self, phase: str, quorum: int) -> int:
        return quorum if phase == VALIDATE else super().enough(phase, quorum)

    # -- server
    def broadcast(self, state: Any, phase: str) -> Groups:
        return self.model(state) if phase == VALIDATE else super().broadcast(state, phase)

    def expects(self, state: Any, phase: str) -> Spec:
        return {} if phase == VALIDATE else super().expects(state, phase)

    def weight(self, update: Update) -> float:
        return update.scalars[_EXAMPLES] if _EXAMPLES in update.scalars else super().weight(update)

    def decode(self, update: Update, state: Any, phase: str) -> Update:
        return update if phase == VALIDATE else super().decode(update, state, phase)

    def measure(self, updates: Iterable[Update], ctx: RoundContext) -> Tensors:
        return {} if ctx.phase == VALIDATE else super().measure(updates, ctx)

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        return weighted_mean(updates, self.weight) if ctx.phase == VALIDATE else super().aggregate(updates, ctx)

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        return state if ctx.phase == VALIDATE else super().server_update(state, aggregate, ctx)

    # -- site
    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        if ctx.phase != VALIDATE:
            return super().site_update(broadcast, site_state, work, ctx)
        found = self.algorithm.evaluated(broadcast, work, ctx)
        finite = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
        return replace(found, metrics=finite).update(ctx, {}, {_EXAMPLES: float(found.examples)}), site_state
