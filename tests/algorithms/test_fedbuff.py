"""FedBuff: the formula by hand, what it is when nobody is late, and late updates in simulated time and in the store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedflow.algorithms import FedBuff
from fedflow.engine.rounds import (
    amend_run,
    close_round,
    commit_round,
    next_step,
    open_round,
    start_run,
    survey,
)
from fedflow.engine.site import SiteWork, site_step
from fedflow.errors import RecipeError
from fedflow.local.model import model_groups
from fedflow.recipe import SiteConfig
from fedflow.simulation.clock import EPOCH
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Update
from tests.algorithms.playing import aggregated
from tests.builders import SITES, bits, recipe, run
from tests.simulation.test_clock import deployed, manifests, table

BUFFERED: dict[str, Any] = {"algorithm": "fedbuff", "schedule": {"kind": "buffered", "size": 2}}


class TestFedBuff(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> FedBuff:
        return FedBuff(server_learning_rate=0.5)


def one_number(x: float) -> nn.Module:
    module = nn.Module()
    module.register_parameter("x", nn.Parameter(torch.tensor([x], dtype=torch.float64)))
    return module


def sent(site: str, y: float, staleness: int) -> Update:
    params: dict[str, Tensor] = {"x": torch.tensor([y], dtype=torch.float64)}
    return Update(site, 5 - staleness, 10, 3, 0.3, {"params": params, "buffers": {}}, staleness=staleness)


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_round_is_the_papers_formula(rate: float) -> None:
    """x = 1; Δ = 1 with τ = 0 and s = 1, Δ = 4 with τ = 3 and s = 1/2: x + η (1·1 + ½·4)/2 = 1 + 1.5 η."""
    algorithm = FedBuff(server_learning_rate=rate)
    state = algorithm.init(model_groups(one_number(1.0)))
    after = aggregated(algorithm, state, [sent("a", 2.0, 0), sent("b", 5.0, 3)])
    assert after.params["x"].item() == pytest.approx(1 + 1.5 * rate, rel=1e-15)


def test_a_fresh_update_weighs_1_and_age_may_be_told_to_be_nothing() -> None:
    weights = [FedBuff().weight(sent("a", 0.0, age)) for age in (0, 1, 8)]
    assert weights == [1.0, pytest.approx(1 / math.sqrt(2)), pytest.approx(1 / 3)]
    assert FedBuff(staleness="constant").weight(sent("a", 0.0, 8)) == 1.0


def test_with_all_in_the_buffer_and_nobody_late_it_is_fedavg_with_uniform_weights() -> None:
    everyone = {**BUFFERED, "schedule": {"kind": "buffered", "size": len(SITES)}, "rounds": 3}
    fedavg = {"algorithm": {"kind": "fedavg", "weight_by": "uniform"}, "rounds": 3}
    assert bits(run(recipe(**everyone))) == bits(run(recipe(**fedavg)))
    assert bits(simulate_on(recipe(**everyone), list(SITES), workers=2)) == bits(run(recipe(**fedavg)))


def test_late_updates_count_by_their_age_in_simulated_time_and_in_the_store_alike(tmp_path: Path) -> None:
    """Sites take 1, 1.5 and 4 s, two updates are a round: site 3's of round 0 counts in round 2, two rounds old, with 1/√3."""
    schedule = {"kind": "buffered", "size": 2, "ask_again": False}
    terms = {**BUFFERED, "schedule": schedule, "training": {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.1}}}
    timeouts = {"round_deadline": 60, "quorum_grace": 0}
    found = simulate_on(recipe(rounds=4, timeouts=timeouts, **terms), SITES, backend="debug", trace=table(1, 1.5, 4))
    bases = [{site: c.base_round for site, c in m.contributors.items()} for m in manifests(found)]
    assert bases == [
        {"site-1": 0, "site-2": 0},
        {"site-1": 1, "site-2": 1},
        {"site-1": 2, "site-3": 0},
        {"site-1": 3, "site-2": 2},
    ]
    weights = [{site: c.weight for site, c in m.contributors.items()} for m in manifests(found)[2:]]
    assert weights == [
        {"site-1": 1.0, "site-3": pytest.approx(1 / math.sqrt(3))},
        {"site-1": 1.0, "site-2": pytest.approx(1 / math.sqrt(2))},
    ]
    assert bits(found) == bits(deployed([sorted(round.items()) for round in bases], tmp_path, **terms))


def test_a_site_that_finished_early_is_asked_again_within_the_round(tmp_path: Path) -> None:
    """Sites take 1, 3 and 100 s, two updates are a round. Site 1 makes its first update in second 1 and another, from the same model, by
    second 2; round 0 closes in second 3 with site 2's, and round 1 as soon as site 2 has made one more, in second 6, with site 1's second
    one: one round old. In that round site 1, whose update was there at its opening, is asked again at once."""
    terms = {**BUFFERED, "training": {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.1}}}
    for algorithm in ("fedbuff", {"kind": "diloco", "local_steps_per_round": 2}):
        fields = terms | {"algorithm": algorithm}
        timeouts = {"round_deadline": 600, "quorum_grace": 0}
        found = simulate_on(
            recipe(rounds=4, timeouts=timeouts, **fields), SITES, backend="debug", trace=table(1, 3, 100)
        )
        bases = [{site: c.base_round for site, c in m.contributors.items()} for m in manifests(found)]
        assert bases == [
            {"site-1": 0, "site-2": 0},
            {"site-1": 0, "site-2": 1},
            {"site-1": 1, "site-2": 2},
            {"site-1": 2, "site-2": 3},
        ]
        assert [(m.committed - EPOCH).total_seconds() for m in manifests(found)] == [3, 6, 9, 12]
        folder = tmp_path / str(found.recipe().algorithm.kind)
        arrive = [
            [("site-1", 0, False), ("site-2", 0, False), ("site-1", 0, True)],
            *([("site-2", r, False), ("site-1", r, True)] for r in (1, 2, 3)),
        ]
        assert bits(found) == bits(answered(arrive, folder, **fields))


def answered(rounds: list[list[tuple[str, int, bool]]], folder: Path, **fields: Any) -> Journal:
    """What the coordinator's functions make of updates in this order. rounds: of each, (site, base, whether it was asked again)."""
    store = ObjectStore(str(folder / "store"))
    journal = start_run(store, "run", recipe(rounds=len(rounds), **fields), SITES)
    for arriving in rounds:
        step = next_step(journal, journal.recipe())
        assert step
        plan, opening = open_round(journal, step)
        for site, base, again in arriving:
            counted = survey(journal, plan).accepted.get(site)
            assert plan.again and (counted is not None) == again
            config = SiteConfig(name=site, store=store.url, state=str(folder / site), allowed_imports=["*"])
            work = SiteWork("run", base, step.phase, after=counted.update if counted else None)
            assert site_step(work, config, unhurried=True) == site_step(work, config, unhurried=True)
        commit_round(journal, plan, close_round(journal, plan, opening, survey(journal, plan), why="as told"))
    assert len({c.update for m in manifests(journal) for c in m.contributors.values()}) == 2 * len(rounds)
    return journal


def test_an_update_that_counted_some_rounds_ago_is_not_looked_at_again(tmp_path: Path) -> None:
    """Site 1 counted in rounds 0, 1 and 2; in round 3 it has not answered."""
    journal = deployed([[("site-1", r), ("site-2", r)] for r in range(3)], tmp_path, **BUFFERED)
    spec = amend_run(journal, rounds=4)
    step = next_step(journal, spec)
    assert step is not None and step.round == 3
    plan, _ = open_round(journal, step)
    assert plan.accept_bases == [0, 1, 2, 3] and survey(journal, plan).answered() == set()


def test_an_update_that_is_too_old_does_not_count(tmp_path: Path) -> None:
    """max_staleness 1: site 3 takes 4 s, in which three rounds of 1.5 s pass; it is stopped and asked anew."""
    terms = {**BUFFERED, "schedule": {"kind": "buffered", "size": 2, "max_staleness": 1}, "rounds": 6}
    timeouts = {"round_deadline": 60, "quorum_grace": 0}
    found = simulate_on(recipe(timeouts=timeouts, **terms), SITES, backend="debug", trace=table(1, 1.5, 4))
    assert all(m.round - c.base_round <= 1 for m in manifests(found) for c in m.contributors.values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"concurrency \(1\) must be at least size \(2\)"):
        recipe(**BUFFERED | {"schedule": {"kind": "buffered", "size": 2, "concurrency": 1}})
    with pytest.raises(RecipeError, match=r"quorum \(3\) must not exceed schedule.size \(2\)"):
        recipe(**BUFFERED, quorum=3)
