"""A store that cannot be written: a clear error at the start or at that write, and a run that goes on afterwards."""

from __future__ import annotations

import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fedflow.errors import FedflowError, QuorumLost, StoreUnwritable
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.types import canonical_json
from tests.builders import in_child, keys, outcome, recipe, run

LARGE: dict[str, Any] = {"model": {"path": "tests.engine.test_store_fails:Wide"}}
"""A model of 200 kB: larger than anything else that a run writes."""


def Wide() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(4, 6000), nn.Linear(6000, 3))


def with_full_disk(at: int, fields: dict[str, Any], store: str, report: str) -> None:
    """For `in_child`: a run in a process that can write no file beyond `at` bytes; its error is written to a pipe's file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run(recipe(**fields), store)
    except FedflowError as error:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        Path(report).write_bytes(canonical_json([type(error).__name__, str(error)]))
        sys.exit(3)


def full_disk(at: int, fields: dict[str, Any], tmp_path: Path) -> str:
    """The error of a run on such a disk."""
    assert in_child(with_full_disk, at, fields, str(tmp_path / "store"), str(tmp_path / "report")) == 3
    return (tmp_path / "report").read_text()


def test_a_disk_that_takes_nothing_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    told = full_disk(0, {}, tmp_path)
    assert "StoreUnwritable" in told and str(tmp_path / "store") in told and "probing" in told
    assert ObjectStore(str(tmp_path / "store")).list() == []
    assert len(run(recipe(), str(tmp_path / "store")).committed()) == 2


def test_a_disk_that_is_full_when_the_model_is_written_stops_the_run_at_that_write(tmp_path: Path) -> None:
    """The probe's 64 kB fit, the model does not."""
    told = full_disk(100_000, LARGE, tmp_path)
    assert "StoreUnwritable" in told and re.search(r"cannot \w+ 'public/run/objects/\w+\.safetensors'", told)
    journal = run(recipe(**LARGE), str(tmp_path / "store"))
    assert outcome(journal)["model"] == outcome(run(recipe(**LARGE)))["model"]


def test_a_disk_that_is_full_for_the_updates_loses_the_quorum_naming_the_write(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run(recipe(**LARGE, rounds=1), store)
    told = full_disk(100_000, LARGE, tmp_path)
    assert "QuorumLost" in told and "round 1: found 0 valid updates, expected 3" in told
    assert re.search(
        r"site-1: .*cannot \w+ 'sites/site-1/run/00001/train/\w+\.safetensors'.*file may be this large", told
    )
    journal = run(recipe(**LARGE), store)
    assert outcome(journal)["model"] == outcome(run(recipe(**LARGE)))["model"]
    plan = journal.plan(1, "train")
    assert plan is not None and len(journal.openings(plan)) == 2


def test_a_place_that_is_no_directory_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(StoreUnwritable, match=f"{tmp_path}/file/store.*probing"):
        run(recipe(), str(tmp_path / "file" / "store"))


def test_a_site_that_cannot_keep_its_memory_is_excluded_and_says_where(tmp_path: Path) -> None:
    """Its state is written before its update: without the one there is not the other."""
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "site-2").write_text("a file where a folder should be")
    fields: dict[str, Any] = {"algorithm": "tests.builders:Leaning"}
    with pytest.raises(QuorumLost, match=rf"missing: site-2: .*{tmp_path}/states/site-2"):
        run(recipe(**fields), str(tmp_path / "store"), state=str(tmp_path / "states"))
    journal = Journal(ObjectStore(str(tmp_path / "store")), "run")
    assert keys(journal.store, r"^sites/site-2/.*\.json$") == []
    (tmp_path / "states" / "site-2").unlink()
    again = run(recipe(**fields), str(tmp_path / "store"), state=str(tmp_path / "states"))
    assert outcome(again)["model"] == outcome(run(recipe(**fields)))["model"]
