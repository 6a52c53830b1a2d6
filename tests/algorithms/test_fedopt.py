"""FedOpt: the moments of D = Σ pᵢ (yᵢ − x), no bias correction, v from τ²; arXiv:2003.00295, Algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import FedAvg, FedOpt
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Update
from tests.algorithms.playing import Game, Point, Returns, aggregated, same_bits
from tests.algorithms.playing import vectors as vectors_of
from tests.builders import outcome, recipe, run


def fedopt(server_optimizer: Any, **fields: Any) -> FedOpt:
    return FedOpt(server_optimizer=server_optimizer, **fields)


def play(algorithm: Algorithm, deltas: list[Any], x: Any = 0.0, dtype: torch.dtype = torch.float64) -> list[Any]:
    """x after each round, where the sites' mean delta is as given."""
    state = algorithm.init({"params": {"x": torch.as_tensor(x, dtype=dtype)}, "frozen": {}, "buffers": {}})
    found = []
    for delta in deltas:
        y = state.params["x"].double() + torch.as_tensor(delta, dtype=torch.float64)
        sent = Update("a", 0, 1, 1, 0.1, {"params": {"x": y.to(dtype)}, "buffers": {}})
        state = aggregated(algorithm, state, [sent])
        found.append(state.params["x"].clone())
    return found


# -- by hand -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_one_round_by_hand(kind: str) -> None:
    """D = ½, η = 0.1, τ = 0.001, β₁ = 0.9 (Adagrad 0), β₂ = 0.99: m = (1 − β₁)/2, and v from τ² = 1e-6."""
    D, v = 0.5, 1e-6
    m = {"adagrad": 1.0}.get(kind, 1 - 0.9) * D
    v = {
        "adagrad": v + D**2,
        "adam": 0.99 * v + 0.01 * D**2,
        "yogi": v - 0.01 * D**2 * math.copysign(1, v - D**2),
    }[kind]
    assert play(fedopt(kind), [D])[0].item() == pytest.approx(0.1 * m / (math.sqrt(v) + 1e-3), rel=1e-12)


@pytest.mark.parametrize("case", vectors_of("fedopt"), ids=lambda case: case["kind"])
def test_rounds_computed_independently(case: dict[str, Any]) -> None:
    kind = case["kind"]
    settings = {"kind": kind, "lr": case["eta"], "tau": case["tau"]}
    settings |= {} if kind == "adagrad" else {"b1": case["b1"], "b2": case["b2"]}
    found = play(fedopt(settings), case["mean_deltas"], case["x0"])
    np.testing.assert_allclose(torch.stack(found), case["expected_x"], rtol=1e-9)


def test_momentum_gives_1_then_2_6_then_4_56() -> None:
    """lr 1, momentum 0.6, D = 1: m = 1, 1.6, 1.96, and x their sums."""
    found = play(fedopt({"kind": "sgd", "lr": 1.0, "momentum": 0.6}), [1.0] * 3)
    assert [x.item() for x in found] == pytest.approx([1.0, 2.6, 4.56], rel=1e-12)


def test_bias_correction_divides_by_what_the_moments_lack() -> None:
    """From m = v = 0 and with it, the first step is η D / (|D| + τ), as of Adam, and so is every one while D is the same."""
    settings = {"kind": "adam", "bias_correction": True, "v_init": 0.0, "lr": 0.1, "tau": 1e-8}
    found = play(fedopt(settings), [0.5] * 3)
    assert [x.item() for x in found] == pytest.approx([0.1, 0.2, 0.3], rel=1e-6)


# -- what it equals ----------------------------------------------------------------------------------------------------
def torchs(optimizer: type[torch.optim.Optimizer], deltas: list[list[float]], **settings: Any) -> list[torch.Tensor]:
    x = torch.nn.Parameter(torch.zeros(len(deltas[0]), dtype=torch.float64))
    torch_optimizer, found = optimizer([x], **settings), []
    for delta in deltas:
        x.grad = -torch.tensor(delta, dtype=torch.float64)
        torch_optimizer.step()
        found.append(x.detach().clone())
    return found


DELTAS = [[0.5, -0.25, 3.0], [0.1, 0.7, -1.0], [-0.3, 0.2, 0.1], [0.0, 1.0, -2.0], [0.9, 0.9, 0.9]]


def test_adam_with_bias_correction_is_torchs() -> None:
    settings = {"kind": "adam", "bias_correction": True, "v_init": 0.0, "lr": 0.01, "tau": 1e-8, "b1": 0.8, "b2": 0.95}
    expected = torchs(torch.optim.Adam, DELTAS, lr=0.01, betas=(0.8, 0.95), eps=1e-8)
    found = play(fedopt(settings), DELTAS, [0.0] * 3)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov: bool) -> None:
    expected = torchs(torch.optim.SGD, DELTAS, lr=0.3, momentum=0.7, nesterov=nesterov)
    settings = {"kind": "sgd", "lr": 0.3, "momentum": 0.7, "nesterov": nesterov}
    found = play(fedopt(settings), DELTAS, [0.0] * 3)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-15)


def test_sgd_at_rate_1_is_fedavg() -> None:
    """In float32, where a difference in float64 is exact."""
    found, expected = (outcome(run(recipe(algorithm=a))) for a in (fedopt("sgd"), FedAvg()))
    assert found["model"] == expected["model"]


def test_a_model_at_which_every_site_stays_is_fixed() -> None:
    """D = 0 leaves m = 0, and x where it is, whatever v."""
    for kind in ("sgd", "adagrad", "adam", "yogi"):
        game = Game(fedopt(kind), {"a": Returns({"x": torch.tensor([0.3])})}, Point([0.3], torch.float32))
        for _ in range(3):
            game.play()
        assert same_bits(game.x, torch.tensor([0.3]))


def test_adagrads_steps_shrink_with_the_root_of_the_rounds() -> None:
    """D = 1 every round: v = τ² + t, so x = Σ η / (√(τ² + t) + τ)."""
    found = play(fedopt("adagrad"), [1.0] * 20)[-1].item()
    assert found == pytest.approx(sum(0.1 / (math.sqrt(1e-6 + t) + 1e-3) for t in range(1, 21)), rel=1e-12)


# -- the server's learning rate ----------------------------------------------------------------------------------------
SCHEDULES: Mapping[str, tuple[Any, Any]] = {
    "constant": ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1)),
    "cosine": (
        {"kind": "cosine", "rounds": 6, "final": 0.1},
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=0.05),
    ),
    "step": ({"kind": "step", "every": 2, "gamma": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rates_are_those_of_torch(name: str) -> None:
    schedule, make = SCHEDULES[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, expected = make(optimizer), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = play(fedopt({"kind": "sgd", "lr": 0.5}, server_schedule=schedule), [1.0] * 6)
    np.testing.assert_allclose(np.diff([0.0, *(x.item() for x in found)]), expected, rtol=1e-9)


def test_a_cosine_stays_at_its_end() -> None:
    cosine = {"kind": "cosine", "rounds": 2, "final": 0.25}
    found = play(fedopt({"kind": "sgd", "lr": 1.0}, server_schedule=cosine), [1.0] * 5)
    assert np.diff([x.item() for x in found])[1:] == pytest.approx([0.25] * 3)


def test_a_tensor_that_nobody_sent_keeps_its_moments() -> None:
    algorithm = fedopt({"kind": "sgd", "momentum": 0.5})
    state = algorithm.init({"params": {"x": torch.zeros(1), "y": torch.zeros(1)}, "frozen": {}, "buffers": {}})
    both = Update("a", 0, 1, 1, 0.1, {"params": {"x": torch.ones(1), "y": torch.ones(1)}, "buffers": {}})
    state = aggregated(algorithm, state, [both])
    alone = Update("a", 0, 1, 1, 0.1, {"params": {"x": torch.ones(1)}, "buffers": {}})
    after = aggregated(algorithm, state, [alone])
    assert same_bits(after.m["y"], state.m["y"]) and same_bits(after.params["y"], state.params["y"])


# -- bad settings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"server_optimizer": "rmsprop"}, "server_optimizer"),
        ({"server_optimizer": {"kind": "adam", "b1": 1.0}}, "b1"),
        ({"server_optimizer": {"kind": "adam", "tau": 0}}, "tau"),
        ({"server_optimizer": {"kind": "adam", "momentum": 0.9}}, "momentum"),
        ({"server_optimizer": {"kind": "adagrad", "b2": 0.9}}, "b2"),
        ({"server_optimizer": {"kind": "sgd", "nesterov": True}}, "nesterov needs momentum"),
        ({"server_optimizer": {"kind": "yogi", "lr": -1}}, "lr"),
        ({"server_schedule": {"kind": "cosine"}}, "rounds"),
        ({"server_schedule": {"kind": "step", "every": 0}}, "every"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        FedOpt(**bad)


VARIANTS = {
    "adam": fedopt("adam"),
    "yogi, differences": fedopt({"kind": "yogi", "bias_correction": True}, transfer="delta"),
    "momentum, cosine": fedopt(
        {"kind": "sgd", "momentum": 0.9, "nesterov": True}, server_schedule={"kind": "cosine", "rounds": 4}
    ),
    "adagrad": fedopt("adagrad"),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found
