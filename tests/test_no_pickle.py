"""No pickle: nothing that is stored needs it, and no code uses it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fedflow.engine.rounds import recording_outcome
from fedflow.store.objects import ObjectStore
from tests.builders import SITES, recipe, run

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("fedflow", "flows") for path in (ROOT / folder).resolve().rglob("*") if path.is_file()
)
CODE = [path for path in SOURCES if path.suffix == ".py"]


def test_every_stored_object_is_json_or_safetensors(tmp_path: Path) -> None:
    """Each is read here by the readers of those formats and by nothing else."""
    store = str(tmp_path / "store")
    fields: dict[str, Any] = {"algorithm": "tests.builders:Leaning", "evaluation": "tests.builders:HeldOut"}
    run(recipe(**fields, rounds=1), store)
    journal = run(recipe(**fields), store)
    with recording_outcome(journal):
        pass
    kinds = set()
    for objects in (ObjectStore(store), *(ObjectStore(f"{store}-states/{site}") for site in SITES)):
        for key in objects.list():
            data = objects.get(key)
            if key.endswith(".json"):
                assert isinstance(json.loads(data), dict)
            else:
                assert key.endswith(".safetensors"), key
                safetensors.torch.load(data)
            kinds.add(Path(key).suffix)
    assert kinds == {".json", ".safetensors"}


def test_there_is_code_to_look_at() -> None:
    assert len(CODE) > 30


@pytest.mark.parametrize("word", ["pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"])
def test_no_file_uses_a_format_that_runs_code(word: str) -> None:
    found = [
        path
        for path in SOURCES
        if path.suffix != ".pyc" and re.search(rf"\b{word}\b", path.read_text(errors="replace"))
    ]
    assert found == []


def test_torch_load_is_called_with_weights_only_and_in_no_other_way() -> None:
    calls = [
        (path, node)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "load"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    safe = [
        (path, node.func)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        )
    ]
    assert [(path, node.lineno) for path, node in calls] == [(path, node.lineno) for path, node in safe]
    assert calls, "the checkpoint's loader is one"
    for path in CODE:
        assert not re.search(r"from torch import .*\bload\b|from torch\.serialization", path.read_text()), path
