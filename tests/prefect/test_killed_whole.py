"""Everything on one machine, killed at once: nothing is left running, and the run goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fedflow.cli import main
from fedflow.environments.poc import PocEnv
from fedflow.errors import UserError
from fedflow.recipe import Federation
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests import builders
from tests.prefect.test_kills import MINUTES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def started(home: Path, recipe: Path) -> subprocess.Popen[bytes]:
    """`fedflow run --env poc`, in a process of its own."""
    command = [sys.executable, "-m", "fedflow.cli", "run", str(recipe), "--env", "poc", "--run-id", "killed"]
    federation = recipe.with_name("federation.yaml")
    federation.write_text("sites: [site-1, site-2, site-3]\n")
    command += ["--home", str(home), "--federation", str(federation)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def await_round(home: Path, process: subprocess.Popen[bytes], round: int) -> None:
    """Until that round is committed."""
    journal = Journal(ObjectStore(str(home / "store")), "killed")
    until = time.monotonic() + MINUTES
    while journal.manifest(round, "train") is None:
        assert process.poll() is None and time.monotonic() < until
        threading.Event().wait(0.1)


def look_and_try_meanwhile(home: Path) -> None:
    """As `fedflow logs`, `ui` and `abort` look; and as a second run in the same home is refused."""
    with PocEnv(Federation.of(3), home=home) as beside:
        assert beside.attach("killed").status() == "running"
        with pytest.raises(UserError, match=r"--home: .* no other process"):
            beside.execute(builders.recipe())


def test_a_killed_command_leaves_nothing_behind_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, home = tmp_path / "recipe.json", tmp_path / "home"
    recipe.write_text(builders.recipe(rounds=4).model_dump_json())
    process = started(home, recipe)
    with ExitStack() as stack:
        stack.callback(process.kill)  # whatever happens here
        await_round(home, process, 0)
        look_and_try_meanwhile(home)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 5
    process.wait()
    assert psutil.wait_procs(below, timeout=MINUTES)[1] == []
    assert main(["resume", "killed", "--home", str(home), "--json"]) == 0
    expected = builders.head(builders.run(builders.recipe(rounds=4))).model_digest
    assert expected in capsys.readouterr().out
