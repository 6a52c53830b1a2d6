"""A wheel is enough: installed in an empty environment, with no checkout, it initialises a project, runs it, starts a site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, and with the dependencies of this one (not fedflow's checkout)."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    # a .pth line with "import" would run the editable install's hook: a plain path lets only the packages in
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def fedflow(installed: Path, cwd: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.defpath, "HOME": str(cwd), **variables}
    command = [str(installed / "python"), "-m", "fedflow.cli", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_installs_one_package_and_no_general_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"fedflow"}
    assert "fedflow/flows/round.py" in names and "fedflow/deployments/prefect.yaml" in names
    assert "fedflow/template/recipe.yaml" in names and "fedflow/py.typed" in names


def test_a_project_is_made_and_simulated(installed: Path, tmp_path: Path) -> None:
    made = fedflow(installed, tmp_path, "init", "project")
    assert made.returncode == 0, made.stderr
    project = tmp_path / "project"
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 10", "rounds: 1"))
    ran = fedflow(installed, project, "run", "recipe.yaml", "--env", "sim", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["status"] == "finished"
    where = subprocess.run(
        [str(installed / "python"), "-c", "import fedflow; print(fedflow.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(installed.parent) in where.stdout


def test_a_site_starts_from_the_wheel_and_takes_part(installed: Path, tmp_path: Path) -> None:
    """The whole of it: a server, a coordinator and two sites, each from the wheel."""
    fedflow(installed, tmp_path, "init", "project")
    project = tmp_path / "project"
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 10", "rounds: 1").replace("quorum: 3", "quorum: 2"))
    (project / "federation.yaml").write_text("sites: [site-1, site-2]\n")
    ran = fedflow(installed, project, "run", "recipe.yaml", "--env", "poc", "--json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert (said["status"], said["rounds"]) == ("finished", 1)
