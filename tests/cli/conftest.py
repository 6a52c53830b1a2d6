"""Projects that the tests of the command line work on."""

from pathlib import Path

import pytest

from tests.cli.project import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh project, without a run."""
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the finished run `points-1`, in which site-3 failed in every round. Only for looking at.

    What the command printed is in its file `printed`.
    """
    project = Project(tmp_path_factory.mktemp("trained"))
    project.break_site("site-3")
    result = project.call("run", "recipe.yaml")
    assert (result.code, result.err) == (0, ""), result
    (project.folder / "printed").write_text(result.out)
    return project
