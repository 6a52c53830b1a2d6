"""`fedflow sweep`: a table, a picture, and the same runs however often it is killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from fedflow.engine import simulate
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.cli.project import SITES, Project, Result, command, environment
from tests.cli.test_run import in_terminal

COUNTING = '''
import os

from points_workload import Points


class Counted(Points):
    """Sixteen points; every training leaves a line in the file `log`."""

    def __init__(self, site, log, run=""):
        super().__init__(site)
        self.log = log

    def batches(self, batch_size, generator):
        with open(self.log, "a") as file:
            file.write(self.site + "\\n")
        return super().batches(batch_size, generator)
'''


def journal(project: Project, run: str) -> Journal:
    return Journal(ObjectStore(str(project.folder / "fedflow-runs" / "store")), run)


def test_a_grid_ends_in_a_table_and_a_picture(project: Project) -> None:
    grid = ["--set", "training.optimizer.lr=0.1,0.5", "--seeds", "0,1"]
    result = project.call("sweep", project.recipe(rounds=1), *grid, "--out", "t.csv", "--parallel", 2)
    assert (result.code, result.err) == (0, ""), result
    header, *lines = result.out.splitlines()
    assert header == "points · sim · 4 runs"
    runs = [f"points-lr-{lr}-seed-{seed}" for lr in (0.1, 0.5) for seed in (0, 1)]
    assert sorted(line.split("  ")[1] for line in lines[:4]) == runs
    assert lines[4].split() == [
        "training.optimizer.lr",
        "seed",
        "status",
        "rounds",
        "accuracy",
        "best",
        "accuracy",
        "time",
        "run",
    ]
    assert [line.split()[-1] for line in lines[5:9]] == runs
    assert lines[9:] == ["t.csv", "fedflow-runs/plots/points.png"]
    with (project.folder / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["training.optimizer.lr"], row["status"]) for row in rows] == [
        (name, name.split("-")[2], "finished") for name in runs
    ]
    again = project.call("sweep", "recipe.yaml", *grid, "--json", "--quiet")
    assert [row["model_digest"] for row in again.json["runs"]] == [row["model_digest"] for row in rows]
    shown = project.call("runs", "show", runs[0], "--json").json
    assert (shown["status"], shown["env"]) == ("finished", "sim")


@pytest.mark.parametrize("also", [False, True], ids=["the sweep", "the sweep and its run"])
def test_killed_in_the_middle_the_same_command_trains_what_is_left(
    project: Project, also: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that were committed are not trained again: only the one in which the run itself was killed may be."""
    (project.folder / "counted.py").write_text(COUNTING)
    workload = {"path": "counted:Counted", "args": {"log": str(project.folder / "log")}}
    recipe, rounds = project.recipe(rounds=60, workload=workload, quorum=3), 60
    grid = ["sweep", recipe, "--seeds", "0,1", "--json"]
    process = subprocess.Popen(
        command(*grid), cwd=project.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any(line.startswith("1/2  points-seed-0  finished") for line in iter(process.stderr.readline, ""))
    second = journal(project, "points-seed-1")
    while not second.committed():
        assert process.poll() is None
        threading.Event().wait(0.05)
    process.kill()
    process.communicate()
    lock = project.folder / "fedflow-runs" / "runs" / "points-seed-1.lock"
    if also:
        os.killpg(int(lock.read_text()), signal.SIGKILL)
    kept = {
        step: journal(project, "points-seed-0").manifest(*step)
        for step in journal(project, "points-seed-0").committed()
    }
    result = project.shell(*grid)
    assert result.code == 0, result
    assert [(row["status"], row["rounds"]) for row in result.json["runs"]] == [("finished", rounds)] * 2
    assert kept == {step: journal(project, "points-seed-0").manifest(*step) for step in kept} and len(kept) == rounds
    trained = Counter((project.folder / "log").read_text().split())
    again = {site: trained[site] - 2 * rounds for site in SITES}
    assert all(0 <= extra <= (4 if also else 0) for extra in again.values()), again
    monkeypatch.syspath_prepend(project.folder)
    for row in result.json["runs"]:
        spec = Recipe.load(Recipe.load(project.folder / recipe).model_dump() | {"seed": row["seed"]})
        undisturbed = simulate(spec, SITES).head(("train",))
        assert undisturbed is not None and row["model_digest"] == undisturbed.model_digest


def test_ctrl_c_stops_it_and_its_run(project: Project) -> None:
    project.recipe(rounds=10_000)
    process = subprocess.Popen(
        command("sweep", "recipe.yaml", "--seeds", "0,1"),
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not journal(project, "points-seed-0").committed():
        assert process.poll() is None
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    stopped = Result(process.returncode, out, err)
    assert stopped.code == 130
    assert stopped.problem == "points: stopped; the same command goes on"
    (known,) = project.call("runs", "ls", "--json").json["runs"]
    assert known["status"] == "aborted"


def test_a_run_that_fails_is_named(project: Project) -> None:
    project.break_site("site-2")
    result = project.call("sweep", project.recipe(rounds=1), "--set", "quorum=3,2", "--json")
    assert [row["status"] for row in result.json["runs"]] == ["failed", "finished"]
    assert result.code == 1
    assert "points-quorum-3-seed-0 (failed)" in result.problem and "fedflow logs RUN" in result.problem


def test_what_a_terminal_shows(project: Project) -> None:
    code, screen = in_terminal(project, "sweep", project.recipe(rounds=2), "--seeds", "0,1")
    assert code == 0
    assert "points · sim · 2 runs" in screen and "2/2 runs" in screen
    assert "points-seed-1" in screen.rpartition("best accuracy")[2]


MISTAKES = {
    "unknown field": (["--set", "algorithm.mu=1"], ["algorithm.mu: unknown field"]),
    "no such value": (["--set", "rounds=1,x"], ["rounds: found 'x'", "integer"]),
    "no values": (["--set", "rounds="], ["rounds: found 'no value'"]),
    "no equals sign": (["--set", "rounds"], ["--set: found 'rounds', expected FIELD=VALUE,…"]),
    "a field twice": (["--set", "rounds=1", "--set", "rounds=2"], ["--set: found 'rounds', expected each field once"]),
    "no YAML": (["--set", "rounds=[1"], ["--set: found 'rounds=[1'"]),
    "seeds": (["--seeds", "0,a"], ["--seeds: found '0,a', expected whole numbers"]),
    "nothing": ([], ["an empty grid"]),
    "table": (["--seeds", "0", "--out", "t.xlsx"], ["--out: found 't.xlsx'"]),
    "picture": (["--seeds", "0", "--plot", "t.gif"], ["--plot: found 't.gif'"]),
    "model": (["--set", "model.args.klasses=3"], ["points-klasses-3-seed-0", "klasses"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(project: Project, case: str) -> None:
    args, words = MISTAKES[case]
    mistake = project.call("sweep", "recipe.yaml", *args).mistake
    assert all(word in mistake for word in words), mistake
    assert not list(Path(project.folder).glob("fedflow-runs/**/run.json"))
