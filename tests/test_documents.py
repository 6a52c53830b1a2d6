"""The Python in the documents runs as it stands there, from top to bottom."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from fedflow.engine import simulate
from fedflow.local import ScriptWorkload
from fedflow.recipe import Recipe

ROOT = Path(__file__).parents[1]
NAME = "document_that_is_run"


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The document's Python blocks as one module."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    module = types.ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, module)
    exec(compile("\n".join(blocks), str(path), "exec"), module.__dict__)
    return module


def test_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = run(ROOT / "docs" / "training.md", monkeypatch)
    (tmp_path / "train.py").write_text(module.SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fields = module.recipe.model_dump(mode="json") | {"name": "script", "workload": f"{NAME}:scripted", "rounds": 1}
    module.scripted = lambda: ScriptWorkload("python -u train.py", folder=tmp_path)
    journal = simulate(Recipe.load(fields), ["site-1"])
    manifest = journal.manifest(0, "train")
    assert manifest is not None and manifest.contributors["site-1"].steps == 25
