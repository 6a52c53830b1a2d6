"""What a simulation's log says of what fails, in the background and in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedflow.environments import SimEnv
from fedflow.errors import RoundError
from fedflow.simulation.engine import Backend
from tests.builders import recipe

BACKENDS = pytest.mark.parametrize("backend", ["debug", "processes"])


@BACKENDS
def test_a_site_that_fails_is_named_with_run_round_and_reason_though_the_round_goes_on(
    backend: Backend, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    work: Any = {"path": "tests.simulation.test_debug:Broken", "args": {"broken": str(broken)}}
    env = SimEnv(3, home=tmp_path, backend=backend, workers=1)
    run = env.execute(recipe(workload=work, quorum=2, rounds=1), run_id="run")
    excluded = run.result().rounds[0].excluded["site-2"]
    (line,) = run.logs("site-2")
    assert line.endswith(
        "WARNING [site-2] run run, round 0: it does not count: training failed: OSError: no such volume"
    )
    assert list(run.logs("site-1")) == list(run.logs("site")) == []
    assert "Traceback" in excluded and 'raise OSError("no such volume")' in excluded


@BACKENDS
def test_what_fails_at_the_server_is_there_with_its_traceback(backend: Backend, tmp_path: Path) -> None:
    env = SimEnv(3, home=tmp_path, backend=backend, workers=1)
    run = env.execute(recipe(algorithm="tests.simulation.test_simulation:Stuck"), run_id="run")
    with pytest.raises(RoundError, match="run run, round 1: the server's part failed: RuntimeError: the sum is odd"):
        run.result()
    log = "\n".join(run.logs())
    assert 'raise RuntimeError("the sum is odd")' in log and "run run, round 1: the server's part failed" in log
