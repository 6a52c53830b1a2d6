"""SCAFFOLD: y ← y − η (g − cᵢ + c), and c the mean of all cᵢ; arXiv:1910.06378, Algorithm 1."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, Scaffold
from fedflow.engine import close_round, commit_round, open_round, site_step, start_run, survey
from fedflow.engine.rounds import next_step
from fedflow.engine.site import SiteWork
from fedflow.errors import RecipeError, SiteError
from fedflow.recipe import LocalTraining, Optimizer, Recipe, SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import SiteStateRecord
from fedflow.store.state import read_state
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Function, Game, Point, Returns, quadratic, vectors
from tests.builders import head, outcome, recipe, run


def c_of(game: Game) -> float:
    """c = Σ cᵢ / N"""
    total: torch.Tensor = game.state.control["x"]
    return total.item() / len(game.works)


def c_i(game: Game, site: str) -> float:
    """cᵢ; 0 before a site's first round."""
    state = game.site_states.get(site)
    return state.control["x"].item() if state else 0.0


# -- by hand -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("option", "control"), [(1, -3.0), (2, -2.25)])
def test_two_rounds_by_hand(option: Any, control: float) -> None:
    """One of two sites trains on f = (x − 3)²/2 from x = 0, η = 0.5, K = 2; the other's cⱼ stays 0.

    Round 1, c = cᵢ = 0: y = 0 → 1.5 → 2.25. Option 1: cᵢ = f'(0) = −3. Option 2: (0 − 2.25)/(2·0.5) = −2.25. c = cᵢ/2.
    Round 2, x = 2.25: y ← y − 0.5 (y − 3 − cᵢ + c) twice.
    """
    game = Game(
        Scaffold(option=option), {"i": quadratic(1.0, 3.0), "j": quadratic(1.0, 3.0)}, Point(0.0), steps=2, lr=0.5
    )
    game.play(["i"])
    assert (game.x.item(), c_i(game, "i"), c_of(game)) == (2.25, control, control / 2)
    y = 2.25
    for _ in range(2):
        y -= 0.5 * (y - 3 - control + control / 2)
    game.play(["i"])
    assert game.x.item() == pytest.approx(y, rel=1e-14)


@pytest.mark.parametrize("case", vectors("scaffold"), ids=lambda case: f"{case['name']}, option {case['option']}")
def test_rounds_computed_independently(case: dict[str, Any]) -> None:
    sites = {site: quadratic(a, b) for site, (a, b) in case["sites"].items()}
    steps = case["steps"] if isinstance(case["steps"], dict) else dict.fromkeys(sites, case["steps"])
    game = Game(
        Scaffold(option=case["option"], server_learning_rate=case["server_lr"]),
        sites,
        Point(case["x0"]),
        trainings={s: LocalTraining(steps=k, optimizer=Optimizer(lr=case["lr"])) for s, k in steps.items()},
    )
    for contributors, expected in zip(case["contributors"], case["expected"], strict=True):
        game.play(contributors)
        for site, y in expected["y"].items():
            assert game.sent[site].tensors["params"]["x"].item() == pytest.approx(y, rel=1e-9)
        assert game.x.item() == pytest.approx(expected["x"], rel=1e-9)
        assert c_of(game) == pytest.approx(expected["c"], rel=1e-9)
        for site, control in expected["c_i"].items():
            assert c_i(game, site) == pytest.approx(control, rel=1e-9)


def test_after_the_step_it_is_the_same_for_plain_sgd() -> None:
    games = [
        Game(Scaffold(apply=apply), {"a": quadratic(1.0, 3.0), "b": quadratic(2.0, -1.0)}, Point(5.0), steps=4)
        for apply in ("gradient", "after_step")
    ]
    for game in games:
        for _ in range(5):
            game.play()
    assert games[0].x.item() == pytest.approx(games[1].x.item(), rel=1e-12)


def test_as_nvflare_both_differences_are_weighted_by_steps_and_not_by_the_share_of_sites() -> None:
    """a: 1 step, b: 3 steps, c absent, η = 0.1, from x = 0 on ½(x − b)² with b = 10, −10.

    y_a = 1; y_b = −1 − 0.9 − 0.81 = −2.71. x = (1·1 + 3·(−2.71))/4. cᵢ = (x − yᵢ)/(K η): −10 and 9.0333...;
    c = (1·c_a + 3·c_b)/4, where the paper has (c_a + c_b)/3.
    """
    works = {"a": quadratic(1.0, 10.0), "b": quadratic(1.0, -10.0), "c": quadratic(1.0, 0.0)}
    trainings = {s: LocalTraining(steps=k, optimizer=Optimizer(lr=0.1)) for s, k in (("a", 1), ("b", 3))}
    game = Game(Scaffold(compat="nvflare"), works, Point(0.0), trainings=trainings)
    game.play(["a", "b"])
    control = {"a": -1 / 0.1, "b": 2.71 / 0.3}
    assert game.x.item() == pytest.approx((1 - 3 * 2.71) / 4, rel=1e-12)
    assert game.state.control["x"].item() == pytest.approx((control["a"] + 3 * control["b"]) / 4, rel=1e-12)
    paper = Game(Scaffold(), works, Point(0.0), trainings=trainings)
    paper.play(["a", "b"])
    assert c_of(paper) == pytest.approx((control["a"] + control["b"]) / 3, rel=1e-12)


# -- what it is for ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("G", [1.0, 10.0, 100.0])
def test_two_quadratics_that_pull_apart_meet_at_the_optimum(G: float, option: Any) -> None:
    """f₁ = x²/2 + G x, f₂ = −G x: the sum has its optimum at 0 whatever G.

    Under FedAvg y₁ + G shrinks by q = (1 − η)ᴷ and y₂ = x + KηG: it settles at x = G (Kη − (1 − q)) / (1 − q), so its error,
    as x²/2, grows with G².
    """
    works = {"a": Function(lambda x: x**2 / 2 + G * x), "b": Function(lambda x: -G * x)}
    scaffold, fedavg = (Game(a, works, Point(1.0), steps=10) for a in (Scaffold(option=option), FedAvg()))
    for _ in range(50):
        scaffold.play()
        fedavg.play()
    assert scaffold.x.item() ** 2 / 2 < 1e-12
    q = 0.9**10
    assert fedavg.x.item() == pytest.approx(G * (10 * 0.1 - (1 - q)) / (1 - q), rel=1e-4, abs=1e-9)


def test_without_heterogeneity_one_site_is_fedavg() -> None:
    """c = cᵢ for the only site, so that nothing is corrected."""
    games = [Game(a, {"a": quadratic(2.0, 1.0)}, Point(0.3), steps=3) for a in (Scaffold(), FedAvg())]
    for game in games:
        for _ in range(4):
            game.play()
    assert games[0].x.item() == games[1].x.item()


def test_the_first_round_is_fedavgs_to_the_bit() -> None:
    """All controls are 0. With BatchNorm, dropout and uneven sites, on the way through the store."""
    fields: Mapping[str, Any] = {"rounds": 1, "training": {"batch_size": 8, "optimizer": {"lr": 0.1}}}
    scaffold, fedavg = (outcome(run(recipe(algorithm=a, **fields))) for a in (Scaffold(), FedAvg(weight_by="uniform")))
    assert scaffold["model"] == fedavg["model"]


# -- the invariant -----------------------------------------------------------------------------------------------------
@settings(max_examples=8)
@given(st.data())
def test_c_is_the_mean_of_all_whoever_takes_part_and_whoever_is_lost(data: st.DataObject) -> None:
    sites = ["a", "b", "c", "d", "e"]
    option = data.draw(st.sampled_from([1, 2]))
    works = {s: quadratic(1.0 + i / 4, 3.0 * i - 5) for i, s in enumerate(sites)}
    game = Game(Scaffold(option=option, transfer=data.draw(st.sampled_from(["full", "delta"]))), works, Point(4.0), 3)
    for _ in range(data.draw(st.integers(1, 5))):
        cohort = data.draw(st.sets(st.sampled_from(sites), min_size=1))
        lost = data.draw(st.sets(st.sampled_from(sorted(cohort)), max_size=len(cohort) - 1))
        game.play(sorted(cohort - lost), lost=sorted(lost))
        mean = sum(c_i(game, s) for s in sites) / len(sites)
        assert c_of(game) == pytest.approx(mean, rel=1e-12, abs=1e-12)


class Unreliable:
    """A federation whose rounds go wrong in every way. happened: how often each of them did.

    Of the sites of a cohort some do not answer; some answer after the closing, which counts in the next round or never; some
    fail in the middle of their training and are asked again; some do it all twice. stops: rounds in which the coordinator
    is gone after the first site, and another one opens the round anew.
    """

    def __init__(self, store: str, recipe: Recipe, sites: list[str], stops: set[int]) -> None:
        self.store, self.recipe, self.sites, self.stops = store, recipe, sites, stops
        self.happened: Counter[str] = Counter()

    def play(self) -> Journal:
        journal = start_run(ObjectStore(self.store), "run", self.recipe, self.sites)
        while step := next_step(journal, self.recipe):
            plan, opening = open_round(journal, step)
            cohort = sorted(plan.tasks)
            if step.round in self.stops:
                self._ask(cohort[0], SiteWork("run", plan.round, plan.phase, opening.number), "answers")
                journal = Journal(ObjectStore(self.store), "run")
                plan, opening = open_round(journal, step, reopen=True, why="resume")
                self.happened["resumed"] += opening.number == 2
            work = SiteWork("run", plan.round, plan.phase, opening.number)
            fates = {site: self._fate(plan.round, site) for site in cohort}
            for site in cohort:
                if fates[site] != "late":
                    self._ask(site, work, fates[site])
            closing = close_round(journal, plan, opening, survey(journal, plan), why="deadline")
            self.happened["carried"] += sum(c.base_round < plan.round for c in closing.contributors.values())
            for site in cohort:
                if fates[site] == "late":
                    self._ask(site, work, "late")
            commit_round(journal, plan, closing)
        return journal

    def _fate(self, round: int, site: str) -> str:
        fates = ["does not answer", "late", "retried", "twice", "answers", "answers"]
        return random.Random(f"{round} {site}").choice(fates)

    def _ask(self, site: str, work: SiteWork, fate: str) -> None:
        config = SiteConfig(name=site, store=self.store, state=f"{self.store}-states/{site}", allowed_imports=["*"])
        self.happened[fate] += 1
        if fate == "retried":
            with pytest.raises(RuntimeError, match="out of power"):
                site_step(work, config, progress=_fail, unhurried=True)
            work = replace(work, attempt=2)
        for _ in range({"does not answer": 0, "twice": 2}.get(fate, 1)):
            site_step(work, config, unhurried=True)


def _fail(done: int, planned: int | None) -> None:
    raise RuntimeError("out of power")


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_c_is_the_mean_of_all_after_fifty_rounds_with_sampling_drops_late_and_retried_sites_and_resumes(
    late: str,
) -> None:
    """Through engine and store, in float32: to 1e-6 of what the controls are."""
    sites, store = [f"site-{i}" for i in range(1, 7)], f"memory://invariant-{late}"
    fields: Mapping[str, Any] = {
        "algorithm": "scaffold",
        "schedule": {"kind": "sampled", "sites_per_round": 4},
        "quorum": 1,
        "late": late,
        "rounds": 50,
        "training": {"batch_size": 16, "optimizer": {"lr": 0.05}},
    }
    federation = Unreliable(store, recipe(**fields), sites, stops={7, 23, 41})
    journal = federation.play()
    assert journal.committed()[-1] == (49, "train")
    assert min(federation.happened[what] for what in ("does not answer", "late", "retried", "twice")) > 10
    assert federation.happened["resumed"] == 3
    assert (federation.happened["carried"] > 2) == (late == "carry")
    total = read_state(journal.store, Scaffold().State, head(journal).state).control
    kept = [control_of(journal, store, site) for site in sites]
    for name, c in total.items():
        mean = sum(k[name] for k in kept if k) / len(sites)
        torch.testing.assert_close(c / len(sites), mean, rtol=1e-6, atol=1e-6 * float(c.abs().max()))


def control_of(journal: Journal, store: str, site: str) -> Mapping[str, torch.Tensor]:
    """The site's accepted cᵢ."""
    accepted = head(journal).sites[site].accepted
    states = ObjectStore(f"{store}-states/{site}")
    for key in states.list():
        if accepted and accepted.partition(":")[2] in key:
            record = SiteStateRecord.from_bytes(states.get(key))
            found: Mapping[str, torch.Tensor] = read_state(states, Scaffold().SiteState, record.state).control
            return found
    return {}


# -- what it refuses ---------------------------------------------------------------------------------------------------
def test_adaptive_optimizers_are_refused_unless_allowed() -> None:
    training = {"optimizer": {"kind": "adam"}}
    with pytest.raises(RecipeError, match=r"training\.optimizer\.kind.*allow_adaptive"):
        recipe(algorithm="scaffold", training=training)
    recipe(algorithm={"kind": "scaffold", "allow_adaptive": True}, training=training)
    with pytest.raises(RecipeError, match=r"overrides\.site-2\.training\.optimizer\.kind"):
        recipe(algorithm="scaffold", training={}, overrides={"site-2": {"training": training}})


def test_a_round_without_a_learning_rate_has_no_control() -> None:
    game = Game(Scaffold(), {"a": Returns({"x": torch.tensor([1.0]).double()}, lr=0.0)}, Point(0.0))
    with pytest.raises(SiteError, match="lr_sum: found 0"):
        game.play()


def test_a_control_that_is_not_finite_is_not_sent() -> None:
    game = Game(Scaffold(), {"a": Returns({"x": torch.tensor([torch.nan]).double()})}, Point(0.0))
    with pytest.raises(SiteError, match="not finite"):
        game.play()


@pytest.mark.parametrize(
    "bad", [{"option": 3}, {"apply": "before"}, {"compat": "flower"}, {"server_learning_rate": -1}], ids=str
)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Scaffold(**bad)


VARIANTS = {
    "as published": Scaffold(),
    "option 1, differences": Scaffold(option=1, transfer="delta"),
    "as NVFlare": Scaffold(compat="nvflare"),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found
