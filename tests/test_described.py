"""A field's docstring is its description in the JSON schema, as pydantic itself would have it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict

from fedflow.algorithms import FedAvg
from fedflow.described import Described
from fedflow.recipe import Recipe


class Oven(Described):
    """Where bread is baked."""

    heat: int
    """In degrees."""
    door: str = "closed"
    shelves: int = 3
    """How many.

    Not more than five.
    """


class Grill(Oven):
    heat: int = 250
    shelves: int = 1
    """The upper one."""


class PlainOven(BaseModel):
    """Where bread is baked."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, title="Oven")

    heat: int
    """In degrees."""
    door: str = "closed"
    shelves: int = 3
    """How many.

    Not more than five.
    """


class PlainGrill(PlainOven):
    model_config = ConfigDict(title="Grill")

    heat: int = 250
    shelves: int = 1
    """The upper one."""


@pytest.mark.parametrize(("ours", "plain"), [(Oven, PlainOven), (Grill, PlainGrill)], ids=["a class", "its subclass"])
def test_the_schema_is_pydantics(ours: type[Described], plain: type[BaseModel]) -> None:
    assert ours.model_json_schema() == plain.model_json_schema()


def test_fields_of_a_recipe_and_of_what_it_holds_are_described() -> None:
    schema = Recipe.model_json_schema()
    assert schema["properties"]["rounds"].get("description") is None
    assert schema["properties"]["attempts"]["description"] == "How often a site may try in a round."
    assert "Learning rate" in schema["$defs"]["Optimizer"]["properties"]["lr"]["description"]
    assert all(
        "description" not in field or field["description"]
        for field in FedAvg.model_json_schema()["properties"].values()
    )


def test_importing_the_simulator_reads_no_sources() -> None:
    """They are read by `inspect`, which tokenises them: it takes longer than everything else about our classes."""
    script = "import torch, linecache, fedflow.simulation.engine; print([f for f in linecache.cache if 'fedflow' in f])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
