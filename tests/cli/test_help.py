"""`fedflow --help` and the like: at once, and about everything."""

import subprocess
import sys
from typing import get_args

import pytest

from fedflow import __version__
from fedflow.cli.options import HOME
from fedflow.cli.runs import Backend
from fedflow.environments import DEFAULT_HOME
from fedflow.simulation.engine import BACKENDS
from tests.cli.project import Project, environment

COMMANDS = [
    *(
        "run",
        "resume",
        "extend",
        "abort",
        "sweep",
        "logs",
        "plot",
        "metrics",
        "export",
        "result",
        "evaluate",
        "stats",
        "psi",
        "init",
        "ui",
        "deploy",
        "gate",
        "enroll",
        "doctor",
        "sites",
    ),
    *("runs ls", "runs show", "recipe schema", "recipe check"),
    *("site enroll", "site try", "site review", "site audit", "site start"),
    *("store verify", "store gc"),
]


def test_help_imports_nothing_slow() -> None:
    code = """
import sys
from fedflow.cli import main
assert main(["--help"]) == main(["run", "--help"]) == 0
slow = {"torch", "prefect", "numpy", "fsspec", "matplotlib", "rich"} & sys.modules.keys()
sys.exit(f"imported {sorted(slow)}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(project: Project, command: str) -> None:
    result = project.call(*command.split(), "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: fedflow {command} ")


def test_help_names_every_command(project: Project) -> None:
    listed = project.call("--help").out.partition("Commands:")[2]
    assert {line.split()[0] for line in listed.splitlines() if line} == {command.split()[0] for command in COMMANDS}
    assert "..." not in listed  # each description fits into its line


def test_without_a_command_help_is_shown(project: Project) -> None:
    result = project.call()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: fedflow ")


def test_version(project: Project) -> None:
    assert project.call("--version").out == f"{__version__}\n"


def test_the_folder_of_runs_and_the_backends_are_those_of_the_environments() -> None:
    assert HOME == DEFAULT_HOME
    assert get_args(Backend) == BACKENDS
