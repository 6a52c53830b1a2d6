"""Training through the command line: run, stop, resume, extend; what is shown, what is printed, the exit code."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fedflow.engine import simulate
from fedflow.environments import recall
from fedflow.recipe import Recipe
from fedflow.simulation.clock import EPOCH
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.cli.project import SITES, Project, Result, command, environment


def journal(project: Project, run: str) -> Journal:
    return Journal(ObjectStore(str(project.folder / "fedflow-runs" / "store")), run)


def reference(project: Project, monkeypatch: pytest.MonkeyPatch, rounds: int) -> str:
    """Digest of the model that `simulate` trains in so many rounds of the project's recipe, at sites that are whole."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(project.folder)
        patch.chdir(project.folder)
        head = simulate(Recipe.load(Recipe.load("recipe.yaml").model_dump() | {"rounds": rounds}), SITES).head(
            ("train",)
        )
    assert head is not None
    return head.model_digest


def test_run_as_a_process_from_elsewhere(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Code and federation beside the recipe are found; stdout is the one object, and all else is on stderr."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    process = subprocess.run(
        command("run", project.folder / "recipe.yaml", "--json"),
        cwd=elsewhere,
        env=environment(),
        capture_output=True,
        text=True,
    )
    result = Result(process.returncode, process.stdout, process.stderr)
    assert result.code == 0, result
    found = result.json
    assert (found["run_id"], found["status"], found["rounds"]) == ("points-1", "finished", 3)
    assert set(found["metrics"]) == {"accuracy", "loss"}
    assert found["model_digest"] == reference(project, monkeypatch, 3)
    rounds = [line.split()[1] for line in result.err.splitlines() if line.startswith("round ")]
    assert rounds == ["0", "1", "2"]
    assert (elsewhere / "fedflow-runs" / "plots" / "points-1.png").exists()


def test_what_is_printed_without_a_terminal(trained: Project) -> None:
    header, *lines = (trained.folder / "printed").read_text().splitlines()
    rounds, end = lines[:3], lines[3:]
    assert header.startswith("points-1 · sim · 3 sites · store file://")
    for number, line in enumerate(rounds):
        assert re.match(
            rf"round {number}  accuracy [\d.]+  loss [\d.]+  sites' loss [\d.]+  2/3 sites  [\d.]+ s  ", line
        )
        assert line.endswith("without site-3 (training failed: OSError: the disk of site-3 is gone)")
    assert end[0] == "points-1 finished: 3 rounds"
    assert re.match(r"  accuracy +[\d.]+ last model \(round 2\), [\d.]+ best model \(round \d\)", end[1])
    assert re.match(r"  model +blake3:[0-9a-f]{64}$", end[2])
    assert Path(trained.folder, end[3].split()[1]).read_bytes().startswith(b"\x89PNG")


def test_failed_run_names_the_site_and_is_resumed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.recipe(quorum=3)
    project.break_site("site-2")
    failed = project.call("run", "recipe.yaml", "--json")
    assert failed.code == 1
    assert (failed.json["run_id"], failed.json["status"], failed.json["rounds"]) == ("points-1", "failed", 0)
    assert "found 2 valid updates, expected 3" in failed.problem
    assert "site-2: training failed: OSError: the disk of site-2 is gone" in failed.problem
    assert "`fedflow resume points-1` goes on" in failed.problem

    project.mend_site("site-2")
    changes = ["--timeout", "round_deadline=20m", "--timeout", "heartbeat=5s", "--quorum", 2]
    resumed = project.call("resume", "points-1", *changes, "--json")
    assert resumed.code == 0, resumed
    assert resumed.json["model_digest"] == reference(project, monkeypatch, 3)
    (amendment,) = journal(project, "points-1").amendments()
    assert amendment.recipe["quorum"] == 2
    assert amendment.recipe["timeouts"]["round_deadline"] == "PT20M"  # type: ignore[index,call-overload]


def test_longer_and_larger(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is called again, extended, joined by a site; each time it goes on from what is committed."""
    first = project.call("run", project.recipe(rounds=1), "--run-id", "mine", "--quiet")
    assert first.out.startswith("mine finished: 1 rounds\n")  # nothing but the result
    committed = journal(project, "mine").manifest(0, "train")
    again = project.call("run", "recipe.yaml", "--run-id", "mine", "--json")
    assert again.code == 0 and journal(project, "mine").committed() == [(0, "train")]
    assert journal(project, "mine").manifest(0, "train") == committed

    extended = project.call("extend", "mine", "--rounds", 2)
    assert extended.code == 0, extended
    header, *lines = extended.out.splitlines()
    assert "resumed after 1 rounds" in header
    assert [line.split()[1] for line in lines if line.startswith("round ")] == ["1"]  # the first is not new
    (found,) = project.call("runs", "ls", "--json").json["runs"]
    assert (found["rounds"], found["model_digest"]) == (2, reference(project, monkeypatch, 2))

    joined = project.call("resume", "mine", "--rounds", 3, "--add-site", "site-4", "--json")
    assert joined.code == 0, joined
    rounds = project.call("runs", "show", "mine", "--json").json["history"]
    assert [sorted(round["sites"]) for round in rounds] == [SITES, SITES, [*SITES, "site-4"]]


def test_run_that_stopped_early_is_not_extended(project: Project) -> None:
    project.recipe(early_stop={"target": 0.0})
    assert project.call("run", "recipe.yaml", "--json").json["rounds"] == 1
    assert "stopped by early_stop after 1 rounds" in project.call("extend", "points-1", "--rounds", 9).mistake


# -- stopping ----------------------------------------------------------------------------------------------------------
def test_a_finished_run_is_shown_and_not_started_again(trained: Project) -> None:
    shown = trained.call("resume", "points-1")
    assert shown.code == 0
    assert shown.out.startswith("points-1 finished: 3 rounds\n")  # no header of a run that goes on
    assert trained.call("resume", "points-1", "--json").json["status"] == "finished"


def test_stopped_run_is_resumed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.recipe(rounds=10_000)
    process = start_until_round_0(project, "--home", "here", "--json")
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    assert stopped.code == 1
    assert stopped.json["status"] == "aborted"
    assert "`fedflow resume points-1 --home here` goes on" in stopped.problem

    done = stopped.json["rounds"]
    resumed = project.call("resume", "points-1", "--rounds", done + 1, "--home", "here", "--json")
    assert resumed.code == 0, resumed
    assert resumed.json["rounds"] == done + 1
    assert resumed.json["model_digest"] == reference(project, monkeypatch, done + 1)


def test_sigterm_stops_the_run_too(project: Project) -> None:
    project.recipe(rounds=10_000)
    process = start_until_round_0(project)
    process.terminate()
    stopped = ended(process)
    assert (stopped.code, "stopping the run" in stopped.out) == (1, True)
    assert project.call("runs", "ls", "--json").json["runs"][0]["status"] != "running"


STOPPING = """
class Stopping(Points):
    def batches(self, batch_size, generator):
        breakpoint()
        return super().batches(batch_size, generator)
"""


def test_a_simulation_in_this_process_that_seldom_writes_its_model(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A breakpoint in the user's code stops in the process of the command; the run that goes on later does as it was told."""
    stopped = set[int]()
    monkeypatch.setattr(sys, "breakpointhook", lambda: stopped.add(os.getpid()))
    with (project.folder / "points_workload.py").open("a") as code:
        code.write(STOPPING)
    project.recipe(workload="points_workload:Stopping")
    options = ("--backend", "debug", "--journal-every", "2", "--json")
    assert project.call("run", "recipe.yaml", *options).json["model_digest"] == reference(project, monkeypatch, 3)
    assert stopped == {os.getpid()}
    kept = journal(project, "points-1")
    assert [_is_written(kept, round) for round in range(3)] == [False, True, True]
    assert project.call("resume", "points-1", "--rounds", 6).code == 0
    assert [_is_written(kept, round) for round in range(6)] == [False, True, True, True, False, True]


def _is_written(journal: Journal, round: int) -> bool:
    manifest = journal.manifest(round, "train")
    assert manifest
    return all(journal.store.exists(ref.key) for ref in manifest.objects())


def test_as_many_processes_train_as_are_asked_for(project: Project) -> None:
    project.recipe()
    assert project.call("run", "recipe.yaml", "--workers", 1, "--backend", "processes").code == 0
    environment = recall("points-1", project.folder / "fedflow-runs")
    assert (environment.workers, environment.backend) == (1, "processes")


def test_a_trace_holds_the_rounds_in_simulated_time(project: Project) -> None:
    """Two of three sites close a round after 10 s of grace; the run that goes on later needs no file."""
    project.recipe(timeouts={"round_deadline": "1h", "quorum_grace": 10})
    (project.folder / "trace.csv").write_text("site,seconds\nsite-1,5\nsite-2,30\nsite-3,600\n")
    assert project.call("run", "recipe.yaml", "--trace", "trace.csv", "--json").json["rounds"] == 3
    (project.folder / "trace.csv").unlink()
    assert project.call("extend", "points-1", "--rounds", 4).code == 0
    held = [journal(project, "points-1").manifest(round, "train") for round in range(4)]
    assert [(m.committed - EPOCH).total_seconds() for m in held if m] == [40, 80, 120, 160]
    assert {tuple(m.excluded.items()) for m in held if m} == {(("site-3", "no update by the closing"),)}
    shown = project.call("runs", "show", "points-1").out
    assert "40 s" in shown, shown


def test_abort_from_elsewhere(project: Project) -> None:
    project.recipe(rounds=10_000)
    process = start_until_round_0(project)
    (running,) = project.call("runs", "ls", "--json").json["runs"]
    assert running["status"] == "running"
    aborted = project.call("abort", "points-1")
    assert aborted.out == "points-1 is stopped; `fedflow resume points-1` goes on from its last committed round\n"
    process.communicate()
    assert process.returncode == 1
    again = project.call("abort", "points-1")
    assert (again.code, again.out.startswith("points-1 is not running")) == (0, True)


def ended(process: subprocess.Popen[str]) -> Result:
    """What it gave, read while it ends."""
    out, err = process.communicate()
    return Result(process.returncode, out, err)


def start_until_round_0(project: Project, *options: str) -> subprocess.Popen[str]:
    """A `fedflow run` in the background, of which the first committed round was seen."""
    process = subprocess.Popen(
        command("run", "recipe.yaml", *options),
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    progress = process.stderr if "--json" in options else process.stdout
    assert progress is not None
    lines = iter(progress.readline, "")
    assert any(re.match("rounds? 0\\b", line) for line in lines)  # the first of many may share a line
    return process


# -- in a terminal -----------------------------------------------------------------------------------------------------
def test_what_a_terminal_shows(project: Project) -> None:
    project.break_site("site-3")
    code, screen = in_terminal(project, "run", "recipe.yaml")
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    assert "starting the simulation" in text
    assert "points-1 · sim · 3 sites" in text
    assert re.search(r"━+ +\d/3 rounds", text)
    for number in range(3):
        assert re.search(rf"round {number}  accuracy .* 2/3 sites .* without site-3 \(training failed", text)
    end = text.rpartition("points-1 finished: 3 rounds")[2]
    assert "last model (round 2)" in end and "━" not in end  # the live part is gone, the result stays


def in_terminal(project: Project, *args: object) -> tuple[int, str]:
    """Exit code of `fedflow args` in a pseudo-terminal, and everything that it wrote there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*args),
        cwd=project.folder,
        env=environment(TERM="xterm-256color"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # how a pseudo-terminal says that its other end is closed
        while data := os.read(ours, 65536):
            written += data
    os.close(ours)
    return process.wait(), written.decode()
