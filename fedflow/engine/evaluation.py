"""Evaluating a run's models on every site: as a run of its own, and its result as a matrix."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fedflow.algorithms.matrix import Matrix, metrics_of
from fedflow.engine.best import best_round, key_metrics
from fedflow.engine.export import write_file
from fedflow.engine.results import excluded_in, read_result
from fedflow.errors import UserError, check_suffix, field_error
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal

__all__ = ["evaluation_of", "matrix_of", "write_matrix"]

PART_OF_DEADLINE = 0.9
"""How long an evaluation waits for sites that have not answered, of its round_deadline."""


def evaluation_of(journal: Journal, *, cross_site: bool = False) -> Recipe:
    """The recipe of a run that evaluates the last model of `journal`'s run, and its best one, on every site's held-out data.

    cross_site: and a model of every site's own, which it first trains from the last one. Whoever answers counts.
    Raises UserError where no round is committed, or its algorithm does not train the recipe's model.
    """
    recipe = journal.recipe()
    if not recipe.algorithm.trains:
        evaluated = "set federated_evaluation in its recipe" if recipe.algorithm.evaluates else "see `fedflow result`"
        found = f"found a run of {recipe.algorithm.kind}, expected one that trains the recipe's model"
        raise UserError(f"{journal.run}: {found}; {evaluated}")
    rounds = journal.rounds(recipe.phases[-1])
    if not rounds:
        raise UserError(f"{journal.run}: found no committed round, expected at least one; resume the run")
    best = best_round(key_metrics(journal, recipe), recipe)
    named = {} if best is None else {"best": f"run:{journal.run}@{rounds[best]}"}
    waits = recipe.durations.round_deadline * PART_OF_DEADLINE
    return Recipe.model_validate(
        {
            **recipe.model_dump(mode="json"),
            "name": f"{journal.run[:40]}-{'cross-site' if cross_site else 'evaluation'}-{rounds[-1]}",
            "algorithm": {"kind": "evaluation", "cross_site": cross_site},
            "schedule": "everyone",
            "transforms": [],
            "rounds": 1,
            "checkpoint": f"run:{journal.run}@{rounds[-1]}",
            "checkpoints": named,
            "quorum": 1,
            "min_sites": 1,
            "required_sites": [],
            "evaluation": None,
            "federated_evaluation": False,
            "early_stop": {},
            "timeouts": {
                "round_deadline": recipe.durations.round_deadline,
                "quorum_grace": waits,
                "run_timeout": recipe.durations.run_timeout,
            },
        }
    )


def matrix_of(journal: Journal, metric: str | None = None) -> Matrix:
    """What a run of `evaluation` found. metric: default the recipe's key metric, else the first that there is

    Raises UserError for a run that evaluated nothing, or no such metric.
    """
    recipe, found = journal.recipe(), read_result(journal)
    names = metrics_of(found)
    wanted = metric or (recipe.key_metric.name if recipe.key_metric.name in names else next(iter(names), ""))
    if wanted not in names:
        raise UserError(field_error("--metric", metric, f"one of {names}", "choose one of them"))
    return Matrix.of(found, wanted, journal.sites(), excluded_in(journal))


def write_matrix(matrix: Matrix, out: Path) -> Path:
    """Write it, whole or not at all, to a .json or a .md; returns `out`. Raises UserError for another suffix."""
    texts = {".json": lambda: json.dumps(asdict(matrix), indent=1), ".md": matrix.as_markdown}
    check_suffix("--out", out, texts)
    write_file(out, lambda path: path.write_text(f"{texts[out.suffix]()}\n", encoding="utf-8"), "--out")
    return out
