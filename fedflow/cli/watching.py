"""What is known of a run while it goes on: reads each committed round once, and the round in progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedflow.engine.rounds import best_round
from fedflow.engine.summary import Current, RoundSummary, summarize_round
from fedflow.errors import RunMissing
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal

if TYPE_CHECKING:
    from fedflow.environments import Run

__all__ = ["Watch"]


@dataclass
class Watch:
    """A run as seen so far. `look` brings it up to date; it reads only what is new.

    rounds: all committed ones; current: the one in progress, None between rounds
    """

    journal: Journal
    recipe: Recipe | None = None
    rounds: list[RoundSummary] = field(default_factory=list)
    current: Current | None = None

    def look(self, run: Run, *, last: bool = False) -> list[RoundSummary]:
        """The rounds that were committed since. last: take a round without the server's evaluation too; none will come."""
        try:
            self.recipe = self.recipe or self.journal.recipe()
        except RunMissing:
            return []
        new = []
        while round := self._next(self.recipe, last):
            self.rounds.append(round)
            new.append(round)
        self.current = None if last else run.current()
        return new

    def _next(self, recipe: Recipe, last: bool) -> RoundSummary | None:
        number, phase = len(self.rounds), recipe.algorithm.phases[-1]
        if self.journal.manifest(number, phase) is None:
            return None
        if recipe.evaluation is not None and not last and self.journal.evaluation(number) is None:
            return None
        return summarize_round(self.journal, number, phase)

    def key_metric(self, round: RoundSummary) -> float | None:
        return round.shown.get(self.recipe.key_metric.name) if self.recipe else None

    @property
    def best(self) -> RoundSummary | None:
        """The round with the best key metric so far."""
        if self.recipe is None:
            return None
        at = best_round([self.key_metric(round) for round in self.rounds], self.recipe)
        return None if at is None else self.rounds[at]
