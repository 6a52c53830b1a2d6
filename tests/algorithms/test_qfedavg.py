"""q-FedAvg: Δᵢ = Fᵢ^q L (x − yᵢ), hᵢ = q Fᵢ^(q−1) ‖L (x − yᵢ)‖² + L Fᵢ^q, x − Σ Δᵢ/Σ hᵢ; arXiv:1905.10497, Algorithm 2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, QFedAvg
from fedflow.errors import SiteError
from fedflow.testing.algorithm import AlgorithmConformance
from tests.algorithms.playing import Function, Game, Point, Returns, quadratic, same_bits


def returns(y: list[float], F: float, lr: float) -> Returns:
    return Returns({"x": torch.tensor(y, dtype=torch.float64)}, lr=lr, loss=F)


def test_one_round_by_hand() -> None:
    """q = 1, η = ½, so L = 2; x = 0. a: F = 3, y = 1; b: F = 1, y = −1.

    Δ_a = 3·2·(−1) = −6, Δ_b = 1·2·1 = 2; h_a = 1·4 + 2·3 = 10, h_b = 4 + 2 = 6: x = 0 + 4/16.
    """
    game = Game(QFedAvg(q=1.0), {"a": returns([1.0], 3.0, 0.5), "b": returns([-1.0], 1.0, 0.5)}, Point(0.0))
    game.play()
    assert game.x.item() == pytest.approx(0.25, rel=1e-14)


NUMBER, POSITIVE = st.floats(-10, 10), st.floats(0.01, 10)


@settings(max_examples=100)
@given(st.lists(st.tuples(NUMBER, NUMBER, POSITIVE), min_size=1, max_size=6), st.floats(0, 5), st.floats(0.01, 2))
def test_a_round_is_the_papers_formula(sites: list[tuple[float, float, float]], q: float, lr: float) -> None:
    works = {f"s{i}": returns([y0, y1], F, lr) for i, (y0, y1, F) in enumerate(sites)}
    game = Game(QFedAvg(q=q), works, Point([1.0, -2.0]))
    game.play()
    L, x = 1 / lr, (1.0, -2.0)
    h = sum(
        q * F ** (q - 1) * L**2 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) + L * F**q for *y, F in sites
    )
    for k in range(2):
        D = sum(F**q * L * (x[k] - y[k]) for *y, F in sites)
        assert game.x[k].item() == pytest.approx(x[k] - D / h, rel=1e-9, abs=1e-9)


def test_at_q_0_it_is_fedavg_to_the_bit() -> None:
    works = {"a": quadratic(1.0, 3.0), "b": quadratic(4.0, -1.0)}
    games = [Game(a, works, Point(5.0), steps=4) for a in (QFedAvg(q=0.0), FedAvg(weight_by="uniform"))]
    for game in games:
        for _ in range(3):
            game.play()
    assert same_bits(games[0].x, games[1].x)


def test_one_step_and_a_small_rate_settle_at_the_fair_point() -> None:
    """It minimises Σ Fᵢ^(q+1): of ½(x − 1)² + 1 and ½(x + 1)² + 1 it is 0 by symmetry, of losses with other floors where
    Σ Fᵢ^q F'ᵢ = 0."""
    floors = {"a": (1.0, 0.5), "b": (-1.0, 2.0)}

    def loss(x: Any, b: float, floor: float) -> Any:
        return (x - b) ** 2 / 2 + floor

    works = {s: Function(lambda x, b=b, f=f: loss(x, b, f)) for s, (b, f) in floors.items()}
    game = Game(QFedAvg(q=2.0), works, Point(0.7), steps=1, lr=0.5)
    for _ in range(150):
        game.play()
    x = game.x.item()
    assert sum(loss(x, b, f) ** 2 * (x - b) for b, f in floors.values()) == pytest.approx(0, abs=1e-6)
    assert x < -0.3  # nearer to the site that is worse off


def test_a_site_that_claims_a_nonsensical_loss_does_not_count() -> None:
    game = Game(QFedAvg(), {"a": returns([1.0], 3.0, 0.5)}, Point(0.0))
    game.play()
    honest = game.sent["a"]
    assert QFedAvg().weight(honest) == 3.0
    for lie in ({"loss": -1.0}, {"loss": float("nan")}, {"r": 0.0}, {"r": -5.0}):
        assert not QFedAvg().weight(replace(honest, scalars={**honest.scalars, **lie})) > 0


def test_a_loss_of_0_cannot_be_used() -> None:
    with pytest.raises(SiteError, match=r"loss \(0\.0\)"):
        Game(QFedAvg(), {"a": returns([1.0], 0.0, 0.5)}, Point(0.0)).play()


@pytest.mark.parametrize("bad", [{"q": -1}, {"q": float("inf")}, {"lipschitz": 0}], ids=str)
def test_a_bad_setting_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        QFedAvg(**bad)


class TestConformance(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return QFedAvg(q=0.5)
