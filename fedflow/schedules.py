"""Schedules: who takes part in a round."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedflow.algorithm import Schedule
from fedflow.types import FederationView, RoundPlan, SiteTask, derive_seed

__all__ = ["Everyone", "Sampled"]


class Everyone(Schedule):
    """Every site that is online, every round."""

    kind: Literal["everyone"] = "everyone"

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        cohort = [site for site in sorted(view) if view[site].online]
        return RoundPlan({site: SiteTask() for site in cohort}, quorum=len(cohort))


class Sampled(Schedule):
    """A seeded random cohort each round, without replacement (McMahan et al., arXiv:1602.05629: "a random fraction C").

    The order of all sites is drawn from (seed, round) alone; sites that are offline are passed over, so that with everyone
    online the cohorts do not depend on who answered before.
    """

    kind: Literal["sampled"] = "sampled"

    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """How many updates close the round. Give this or `fraction`."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The paper's C: max(C·N, 1) sites, rounded half up."""
    over_selection: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Factor by which more sites are asked than are needed; 1.3 in Bonawitz et al., arXiv:1902.01046, section 2.2."""

    @model_validator(mode="after")
    def _one_size(self) -> Sampled:
        if (self.sites_per_round is None) == (self.fraction is None):
            raise ValueError("give exactly one of sites_per_round and fraction")
        return self

    def _wanted(self, federation: int) -> int:
        if self.sites_per_round is not None:
            return self.sites_per_round
        assert self.fraction is not None
        return max(1, math.floor(self.fraction * federation + 0.5))

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        wanted = self._wanted(len(view))
        order = sorted(view, key=lambda site: (derive_seed("cohort", seed, round, site), site))
        asked = [site for site in order if view[site].online][: math.ceil(wanted * self.over_selection - 1e-9)]
        return RoundPlan({site: SiteTask() for site in sorted(asked)}, quorum=min(wanted, len(asked)))
