"""The page on threats promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from fedflow.recipe import SiteConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_the_page_has_its_table() -> None:
    assert len(ROWS) > 10 and all(row.count("|") == 5 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.rsplit("`", 2)[1].rpartition("/")[2])
def test_each_row_names_a_test_that_is_there(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", row.rsplit("|", 2)[1])
    assert named
    for path, function in named:
        found = functions(ROOT / path)
        assert function in found if function else any(name.startswith("test_") for name in found)


def test_the_configuration_in_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    fields = yaml.safe_load(
        text.replace("/var/lib/fedflow", str(tmp_path)).replace("ed25519:...", f"ed25519:{'A' * 43}=")
    )
    config = SiteConfig.load({"name": "a", "store": "s", "state": str(tmp_path), **fields})
    assert config.review is not None and config.review.policy is not None
