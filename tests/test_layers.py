"""Imports go only downwards, Prefect stays in its corner, and `__all__` says what is there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedflow"

LAYERS = [  # lowest first; a part imports itself and what lies below
    {"errors"},  # the tree of errors
    {"types", "memory"},  # values that cross a boundary; a process and its memory
    {"tensors", "described", "registry", "data"},
    {"algorithm"},  # the contracts
    {"algorithms", "schedules", "transforms"},
    {"recipe"},
    {"local", "store"},
    {"client"},  # what training scripts call
    {"engine"},
    {"simulation", "plot", "testing", "template"},
    {"prefect, flows"},  # one part: what flows are made of, and who starts them
    {"environments", "deployments"},
    {"sweep"},  # many runs in one
    {"cli"},
]
PARTS = {"prefect": "prefect, flows", "flows": "prefect, flows"}
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
KNOW_PREFECT = {"prefect, flows", "environments", "cli", "deployments"}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that the module imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part that a module of fedflow belongs to; None for others, and for the package itself."""
    words = module.split(".")
    if words[0] != "fedflow" or len(words) == 1 or words[1] == "__version__":
        return None
    return PARTS.get(words[1], words[1])


def test_every_part_has_its_layer() -> None:
    assert {part_of(module) for module in MODULES} - {None} == RANK.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    own = part_of(module)
    for name in imports(MODULES[module]):
        part = part_of(name)
        if own is not None and part not in (None, own):
            assert RANK[part] < RANK[own], f"{module} imports {name}"


def test_only_the_outermost_parts_import_prefect() -> None:
    importing = {
        module for module, path in MODULES.items() if any(name.split(".")[0] == "prefect" for name in imports(path))
    }
    assert {part_of(module) for module in importing} <= KNOW_PREFECT


def declared(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            found: list[str] = ast.literal_eval(node.value)
            return found
    return None


DECLARING = {module: names for module, path in MODULES.items() if (names := declared(path)) is not None}


@pytest.mark.parametrize("module", DECLARING)
def test_what_a_module_offers_is_there(module: str) -> None:
    names = DECLARING[module]
    assert len(set(names)) == len(names)
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []
