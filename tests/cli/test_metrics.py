"""`fedflow metrics`: figures on the screen, in tables, for TensorBoard."""

from __future__ import annotations

import csv
import io
import subprocess

import pyarrow.parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.project import Project, command, environment


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_on_the_screen_it_is_csv(trained: Project) -> None:
    """Three rounds; site-3 failed in each."""
    result = trained.call("metrics", "points-1")
    assert (result.code, result.err) == (0, "")
    found = rows(result.out)
    history = trained.call("runs", "show", "points-1", "--json").json["history"]
    server = {(int(r["round"]), r["metric"]): float(r["value"]) for r in found if r["source"] == "server"}
    assert server == {(r["round"], name): v for r in history for name, v in r["evaluation"].items()}
    assert {r["site"] for r in found} == {"", "site-1", "site-2"}
    federation = rows(trained.call("metrics", "points-1", "--no-sites").out)
    assert federation == [r for r in found if r["site"] == ""]


def test_the_same_in_each_format(trained: Project) -> None:
    printed = rows(trained.call("metrics", "points-1").out)
    assert trained.call("metrics", "points-1", "--out", "m/run.csv").out == "m/run.csv\n"
    assert rows((trained.folder / "m" / "run.csv").read_text()) == printed
    assert trained.call("metrics", "points-1", "--out", "m/run.parquet").code == 0
    read = pyarrow.parquet.read_table(trained.folder / "m" / "run.parquet").to_pylist()
    assert [(r["round"], r["site"], r["metric"], str(r["value"])) for r in read] == [
        (int(r["round"]), r["site"], r["metric"], r["value"]) for r in printed
    ]
    assert trained.call("metrics", "points-1", "--out", "board").out == "board/points-1\n"
    assert {path.parent.name for path in (trained.folder / "board").rglob("events.*")} == {
        "points-1",
        "site-1",
        "site-2",
    }


def test_several_runs_are_one_table(trained: Project) -> None:
    found = rows(trained.call("metrics", "points-1", "points-1", "--no-sites").out)
    assert len(found) == 2 * len(rows(trained.call("metrics", "points-1", "--no-sites").out))


def test_mistakes(trained: Project) -> None:
    assert "'m.xlsx'" in trained.call("metrics", "points-1", "--out", "m.xlsx").mistake
    assert "'recipe'" in trained.call("metrics", "points-1", "recipe", "--out", "m.csv").mistake
    assert not (trained.folder / "m.csv").exists()
    (trained.folder / "board-file").touch()
    assert "a folder" in trained.call("metrics", "points-1", "--out", "board-file").mistake


def test_a_reader_may_stop_early(trained: Project) -> None:
    """As `head` does: no traceback, no log of an error."""
    process = subprocess.Popen(
        command("metrics", "points-1"),
        cwd=trained.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_run_is_written_for_tensorboard_while_it_goes_on(project: Project) -> None:
    """And, resumed, whole again: three rounds and then the fourth."""
    assert project.call("run", "recipe.yaml", "--tensorboard", "board", "--quiet").code == 0
    assert steps(project) == [0, 1, 2]
    assert project.call("resume", "points-1", "--rounds", 4, "--tensorboard", "board", "--quiet").code == 0
    assert steps(project) == [0, 1, 2, 3]
    (project.folder / "file").touch()
    assert "a folder that can be written" in project.call("run", "recipe.yaml", "--tensorboard", "file/a").mistake


def steps(project: Project) -> list[int]:
    """Of the rounds whose evaluation TensorBoard reads."""
    events = EventAccumulator(str(project.folder / "board" / "points-1")).Reload()
    return [event.step for event in events.Scalars("server/accuracy")]
