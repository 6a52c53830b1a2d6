"""SIGKILL between rounds: momenta, moments, control variates and schedules are in the store, and the bytes the same."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedflow.testing.faults import fail_at
from tests.builders import in_child, outcome, recipe, run, run_with

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedprox": {"kind": "fedprox", "mu": 0.1},
    "momentum at the server": {
        "kind": "fedopt",
        "server_optimizer": {"kind": "sgd", "momentum": 0.9},
        "server_schedule": {"kind": "cosine", "rounds": 4},
    },
    "adam at the server": {"kind": "fedopt", "server_optimizer": {"kind": "adam", "bias_correction": True}},
    "scaffold": {"kind": "scaffold"},
    "diloco": {"kind": "diloco", "local_steps_per_round": 2},
    "streaming diloco": {"kind": "streaming_diloco", "local_steps_per_round": 2},
    "fednova": {"kind": "fednova", "momentum": 0.9},
    "feddyn": {"kind": "feddyn", "alpha": 0.1},
    "qfedavg": {"kind": "qfedavg"},
    "a task": {"kind": "task", "function": "tests.builders:summed", "reduction": "sum", "shared": ["sum"]},
    "personal, median": {"kind": "fedavg", "personal": ["1.*"], "reduction": "median"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_killed_and_resumed_in_every_round_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    fields: dict[str, Any] = {
        "algorithm": ALGORITHMS[name],
        "schedule": {"kind": "sampled", "fraction": 0.7},
        "rounds": 3,
    }
    expected = outcome(run(recipe(**fields), str(tmp_path / "undisturbed")))
    for round, step in enumerate(("manifest", "closing")):
        fault: Any = fail_at(step, round=round, when="after", token=tmp_path / f"token-{round}")  # type: ignore[arg-type]
        assert in_child(run_with, fault, fields, str(tmp_path / "store"), {}) == -signal.SIGKILL
        assert fault.struck
    found = outcome(run(recipe(**fields), str(tmp_path / "store")))
    for named_by_the_run in ("updates", "accepted"):
        del found[named_by_the_run], expected[named_by_the_run]
    assert found == expected
