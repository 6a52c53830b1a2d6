"""SIGKILL at random instants of an aggregation: the same bytes in the end, nothing partial to be seen, no orphan after gc."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from benchmarks.aggregation import prepare
from fedflow.engine.child import aggregate_in_child, warm_up
from fedflow.engine.retention import Policy, check_run, drop, garbage
from fedflow.errors import RoundError
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.builders import OBJECTS, keys, outcome
from tests.servers import s3_server

pytestmark = pytest.mark.faults

KILLS = 50
FEDADAM: Any = {"kind": "fedopt", "server_optimizer": {"kind": "adam", "lr": 0.01}}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """URL and options of an empty store."""
    if request.param == "local":
        yield str(tmp_path), {}
    else:
        with s3_server() as server:
            yield f"s3://{server.bucket}/killed", server.options


def aggregate(place: tuple[str, dict[str, Any]], timeout: float) -> bool:
    """Whether it was done before it was killed."""
    try:
        aggregate_in_child(*place, "run", 0, "train", 1, timeout=timeout)
    except RoundError as error:
        assert "killed after" in str(error)
        return False
    return True


@pytest.mark.parametrize("algorithm", ["fedavg", FEDADAM], ids=["fedavg", "fedadam"])
def test_fifty_kills(place: tuple[str, dict[str, Any]], algorithm: Any) -> None:
    prepare(*place, 24, 4, algorithm)
    warm_up()
    store = ObjectStore(*place)
    journal = Journal(store, "run")
    before = set(store.list())

    def undo() -> None:
        for key in set(store.list()) - before:
            store.delete(key)

    for _ in range(2):  # the second one tells how long it takes
        undo()
        started = time.monotonic()
        assert aggregate(place, 600)
        seconds = time.monotonic() - started
    expected = outcome(journal)

    instants, killed = random.Random(0), 0
    while killed < KILLS:
        undo()
        while aggregate(place, instants.uniform(0, seconds)):  # until the kill comes first
            undo()
        killed += 1
        for key in keys(store, OBJECTS):
            safetensors.torch.load(store.get(key))  # raises for anything that is not whole
        drop(journal, garbage(journal, Policy(last=9)))
        assert aggregate(place, 600)
        assert outcome(journal) == expected
        drop(journal, garbage(journal, Policy(last=9)))
        named = {ref.key for r, phase in ((-1, "initial"), (0, "train")) for ref in committed(journal, r, phase)}
        assert {key for key in keys(store, OBJECTS) if not key.startswith("sites/")} == named
        assert check_run(journal).problems == []


def committed(journal: Journal, round: int, phase: str) -> list[Any]:
    manifest = journal.manifest(round, phase)
    assert manifest is not None
    return list(manifest.objects())
