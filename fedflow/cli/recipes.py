"""`fedflow recipe schema`, `recipe check`."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import typer

from fedflow.cli.options import FederationFile, RecipeFile
from fedflow.cli.runs import load_federation, load_recipe
from fedflow.errors import ResolveError

if TYPE_CHECKING:
    from fedflow.recipe import Recipe

__all__ = ["app", "check_recipe"]

app = typer.Typer(help="Recipes: their fields, and whether one is right.", no_args_is_help=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from fedflow.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def check(recipe: RecipeFile, federation: FederationFile = None) -> None:
    """Check RECIPE as far as it can be before a run.

    Fields, timeouts, model, checkpoint, evaluation, names of sites.
    """
    spec = load_recipe(recipe)
    sites = (
        load_federation(federation, recipe).names
        if federation or (recipe.parent / "federation.yaml").exists()
        else None
    )
    for line in check_recipe(spec, sites):
        typer.echo(line)
    typer.echo(f"{recipe}: ok")


def check_recipe(recipe: Recipe, sites: list[str] | None) -> list[str]:
    """What the recipe amounts to. Raises UserError where a run of it would not start: it is started, in memory.

    sites: of the federation; None = unknown: those of which the recipe speaks, and as many more as it needs
    """
    from fedflow.engine import start_run
    from fedflow.engine.aggregation import read_model
    from fedflow.local.workload import check_evaluator
    from fedflow.registry import call, resolve
    from fedflow.store.objects import ObjectStore

    named = sites or _as_many_as_needed(recipe)
    journal = start_run(ObjectStore(f"memory://fedflow-check-{uuid.uuid4().hex}"), "check", recipe, named)
    if recipe.evaluation is not None:
        found = resolve("workloads", recipe.evaluation.path, field="evaluation")
        check_evaluator(call(found, recipe.evaluation.args, field="evaluation.args", site="server"), "evaluation")
    initial = journal.head(recipe.phases)
    assert initial is not None
    count = sum(tensor.numel() for tensors in read_model(journal, initial).values() for tensor in tensors.values())
    return [
        f"model      {recipe.model.path}: {count:,} numbers",
        f"algorithm  {recipe.algorithm.kind}, schedule {recipe.schedule.kind}, {recipe.rounds} rounds",
        f"workload   {recipe.workload.path}{_whether_here(recipe)}",
    ]


def _as_many_as_needed(recipe: Recipe) -> list[str]:
    wanted = (
        recipe.quorum,
        recipe.min_sites,
        recipe.algorithm.least_updates,
        recipe.schedule.closing[1] if recipe.schedule.closing else None,
    )
    missing = max(number or 0 for number in wanted) - len(recipe.named_sites)
    return sorted(recipe.named_sites) + [f"unnamed-{i}" for i in range(missing)]


def _whether_here(recipe: Recipe) -> str:
    from fedflow.registry import resolve

    try:
        resolve("workloads", recipe.workload.path, field="workload")
    except ResolveError:
        return ": not found here; each site must find it"
    return ""
