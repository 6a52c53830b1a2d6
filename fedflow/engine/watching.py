"""What is known of a run while it goes on: looks once at each committed round, and at the round in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fedflow.engine.summary import Current, Glance, current_in, glance
from fedflow.errors import RunMissing
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal

__all__ = ["Pace", "Watch"]

RECENT = timedelta(seconds=20)
"""What the pace is taken from: the rounds committed in so long before the newest."""


@dataclass(frozen=True)
class Pace:
    """How fast a run is going. rounds, sites: per second; left: until its last round, at this pace."""

    rounds: float
    sites: float
    left: timedelta


@dataclass
class Watch:
    """A run as seen so far. `look` brings it up to date; it reads only what is new, and cheaply.

    before: rounds that were committed when this watch began
    rounds: all committed ones; best: of them the first with the best key metric; current: the one in progress, None between rounds
    """

    journal: Journal
    before: int = 0
    recipe: Recipe | None = None
    rounds: list[Glance] = field(default_factory=list)
    best: Glance | None = None
    current: Current | None = None

    def look(self, *, last: bool = False) -> list[Glance]:
        """The rounds that were committed since. last: take a round without the server's evaluation too; none will come."""
        try:
            self.recipe = self.recipe or self.journal.recipe()
        except RunMissing:
            return []
        known = max(len(self.rounds), self.before)
        while found := glance(self.journal, self.recipe, len(self.rounds), last=last or len(self.rounds) < self.before):
            self._add(found)
        self.current = None if last else current_in(self.journal, self.recipe, len(self.rounds))
        return self.rounds[known:]

    def _add(self, round: Glance) -> None:
        self.rounds.append(round)
        if self.recipe and (value := self.key_metric(round)) is not None:
            sign = 1 if self.recipe.key_metric.mode == "max" else -1
            best = self.key_metric(self.best) if self.best else None
            if best is None or sign * value > sign * best:
                self.best = round

    def key_metric(self, round: Glance) -> float | None:
        return round.shown.get(self.recipe.key_metric.name) if self.recipe else None

    def pace(self, now: datetime) -> Pace | None:
        """Of the newest rounds; None before the first of this start."""
        recent = _recent(self.rounds[self.before :])
        if self.recipe is None or not recent:
            return None
        counted = recent[1:] or recent  # from one commit to another, or from the only one's opening
        began = recent[0].committed if len(recent) > 1 else (recent[0].opened or recent[0].committed)
        seconds = (recent[-1].committed - began).total_seconds()
        if seconds <= 0:
            return None
        rate = len(counted) / seconds
        left = timedelta(seconds=(self.recipe.rounds - len(self.rounds)) / rate)
        waited = min(now - recent[-1].committed, timedelta(seconds=1 / rate))  # of the round in progress
        return Pace(rate, sum(round.sites for round in counted) / seconds, max(left - waited, timedelta(0)))


def _recent(rounds: Sequence[Glance]) -> Sequence[Glance]:
    """The newest of `rounds`: at least two, if there are, and else those that are recent."""
    first = len(rounds)
    while first and (len(rounds) - first < 2 or rounds[-1].committed - rounds[first - 1].committed <= RECENT):
        first -= 1
    return rounds[first:]
