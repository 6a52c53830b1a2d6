"""The key metric of every round, and what follows from it: which round is best, whether the run ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedflow.recipe import Recipe
from fedflow.store.journal import Journal

__all__ = ["best_round", "key_metrics", "stops_early"]


def key_metrics(journal: Journal, recipe: Recipe) -> list[float | None]:
    """The key metric of every committed round: the server's evaluation, else the weighted mean of the sites'."""
    last = recipe.phases[-1]
    values = []
    for round in journal.rounds(last):
        evaluation, manifest = journal.evaluation(round), journal.manifest(round, last)
        assert manifest is not None
        source = evaluation.metrics if evaluation else manifest.metrics
        values.append(source.get(recipe.key_metric.name))
    return values


def best_round(values: Sequence[float | None], recipe: Recipe) -> int | None:
    """The earliest round with the best key metric."""
    sign = 1 if recipe.key_metric.mode == "max" else -1
    known = [(sign * v, -i) for i, v in enumerate(values) if v is not None]
    return -max(known)[1] if known else None


def stops_early(values: Sequence[float | None], recipe: Recipe) -> bool:
    """Whether these key metrics, one a round, end the run."""
    if recipe.early_stop.target is None and recipe.early_stop.patience is None:
        return False
    stop, sign = recipe.early_stop, 1 if recipe.key_metric.mode == "max" else -1
    best, best_at = -math.inf, -1
    for i, value in enumerate(values):
        if value is not None and sign * value > best + stop.min_delta:
            best, best_at = sign * value, i
        if stop.target is not None and value is not None and sign * value >= sign * stop.target:
            return True
        if stop.patience is not None and i - best_at >= stop.patience:
            return True
    return False
