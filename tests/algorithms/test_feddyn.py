"""FedDyn: gᵢ ← gᵢ − α (yᵢ − x), h ← h − α/N Σ (yᵢ − x), x ← mean yᵢ − h/α; arXiv:2111.04263, Algorithm 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, FedDyn
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Game, Point, Returns, quadratic


def returns(y: float) -> Returns:
    return Returns({"x": torch.tensor([y], dtype=torch.float64)})


def test_two_rounds_by_hand() -> None:
    """α = ½, N = 4, x = 1. Round 1: a and b send 2 and 5, deltas 1 and 4: h = −½/4·5 = −0.625, x = 3.5 + 1.25 = 4.75.

    Round 2: a sends 2 again, delta −2.75: h = −0.625 + ½/4·2.75 = −0.28125, x = 2 + 0.5625 = 2.5625.
    g_a = −½·1 + ½·2.75 = 0.875.
    """
    works = {"a": returns(2.0), "b": returns(5.0), "c": returns(0.0), "d": returns(0.0)}
    game = Game(FedDyn(alpha=0.5), works, Point(1.0))
    game.play(["a", "b"])
    assert (game.state.h["x"].item(), game.x.item()) == (-0.625, 4.75)
    game.play(["a"])
    assert (game.state.h["x"].item(), game.x.item()) == (-0.28125, 2.5625)
    assert (game.site_states["a"].g["x"].item(), game.site_states["b"].g["x"].item()) == (0.875, -2.0)


def test_a_steps_gradient_by_hand() -> None:
    """f = (y − 3)²/2, η = ½, α = 1, K = 2, from x = 0. Round 1, g = 0: y₁ = 1.5; y₂ = 1.5 − ½(−1.5 + 1.5) = 1.5; g = −1.5,
    h = −1.5 with one site, x = 1.5 + 1.5 = 3. Round 2 from 3: y₁ = 3 − ½(0 + 1.5) = 2.25; y₂ = 2.25 − ½(−0.75 + 1.5 − 0.75) = 2.25.
    """
    game = Game(FedDyn(alpha=1.0), {"a": quadratic(1.0, 3.0)}, Point(0.0), steps=2, lr=0.5)
    game.play()
    assert (game.x.item(), game.site_states["a"].g["x"].item()) == (3.0, -1.5)
    game.play()
    assert game.sent["a"].tensors["params"]["x"].item() == 2.25


def test_it_settles_at_the_optimum_of_the_sum_where_fedavg_does_not() -> None:
    """What is fixed: yᵢ = x and gᵢ = f'ᵢ(x), with h = mean gᵢ = 0: x* = Σ aᵢ bᵢ / Σ aᵢ."""
    sites = {"a": (1.0, 3.0), "b": (4.0, -1.0), "c": (2.0, 0.5)}
    works = {s: quadratic(a, b) for s, (a, b) in sites.items()}
    found = []
    for algorithm in (FedDyn(alpha=0.5), FedAvg()):
        game = Game(algorithm, works, Point(10.0), steps=20)
        for _ in range(60):
            game.play()
        found.append(game.x.item())
    optimum = sum(a * b for a, b in sites.values()) / sum(a for a, _ in sites.values())
    assert found[0] == pytest.approx(optimum, abs=1e-4)
    assert abs(found[1] - optimum) > 0.1


def test_one_site_that_reaches_its_optimum_is_a_proximal_point() -> None:
    """With K large, y = argmin f + ½α(y − x)² − g y, and f'(y) = g − α (y − x) = the new g; then x = y − h/α with h = g."""
    game = Game(FedDyn(alpha=1.0), {"a": quadratic(2.0, 3.0)}, Point(0.0), steps=80, lr=0.3)
    x = g = 0.0
    for _ in range(4):
        game.play()
        y = (2 * 3 + g + x) / (2 + 1)
        g -= y - x
        x = y - g
        assert game.x.item() == pytest.approx(x, rel=1e-9)
        assert game.site_states["a"].g["x"].item() == pytest.approx(2 * (y - 3), abs=1e-9)


@settings(max_examples=8)
@given(st.data())
def test_h_is_the_mean_of_all_whoever_takes_part_and_whoever_is_lost(data: st.DataObject) -> None:
    sites = ["a", "b", "c", "d"]
    algorithm = FedDyn(alpha=0.3, transfer=data.draw(st.sampled_from(["full", "delta"])))
    game = Game(algorithm, {s: quadratic(1.0 + i, 2.0 * i) for i, s in enumerate(sites)}, Point(4.0), steps=3)
    for _ in range(data.draw(st.integers(1, 6))):
        cohort = data.draw(st.sets(st.sampled_from(sites), min_size=1))
        lost = data.draw(st.sets(st.sampled_from(sorted(cohort)), max_size=len(cohort) - 1))
        game.play(sorted(cohort - lost), lost=sorted(lost))
        mean = sum(s.g["x"].item() for s in game.site_states.values()) / len(sites)
        assert game.state.h["x"].item() == pytest.approx(mean, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), "small"], ids=str)
def test_a_bad_alpha_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValidationError, match="alpha"):
        FedDyn(alpha=bad)


class TestConformance(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return FedDyn(alpha=0.1)
