"""Schedules: who takes part in a round, and where it is aggregated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedflow.algorithm import Schedule
from fedflow.errors import QuorumLost
from fedflow.types import FederationView, RoundPlan, SiteId, SiteTask, derive_seed

__all__ = ["Buffered", "Cyclic", "Everyone", "Sampled", "Swarm", "Tree"]


class Everyone(Schedule):
    """Every site that is online, every round; or every one of those that are named."""

    kind: Literal["everyone"] = "everyone"

    sites: Annotated[list[SiteId], Field(min_length=1)] | None = None
    """Only these. Default: all of the federation."""

    @property
    def names(self) -> Collection[SiteId]:
        return self.sites or ()

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        cohort = [site for site in sorted(view) if view[site].online and (self.sites is None or site in self.sites)]
        return RoundPlan({site: SiteTask() for site in cohort}, quorum=len(cohort))


class Sampled(Schedule):
    """A seeded random cohort each round, without replacement (McMahan et al., arXiv:1602.05629: "a random fraction C").

    The order of all sites is drawn from (seed, round) and their names alone; sites that are offline are passed over, so that
    with everyone online the cohorts do not depend on who answered before.
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

    @property
    def closing(self) -> tuple[str, int] | None:
        return None if self.sites_per_round is None else ("schedule.sites_per_round", self.sites_per_round)

    def _wanted(self, federation: int) -> int:
        if self.sites_per_round is not None:
            return self.sites_per_round
        assert self.fraction is not None
        return max(1, math.floor(self.fraction * federation + 0.5))

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        wanted = self._wanted(len(view))
        online = (site for site in _shuffled(sorted(view), seed, round) if view[site].online)
        asked = list(itertools.islice(online, math.ceil(wanted * self.over_selection - 1e-9)))
        return RoundPlan({site: SiteTask() for site in sorted(asked)}, quorum=min(wanted, len(asked)))


class Cyclic(Schedule):
    """One site a round: the model visits the sites in turn, and what each makes of it goes to the next (Chang et al.,
    "Distributed deep learning networks among institutions for medical imaging", JAMIA 2018, doi:10.1093/jamia/ocy017).

    A lap is as many rounds as there are sites. Whose turn comes next follows from the committed rounds: a run that is killed in the
    middle of a lap goes on there. A site that is offline is passed over.
    """

    kind: Literal["cyclic"] = "cyclic"

    order: Literal["fixed", "random", "random_without_repeat"] = "fixed"
    """fixed: in the order of `sites`, after the one visited last; random: any site that is online, drawn anew each round;
    random_without_repeat: in an order drawn for each lap, in which no site comes twice as long as another that is online has not
    come."""
    sites: Annotated[list[SiteId], Field(min_length=1)] | None = None
    """The sites that are visited, in this order. Default: all of the federation, by name."""

    @model_validator(mode="after")
    def _once(self) -> Cyclic:
        if self.sites and len(set(self.sites)) < len(self.sites):
            raise ValueError(f"sites: found {self.sites}, expected each once; leave out the others")
        return self

    @property
    def names(self) -> Collection[SiteId]:
        return self.sites or ()

    @property
    def closing(self) -> tuple[str, int]:
        return "schedule", 1

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        turn = self.sites or sorted(view)
        online = [site for site in turn if view[site].online]
        chosen = [self._next(round, turn, online, view, seed)] if online else []
        return RoundPlan({site: SiteTask() for site in chosen}, quorum=1)

    def _next(
        self, round: int, turn: Sequence[SiteId], online: Sequence[SiteId], view: FederationView, seed: int
    ) -> SiteId:
        if self.order == "random":
            return min(online, key=lambda site: (derive_seed("cyclic", seed, round, site), site))
        visits = {site: -1 if (last := view[site].last_round) is None else last for site in turn}
        latest = max(turn, key=lambda site: visits[site])
        if self.order == "fixed":
            first = turn.index(latest) + 1 if visits[latest] >= 0 else 0
            return next(site for site in (*turn[first:], *turn[:first]) if site in online)
        lap = round // len(turn)
        left = [site for site in online if visits[site] < lap * len(turn)]
        among = left or [site for site in online if site != latest] or online
        return min(among, key=lambda site: (derive_seed("cyclic", seed, lap, site), site))


class Buffered(Schedule):
    """Whoever is not at work is asked, and every `size` updates are a round, of whatever age up to `max_staleness` (FedBuff: Nguyen et
    al., arXiv:2106.06639).

    A site that is at work when a round closes goes on, until its own round's deadline, and its update counts in a later one; one that has
    finished before is asked again at once, for an update that counts in the next round. Set `timeouts.quorum_grace: 0s`: a round is not to wait for more.
    """

    kind: Literal["buffered"] = "buffered"

    size: Annotated[int, Field(ge=1, strict=True)] = 10
    """K: updates that close a round; 10 in the paper."""
    max_staleness: Annotated[int, Field(ge=0, strict=True)] = 10
    """τ of the oldest update that counts, in rounds; a site that is at work for longer is stopped, and asked anew. Ours."""
    concurrency: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Sites at work at a time, drawn anew among those that are idle; the paper's M_c. Default: all that are online."""
    ask_again: bool = True
    """Whether a site that finished before its round closed is asked for another update from the same model, so that it is never idle; once a
    round. As in the paper, where whoever finishes is replaced at once."""
    dynamic_steps: Annotated[int, Field(ge=1, strict=True)] | None = None
    """H, dynamic local updates (arXiv:2401.09135): the fastest site takes so many steps, each other one as many of them as its speed in its
    last contribution says, so that all take about as long. Default: as `training` says."""

    @model_validator(mode="after")
    def _enough(self) -> Buffered:
        if self.concurrency is not None and self.concurrency < self.size:
            raise ValueError(
                f"concurrency ({self.concurrency}) must be at least size ({self.size}); raise it, or lower size"
            )
        return self

    @property
    def closing(self) -> tuple[str, int]:
        return "schedule.size", self.size

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        online = [site for site in sorted(view) if view[site].online]
        oldest = round - self.max_staleness
        at_work = [site for site in online if (base := view[site].in_flight) is not None and base >= oldest]
        idle = sorted(set(online) - set(at_work), key=lambda site: (derive_seed("buffered", seed, round, site), site))
        free = len(idle) if self.concurrency is None else max(self.concurrency - len(at_work), 0)
        cohort = sorted([*at_work, *idle[:free]])
        return RoundPlan(
            {site: SiteTask(self._steps(site, view)) for site in cohort},
            quorum=min(self.size, len(cohort)),
            accept_bases=self.max_staleness,
            late="carry",
            again=self.ask_again,
        )

    def _steps(self, site: SiteId, view: FederationView) -> int | None:
        """⌊H vᵢ / max v⌋, at least 1, v being steps per second; H for a site that has not contributed."""
        H = self.dynamic_steps
        speeds = {s: seen.steps / seen.seconds for s, seen in view.items() if seen.steps and seen.seconds}
        return H if H is None or site not in speeds else max(1, math.floor(H * speeds[site] / max(speeds.values())))


# -- where a round is aggregated -----------------------------------------------------------------------------------------
def _named(value: Any) -> Any:
    """A bare name stands for its defaults."""
    return {"kind": value} if isinstance(value, str) else value


Cohort = Annotated[Everyone | Sampled | Cyclic | Buffered, Field(discriminator="kind"), BeforeValidator(_named)]


class _Aggregated(Schedule):
    """A schedule that leaves it to another who takes part."""

    cohort: Cohort = Everyone()
    """Who takes part: another schedule, with its settings."""

    @property
    def names(self) -> Collection[SiteId]:
        return self.cohort.names

    @property
    def invited(self) -> Collection[SiteId]:
        return self.cohort.invited

    @property
    def closing(self) -> tuple[str, int] | None:
        found = self.cohort.closing
        return found and (found[0].replace("schedule", "schedule.cohort", 1), found[1])


class Swarm(_Aggregated):
    """Aggregation at the sites, each in its turn: swarm learning (Warnat-Herresthal et al., Nature 594, 2021,
    doi:10.1038/s41586-021-03583-3).

    A round is aggregated by the site whose turn it is, at its own worker; if that dies, the role passes on to the next, within the
    round. The coordinator reads and writes records only, no model. Who aggregates decides no bit of the result.
    """

    kind: Literal["swarm"] = "swarm"

    aggregators: Annotated[list[SiteId], Field(min_length=1)] | None = None
    """Sites that may aggregate: they can read all updates. Default: every site."""

    @property
    def names(self) -> Collection[SiteId]:
        return {*super().names, *(self.aggregators or ())}

    def objections(self, recipe: Any) -> list[str]:
        found = []
        if recipe.evaluation is not None:
            found.append(
                f"evaluation: found {recipe.evaluation.path}, expected none with schedule swarm, whose coordinator holds no model; "
                "remove it, and set federated_evaluation: true to have the sites evaluate"
            )
        if recipe.algorithm.coordinator_only:
            found.append(
                f"schedule: found swarm with algorithm {recipe.algorithm.kind}, expected one that aggregates at the coordinator: no site "
                "may read what all of them send; choose another"
            )
        return found

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        turn = sorted(set(self.aggregators or view))
        first = round % len(turn)
        order = [site for site in (*turn[first:], *turn[:first]) if view[site].online]
        if not order:
            raise QuorumLost(
                f"found none of {turn}, expected one to aggregate; start their workers and resume", round=round
            )
        return replace(self.cohort.plan(round, view, seed), aggregators=order)


class Tree(_Aggregated):
    """Aggregation in two steps: the updates of a region's sites are summed up by the region's own aggregator, at its work pool, and the
    sums at the coordinator.

    The sums are float64, one a region: the result differs from that of all updates at once by its last bits only. A region whose
    worker is absent takes its sites with it. Sites of no region go to the coordinator directly.
    """

    kind: Literal["tree"] = "tree"

    regions: Annotated[dict[str, Annotated[list[SiteId], Field(min_length=1)]], Field(min_length=1)]
    """Regional aggregator -> its sites."""

    @model_validator(mode="after")
    def _once(self) -> Tree:
        sites = [site for members in self.regions.values() for site in members]
        if twice := sorted({site for site in sites if sites.count(site) > 1}):
            raise ValueError(f"regions: found {twice} twice, expected each site in one region; leave out the others")
        if both := sorted(self.regions.keys() & set(sites)):
            raise ValueError(f"regions: found {both} as region and as site, expected two names; rename the region")
        return self

    @property
    def names(self) -> Collection[SiteId]:
        return {*super().names, *(site for members in self.regions.values() for site in members)}

    @property
    def regional(self) -> Collection[str]:
        return sorted(self.regions)

    def objections(self, recipe: Any) -> list[str]:
        if recipe.algorithm.averages and not recipe.algorithm.measures:
            return []
        return [
            f"schedule: found tree with algorithm {recipe.algorithm.kind} and its reduction, expected one that takes a weighted mean, "
            "which alone can be made of sums; choose another, or leave out the tree"
        ]

    def absences(self, absent: Mapping[str, str]) -> Mapping[SiteId, str]:
        gone = {region: why for region, why in absent.items() if region in self.regions}
        cut_off = {site: f"region {region}: {why}" for region, why in gone.items() for site in self.regions[region]}
        return cut_off | {site: why for site, why in absent.items() if site not in gone}

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        plan = self.cohort.plan(round, view, seed)
        asked = {
            region: [site for site in sorted(self.regions[region]) if site in plan.tasks] for region in self.regional
        }
        return replace(plan, regions={region: sites for region, sites in asked.items() if sites})


def _shuffled(sites: Sequence[SiteId], seed: int, round: int) -> Iterator[SiteId]:
    """All of `sites` in a random order; a draw for each that is asked for (Fisher and Yates, as Durstenfeld's algorithm 235)."""
    moved: dict[int, int] = {}  # what lies no longer where it lay
    for place in range(len(sites)):
        drawn = place + derive_seed("cohort", seed, round, place) % (len(sites) - place)
        here = moved.pop(place, place)
        if drawn == place:
            yield sites[here]
        else:
            there, moved[drawn] = moved.get(drawn, drawn), here
            yield sites[there]
