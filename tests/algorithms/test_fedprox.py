"""FedProx: gradients g + μ (w − x); arXiv:1812.06127, Algorithm 2."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, FedProx
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Game, Point, quadratic, same_bits, vectors
from tests.builders import outcome, recipe, run


def test_one_round_by_hand() -> None:
    """f = (w − 3)²/2 from x = 1 with η = 0.5, μ = 2, K = 2: w₁ = 1 − ½(−2) = 2; w₂ = 2 − ½(−1 + 2·(2 − 1)) = 1.5."""
    game = Game(FedProx(mu=2.0), {"a": quadratic(1.0, 3.0)}, Point(1.0), steps=2, lr=0.5)
    game.play()
    assert game.x.item() == 1.5


@pytest.mark.parametrize("case", vectors("fedprox"), ids=lambda case: f"mu={case['mu']}")
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_computed_independently(case: dict[str, Any], steps: int) -> None:
    game = Game(FedProx(mu=case["mu"]), {"a": quadratic(case["a"], case["b"])}, Point(case["w0"]), steps, case["lr"])
    game.play()
    assert game.x.item() == pytest.approx(case["expected_w"][steps - 1], rel=1e-9)


def test_it_settles_where_the_pulls_with_the_proximal_term_cancel() -> None:
    """The gradient of aᵢ/2 (y − bᵢ)² + μ/2 (y − x)² shrinks by 1 − η(aᵢ + μ) a step towards y* with y* − x = aᵢ/(aᵢ + μ) (bᵢ − x).

    So yᵢ − x = cᵢ (bᵢ − x) with cᵢ = aᵢ/(aᵢ + μ) (1 − (1 − η(aᵢ + μ))ᴷ), and x* = Σ cᵢ bᵢ / Σ cᵢ.
    """
    eta, K, mu, sites = 0.1, 5, 0.5, {"a": (1.0, 3.0), "b": (4.0, -1.0)}
    game = Game(FedProx(mu=mu), {s: quadratic(a, b) for s, (a, b) in sites.items()}, Point(10.0), K, eta)
    for _ in range(120):
        game.play()
    pulls = [(a / (a + mu) * (1 - (1 - eta * (a + mu)) ** K), b) for a, b in sites.values()]
    assert game.x.item() == pytest.approx(sum(c * b for c, b in pulls) / sum(c for c, _ in pulls), rel=1e-9)


def test_without_a_proximal_term_it_is_fedavg_to_the_bit() -> None:
    """With BatchNorm, dropout, momentum and uneven sites."""
    prox, avg = (outcome(run(recipe(algorithm=a))) for a in (FedProx(mu=0.0), FedAvg()))
    assert prox["model"] == avg["model"]


def test_the_first_of_a_rounds_steps_is_fedavgs() -> None:
    """There w = x, and the term is 0."""
    games = [Game(a, {"a": quadratic(2.0, 1.0)}, Point(0.3)) for a in (FedProx(mu=1.0), FedAvg())]
    for game in games:
        game.play()
    assert same_bits(games[0].x, games[1].x)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "much", None], ids=str)
def test_a_bad_mu_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValidationError, match="mu"):
        FedProx(mu=bad)


class TestConformance(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return FedProx(mu=0.1)
