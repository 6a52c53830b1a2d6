"""The examples in the documents run as they stand there, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from fedflow.engine import simulate
from fedflow.local import ScriptWorkload
from fedflow.recipe import Recipe
from tests.shell import run_shell

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


def test_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    run(ROOT / "docs" / "tasks.md", monkeypatch)


def test_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    run(ROOT / "docs" / "evaluation.md", monkeypatch)


def test_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "docs" / "statistics.md", monkeypatch)


def test_psi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "docs" / "psi.md", monkeypatch)


def test_xgboost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "docs" / "xgboost.md", monkeypatch)


def test_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings fit together, too."""
    run(path := ROOT / "docs" / "timeouts.md", monkeypatch)
    blocks = re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        Recipe.load({"name": "page", "model": "a:B", "workload": "a:C", "rounds": 1, **yaml.safe_load(block)})
    assert len(blocks) == 3


# -- docs/simulation.md ------------------------------------------------------------------------------------------------
SIMULATION = (ROOT / "docs" / "simulation.md").read_text()
ON_A_SERVER = ("fedflow run recipe.yaml --tracking", "fedflow ui digits-3")
"""What tests/prefect/test_tracking.py does."""


def commands() -> list[str]:
    found = re.findall(r"^\$ (.*?)(?:  +#.*)?$", SIMULATION, re.MULTILINE)
    return [command for command in found if command not in ON_A_SERVER]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh project in which every command of the page was called, in order; two rounds show no more than one does."""
    folder = tmp_path_factory.mktemp("simulated")
    shell = [
        "fedflow init .",
        "sed -i 's/^rounds: 10$/rounds: 1/; s/^quorum: 3 /quorum: 2 /' recipe.yaml",
        "sed -i 's/, site-3, site-4//' federation.yaml",
    ]
    for command in commands():
        shell += [f"echo '$ {command}'", command.replace("--rounds 3", "--rounds 2")]
    (folder / "output").write_text(run_shell(folder, [*shell, "echo all is done"]))
    return folder


@pytest.mark.timeout(1800)
def test_every_command_on_simulation_succeeds(simulated: Path) -> None:
    output = (simulated / "output").read_text()
    assert output.endswith("all is done\n"), output
    for name in ("digits.csv", "digits.parquet", "both.svg", "lr.csv", "fedflow-runs/plots/lr.png"):
        assert (simulated / name).stat().st_size > 0, output
    assert "lr-lr-0.01-seed-0" in output


@pytest.mark.timeout(1800)
def test_the_python_on_simulation_runs(simulated: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", SIMULATION, re.DOTALL | re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=simulated,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(simulated)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (simulated / "lr.png").stat().st_size > 0
