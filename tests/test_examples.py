"""Every example runs: its recipe as it is, but for fewer rounds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedflow import algorithms, schedules
from fedflow.engine import simulate
from fedflow.engine.aggregation import read_model
from fedflow.local import build_model
from fedflow.recipe import Federation, Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
OTHERS = ("training", "tasks")
"""Folders whose examples have tests of their own."""
RECIPES = sorted(
    path for path in EXAMPLES.rglob("*.yaml") if path.name != "federation.yaml" and path.parent.name not in OTHERS
)


def shortened(recipe: Recipe) -> Recipe:
    """Two rounds of one epoch, or of two steps."""
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    fields["rounds"] = 2
    if fields["algorithm"].get("local_steps_per_round"):
        fields["algorithm"]["local_steps_per_round"] = 2
        fields["algorithm"] |= {"tau": 1} if "tau" in fields["algorithm"] else {}
    else:
        fields["training"] |= {"epochs": 1}
    return Recipe.load(fields)


@pytest.fixture(params=RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's file, its folder on the import path as the command line has it."""
    path: Path = request.param
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.delitem(sys.modules, "workload", raising=False)
    return path


def test_an_example_runs_and_changes_the_model(example: Path) -> None:
    recipe = shortened(Recipe.load(example))
    sites = Federation.load(example.parent / "federation.yaml").names
    journal = simulate(recipe, sites)
    assert [number for number, _ in journal.committed()] == [0, 1]
    first, last = (journal.manifest(*step) for step in ((-1, "initial"), journal.committed()[-1]))
    assert first and last and sorted(last.contributors) == sites and first.model_digest != last.model_digest
    evaluation = journal.evaluation(1)
    assert evaluation is not None and "loss" in evaluation.metrics
    assert (
        read_model(journal, last)["params"].keys()
        == dict(build_model(recipe.model.path, recipe.model.args).named_parameters()).keys()
    )


def test_there_is_a_recipe_for_every_algorithm() -> None:
    tasks = [path for path in (EXAMPLES / "tasks").glob("*.yaml") if path.name != "federation.yaml"]
    found = {Recipe.load(path).algorithm.kind for path in (*RECIPES, *tasks)}
    assert found == {getattr(algorithms, name).model_fields["kind"].default for name in algorithms.__all__}


def test_the_page_of_recipes_names_every_one_and_every_schedule() -> None:
    """Each of them is run: here, in tests/test_task_examples.py, in tests/test_training_examples.py; digits, which is what `fedflow init`
    lays out, in tests/cli."""
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text()
    named = set(re.findall(r"`(examples/\S+\.yaml)`", page))
    known = {str(path.relative_to(EXAMPLES.parent)) for path in EXAMPLES.rglob("*.yaml")}
    assert named == {path for path in known if not path.endswith("federation.yaml")} | {"examples/digits/recipe.yaml"}
    kinds = [getattr(schedules, name).model_fields["kind"].default for name in schedules.__all__]
    assert [kind for kind in kinds if f"`{kind}`" not in page and f"schedule: {kind}`" not in page] == []
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if not (EXAMPLES.parent / "docs" / link).exists()] == []
