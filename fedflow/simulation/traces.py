"""Traces: how fast the sites of a simulation are, when they are there, and how often they fail, over simulated time.

A trace is a pure function of (site, second of the run): drawn from a seed when it is asked, so that sites that nobody asks
cost nothing, or looked up in a table (`tables`). Seconds count from the run's start; Mbit are 10⁶ bits.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from random import Random
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fedflow.described import Described
from fedflow.errors import UserError
from fedflow.recipe import Delay, Duration
from fedflow.types import SiteId, derive_seed

__all__ = [
    "Always",
    "Conditions",
    "Constant",
    "Diurnal",
    "Generated",
    "LogNormal",
    "Pareto",
    "Period",
    "Trace",
    "UpDown",
]

DAY = 86400  # seconds


@dataclass(frozen=True)
class Conditions:
    """What a site that is there is like.

    seconds_per_step: of an optimizer step; or seconds: of a local training, whatever its steps; exactly one of them
    download_mbit, upload_mbit: Mbit/s; None = unlimited. latency: seconds, of each transfer
    drop: probability that an attempt fails on the way
    """

    seconds_per_step: float | None = None
    seconds: float | None = None
    download_mbit: float | None = None
    upload_mbit: float | None = None
    latency: float = 0.0
    drop: float = 0.0

    def duration(self, steps: int | None, down: int, up: int) -> float:
        """Seconds of an attempt: broadcast of `down` bytes, `steps` local steps, update of `up` bytes. steps None: not known.

        Raises UserError where steps are needed and not known.
        """
        training = self.seconds
        if training is None:
            if steps is None:
                raise UserError(
                    "trace.seconds_per_step: found a recipe that trains by epochs, expected a number of steps; give training.steps in "
                    "the recipe, or `seconds` of a whole local training in the trace"
                )
            assert self.seconds_per_step is not None
            training = steps * self.seconds_per_step
        return training + sum(
            self.latency + (size * 8e-6 / speed if speed else 0.0)
            for size, speed in ((down, self.download_mbit), (up, self.upload_mbit))
        )


@dataclass(frozen=True)
class Period:
    """From second `start` to before `end` a site is online, under the same conditions, or it is not."""

    start: float
    end: float
    online: bool


class Trace(Described):
    """How every site fares over simulated time. Raises UserError where it does not know a site."""

    kind: str

    def period(self, site: SiteId, at: float) -> Period:
        """The period of `site` that second `at` ≥ 0 of the run lies in."""
        raise NotImplementedError

    def conditions(self, site: SiteId, at: float) -> Conditions:
        """What `site`, which is online, is like at second `at` of the run."""
        raise NotImplementedError


# -- draws -------------------------------------------------------------------------------------------------------------
class Constant(Described):
    """The same for every site. A bare number in place of it means it."""

    kind: Literal["constant"] = "constant"
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def draw(self, u: float) -> float:
        return self.value


class LogNormal(Described):
    """exp(N(ln median, sigma²))."""

    kind: Literal["lognormal"] = "lognormal"
    median: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def draw(self, u: float) -> float:
        return self.median * math.exp(self.sigma * NormalDist().inv_cdf(u))


class Pareto(Described):
    """P(X > x) = (least / x)^alpha for x ≥ least: heavy-tailed, its mean infinite up to alpha 1, its variance up to 2."""

    kind: Literal["pareto"] = "pareto"
    least: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    def draw(self, u: float) -> float:
        return float(self.least * (1 - u) ** (-1 / self.alpha))


def _number(value: Any) -> Any:
    return {"kind": "constant", "value": value} if isinstance(value, (int, float)) else value


Draw = Annotated[Constant | LogNormal | Pareto, Field(discriminator="kind"), BeforeValidator(_number)]
"""A distribution over sites: `draw(u)` is its quantile function, 0 < u < 1."""


def _uniform(*parts: str | int) -> float:
    """In (0, 1), from the parts alone."""
    return ((derive_seed("trace", *parts) >> 10) + 0.5) / 2**53


# -- availability ------------------------------------------------------------------------------------------------------
class Always(Described):
    """Every site is there all the time."""

    kind: Literal["always"] = "always"

    def period(self, seed: int, site: SiteId, at: float) -> Period:
        return Period(0.0, math.inf, True)


class Diurnal(Described):
    """Every site is there for the same hours of its day, which begins at another time for each. The run begins at midnight."""

    kind: Literal["diurnal"] = "diurnal"
    online: Annotated[Duration, Field(lt=timedelta(days=1))] = timedelta(hours=12)
    """How long a day."""
    begins: Annotated[Delay, Field(lt=timedelta(days=1))] = timedelta(0)
    """The earliest time of day at which it begins."""
    spread: Annotated[Delay, Field(le=timedelta(days=1))] = timedelta(days=1)
    """Up to how much later it begins, uniformly; a day: all around the world."""

    def period(self, seed: int, site: SiteId, at: float) -> Period:
        first = math.floor((self.begins + _uniform(seed, "day", site) * self.spread).total_seconds())
        begun = first + math.floor((at - first) / DAY) * DAY
        ended = begun + self.online.total_seconds()
        if at < ended:
            return Period(max(begun, 0.0), ended, True)
        return Period(max(ended, 0.0), float(begun + DAY), False)


class UpDown(Described):
    """Sites come and go: exponential times there and away, in equilibrium from the start."""

    kind: Literal["up_down"] = "up_down"
    up: Duration
    """Mean time there."""
    down: Duration
    """Mean time away."""

    def period(self, seed: int, site: SiteId, at: float) -> Period:
        up, down = self.up.total_seconds(), self.down.total_seconds()
        window = 8 * math.ceil(up + down)  # whole seconds: its multiples are exact
        number = int(at // window)
        online, switches = _switches(seed, site, number * window, (number + 1) * window, up, down)
        i = bisect_right(switches, at)
        return Period(switches[i - 1], switches[i], online ^ (i % 2 == 0))


@lru_cache(maxsize=1 << 15)
def _switches(seed: int, site: SiteId, start: int, end: int, up: float, down: float) -> tuple[bool, tuple[float, ...]]:
    """Whether the site is there at `start`, and when that changes until `end`, both included.

    The process has no memory, so that it can be drawn anew for every window, whatever was before.
    """
    random = Random(derive_seed("trace", seed, "up_down", site, start))
    first = online = random.random() < up / (up + down)
    at, switches = float(start), [float(start)]
    while at < end:
        at = min(at - (up if online else down) * math.log1p(-random.random()), float(end))
        online = not online
        switches.append(at)
    return first, tuple(switches)


# -- generated ---------------------------------------------------------------------------------------------------------
class Generated(Trace):
    """Drawn from a seed: every site's own speed, network and times, the same whenever it is asked."""

    kind: Literal["generated"] = "generated"
    seed: Annotated[int, Field(ge=0, lt=2**53, strict=True)] = 0
    seconds_per_step: Draw | None = None
    """Of an optimizer step. Give this or `seconds`."""
    seconds: Draw | None = None
    """Of a local training, whatever its steps."""
    download_mbit: Draw | None = None
    """Mbit/s. Default: unlimited."""
    upload_mbit: Draw | None = None
    """Mbit/s. Default: unlimited."""
    latency: Draw = Constant(value=0)
    """Seconds of each transfer besides."""
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that an attempt fails on the way, at a time that is uniform over it."""
    availability: Annotated[Always | Diurnal | UpDown, Field(discriminator="kind")] = Always()

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if (self.seconds_per_step is None) == (self.seconds is None):
            raise ValueError("give exactly one of seconds_per_step and seconds")
        return self

    def period(self, site: SiteId, at: float) -> Period:
        return self.availability.period(self.seed, site, at)

    def conditions(self, site: SiteId, at: float) -> Conditions:
        def drawn(name: str) -> float | None:
            draw = getattr(self, name)
            return None if draw is None else float(draw.draw(_uniform(self.seed, name, site)))

        speeds = {name: drawn(name) for name in ("seconds_per_step", "seconds", "download_mbit", "upload_mbit")}
        return Conditions(**speeds, latency=drawn("latency") or 0.0, drop=self.drop)
