"""`fedflow site try`, `review`, `audit`: what a site's owner sees before and after."""

from __future__ import annotations

import pytest
import yaml

from fedflow.recipe import Recipe
from tests.cli.project import Project
from tests.cli.test_enrolling import site


@pytest.fixture
def here(project: Project) -> Project:
    """With a site's configuration, whose code is on its own python_path."""
    files = {name: str(project.folder / f"{name}.jsonl") for name in ("approved", "audit")}
    review = {"approved": files["approved"]}
    site(
        project,
        python_path=[str(project.folder)],
        allowed_imports=["points_workload"],
        review=review,
        audit=files["audit"],
    )
    return project


def test_a_recipe_is_tried_and_what_would_be_sent_is_shown(here: Project) -> None:
    printed = here.call("site", "try", "recipe.yaml", "--config", "site.yaml")
    assert printed.code == 0, printed
    assert "train: 2 steps on 16 examples" in printed.out and "would send  params: " in printed.out
    assert printed.out.splitlines()[-1].endswith("nothing was sent")
    (row,) = here.call("site", "try", "recipe.yaml", "--config", "site.yaml", "--json").json  # type: ignore[misc]
    assert row["objection"] is None and row["would_send"]["params"]["digest"] in printed.out
    assert not (here.folder / "store").exists() and not (here.folder / "audit.jsonl").exists()


def test_a_recipe_is_shown_and_approved_and_runs_are_listed(here: Project, trained: Project) -> None:
    shown = here.call("site", "review", "recipe.yaml", "--config", "site.yaml")
    assert "refused: nobody has approved it" in shown.out.splitlines()[-1], shown
    assert yaml.safe_load("\n".join(shown.out.splitlines()[:-1]))["model"]["path"] == "points_workload:Line"
    fields = yaml.safe_load((here.folder / "site.yaml").read_text())
    store = str(trained.folder / "fedflow-runs" / "store")
    (here.folder / "site.yaml").write_text(yaml.safe_dump(fields | {"store": store}))
    listed = here.call("site", "review", "--config", "site.yaml")
    assert "points-1" in listed.out and "refused: nobody" in listed.out, listed
    approved = here.call("site", "review", "points-1", "--approve", "--config", "site.yaml")
    assert approved.out.endswith(f"{Recipe.load(here.folder / 'recipe.yaml').digest()}: approved\n"), approved
    assert "approved" in here.call("site", "review", "--config", "site.yaml").out.splitlines()[-1]
    revoked = here.call("site", "review", "recipe.yaml", "--revoke", "--config", "site.yaml")
    assert "refused: its approval was revoked" in revoked.out


def test_what_left_is_a_table(here: Project) -> None:
    empty = here.call("site", "audit", "--config", "site.yaml")
    assert empty.out.splitlines()[-1] == "0 objects, 0 B"
    line = (
        '{"at":"2026-01-02","bytes":12,"digest":"blake3:ab","object":"sites/a/x","phase":"train","round":3,"run":"r"}\n'
    )
    (here.folder / "audit.jsonl").write_text(line)
    printed = here.call("site", "audit", "--config", "site.yaml")
    assert "sites/a/x" in printed.out and printed.out.splitlines()[-1] == "1 objects, 12 B"
    assert "sites/a/x" not in here.call("site", "audit", "--run", "other", "--config", "site.yaml").out


@pytest.mark.parametrize("command", [["review", "recipe.yaml", "--approve"], ["audit"]])
def test_what_the_configuration_must_say_first(project: Project, command: list[str]) -> None:
    site(project, python_path=[str(project.folder)])
    mistake = project.call("site", *command, "--config", "site.yaml").mistake
    assert f"{command[0]}: found None" in mistake and "to site.yaml" in mistake
