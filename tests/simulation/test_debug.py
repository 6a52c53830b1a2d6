"""`SimEnv(backend="debug")`: a run in this very process, where a debugger stops, and a run like any other all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fedflow.environments import SimEnv
from fedflow.errors import RoundError, UserError
from tests.builders import Blobs, bits, recipe, run

HERE = "tests.simulation.test_debug"


class Stopping(Blobs):
    """A debugger is to stop at each step of site 2."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.site == "site-2":
            breakpoint()
        return super().loss(model, batch)


class Broken(Blobs):
    """Site 2 fails as long as there is that file."""

    def __init__(self, site: str, broken: str) -> None:
        if site == "site-2" and Path(broken).exists():
            raise OSError("no such volume")
        super().__init__(site)


def env(home: Path) -> SimEnv:
    return SimEnv(3, home=home, backend="debug")


def test_breakpoints_stop_in_the_calling_process_while_the_run_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set[Any]()

    def stop() -> None:
        other = env(tmp_path).resume("run")  # whoever asks for it meanwhile does not run it a second time
        with pytest.raises(UserError, match="found 'debug', expected a run in a process of its own"):
            other.abort()
        seen.add((os.getpid(), other.status()))

    monkeypatch.setattr(sys, "breakpointhook", stop)
    found = env(tmp_path).execute(recipe(workload=f"{HERE}:Stopping"), run_id="run")
    assert seen == {(os.getpid(), "running")}
    assert found.status() == "finished" and found.result().status == "finished"
    assert bits(found.journal) == bits(run(recipe()))


def test_a_run_that_fails_here_says_why_and_goes_on_when_it_is_mended(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    work = {"path": f"{HERE}:Broken", "args": {"broken": str(broken)}}
    failed = env(tmp_path).execute(recipe(workload=work), run_id="run")
    assert failed.status() == "failed"
    with pytest.raises(RoundError, match="run run, round 0: .* missing: site-2: .*"):
        failed.result()
    assert any("OSError: no such volume" in line for line in failed.logs())
    broken.unlink()
    assert bits(env(tmp_path).resume("run").journal) == bits(run(recipe()))


def test_ctrl_c_in_the_debugger_stops_the_run_and_whoever_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "breakpointhook", stop)
    with pytest.raises(KeyboardInterrupt):
        env(tmp_path).execute(recipe(workload=f"{HERE}:Stopping"), run_id="run")
    assert env(tmp_path).attach("run").status() == "aborted"
    monkeypatch.setattr(sys, "breakpointhook", lambda: None)
    assert bits(env(tmp_path).resume("run").journal) == bits(run(recipe()))
