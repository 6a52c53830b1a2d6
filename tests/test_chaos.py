"""The fault matrix: the page's commands are understood, and a case on real servers is told as it went."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import read
from benchmarks.chaos.cases import CASES

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


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", ["trainer-in-upload", "machine-lost"])
def test_a_case_holds_and_says_who_trained_again(case: str, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--case", case, "--algorithm", "scaffold", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {result["case"]: result for result in json.loads(out.read_text())}
    assert found.keys() == {"undisturbed", case} <= CASES.keys()
    assert found[case]["same"] is True and found[case]["retrained"] == {"site-2": 1}
