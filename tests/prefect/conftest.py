"""Real Prefect servers with real workers: one on SQLite that fedflow starts, one on PostgreSQL and S3 as in production."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedflow.environments.base import Run
from fedflow.environments.poc import PocEnv
from fedflow.environments.prod import ProdEnv
from fedflow.recipe import Federation, Recipe
from fedflow.testing.faults import Fault, watching
from tests import builders
from tests.deployed import ROOT, Deployed
from tests.servers import PrefectServer, S3Server


@pytest.fixture(scope="session")
def own_algorithm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the example package with its own algorithm is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(folder),
    ]
    subprocess.run([*pip, str(ROOT / "examples" / "own-algorithm")], check=True)
    return folder


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
def started(tmp_path_factory: pytest.TempPathFactory, own_algorithm: Path) -> Iterator[Poc]:
    home = tmp_path_factory.mktemp("poc")
    fault_file = home / "fault.json"
    environment = watching(fault_file, {"PYTHONPATH": str(own_algorithm)})
    with PocEnv(Federation.of(3), home=home, environment=environment) as env:
        env.start(builders.recipe())
        yield Poc(env, fault_file)


def own_flow(folder: Path) -> dict[str, Any]:
    """A copy of the site's flow that its owner has changed, and the fields of a configuration that name it."""
    text = (ROOT / "fedflow" / "flows" / "site.py").read_text()
    folder.mkdir()
    (folder / "hospital_flow.py").write_text(
        text.replace(
            "    log = get_run_logger()\n", '    log = get_run_logger()\n    log.info("as the hospital does it")\n'
        )
    )
    return {"flow": "hospital_flow:local_training", "python_path": [str(folder)]}


@pytest.fixture
def poc(started: Poc) -> Iterator[Poc]:
    """The environment, without a fault before and after the test."""
    started.heal()
    yield started
    started.heal()


@pytest.fixture(scope="session")
def prod(
    tmp_path_factory: pytest.TempPathFactory, prefect_api: PrefectServer, s3: S3Server, own_algorithm: Path
) -> Iterator[ProdEnv]:
    """As users deploy it: a Prefect server on PostgreSQL, an S3 store, workers started by the documented commands."""
    home = tmp_path_factory.mktemp("prod")
    paths = {"PYTHONPATH": os.pathsep.join([str(own_algorithm), str(ROOT)])}
    fields = {"site-3": own_flow(home / "own")}
    with Deployed(home, prefect_api, s3, environment=paths, fields=fields) as deployed:
        yield deployed.env


@pytest.fixture(scope="session")
def undisturbed() -> Any:
    """(fields of a recipe) -> the outcome of its reference run, in memory, once a session."""
    known: dict[str, dict[str, Any]] = {}

    def outcome(**fields: Any) -> dict[str, Any]:
        key = repr(sorted(fields.items()))
        if key not in known:
            known[key] = builders.outcome(builders.run(builders.recipe(**fields)))
        return known[key]

    return outcome
