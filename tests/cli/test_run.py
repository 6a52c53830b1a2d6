"""Training through the command line: run, stop, resume, extend; what is shown, what is printed, the exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from fedflow.engine import simulate
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.cli.project import SITES, Project, Result, command, environment


def journal(project: Project, run: str = "points-1") -> Journal:
    return Journal(ObjectStore(str(project.folder / "fedflow-runs" / "store")), run)


def reference(project: Project, monkeypatch: pytest.MonkeyPatch, rounds: int) -> str:
    """Digest of the model that `simulate` trains with the project's recipe, at the sites that are whole."""
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.chdir(project.folder)
    fields = Recipe.load("recipe.yaml").model_dump() | {"rounds": rounds}
    head = simulate(Recipe.load(fields), SITES).head(("train",))
    assert head is not None
    return head.model_digest


def test_run_as_a_process(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    result = project.shell("run", "recipe.yaml", "--json")
    assert result.code == 0, result
    found = result.json
    assert (found["run_id"], found["status"], found["rounds"]) == ("points-1", "finished", 3)
    assert set(found["metrics"]) == {"accuracy", "loss"}
    assert found["model_digest"] == reference(project, monkeypatch, 3)
    assert [line.split()[:2] for line in result.err.splitlines() if line.startswith("round ")] == [
        ["round", str(number)] for number in range(3)
    ]


def test_what_is_printed_without_a_terminal(project: Project) -> None:
    project.break_site("site-3")
    result = project.call("run", "recipe.yaml", "--run-id", "mine")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.startswith("mine · sim · 3 sites · store file://")
    rounds, end = lines[:3], lines[3:]
    for number, line in enumerate(rounds):
        assert re.match(rf"round {number}  accuracy [\d.]+  loss [\d.]+  sites' loss [\d.]+  2/3 sites  [\d.]+ s  ", line)
        assert line.endswith("without site-3 (training failed: OSError: the disk of site-3 is gone)")
    assert end[0] == "mine finished: 3 rounds"
    assert re.match(r"  accuracy +[\d.]+ last model \(round 2\), [\d.]+ best model \(round \d\)", end[1])
    assert re.match(r"  model +blake3:[0-9a-f]{64}$", end[2])
    plot = Path(project.folder, end[3].split()[1])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_quiet_prints_the_result_alone(project: Project) -> None:
    result = project.call("run", project.recipe(rounds=1), "--quiet")
    assert result.out.startswith("points-1 finished: 1 rounds\n")


def test_code_beside_the_recipe_is_found_from_anywhere(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    project.recipe(rounds=1)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        command("run", project.folder / "recipe.yaml", "--json"), cwd=elsewhere, env=environment(), capture_output=True
    )
    assert json.loads(done.stdout)["status"] == "finished"


def test_failed_run_names_the_sites_and_is_resumed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.recipe(quorum=3)
    project.break_site("site-2")
    failed = project.call("run", "recipe.yaml", "--json")
    assert failed.code == 1
    assert (failed.json["status"], failed.json["rounds"]) == ("failed", 0)
    assert "found 2 valid updates, expected 3" in failed.problem
    assert "site-2: training failed: OSError: the disk of site-2 is gone" in failed.problem
    assert "`fedflow resume points-1` goes on" in failed.problem

    project.mend_site("site-2")
    resumed = project.call("resume", "points-1", "--json")
    assert resumed.code == 0
    assert "round 0  opens again" not in resumed.problem if resumed.err.startswith("error") else True
    assert resumed.json["model_digest"] == reference(project, monkeypatch, 3)


def test_resume_with_a_lower_quorum_and_other_timeouts(project: Project) -> None:
    project.recipe(quorum=3, rounds=2)
    project.break_site("site-2")
    assert project.call("run", "recipe.yaml", "--quiet").code == 1
    changes = ["--quorum", 2, "--timeout", "round_deadline=20m", "--timeout", "heartbeat=5s"]
    resumed = project.call("resume", "points-1", *changes, "--json")
    assert resumed.code == 1  # the round that is planned keeps its quorum
    resumed = project.call("resume", "points-1", "--json")
    recipe = journal(project).recipe()
    assert (recipe.quorum, recipe.timeouts.round_deadline.total_seconds()) == (2, 1200)


def test_extended_run_is_the_longer_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.call("run", project.recipe(rounds=2), "--quiet").code == 0
    extended = project.call("extend", "points-1", "--rounds", 3)
    assert extended.code == 0
    header, *lines = extended.out.splitlines()
    assert "resumed after 2 rounds" in header
    assert [line.split()[1] for line in lines if line.startswith("round ")] == ["2"]  # the others are not shown as new
    (found,) = project.call("runs", "ls", "--json").json["runs"]
    assert (found["rounds"], found["model_digest"]) == (3, reference(project, monkeypatch, 3))
    assert [a.recipe for a in journal(project).amendments()] == [{"rounds": 3}]


def test_run_that_stopped_early_is_not_extended(project: Project) -> None:
    project.recipe(early_stop={"target": 0.0})
    assert project.call("run", "recipe.yaml", "--json").json["rounds"] == 1
    assert "stopped by early_stop after 1 rounds" in project.call("extend", "points-1", "--rounds", 9).mistake


def test_same_name_and_recipe_is_the_same_run(project: Project) -> None:
    first = project.call("run", project.recipe(rounds=1), "--run-id", "one", "--json")
    again = project.call("run", "recipe.yaml", "--run-id", "one", "--json")
    assert (again.code, again.json) == (0, first.json)
    assert len(journal(project, "one").openings(journal(project, "one").plan(0, "train"))) == 1  # type: ignore[arg-type]


def test_site_joins_a_run(project: Project) -> None:
    assert project.call("run", project.recipe(rounds=1), "--quiet").code == 0
    resumed = project.call("resume", "points-1", "--rounds", 2, "--add-site", "site-4", "--json")
    assert resumed.code == 0
    last = project.call("runs", "show", "points-1", "--json").json["history"][1]
    assert sorted(last["sites"]) == [*SITES, "site-4"]


# -- stopping ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_is_resumed(project: Project, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    project.recipe(rounds=10_000)
    process = start(project, "run", "recipe.yaml", "--home", "here", "--json")
    assert process.stdout and process.stderr
    seen = [line for line in iter(process.stderr.readline, "") if line.startswith("round 1 ")][:1] if False else []
    while not seen or not seen[-1].startswith("round 1 "):
        seen.append(process.stderr.readline())
        assert seen[-1], seen
    process.send_signal(number)
    out, err = process.communicate()
    stopped = Result(process.returncode, out, err)
    assert stopped.code == 1
    assert stopped.json["status"] != "finished"
    assert "`fedflow resume points-1 --home here` goes on" in stopped.problem

    done = stopped.json["rounds"]
    resumed = project.call("resume", "points-1", "--rounds", done + 1, "--home", "here", "--json")
    assert (resumed.code, resumed.json["rounds"]) == (0, done + 1)
    assert resumed.json["model_digest"] == reference(project, monkeypatch, done + 1)


def test_abort_from_elsewhere(project: Project) -> None:
    project.recipe(rounds=10_000)
    process = start(project, "run", "recipe.yaml")
    assert process.stdout
    while not (line := process.stdout.readline()).startswith("round 0 "):
        assert line
    (running,) = project.call("runs", "ls", "--json").json["runs"]
    assert running["status"] == "running"
    aborted = project.call("abort", "points-1")
    assert aborted.out == "points-1 is stopped; `fedflow resume points-1` goes on from its last committed round\n"
    process.communicate()
    assert process.returncode == 1
    again = project.call("abort", "points-1")
    assert (again.code, again.out.startswith("points-1 is not running")) == (0, True)


def start(project: Project, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), cwd=project.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# -- in a terminal -----------------------------------------------------------------------------------------------------
def test_what_a_terminal_shows(project: Project) -> None:
    project.break_site("site-3")
    project.recipe(rounds=6)
    code, screen = in_terminal(project, "run", "recipe.yaml")
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    assert "starting the simulation" in text
    assert "points-1 · sim · 3 sites" in text
    assert re.search(r"━+ +\d/6 rounds", text)
    for number in range(6):
        assert re.search(rf"round {number}  accuracy .* 2/3 sites .* without site-3 \(training failed", text)
    last = text.rpartition("points-1 finished: 6 rounds")[2]
    assert "last model (round 5)" in last and "━" not in last  # the live part is gone, the result stays


def in_terminal(project: Project, *args: object) -> tuple[int, str]:
    """Exit code of `fedflow args` in a pseudo-terminal, and everything that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*args), cwd=project.folder, env=environment(TERM="xterm-256color"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # how a pseudo-terminal says that its other end is closed
        while data := os.read(ours, 65536):
            written += data
    os.close(ours)
    return process.wait(), written.decode()
