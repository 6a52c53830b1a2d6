"""Settings whose documentation is the docstring below each field, read only when somebody asks for it."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

__all__ = ["Described"]


class Described(BaseModel):
    """A frozen model; in its JSON schema every field has its docstring as description.

    What pydantic's `use_attribute_docstrings` does, which reads sources whenever a class is made: a quarter of a second for
    all of ours. Validators are made when a class is first used, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for name, text in _described(cls).items():
            if text and name in properties:
                properties[name].setdefault("description", text)
        return found


def _described(cls: type[Any]) -> dict[str, str | None]:
    """Each annotated name with its docstring; a class that annotates a name again says all about it."""
    found: dict[str, str | None] = {}
    for base in reversed(cls.__mro__):
        source = _classes(base.__module__).get(base.__qualname__) if issubclass(base, Described) else None
        if source:
            found |= _docstrings(source)
    return found


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a module's source; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, LookupError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _docstrings(source: ast.ClassDef) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for node, below in zip(source.body, [*source.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            found[node.target.id] = inspect.cleandoc(value) if isinstance(value, str) else None
    return found
