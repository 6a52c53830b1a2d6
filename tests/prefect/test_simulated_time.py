"""A trace replayed by real sites: the same cohorts, exclusions, staleness and bits as in simulated time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.client.schemas.objects import StateType
from torch import nn

from fedflow.local import FunctionWorkload
from fedflow.prefect.api import connect, find_runs, run_tag
from fedflow.simulation.clock import EPOCH
from fedflow.simulation.engine import simulate
from fedflow.simulation.trace_files import read_trace
from fedflow.store.journal import Journal
from fedflow.store.records import Manifest
from tests.builders import SITES, blobs, recipe
from tests.prefect.conftest import Poc
from tests.prefect.test_kills import MINUTES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]  # in real seconds: nothing else may take the machine's time


class Paced(FunctionWorkload):
    """Takes as long, and fails, as `trace` says of the instant at which the round was opened in simulated time."""

    def __init__(self, site: str, trace: str | None = None, openings: Sequence[float] = ()) -> None:
        paced = {"trace": trace, "openings": list(openings)}
        super().__init__(train, blobs(16, seed=int(site[-1])), examples=16, config=paced)


def train(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], config: Any) -> None:
    if config.trace:
        found = read_trace(config.trace).conditions(config.site, config.openings[config.round])
        if found.drop:
            raise ConnectionError("dropped out")
        threading.Event().wait(found.seconds)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def course(journal: Journal) -> list[Any]:
    """Of every round who was asked and did not count, the others with the round that they started from, and the model."""
    found = manifests(journal)
    bases = [{site: c.base_round for site, c in m.contributors.items()} for m in found]
    return [(sorted(m.excluded), base, m.model_digest) for m, base in zip(found, bases, strict=True)]


def manifests(journal: Journal) -> list[Manifest]:
    return [manifest for step in journal.committed() if (manifest := journal.manifest(*step))]


def replayed(poc: Poc, trace: Path, run: str, **fields: Any) -> tuple[list[Any], list[Any]]:
    """The course in simulated time, and with real sites."""
    workload = "tests.prefect.test_simulated_time:Paced"
    fields |= {"quorum": 2, "attempts": 1}
    simulated = simulate(recipe(workload=workload, **fields), SITES, trace=read_trace(trace), backend="debug")
    openings = [(m.opened - EPOCH).total_seconds() for m in manifests(simulated) if m.opened]
    args = {"trace": str(trace), "openings": openings}
    held = poc.execute(recipe(workload={"path": workload, "args": args}, **fields), run)
    held.result(MINUTES)
    with connect(poc.env.api_url) as client:
        assert not find_runs(client, run_tag(held.journal.record().nonce), f"site:{SITES[-1]}", states=RUNNING)
    return course(simulated), course(held.journal)


RUNNING = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]


def test_slow_and_failing_sites_are_left_out_of_the_same_rounds(poc: Poc, tmp_path: Path) -> None:
    """Site 3 is slow at first, then site 2 drops out once."""
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "site,start,end,seconds,drop\n"
        "site-1,,,0.5,\n"
        "site-2,,7,1,\nsite-2,7,7.2,0.5,1\nsite-2,7.2,,1,\n"
        "site-3,,7,50,\nsite-3,7,,0.5,\n"
    )  # fmt: skip
    timeouts = {"round_deadline": 90, "quorum_grace": 6, "train_timeout": 80}
    simulated, real = replayed(poc, trace, "paced", rounds=3, timeouts=timeouts)
    assert [excluded for excluded, *_ in simulated] == [["site-3"], ["site-2"], []]
    assert real == simulated


def test_late_updates_count_in_the_same_rounds(poc: Poc, tmp_path: Path) -> None:
    """Site 3 needs 9 s, rounds close 3 s after the quorum: its update of round 0 counts in round 1, that of round 2 in none."""
    trace = tmp_path / "trace.csv"
    trace.write_text("site,seconds\nsite-1,1\nsite-2,2\nsite-3,9\n")
    timeouts = {"round_deadline": 90, "quorum_grace": 3, "train_timeout": 80}
    simulated, real = replayed(poc, trace, "carried", rounds=3, timeouts=timeouts, late="carry")
    assert [base for _, base, _ in simulated] == [
        {"site-1": 0, "site-2": 0},
        {"site-1": 1, "site-2": 1, "site-3": 0},
        {"site-1": 2, "site-2": 2},
    ]
    assert real == simulated
