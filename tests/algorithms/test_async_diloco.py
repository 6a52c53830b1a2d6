"""Asynchronous DiLoCo: Delayed Nesterov by its formula, and what it equals; arXiv:2401.09135, Algorithm 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedflow.algorithms import AsyncDiLoCo
from fedflow.algorithms.async_diloco import AsyncDiLoCoState
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.simulation.tables import Row, Table
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Update
from tests.algorithms.playing import aggregated
from tests.builders import SITES, head, recipe, run
from tests.simulation.test_clock import manifests


class TestAsyncDiLoCo(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> AsyncDiLoCo:
        return AsyncDiLoCo(momentum_every=2, momentum_activation=0.25)


def after(algorithm: AsyncDiLoCo, gradients: list[float]) -> AsyncDiLoCoState:
    """x = 0, then a round for every outer gradient g: one site that moves by −g."""
    x = torch.zeros(1, dtype=torch.float64)
    state = AsyncDiLoCoState({"x": x}, {}, {}, momentum={}, pending={}, count=0)
    for g in gradients:
        update = Update("a", 0, 1, 1, 0.1, {"params": {"x": state.params["x"] - g}, "buffers": {}})
        state = aggregated(algorithm, state, [update])
    return state


@pytest.mark.parametrize("c", [0.0, 0.2, 1 / 3])
def test_rounds_are_the_papers_formula(c: float) -> None:
    lr, beta, N, gradients = 0.7, 0.9, 3, [1.0, -2.0, 4.0, 0.5, 3.0, -1.0, 2.0]
    x = m = delta = 0.0
    for t, g in enumerate(gradients):
        delta += g
        if (t + 1) % N == 0:
            m = beta * m + delta / N
            x -= lr * ((1 - c * N + c) * beta * m + g / N)
            delta = 0.0
        else:
            x -= lr * (c * beta * m + g / N)
    found = after(AsyncDiLoCo(momentum_every=N, momentum_activation=c), gradients)
    assert found.params["x"].item() == pytest.approx(x, rel=1e-13)
    assert (found.momentum["x"].item(), found.count) == (pytest.approx(m, rel=1e-13), 1)
    assert found.pending["x"].item() == pytest.approx(delta, rel=1e-13)


def test_n_rounds_have_the_effect_of_one_nesterov_step_with_their_mean() -> None:
    delayed = after(AsyncDiLoCo(momentum_every=4), [1.0, 2.0, 3.0, -2.0, 5.0, 5.0, 1.0, 1.0])
    once = after(AsyncDiLoCo(momentum_every=1), [1.0, 3.0])
    assert delayed.params["x"].item() == pytest.approx(once.params["x"].item(), rel=1e-13)


def test_with_momentum_in_every_round_it_is_diloco_to_the_bit() -> None:
    common: dict[str, Any] = {"rounds": 3, "training": {"batch_size": 8, "optimizer": {"kind": "adamw", "lr": 0.01}}}
    diloco = head(run(recipe(**common, algorithm="diloco")))
    delayed = head(run(recipe(**common, algorithm={"kind": "async_diloco", "momentum_every": 1})))
    assert delayed.model_digest == diloco.model_digest


def test_a_site_that_is_slow_takes_fewer_steps_and_is_not_late() -> None:
    """1 and 4 s a step, H = 8: 8 and 32 s at first; once their speeds are known 8 and 2 steps, 8 s each, and nobody is late."""
    spec = recipe(
        algorithm={"kind": "async_diloco", "local_steps_per_round": 8, "momentum_every": 2},
        schedule={"kind": "buffered", "size": 1, "max_staleness": 9, "dynamic_steps": 8},
        training={"batch_size": 4, "optimizer": {"lr": 0.1}},
        timeouts={"round_deadline": 600, "quorum_grace": 0},
        rounds=12,
    )
    trace = Table(rows=(Row(site="site-1", seconds_per_step=1), Row(site="site-2", seconds_per_step=4)))
    found = simulate_on(spec, SITES[:2], backend="debug", trace=trace)
    took = [{site: c.steps for site, c in m.contributors.items()} for m in manifests(found)]
    assert took == [{"site-1": 8}] * 3 + [{"site-1": 8, "site-2": 8}] + [{"site-1": 8, "site-2": 2}] * 8


@pytest.mark.parametrize(
    "bad", [{"momentum_every": 0}, {"momentum_every": 4, "momentum_activation": 0.3}, {"outer_optimizer": "sgd"}]
)
def test_a_value_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(bad)[-1]):
        AsyncDiLoCo(**bad)
