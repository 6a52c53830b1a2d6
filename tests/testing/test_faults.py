"""Faults strike where they should, and as they should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.faults import fail_at
from tests.builders import SITES, in_child, outcome, recipe, run, run_with


def test_a_held_process_waits_where_it_is_until_it_is_released(tmp_path: Path) -> None:
    """Before round 1's closing: the updates are there, the closing is not; then the run goes on as if nothing were."""
    store, fault = str(tmp_path / "store"), fail_at("closing", round=1, effect="hold", token=tmp_path / "token")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(in_child, run_with, fault, {}, store, {})
        while not fault.struck:
            assert not done.done()
        journal = Journal(ObjectStore(store), "run")
        plan = journal.plan(1, "train")
        assert plan is not None and journal.closing(plan, 1) is None and plan.tasks.keys() == set(SITES)
        assert not done.done()
        fault.release()
        assert done.result() == 0
    assert outcome(journal)["model"] == outcome(run(recipe()))["model"]
