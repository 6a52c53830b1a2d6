"""The fault matrix: the page's commands are understood, and a case on real servers is told as it went."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import main, read, report
from benchmarks.chaos.cases import CASES
from benchmarks.chaos.ground import Verdict
from benchmarks.chaos.results import Results

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()
COMMANDS = re.findall(r"^\$ python -m benchmarks.chaos (.*?)(?: +#.*)?$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command: str) -> None:
    assert read(shlex.split(command)).cases


def test_a_case_that_there_is_not_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(["--case", "worker", "wroker"])
    assert ended.value.code == 2
    assert "--case: found ['wroker'], expected names or patterns of those that --list has" in capsys.readouterr().err


def test_what_holds_already_is_told_and_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest trial of each algorithm counts; those with the server on another database do not."""
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    file.write_text("{")  # cut off
    for database, why in (("postgres", ["it broke"]), ("postgres", []), ("sqlite", ["it broke there"])):
        for algorithm, lost in (("fedavg", 1.0), ("scaffold", 2.0), ("diloco", None)):
            verdict = Verdict(why=why, retrained={"site-2": 1}, lost=lost, same=True, notes=[algorithm])
            Results(file, database).keep("worker", algorithm, verdict)
    options = ["--case", "worker", "--continue", "--results", str(file), "--out", str(out)]
    assert main(options) == 0
    row = "| worker | kill -9 of a worker; its trainer goes on | yes | site-2 | 1.0 | 2.0 | – | yes | fedavg; scaffold; diloco |"
    assert row in capsys.readouterr().out and row in (out / "chaos.md").read_text() and (out / "chaos.svg").exists()
    assert report(Results(file, "sqlite").found(), read([*options, "--database", "sqlite"])) == 1
    page = (out / "chaos-sqlite.md").read_text()
    assert "--database sqlite --case worker --out" in page and "with SQLite," in page
    assert "**no**" in page and "it broke there" in page


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", ["trainer-in-upload", "machine-lost"])
def test_a_case_holds_and_says_who_trained_again(case: str, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.chaos", "--algorithm", "scaffold"]
    command += ["--case", case, "--results", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {case: verdict for (case, _), verdict in Results(out, "postgres").found().items()}
    assert found.keys() == {"undisturbed", case} <= CASES.keys()
    assert found[case].same is True and found[case].retrained == {"site-2": 1}
