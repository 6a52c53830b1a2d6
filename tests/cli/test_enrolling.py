"""`fedflow enroll`, `fedflow site enroll`: keys are made once, and their public halves printed as the files want them."""

from __future__ import annotations

import pytest
import yaml

from fedflow.recipe import FederationSite
from fedflow.store.signing import COORDINATOR_KEY, PrivateKey
from tests.cli.project import SITES, Project
from tests.cli.test_doctor import lines


def site(project: Project, **fields: object) -> str:
    given = {"name": "site-1", "store": "store", "state": str(project.folder / "state")}
    (project.folder / "site.yaml").write_text(yaml.safe_dump(given | fields))
    return "site.yaml"


def test_a_site_makes_its_key_once_and_prints_its_line_of_the_federation_file(project: Project) -> None:
    path = project.folder / "site.key"
    config = site(project, key=str(path))
    first = project.call("site", "enroll", "--config", config)
    assert first.code == 0 and f"wrote {path}" in first.err, first
    (line,) = yaml.safe_load(first.out)
    assert FederationSite.model_validate(line).key == PrivateKey.load(path).public
    before = path.read_bytes()
    again = project.call("site", "enroll", "--config", config)
    assert (again.code, again.out) == (0, first.out) and f"kept  {path}" in again.err
    assert path.read_bytes() == before


def test_a_site_without_a_place_for_its_key_is_told_what_to_write(project: Project) -> None:
    mistake = project.call("site", "enroll", "--config", site(project)).mistake
    assert "key: found None, expected the path" in mistake and f"`key: {project.folder / 'site.key'}`" in mistake
    mistake = project.call("site", "enroll", "--config", site(project, key="site.key")).mistake
    assert "expected an absolute path" in mistake


def test_doctor_says_who_signs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody, some sites, the coordinator; and where its key is missing or another."""
    found = lines(project.call("doctor", "recipe.yaml"))
    assert found["coordinator's key"] == ("ok", "signs nothing: no coordinator_key in the federation")
    assert found["sites' keys"][1].startswith("of 0 of 3 sites")
    made = project.call("enroll", "coordinator.key")
    public = yaml.safe_load(made.out)["coordinator_key"]
    enrolled = [{"name": "site-1", "key": public}, *SITES[1:]]
    (project.folder / "federation.yaml").write_text(yaml.safe_dump({"sites": enrolled, "coordinator_key": public}))
    missing = project.call("doctor", "recipe.yaml")
    assert missing.code == 1 and COORDINATOR_KEY in lines(missing)["coordinator's key"][1]
    monkeypatch.setenv(COORDINATOR_KEY, str(project.folder / "coordinator.key"))
    found = lines(project.call("doctor", "recipe.yaml"))
    assert found["coordinator's key"][0] == "ok" and public[:30] in found["coordinator's key"][1]
    assert found["sites' keys"][1].startswith("of 1 of 3 sites") and "site-2" in found["sites' keys"][1]
