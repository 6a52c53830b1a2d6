"""`fedflow export`, `plot`, `init`, `recipe schema`: files that other programs and people read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedflow.engine import read_model, simulate
from fedflow.engine.export import export_model
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.tensors import model_digest
from tests.cli.project import Project


def committed(project: Project, round: int) -> dict[str, torch.Tensor]:
    """The model of a round, straight from the store."""
    journal = Journal(ObjectStore(str(project.folder / "fedflow-runs" / "store")), "points-1")
    manifest = journal.manifest(round, "train")
    assert manifest is not None
    return {name: t for tensors in read_model(journal, manifest).values() for name, t in tensors.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


# -- export ------------------------------------------------------------------------------------------------------------
def test_export_safetensors(trained: Project) -> None:
    result = trained.call("export", "points-1", "last.safetensors")
    assert result.code == 0
    path = trained.folder / "last.safetensors"
    assert equal(load_file(path), committed(trained, 2))
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert (about["run"], about["round"], about["model_digest"]) == ("points-1", "2", model_digest(load_file(path)))
    assert about["model_digest"] in result.out


@pytest.mark.parametrize("name", ["first.pt", "first.pth"])
def test_export_state_dict(trained: Project, name: str) -> None:
    assert trained.call("export", "points-1", name, "--round", 0).code == 0
    state = torch.load(trained.folder / name, weights_only=True)
    assert type(state) is dict
    assert equal(state, committed(trained, 0))
    torch.nn.Linear(4, 2).load_state_dict(state)


def test_export_best(trained: Project) -> None:
    best = trained.call("runs", "show", "points-1", "--json").json["best_round"]
    assert trained.call("export", "points-1", "best.safetensors", "--best").code == 0
    assert equal(load_file(trained.folder / "best.safetensors"), committed(trained, best))


def test_export_replaces_the_file_at_once(trained: Project) -> None:
    """Nothing but the file is left, and it is as readable as any other file."""
    folder = trained.folder / "models"
    folder.mkdir()
    (folder / "model.pt").write_text("an older model")
    assert trained.call("export", "points-1", "models/model.pt").code == 0
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    other = trained.folder / "recipe.yaml"
    assert (folder / "model.pt").stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model.bin"], ["OUT", "'model.bin'", ".safetensors, .pt, .pth"]),
        (["no/such/model.pt"], ["OUT", "no/such", "a folder that exists"]),
        (["printed/model.pt"], ["OUT", "a folder that exists"]),
        (["m.pt", "--round", "3"], ["--round", "found 3", "0 to 2"]),
        (["m.pt", "--round", "0", "--best"], ["--best, --round", "one of the two"]),
    ],
)
def test_export_mistakes(trained: Project, args: list[str], words: list[str]) -> None:
    mistake = trained.call("export", "points-1", *args).mistake
    assert all(word in mistake for word in words), mistake
    assert not (trained.folder / "m.pt").exists()


def test_export_where_nothing_can_be_written(trained: Project) -> None:
    mistake = trained.call("export", "points-1", "/proc/model.pt").mistake
    assert "'/proc/model.pt'" in mistake and "a place that can be written" in mistake


def test_tied_tensors_have_all_their_names_in_a_state_dict(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.chdir(project.folder)
    fields = {"name": "tied", "model": "points_workload:Tied", "workload": "points_workload:Points", "rounds": 1}
    journal = simulate(Recipe.load(fields), ["site-1"])
    assert export_model(journal, 0, Path("tied.pt")) == []
    state = torch.load("tied.pt", weights_only=True)
    assert set(state) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert torch.equal(state["first.weight"], state["second.weight"])
    export_model(journal, 0, Path("tied.safetensors"))
    assert set(load_file("tied.safetensors")) == {"first.weight", "first.bias"}


def test_without_the_model_s_code_the_committed_names_are_exported(trained: Project, project: Project) -> None:
    """A store alone is enough to get the model out of it; a note says what may be missing."""
    (project.folder / "points_workload.py").unlink()
    result = project.call("export", "points-1", "model.pt", "--store", trained.folder / "fedflow-runs" / "store")
    assert result.code == 0
    assert result.err.startswith("note: ") and "points_workload" in result.err
    assert equal(torch.load(project.folder / "model.pt", weights_only=True), committed(trained, 2))


# -- plot --------------------------------------------------------------------------------------------------------------
def test_plot(trained: Project) -> None:
    result = trained.call("plot", "points-1")
    assert result.out == "fedflow-runs/plots/points-1.png\n"
    assert trained.call("plot", "points-1", "--out", "pictures/run.svg").out == "pictures/run.svg\n"
    assert "<svg" in (trained.folder / "pictures" / "run.svg").read_text()


def test_plot_of_another_kind_is_refused(trained: Project) -> None:
    assert "'run.gif'" in trained.call("plot", "points-1", "--out", "run.gif").mistake


def test_plot_of_several_runs(project: Project) -> None:
    for name, fields in {
        "a": {"seed": 1},
        "b": {"seed": 2},
        "c": {"algorithm": {"kind": "fedprox", "mu": 0.5}},
    }.items():
        assert project.call("run", project.recipe(rounds=2, **fields), "--run-id", name, "--quiet").code == 0
    result = project.call("plot", "a", "b", "c", "--out", "all.svg", "--x", "bytes")
    assert (result.code, result.out) == (0, "all.svg\n")
    picture = (project.folder / "all.svg").read_text()
    assert all(text in picture for text in ("accuracy, 3 runs", "fedavg: ", ", 2 seeds<", "fedprox: ")), picture[:3000]
    assert project.call("plot", "a", "b").out == "fedflow-runs/plots/a-and-1-more.png\n"
    assert project.call("plot", "a", "--x", "seconds", "--out", "a.pdf").code == 0


def test_plot_mistakes(trained: Project) -> None:
    assert "give the picture as --out run.png" in trained.call("plot", "points-1", "run.png").mistake
    assert "each run once" in trained.call("plot", "points-1", "points-1").mistake
    assert "'nothing'" in trained.call("plot", "points-1", "nothing").mistake


# -- init, recipe ------------------------------------------------------------------------------------------------------
def test_init_lays_out_a_project_that_is_right(project: Project) -> None:
    result = project.call("init", "new")
    assert result.code == 0
    for name in ("recipe.yaml", "federation.yaml", "workload.py", "flows/site.py", "deployments/prefect.yaml"):
        assert f"wrote new/{name}\n" in result.out
    commands = result.out.partition("next:\n")[2].splitlines()
    assert [line.split("#")[0].split() for line in commands] == [
        ["fedflow", "run", "new/recipe.yaml"],
        ["fedflow", "run", "new/recipe.yaml", "--env", "poc"],
    ]
    checked = project.call("recipe", "check", "new/recipe.yaml")
    assert (checked.code, checked.out.splitlines()[-1]) == (0, "new/recipe.yaml: ok")


def test_init_overwrites_nothing(project: Project) -> None:
    before = hashlib.sha256((project.folder / "recipe.yaml").read_bytes()).digest()
    result = project.call("init", ".")
    assert result.code == 0
    assert "kept  recipe.yaml, which was there\n" in result.out and "wrote workload.py\n" in result.out
    assert hashlib.sha256((project.folder / "recipe.yaml").read_bytes()).digest() == before


def test_init_where_nothing_can_be_written(project: Project) -> None:
    (project.folder / "file").touch()
    assert "'file/new'" in project.call("init", "file/new").mistake


def test_schema(project: Project) -> None:
    schema = json.loads(project.call("recipe", "schema").out)
    assert set(schema["required"]) >= {"name", "workload", "rounds"} and "model" not in schema["required"]
    assert schema["properties"]["algorithm"]["oneOf"][0]["properties"]["kind"]["enum"]
