"""The examples run as they are, and learn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedflow.engine import simulate
from fedflow.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "examples" / "training"
BETTER_THAN = {  # accuracy on held-out data: chance is 0.1 for digits, about 0.6 for breast cancer; silhouette of clusters
    "function": 0.7,
    "script": 0.6,
    "lightning": 0.6,
    "transformer": 0.1,
    "numpy": 0.9,
    "linear": 0.9,
    "keras": 0.6,
    "kmeans": 0.1,
    "svm": 0.9,
}


@pytest.fixture(autouse=True)
def as_if_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_every_recipe_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == BETTER_THAN.keys()


@pytest.mark.parametrize("name", BETTER_THAN)
def test_it_runs_and_learns(name: str) -> None:
    recipe = Recipe.load(FOLDER / f"{name}.yaml")
    journal = simulate(recipe, ["site-1", "site-2"])
    found = journal.evaluation(recipe.rounds - 1)
    assert found is not None
    accuracy = found.metrics[recipe.key_metric.name]
    assert accuracy is not None and accuracy > BETTER_THAN[name]
    if name == "transformer":  # only what is trained travels back
        manifest = journal.manifest(1, "train")
        assert manifest is not None
        assert sum(c.bytes for c in manifest.contributors.values()) < 2 * manifest.model["frozen"].size
