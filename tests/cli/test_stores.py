"""`fedflow store verify`, `store gc`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import flip
from tests.cli.project import Project

RUN = "points-1"


@pytest.fixture
def ended(project: Project) -> Project:
    """A finished run of three rounds, to do anything with."""
    assert project.call("run", "recipe.yaml").code == 0
    return project


def objects(project: Project) -> list[Path]:
    return sorted((project.folder / "fedflow-runs" / "store").rglob("*.safetensors"))


def test_gc_says_what_it_would_delete_and_deletes_it_when_told(ended: Project) -> None:
    before = objects(ended)
    said = ended.call("store", "gc", RUN)
    assert said.code == 0 and said.out.splitlines()[-1].endswith(": would be deleted: add --delete")
    assert objects(ended) == before
    listed = ended.call("store", "gc", RUN, "--json").json
    done = ended.call("store", "gc", RUN, "--delete", "--json").json
    assert done == {**listed, "deleted": True} and done["bytes"] > 0
    gone = {
        str(path.relative_to(ended.folder / "fedflow-runs" / "store")) for path in set(before) - set(objects(ended))
    }
    assert gone == set(listed["objects"])
    assert ended.call("store", "gc", RUN).out == "0 objects, 0 B: would be deleted: add --delete\n"
    verified = ended.call("store", "verify", RUN)
    assert verified.code == 0
    assert "objects of superseded rounds are not there: dropped by gc, or lost" in verified.out


def test_what_gc_left_can_be_exported_and_gone_on_with(ended: Project) -> None:
    assert ended.call("store", "gc", RUN, "--delete", "--drop-best").code == 0
    assert ended.call("export", RUN, "model.safetensors").code == 0
    gone = ended.call("export", RUN, "first.safetensors", "--round", "0")
    assert gone.code != 0 and "Traceback" not in gone.err
    assert f"{RUN}: found no model of round 0" in gone.err and "choose another round" in gone.err
    assert not (ended.folder / "first.safetensors").exists()
    assert ended.call("resume", RUN, "--rounds", "4").code == 0
    assert ended.call("runs", "show", RUN, "--json").json["rounds"] == 4


def test_verify_reads_everything_and_names_what_is_damaged(ended: Project) -> None:
    said = ended.call("store", "verify", RUN)
    assert said.code == 0 and said.out.endswith(": read and compared\n")
    assert ended.call("store", "verify", RUN, "--json").json["problems"] == []
    path = next(path for path in objects(ended) if "sites" not in path.parts)
    flip(path)
    damaged = ended.call("store", "verify", RUN)
    assert damaged.code == 1
    assert path.name in damaged.err and "is corrupt" in damaged.err and "Traceback" not in damaged.err


@pytest.mark.parametrize("command", ["gc", "verify"])
def test_a_run_that_is_not_there(project: Project, command: str) -> None:
    found = project.call("store", command, "nothing-1")
    assert found.code == 2 and "nothing-1" in found.err and "Traceback" not in found.err
