"""A user's mistakes: exit code 2, one line that names field, found, expected and fix, and nothing was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.project import Project


def changes(**fields: Any) -> dict[str, Any]:
    return fields


BAD_RECIPES = {
    "unknown field": (changes(lerning_rate=1), ["lerning_rate", "unknown field"]),
    "wrong type": (changes(rounds="many"), ["rounds", "'many'", "integer"]),
    "negative": (changes(rounds=0), ["rounds", "found 0", "greater than or equal to 1"]),
    "timeouts": (
        changes(timeouts={"round_deadline": "1m", "train_timeout": "2m"}),
        ["train_timeout (0:02:00)", "round_deadline (0:01:00)", "lower the first or raise the second"],
    ),
    "unknown timeout": (changes(timeouts={"deadline": "1m"}), ["timeouts.deadline", "unknown field"]),
    "quorum": (changes(quorum=1, min_sites=2), ["min_sites (2)", "quorum (1)"]),
    "missing model class": (changes(model="points_workload:Lime"), ["model", "'points_workload:Lime'", "'Line'"]),
    "missing module": (changes(model="no_such_module:Model"), ["model", "'no_such_module:Model'", "install"]),
    "model arguments": (changes(model={"path": "points_workload:Line", "args": {"klasses": 3}}), ["klasses"]),
    "not a model": (changes(model="points_workload:points"), ["model"]),
    "missing evaluation": (changes(evaluation="points_workload:Nope"), ["evaluation", "'points_workload:Nope'"]),
    "unknown algorithm": (changes(algorithm="fedprocks"), ["algorithm", "'fedprocks'", "fedavg"]),
    "unknown site": (changes(required_sites=["site-9"]), ["required_sites", "site-9", "site-1"]),
    "missing checkpoint": (changes(checkpoint="no.safetensors"), ["checkpoint", "no.safetensors"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
@pytest.mark.parametrize("command", ["run", "recipe check"])
def test_bad_recipe(project: Project, command: str, case: str) -> None:
    fields, words = BAD_RECIPES[case]
    project.recipe(**fields)
    mistake = project.call(*command.split(), "recipe.yaml").mistake
    assert all(word in mistake for word in words), mistake
    assert not list((project.folder / "fedflow-runs").glob("**/run.json"))


def test_sites_without_a_server(project: Project) -> None:
    mistake = project.call("sites").mistake
    assert all(word in mistake for word in ["PREFECT_API_URL", "found None", "prefect config set"]), mistake


def test_missing_workload(project: Project) -> None:
    project.recipe(workload="points_workload:Nope")
    mistake = project.call("run", "recipe.yaml").mistake
    assert all(word in mistake for word in ["workload", "'points_workload:Nope'", "'Points'"])
    # at a coordinator that has no data this is as it should be
    checked = project.call("recipe", "check", "recipe.yaml")
    assert (checked.code, checked.err) == (0, "")
    assert "points_workload:Nope: not found here; each site must find it" in checked.out


@pytest.mark.parametrize(
    "fields",
    [
        {"quorum": 2},
        {"schedule": {"kind": "sampled", "sites_per_round": 3}},
        {"schedule": {"kind": "everyone", "sites": ["a", "b"]}},
    ],
)
def test_a_recipe_is_checked_where_no_federation_is_known(project: Project, fields: dict[str, Any]) -> None:
    (project.folder / "federation.yaml").unlink()
    project.recipe(**fields)
    checked = project.call("recipe", "check", "recipe.yaml")
    assert (checked.code, checked.err) == (0, "")


def test_checkpoint_that_does_not_fit(project: Project) -> None:
    torch.save({"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}, project.folder / "other.pt")
    project.recipe(checkpoint=str(project.folder / "other.pt"))
    mistake = project.call("run", "recipe.yaml").mistake
    assert "bias is missing" in mistake and "extra is not in the model" in mistake
    assert "weight is" in mistake and "3" in mistake


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds: [", ["not valid YAML"]),
        ("- rounds", ["a mapping of fields", "fedflow init"]),
        ("{}", ["name: missing", "model: missing", "workload: missing", "rounds: missing"]),
    ],
)
def test_not_a_recipe(project: Project, text: str, words: list[str]) -> None:
    (project.folder / "recipe.yaml").write_text(text)
    mistake = project.call("run", "recipe.yaml").mistake
    assert mistake.startswith("recipe.yaml: ")
    assert all(word in mistake for word in words), mistake


def test_no_recipe(project: Project) -> None:
    assert "found 'none.yaml', expected a readable file" in project.call("run", "none.yaml").mistake


def test_no_federation(project: Project) -> None:
    (project.folder / "federation.yaml").unlink()
    mistake = project.call("run", "recipe.yaml").mistake
    assert "federation.yaml" in mistake and "--federation" in mistake


def test_bad_federation(project: Project) -> None:
    (project.folder / "federation.yaml").write_text("sites: [a, a]")
    assert "sites named twice: ['a']" in project.call("run", "recipe.yaml").mistake


@pytest.mark.parametrize("run_id", ["../outside", "/absolute", "a/b"])
def test_run_id_that_is_no_name(project: Project, run_id: str) -> None:
    assert run_id in project.call("run", "recipe.yaml", "--run-id", run_id).mistake


def test_store_that_cannot_be_written(project: Project) -> None:
    (project.folder / "file").write_text("not a folder")
    mistake = project.call("run", "recipe.yaml", "--store", project.folder / "file" / "store").mistake
    assert "file/store" in mistake


def test_store_of_an_unknown_kind(project: Project) -> None:
    assert "nosuch" in project.call("run", "recipe.yaml", "--store", "nosuch://bucket").mistake


def test_unreachable_server(project: Project) -> None:
    api = "http://127.0.0.1:1/api"
    result = project.shell("run", "recipe.yaml", "--env", "prod", "--store", "store", "--json", PREFECT_API_URL=api)
    assert api in result.mistake and "PREFECT_API_URL" in result.mistake


def test_run_id_of_another_recipe(trained: Project) -> None:
    other = trained.recipe("other.yaml", seed=1)
    mistake = trained.call("run", other, "--run-id", "points-1").mistake
    assert "points-1" in mistake and "seed: 0 there, 1 here" in mistake and "--run-id" in mistake


@pytest.mark.parametrize(
    "command",
    [
        *(
            "resume nobody",
            "extend nobody --rounds 9",
            "abort nobody",
            "runs show nobody",
            "logs nobody",
            "plot nobody",
        ),
        *("export nobody out.pt", "ui nobody"),
    ],
)
def test_unknown_run(trained: Project, command: str) -> None:
    mistake = trained.call(*command.split()).mistake
    assert "'nobody'" in mistake and "points-1" in mistake


def test_unknown_run_in_a_store(trained: Project) -> None:
    assert "'nobody'" in trained.call("runs", "show", "nobody", "--store", "fedflow-runs/store").mistake


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("resume points-1 --timeout soon", ["--timeout", "'soon'", "NAME=DURATION"]),
        ("resume points-1 --timeout round_deadline=soon", ["timeouts.round_deadline", "'soon'"]),
        ("resume points-1 --timeout dead_line=1m", ["timeouts.dead_line", "unknown field"]),
        ("resume points-1 --timeout train_timeout=3h", ["train_timeout", "round_deadline"]),
        ("resume points-1 --rounds 2", ["rounds", "found 2", "at least the 3 that are committed"]),
        ("resume points-1 --add-site ../x", ["name", "'../x'"]),
        ("extend points-1 --rounds 3", ["--rounds", "found 3", "more than 3"]),
        ("logs points-1 --site site-9", ["--site", "'site-9'", "site-1"]),
        ("ui points-1", ["no UI", "fedflow runs show points-1"]),
        ("run recipe.yaml --keep-server", ["--keep-server", "poc"]),
        ("run recipe.yaml --env poc --trace trace.csv", ["--trace", "'poc'", "sim"]),
        ("run recipe.yaml --env poc --backend debug", ["--backend", "'poc'", "sim", "leave it out"]),
        ("run recipe.yaml --env prod --workers 2", ["--workers", "'prod'", "sim", "leave it out"]),
        ("run recipe.yaml --env poc --journal-every 5", ["--journal-every", "'poc'", "sim", "leave it out"]),
        ("run recipe.yaml --trace nowhere.csv", ["trace", "'nowhere.csv'", "a readable file"]),
        ("run recipe.yaml --trace recipe.yaml", ["trace.kind", "None", "'generated', 'table'"]),
    ],
)
def test_bad_options(trained: Project, command: str, words: list[str]) -> None:
    mistake = trained.call(*command.split()).mistake
    assert all(word in mistake for word in words), mistake


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rum", ["No such command 'rum'", "'run'"]),
        ("run", ["Missing argument 'RECIPE'", "fedflow run --help"]),
        ("run recipe.yaml --env cloud", ["'--env'", "'cloud'", "'sim', 'poc', 'prod'"]),
        ("run recipe.yaml --backend dask", ["'--backend'", "'dask'", "'processes', 'ray', 'debug'"]),
        ("run recipe.yaml --workers 0", ["--workers", "greater than or equal to 1"]),
        ("run recipe.yaml --rouns 3", ["--rouns"]),
        ("extend points-1", ["--rounds"]),
        ("extend points-1 --rounds 0", ["--rounds", "greater than or equal to 1"]),
    ],
)
def test_bad_usage(project: Project, command: str, words: list[str]) -> None:
    mistake = project.call(*command.split()).mistake
    assert all(word in mistake for word in words), mistake


def test_bad_site_configuration(project: Project) -> None:
    (project.folder / "site.yaml").write_text("name: site-1\nstor: here")
    mistake = project.call("site", "start", "--config", "site.yaml").mistake
    assert all(word in mistake for word in ["site.yaml", "stor: unknown field", "store: missing", "state: missing"])
    (project.folder / "site.yaml").write_text("name: site-1\nstore: s3://fedflow\nstate: beside/me")
    mistake = project.call("site", "start", "--config", "site.yaml").mistake
    assert all(word in mistake for word in ["state: found 'beside/me'", "absolute path", str(project.folder)])


# -- what nobody foresaw -----------------------------------------------------------------------------------------------
def test_unexpected_error_is_one_line_and_a_log(project: Project) -> None:
    project.recipe(model="points_workload:Explodes")
    result = project.call("run", "recipe.yaml", "--home", "elsewhere")
    assert (result.code, result.out) == (1, "")
    assert result.problem.startswith("unexpected ZeroDivisionError: one two; its traceback is in elsewhere/logs/error-")
    log = Path(project.folder, result.problem.rpartition(" is in ")[2])
    assert "Traceback" in log.read_text() and "points_workload.py" in log.read_text()


def test_traceback_on_request(project: Project) -> None:
    result = project.call("--traceback", "run", project.recipe(rounds=0))
    assert result.code == 2
    assert result.err.startswith("Traceback") and "RecipeError" in result.err


def test_as_a_process(project: Project) -> None:
    """The same through a real process: nothing besides the line, no traceback from anywhere."""
    result = project.shell("run", project.recipe(rounds=0))
    assert len(result.err.splitlines()) == 1
    assert "rounds: found 0" in result.mistake
