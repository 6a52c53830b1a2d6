"""The model goes from site to site: the composition of their trainings, to the bit, whatever is killed on the way."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine.aggregation import read_model
from fedflow.engine.rounds import amend_run, next_step, open_round
from fedflow.errors import QuorumLost, RecipeError
from fedflow.local import Setup, build_model, model_groups, training_of
from fedflow.local.state import Memory
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.tensors import model_digest
from fedflow.testing.faults import fail_at
from fedflow.types import Groups, RoundContext
from tests.builders import SITES, Blobs, bits, head, in_child, outcome, recipe, run, run_with

CYCLIC: dict[str, Any] = {"schedule": "cyclic", "rounds": 5}


def digest(groups: Groups) -> str:
    return model_digest({name: t for tensors in groups.values() for name, t in tensors.items()})


@pytest.mark.parametrize("order", ["fixed", "random", "random_without_repeat"])
def test_a_run_is_the_composition_of_the_sites_trainings(order: str) -> None:
    spec = recipe(**CYCLIC | {"schedule": {"kind": "cyclic", "order": order}})
    journal = run(spec)
    model = build_model(spec.model.path, spec.model.args, seed=spec.seed)
    groups: Groups = {
        group: {n: t.clone() for n, t in tensors.items()} for group, tensors in model_groups(model).items()
    }
    for round in range(5):
        manifest = journal.manifest(round, "train")
        assert manifest is not None
        (site,) = manifest.contributors
        if order == "fixed":
            assert site == SITES[round % 3]
        setup = Setup(lambda: model, spec.training, spec.numerics, lambda done, planned: None, Memory())
        context = RoundContext.at(spec.seed, "run", round, "train", site, len(SITES))
        groups = training_of(Blobs(site), setup).train(groups, context).groups
        assert manifest.model_digest == digest(groups) == digest(read_model(journal, manifest))


def test_worker_processes_give_the_same_bits() -> None:
    spec = recipe(**CYCLIC)
    assert bits(simulate_on(spec, list(SITES), workers=2)) == bits(run(spec))


def test_killed_in_the_middle_of_a_lap_it_goes_on_there(tmp_path: Path) -> None:
    expected = outcome(run(recipe(**CYCLIC), str(tmp_path / "undisturbed")))
    fault = fail_at("manifest", round=1, when="after", token=tmp_path / "token")
    assert in_child(run_with, fault, CYCLIC, str(tmp_path / "store"), {}) == -signal.SIGKILL and fault.struck
    journal = run(recipe(**CYCLIC), str(tmp_path / "store"))
    assert [list(journal.manifest(r, "train").contributors) for r in range(5)] == [[SITES[r % 3]] for r in range(5)]  # type: ignore[union-attr]
    assert {k: outcome(journal)[k] for k in ("model", "state")} == {k: expected[k] for k in ("model", "state")}


def test_an_absent_site_is_passed_over_as_long_as_enough_are_there(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run(recipe(**CYCLIC | {"rounds": 1}), store)
    journal = run(recipe(**CYCLIC | {"rounds": 3, "min_sites": 2}), store, sites=["site-1", "site-3"])
    assert [list(journal.manifest(r, "train").contributors) for r in range(3)] == [["site-1"], ["site-3"], ["site-1"]]  # type: ignore[union-attr]
    assert "site-2" in head(journal).excluded
    step = next_step(journal, amend_run(journal, rounds=4))
    assert step is not None
    with pytest.raises(
        QuorumLost, match=r"found 1 sites to ask, expected at least 2 \(min_sites\): site-1 \(no worker\)"
    ):
        open_round(journal, step, absent=dict.fromkeys(["site-1", "site-2"], "no worker"))


def test_a_quorum_of_more_than_the_one_site_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"quorum \(2\) must not exceed schedule \(1\)"):
        recipe(**CYCLIC, quorum=2)
