"""A real Prefect server with real workers on this machine, shared by the tests that only look at runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedflow.environments.base import Run
from fedflow.environments.poc import PocEnv
from fedflow.recipe import Federation, Recipe
from fedflow.testing.faults import Fault, watching
from tests import builders


@dataclass(frozen=True)
class Poc:
    """An environment whose processes look for a fault in `fault_file`."""

    env: PocEnv
    fault_file: Path

    def execute(self, recipe: Recipe, run: str, fault: Fault | None = None) -> Run:
        """Start a run that meets `fault`."""
        if fault is not None:
            fault.write(self.fault_file)
        return self.env.execute(recipe, run_id=run)

    def heal(self) -> None:
        """No fault any more."""
        self.fault_file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    home = tmp_path_factory.mktemp("poc")
    fault_file = home / "fault.json"
    with PocEnv(Federation.of(3), home=home, environment=watching(fault_file, {})) as env:
        env.start(None)
        yield Poc(env, fault_file)


@pytest.fixture
def poc(started: Poc) -> Iterator[Poc]:
    """The environment, without a fault before and after the test."""
    started.heal()
    yield started
    started.heal()


@pytest.fixture(scope="session")
def undisturbed() -> Any:
    """(fields of a recipe) -> the outcome of its reference run, in memory, once a session."""
    known: dict[str, dict[str, Any]] = {}

    def outcome(**fields: Any) -> dict[str, Any]:
        key = repr(sorted(fields.items()))
        if key not in known:
            without_log = {k: v for k, v in fields.items() if k != "workload"}
            known[key] = builders.outcome(builders.run(builders.recipe(**without_log)))
        return known[key]

    return outcome
