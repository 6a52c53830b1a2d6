"""Aggregation elsewhere than at the coordinator: at the sites in turn (swarm), and in regions (tree)."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedflow.algorithm import Averager
from fedflow.engine.aggregation import aggregate_round, read_model, reduce_elsewhere
from fedflow.engine.retention import Policy, check_run, drop, garbage
from fedflow.engine.rounds import amend_run, close_round, delegate, next_step, open_round, start_run, survey
from fedflow.engine.shares import reduced_of, shares
from fedflow.engine.site import SiteWork, site_step
from fedflow.errors import QuorumLost, RecipeError, RoundError, UserError
from fedflow.recipe import SiteConfig
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Closing, Plan, UpdateManifest
from fedflow.testing.faults import Step, fail_at
from fedflow.types import Update
from tests.builders import SITES, Blobs, Tiny, bits, flip, head, in_child, outcome, path_of, recipe, run, run_with

SWARM: dict[str, Any] = {"schedule": "swarm"}
THREE = {"north": ["site-2"], "south": ["site-1"], "west": ["site-3"]}
TREE: dict[str, Any] = {"schedule": {"kind": "tree", "regions": {"north": ["site-1", "site-3"]}}}
COMPOSED: dict[str, Any] = {
    "algorithm": {"kind": "diloco", "transfer": "delta"},
    "transforms": [{"kind": "quantise", "bits": 8}],
    "federated_evaluation": True,
    "training": {"steps": 2, "batch_size": 8, "evaluate": "never"},
    "workload": "tests.engine.test_elsewhere:Judged",
}


class Judged(Blobs):
    """With held-out data."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.held_out = (self.inputs, self.targets)


class Doubles(Blobs):
    """In float64."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.inputs = self.inputs.double()


def double() -> nn.Module:
    return Tiny().double()


# -- swarm -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, {"algorithm": "scaffold"}, COMPOSED], ids=["fedavg", "scaffold", "composed"])
def test_a_swarm_has_the_bits_of_the_same_algorithm_at_the_coordinator(fields: dict[str, Any]) -> None:
    flat, journal = run(recipe(**fields, rounds=3)), run(recipe(**fields, **SWARM, rounds=3))
    assert bits(journal) == bits(flat)
    assert [journal.manifest(r, "train").aggregator for r in range(3)] == list(SITES)  # type: ignore[union-attr]
    of_the_run = {ref.key for ref in journal.manifest(-1, "initial").objects()}  # type: ignore[union-attr]
    ours = {key for key in journal.store.list() if key.startswith(("server/", "public/")) and "/objects/" in key}
    assert ours == of_the_run, "the coordinator has written what is of a model"
    assert bits(simulate_on(recipe(**fields, **SWARM, rounds=3), list(SITES), backend="debug", run="run")) == bits(flat)


@pytest.mark.parametrize("step", ["workplace objects", "workplace record", "closing", "manifest"])
@pytest.mark.parametrize("fields", [SWARM, TREE], ids=["swarm", "tree"])
def test_killed_anywhere_in_an_aggregation_and_resumed_the_bytes_are_the_same(
    tmp_path: Path, fields: dict[str, Any], step: Step
) -> None:
    expected = outcome(run(recipe(**fields), str(tmp_path / "undisturbed")))
    fault = fail_at(step, round=1 if step in ("closing", "manifest") else None, when="after", token=tmp_path / "token")
    assert in_child(run_with, fault, fields, str(tmp_path / "store"), {}) == -signal.SIGKILL and fault.struck
    found = outcome(run(recipe(**fields), str(tmp_path / "store")))
    assert {k: found[k] for k in ("model", "state")} == {k: expected[k] for k in ("model", "state")}


def test_the_role_passes_over_who_is_absent_and_on_from_who_cannot(tmp_path: Path) -> None:
    """Round 0 would be site-1's, which can write nothing; round 1 is site-2's; round 2 would be site-3's, which is gone."""
    blocked = tmp_path / "store" / "sites" / "site-1" / "run" / "aggregated"
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    spec = {**SWARM, "min_sites": 2}
    run(recipe(**spec), str(tmp_path / "store"))
    blocked.unlink()
    journal = run(recipe(**spec, rounds=3), str(tmp_path / "store"), sites=SITES[:2])
    assert [journal.manifest(r, "train").aggregator for r in range(3)] == ["site-2", "site-2", "site-1"]  # type: ignore[union-attr]
    step = next_step(journal, amend_run(journal, rounds=4))
    assert step is not None
    with pytest.raises(QuorumLost, match=r"found 1 sites to ask, expected at least 2 \(min_sites\)"):
        open_round(journal, step, absent=dict.fromkeys(SITES[1:], "no worker"))


def test_nobody_left_to_aggregate_is_an_error_and_no_green_round(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, **SWARM)
    with pytest.raises(RoundError, match=r"nobody aggregated: all are ill; resume"):
        delegate(journal, plan, closing, lambda closing, wanted: dict.fromkeys(wanted, "all are ill"))
    with pytest.raises(RoundError, match="found no aggregation of the round"):
        aggregate_round(journal, plan, closing)
    only = recipe(schedule={"kind": "swarm", "aggregators": ["site-1"]})
    begun = start_run(ObjectStore(str(tmp_path / "other")), "run", only, SITES)
    step = next_step(begun, only)
    assert step is not None
    with pytest.raises(QuorumLost, match=r"found none of \['site-1'\], expected one to aggregate"):
        open_round(begun, step, absent={"site-1": "no worker"})


def test_who_needs_everyone_needs_all_that_the_cohort_asks_and_not_those_only_that_aggregate(tmp_path: Path) -> None:
    spec = recipe(
        algorithm={"kind": "xgboost", "mode": "histogram", "params": {"objective": "binary:logistic"}},
        workload="tests.builders:labelled",
        schedule={"kind": "swarm", "aggregators": ["site-1"]},
    )
    journal = start_run(ObjectStore(str(tmp_path)), "run", spec, SITES)
    step = next_step(journal, spec)
    assert step is not None
    with pytest.raises(QuorumLost, match="required sites are absent: site-2"):
        open_round(journal, step, absent={"site-2": "no worker"})


# -- tree --------------------------------------------------------------------------------------------------------------
def test_a_tree_of_three_regions_equals_flat_within_1e_12() -> None:
    fields: dict[str, Any] = {
        "model": "tests.engine.test_elsewhere:double",
        "workload": "tests.engine.test_elsewhere:Doubles",
        "rounds": 3,
    }
    flat, tree = (run(recipe(**fields, **more)) for more in ({}, {"schedule": {"kind": "tree", "regions": THREE}}))
    a, b = (read_model(journal, head(journal)) for journal in (flat, tree))
    for group in a:
        for name, tensor in a[group].items():
            torch.testing.assert_close(b[group][name].double(), tensor.double(), rtol=1e-12, atol=0)


def test_sums_of_forty_sites_equal_their_mean_within_1e_12() -> None:
    generator = torch.Generator().manual_seed(1)
    sent = [
        Update(
            f"s{i:02}",
            0,
            i + 1,
            1,
            0.1,
            {"params": {"w": torch.randn(50, generator=generator).double()}},
            scalars={"a": float(i)},
        )
        for i in range(40)
    ]
    flat, tree = Averager(), Averager()
    regions = [Averager() for _ in range(3)]
    for i, update in enumerate(sent):
        flat.add(update, update.examples)
        (tree if i == 7 else regions[i % 3]).add(update, update.examples)
    for region in regions:
        tree.add_partial(region.partial())
    a, b = flat.aggregate(), tree.aggregate()
    torch.testing.assert_close(b.tensors["params"]["w"], a.tensors["params"]["w"], rtol=1e-12, atol=1e-15)
    assert b.scalars["a"] == pytest.approx(a.scalars["a"], rel=1e-12) and (a.weight, a.count) == (b.weight, b.count)


@pytest.mark.parametrize("fields", [{}, COMPOSED, {"algorithm": "scaffold"}], ids=["fedavg", "composed", "scaffold"])
def test_a_tree_has_the_same_bits_in_simulation_and_by_parts(tmp_path: Path, fields: dict[str, Any]) -> None:
    journal = run(recipe(**fields, **TREE))
    assert bits(simulate_on(recipe(**fields, **TREE), list(SITES), workers=2, run="run")) == bits(journal)
    assert bits(run(recipe(**fields, **TREE, memory_budget=1 << 20))) == bits(journal)


def test_sums_are_the_same_by_rows(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, **TREE)
    (share,) = shares(plan, closing)
    whole = reduce_elsewhere(journal, plan, closing, share, "north")
    parted = reduce_elsewhere(journal, plan, closing, share, "elsewhere", memory_budget=1, threads=3)
    assert {g: r.digest for g, r in whole.sums.items()} == {g: r.digest for g, r in parted.sums.items()} != {}
    assert whole.weights == parted.weights and reduced_of(journal, share) == whole


def test_a_damaged_update_is_excluded_by_the_region_that_reads_it_and_other_sums_stand(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, schedule={"kind": "tree", "regions": THREE}, quorum=2)
    sent = UpdateManifest.from_bytes(journal.store.get(closing.contributors["site-2"].key))
    flip(path_of(journal.store, sent.groups["params"].key))
    asked: list[str] = []

    def have_done(closing: Closing, wanted: Any) -> dict[Any, str]:
        for share in wanted:
            asked.append(share.name)
            reduce_elsewhere(journal, plan, closing, share, share.workplaces[0])
        return {}

    left = delegate(journal, plan, closing, have_done)
    assert sorted(left.contributors) == ["site-1", "site-3"] and "site-2" in left.excluded
    assert asked == ["region-north", "region-south", "region-west"]
    assert sorted(aggregate_round(journal, plan, left).contributors) == ["site-1", "site-3"]


def test_a_region_that_does_not_answer_costs_its_sites_and_not_the_round(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, **TREE, quorum=1)
    left = delegate(journal, plan, closing, lambda closing, wanted: dict.fromkeys(wanted, "no worker"))
    assert list(left.contributors) == ["site-2"] and left.excluded["site-1"] == "region north: no worker"
    journal, plan, closing = closed(tmp_path / "strict", **TREE)
    with pytest.raises(QuorumLost, match="region north: no worker"):
        delegate(journal, plan, closing, lambda closing, wanted: dict.fromkeys(wanted, "no worker"))


def test_an_absent_region_takes_its_sites_with_it(tmp_path: Path) -> None:
    spec = recipe(**TREE)
    journal = start_run(ObjectStore(str(tmp_path)), "run", spec, SITES)
    step = next_step(journal, spec)
    assert step is not None
    plan, _ = open_round(journal, step, absent={"north": "no worker"})
    assert list(plan.tasks) == ["site-2"] and plan.absent == dict.fromkeys(
        ["site-1", "site-3"], "region north: no worker"
    )


def test_a_record_that_names_foreign_objects_does_not_count(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, **SWARM)
    (share,) = shares(plan, closing)
    honest = reduce_elsewhere(journal, plan, closing, share, "site-2")
    stolen = {group: replace(ref, key="sites/site-3/other/objects/x") for group, ref in honest.model.items()}
    forged = honest.model_copy(update={"workplace": "site-1", "model": stolen})
    journal.put_reduced(forged)
    assert reduced_of(journal, share) == honest


def test_what_was_summed_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    for name, fields in (("swarm", SWARM), ("tree", TREE)):
        journal = run(recipe(**fields), str(tmp_path / name))
        drop(journal, garbage(journal, Policy(last=1, best=False)))
        assert check_run(journal).problems == []
        assert not [key for key in journal.store.list("sites/north") if key.endswith(".safetensors")]
        assert bits(run(recipe(**fields, rounds=3), str(tmp_path / name))) == bits(run(recipe(**fields, rounds=3)))


def closed(tmp_path: Path, **fields: Any) -> tuple[Journal, Plan, Closing]:
    """A round whose sites have answered, about to be aggregated."""
    spec, store = recipe(**fields), ObjectStore(str(tmp_path / "store"))
    journal = start_run(store, "run", spec, SITES)
    step = next_step(journal, spec)
    assert step is not None
    plan, opening = open_round(journal, step)
    for site in plan.tasks:
        config = SiteConfig(name=site, store=store.url, state=str(tmp_path / "states" / site), allowed_imports=["*"])
        site_step(SiteWork("run", 0, "train"), config)
    return journal, plan, close_round(journal, plan, opening, survey(journal, plan), why="every site answered")


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({**SWARM, "evaluation": "tests.builders:HeldOut"}, r"evaluation: found .*federated_evaluation: true"),
        (
            {**TREE, "algorithm": {"kind": "fedavg", "reduction": "median"}},
            r"schedule: found tree with algorithm fedavg",
        ),
        ({"schedule": {"kind": "tree", "regions": {}}}, "regions"),
        ({"schedule": {"kind": "tree", "regions": {"a": ["s"], "b": ["s"]}}}, r"regions: found \['s'\] twice"),
        ({"schedule": {"kind": "tree", "regions": {"s": ["s"]}}}, r"found \['s'\] as region and as site"),
    ],
    ids=["evaluation", "median", "none", "twice", "both"],
)
def test_a_recipe_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**fields)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"kind": "swarm", "aggregators": ["site-9"]}, r"schedule: found \['site-9'\]"),
        ({"kind": "tree", "regions": {"north": ["site-9"]}}, r"schedule: found \['site-9'\]"),
        (
            {"kind": "tree", "regions": {"site-3": ["site-1"]}},
            r"schedule.regions: found \['site-3'\], expected names that are no",
        ),
    ],
    ids=["aggregator", "site", "region"],
)
def test_names_that_are_not_there_are_told_before_anything_is_trained(schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(recipe(schedule=schedule))
