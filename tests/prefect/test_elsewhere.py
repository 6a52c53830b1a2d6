"""Aggregation at the sites and at regions, on a real server: the reference's bits, whoever is killed while aggregating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedflow.testing.faults import fail_at
from tests.builders import bits, recipe, run
from tests.prefect.conftest import Poc

pytestmark = pytest.mark.timeout(600)

SWARM: dict[str, Any] = {"schedule": "swarm", "rounds": 3}
TREE: dict[str, Any] = {"schedule": {"kind": "tree", "regions": {"north": ["site-1", "site-3"]}}}
TWO: dict[str, Any] = {"kind": "tree", "regions": {"north": ["site-1", "site-3"], "south": ["site-2"]}}


@pytest.mark.faults
def test_a_swarm_has_the_bits_of_fedavg_though_site_and_coordinator_are_killed(poc: Poc, tmp_path: Path) -> None:
    """Round 0 is site-1's to aggregate: killed -9 with an object half done, it is taken over by site-2. In round 2 the coordinator dies
    when it has noted whom it asks, and is resumed."""
    aggregator = fail_at("workplace objects", site="site-1", token=tmp_path / "aggregator")
    coordinator = fail_at("delegation", round=2, when="after", token=tmp_path / "coordinator")
    started = poc.execute(recipe(**SWARM), "swarm", aggregator)
    started.wait(600, until=lambda: aggregator.struck, every=0.05)
    coordinator.write(poc.fault_file)
    assert started.wait(600) == "interrupted" and aggregator.struck and coordinator.struck
    poc.heal()
    poc.env.resume(started.id).result(600)
    journal = started.journal
    assert [journal.manifest(r, "train").aggregator for r in range(3)] == ["site-2", "site-2", "site-3"]  # type: ignore[union-attr]
    assert bits(journal) == bits(run(recipe(rounds=3)))
    assert not journal.store.list("server/swarm/objects"), "the coordinator has written what is of a model"


def test_a_tree_has_the_references_bits_though_the_regions_aggregator_is_killed(poc: Poc, tmp_path: Path) -> None:
    fault = fail_at("workplace objects", site="north", token=tmp_path / "token")
    started = poc.execute(recipe(**TREE), "tree", fault)
    started.result(600)
    assert fault.struck and bits(started.journal) == bits(run(recipe(**TREE)))
    assert len(started.journal.store.list("sites/north/tree/aggregated")) == 2


@pytest.mark.faults
def test_a_tree_has_the_references_bits_though_regions_and_coordinator_are_killed(poc: Poc, tmp_path: Path) -> None:
    """In round 0 north dies when its sums are written and the record that names them is not; in round 1 the coordinator, when it has noted
    which regions it asks, and is resumed; in round 2 south, with its sums half written."""
    fields = {"schedule": TWO, "rounds": 3}
    north = fail_at("workplace record", site="north", round=0, token=tmp_path / "north")
    coordinator = fail_at("delegation", round=1, when="after", token=tmp_path / "coordinator")
    south = fail_at("workplace objects", site="south", round=2, token=tmp_path / "south")
    started = poc.execute(recipe(**fields), "two-regions", north)
    started.wait(600, until=lambda: north.struck, every=0.05)
    coordinator.write(poc.fault_file)
    assert started.wait(600) == "interrupted" and coordinator.struck
    south.write(poc.fault_file)
    poc.env.resume(started.id).result(600)
    assert north.struck and south.struck and bits(started.journal) == bits(run(recipe(**fields)))
    for region in ("north", "south"):
        assert len(started.journal.store.list(f"sites/{region}/two-regions/aggregated")) == 3
