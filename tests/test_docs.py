"""The examples in the pages on algorithms run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedflow import algorithms, transforms
from fedflow.algorithms.robust import Reduction
from fedflow.engine import simulate
from fedflow.engine.aggregation import read_model
from tests.builders import recipe

PAGE = (Path(__file__).parents[1] / "docs/algorithms.md").read_text()
SITES = [f"site-{i}" for i in range(1, 6)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[0][:60])
def test_a_recipe_in_the_page_runs(text: str) -> None:
    fields: dict[str, Any] = {"training": {"optimizer": {"lr": 0.05}}} | yaml.safe_load(text)
    journal = simulate(recipe(**fields, rounds=2), SITES)
    assert len(journal.committed()) == 2


def test_the_class_in_the_page_is_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round moves every parameter by lr, or not at all where its difference is 0."""
    (source,) = blocks("python")
    (tmp_path / "signs.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    journal = simulate(recipe(algorithm={"kind": "signs:SignAvg", "lr": 0.25}, rounds=1), SITES)
    first, last = (journal.manifest(*step) for step in ((-1, "initial"), (0, "train")))
    assert first and last
    before, after = (read_model(journal, manifest)["params"] for manifest in (first, last))
    steps = torch.cat([(after[n] - x).abs().flatten() for n, x in before.items()])
    assert bool(((steps - 0.25).abs() < 1e-6).logical_or(steps == 0).all()) and float(steps.max()) > 0.2


def test_the_page_names_every_algorithm_reduction_and_transform() -> None:
    kinds = [cls.model_fields["kind"].default for cls in _all()]
    assert [kind for kind in kinds if f"`{kind}`" not in PAGE] == []


def _all() -> list[Any]:
    named = [getattr(module, name) for module in (algorithms, transforms) for name in module.__all__]
    return [*named, *(cls for cls in _subclasses(Reduction))]


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]
