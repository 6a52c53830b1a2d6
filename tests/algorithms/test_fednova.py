"""FedNova: x − τ η Σ pᵢ dᵢ with dᵢ = (x − yᵢ)/(η ‖aᵢ‖); arXiv:2007.07481."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, FedNova
from fedflow.errors import RecipeError
from fedflow.recipe import LocalTraining, Optimizer
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Game, Point, Returns, quadratic, vectors
from tests.builders import recipe


def tensor(x: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([x], dtype=torch.float64)}


def test_one_round_by_hand() -> None:
    """x = 0; a: 1 example, K = 1, y = 2; b: 3 examples, K = 4, y = −8. p = ¼, ¾; τ = ¼·1 + ¾·4 = 3.25;
    Σ pᵢ (yᵢ − x)/Kᵢ = ¼·2 + ¾·(−2) = −1, so x = −3.25."""
    works = {"a": Returns(tensor(2.0), 1, steps=1), "b": Returns(tensor(-8.0), 3, steps=4)}
    game = Game(FedNova(), works, Point(0.0))
    game.play()
    assert game.x.item() == -3.25


@pytest.mark.parametrize("case", vectors("fednova"), ids=lambda case: f"momentum={case['momentum']}")
def test_rounds_computed_independently(case: dict[str, Any]) -> None:
    trainings = {
        s: LocalTraining(steps=k, optimizer=Optimizer(lr=case["lr"], momentum=case["momentum"]))
        for s, k in case["steps"].items()
    }
    works = {s: quadratic(a, b, examples=int(100 * case["p"][s])) for s, (a, b) in case["sites"].items()}
    game = Game(FedNova(momentum=case["momentum"]), works, Point(case["x0"]), trainings=trainings)
    game.play()
    expected = case["expected"]
    tau = sum(case["p"][s] * u.scalars["a"] for s, u in game.sent.items())
    assert tau == pytest.approx(expected["tau_eff"], rel=1e-9)
    assert game.x.item() == pytest.approx(expected["x"], rel=1e-9)


def test_sites_that_take_as_many_steps_are_fedavg() -> None:
    works = {"a": quadratic(1.0, 3.0, 2), "b": quadratic(4.0, -1.0, 6)}
    games = [Game(a, works, Point(5.0), steps=4) for a in (FedNova(), FedAvg())]
    for game in games:
        for _ in range(3):
            game.play()
    assert games[0].x.item() == pytest.approx(games[1].x.item(), rel=1e-12)


def test_it_settles_where_normalised_steps_cancel_and_fedavg_does_not() -> None:
    """K steps on aᵢ/2 (x − bᵢ)² give yᵢ − x = cᵢ (bᵢ − x), cᵢ = 1 − (1 − η aᵢ)ᴷⁱ: x* = Σ (cᵢ/Kᵢ) bᵢ / Σ (cᵢ/Kᵢ) here, and
    without 1/Kᵢ for FedAvg. As η → 0, cᵢ/Kᵢ → η aᵢ: the optimum of the sum."""
    eta, sites = 0.01, {"a": (1.0, 3.0, 1), "b": (2.0, -1.0, 20)}
    trainings = {s: LocalTraining(steps=k, optimizer=Optimizer(lr=eta)) for s, (_, _, k) in sites.items()}
    works = {s: quadratic(a, b) for s, (a, b, _) in sites.items()}
    found = []
    for algorithm in (FedNova(), FedAvg()):
        game = Game(algorithm, works, Point(0.3), trainings=trainings)
        for _ in range(150):
            game.play()
        found.append(game.x.item())
    pulls = [(1 - (1 - eta * a) ** k, b, k) for a, b, k in sites.values()]
    fixed = sum(c / k * b for c, b, k in pulls) / sum(c / k for c, _, k in pulls)
    assert found[0] == pytest.approx(fixed, rel=1e-6)
    optimum = sum(a * b for a, b, _ in sites.values()) / sum(a for a, _, _ in sites.values())
    assert abs(found[0] - optimum) < 0.2 < 0.5 < abs(found[1] - optimum)


def test_what_a_site_says_of_its_steps_must_fit_its_scalar() -> None:
    game = Game(FedNova(), {"a": Returns(tensor(1.0), steps=3)}, Point(0.0))
    game.play()
    honest = game.sent["a"]
    assert FedNova().weight(honest) == 1
    assert FedNova().weight(replace(honest, scalars={"a": 1e9})) == 0


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "told"),
    [
        ({}, {"momentum": 0.9}, r"training\.optimizer\.momentum \(0\.9\) must equal algorithm\.momentum \(0\.0\)"),
        ({"momentum": 0.5}, {}, r"training\.optimizer\.momentum \(0\.0\)"),
        ({}, {"kind": "adam"}, "found adam"),
        ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, "found nesterov"),
    ],
)
def test_local_training_that_it_cannot_normalise_is_refused(
    algorithm: Mapping[str, Any], optimizer: Mapping[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(algorithm={"kind": "fednova", **algorithm}, training={"optimizer": optimizer})


@pytest.mark.parametrize("bad", [{"momentum": 1.0}, {"momentum": -0.1}, {"transfer": "full"}], ids=str)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        FedNova(**bad)


class TestConformance(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return FedNova(momentum=0.5)
