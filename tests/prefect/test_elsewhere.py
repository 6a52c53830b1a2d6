"""Aggregation at the sites and at regions, on a real server: the reference's bits, whoever is killed while aggregating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedflow.testing.faults import fail_at
from tests.builders import bits, recipe, run
from tests.prefect.conftest import Poc

SWARM: dict[str, Any] = {"schedule": "swarm"}
TREE: dict[str, Any] = {"schedule": {"kind": "tree", "regions": {"north": ["site-1", "site-3"]}}}


def test_a_swarm_has_the_bits_of_fedavg_though_the_aggregating_site_is_killed(poc: Poc, tmp_path: Path) -> None:
    """Round 0 is site-1's to aggregate: killed -9 with an object half done, it is taken over by site-2, and round 1 is site-2's."""
    fault = fail_at("workplace objects", site="site-1", token=tmp_path / "token")
    started = poc.execute(recipe(**SWARM), "swarm", fault)
    started.result()
    journal = started.journal
    assert fault.struck
    manifests = [journal.manifest(round, "train") for round in (0, 1)]
    assert [m.aggregator for m in manifests if m] == ["site-2", "site-2"]
    assert bits(journal) == bits(run(recipe()))
    assert not journal.store.list("server/swarm/objects"), "the coordinator has written a model"


def test_a_tree_has_the_references_bits_though_the_regions_aggregator_is_killed(poc: Poc, tmp_path: Path) -> None:
    fault = fail_at("workplace objects", site="north", token=tmp_path / "token")
    started = poc.execute(recipe(**TREE), "tree", fault)
    started.result()
    assert fault.struck and bits(started.journal) == bits(run(recipe(**TREE)))
    assert len(started.journal.store.list("sites/north/tree/aggregated")) == 2
