"""FedAvg: one round by hand, a fixed point, what it equals, and what the engine asks of every algorithm.

The formula (arXiv:1602.05629, Algorithm 1, with a server learning rate): x ← x + η_g Σ pᵢ (yᵢ − x), pᵢ = wᵢ / Σ w.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, LocalResult, NoState
from fedflow.algorithms.averaging import ModelState
from fedflow.algorithms.fedavg import FedAvg
from fedflow.local import LocalTrainer, TorchWorkload
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.tensors import raw_bytes
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Groups, RoundContext, Update, derive_seed

SERVER = RoundContext("run", 0, "train", None, num_sites=2, seed=0)


def state_of(x: Any, buffers: Mapping[str, Tensor] | None = None, frozen: Any = ()) -> ModelState:
    return ModelState({"x": torch.as_tensor(x)}, {"f": torch.as_tensor(frozen)} if len(frozen) else {}, buffers or {})


def update_of(site: str, groups: Groups, examples: int = 1, steps: int = 1) -> Update:
    return Update(site, base_round=0, examples=examples, steps=steps, lr_sum=0.1 * steps, tensors=groups)


def params(y: Any) -> dict[str, dict[str, Tensor]]:
    return {"params": {"x": torch.as_tensor(y)}, "buffers": {}}


def after(algorithm: FedAvg, state: ModelState, updates: Sequence[Update]) -> ModelState:
    new: ModelState = algorithm.server_update(state, algorithm.aggregate(iter(updates), SERVER), SERVER)
    return new


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bytes(raw_bytes(a)) == bytes(raw_bytes(b))


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_one_round_by_hand() -> None:
    """x = (1, 2); site a has 1 example and y = (3, 2); site b has 3 and y = (5, 6); η_g = 1/2.

    p = (1/4, 3/4); Σ p (y − x) = (1/4·2 + 3/4·4, 1/4·0 + 3/4·4) = (3.5, 3); x + 1/2 of it = (2.75, 3.5).
    """
    updates = [update_of("a", params([3.0, 2.0]), examples=1), update_of("b", params([5.0, 6.0]), examples=3)]
    new = after(FedAvg(server_learning_rate=0.5), state_of([1.0, 2.0]), updates)
    assert new.params["x"].tolist() == [2.75, 3.5]


def test_rounds_computed_independently() -> None:
    for case in json.loads((Path(__file__).parents[1] / "vectors/fedavg.json").read_text()):
        updates = [
            update_of(f"site-{i}", params(torch.tensor(y, dtype=torch.float64)), examples=w)
            for i, (w, y) in enumerate(case["updates"])
        ]
        new = after(FedAvg(), state_of(torch.zeros(len(case["expected"]), dtype=torch.float64)), updates)
        np.testing.assert_allclose(new.params["x"], case["expected"], rtol=1e-15)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight_by": "examples"}, (10 * 1 + 30 * 5) / 40),
        ({"weight_by": "steps"}, (4 * 1 + 1 * 5) / 5),
        ({"weight_by": "uniform"}, (1 + 5) / 2),
        ({"weight_by": "uniform", "aggregation_weights": {"a": 3.0}}, (3 * 1 + 5) / 4),
        ({"weight_by": "examples", "aggregation_weights": {"b": 0.5}}, (10 * 1 + 15 * 5) / 25),
    ],
)
def test_weights_are_chosen_explicitly(settings: Mapping[str, Any], expected: float) -> None:
    """Site a: 10 examples, 4 steps, y = 1. Site b: 30 examples, 1 step, y = 5."""
    updates = [
        update_of("a", params([1.0]), examples=10, steps=4),
        update_of("b", params([5.0]), examples=30, steps=1),
    ]
    assert after(FedAvg(**settings), state_of([0.0]), updates).params["x"].item() == pytest.approx(expected, rel=1e-7)


def test_a_tensor_is_averaged_over_the_sites_that_sent_it_and_stays_if_nobody_did() -> None:
    state = ModelState({"a": torch.zeros(1), "b": torch.ones(1)}, {}, {"n": torch.tensor(4)})
    updates = [
        update_of("s", {"params": {"a": torch.tensor([2.0])}, "buffers": {}}, examples=1),
        update_of("t", {"params": {"a": torch.tensor([8.0])}, "buffers": {"n": torch.tensor(7)}}, examples=2),
    ]
    new = after(FedAvg(), state, updates)
    assert (new.params["a"].item(), new.params["b"].item(), new.buffers["n"].item()) == (6.0, 1.0, 7)


def test_buffers_take_the_plain_weighted_mean_whatever_the_server_learning_rate() -> None:
    """Floats rounded once, integers half to even (2·1 + 1·4)/3 = 2, booleans by majority with ties true."""
    old = {"f": torch.zeros(1), "n": torch.tensor([0, 0]), "b": torch.tensor([False, True])}
    sent = [
        {"f": torch.tensor([1.0]), "n": torch.tensor([1, 0]), "b": torch.tensor([True, False])},
        {"f": torch.tensor([4.0]), "n": torch.tensor([4, 3]), "b": torch.tensor([False, False])},
    ]
    for weights, expected in (((2, 1), ([2.0], [2, 1], [True, False])), ((1, 1), ([2.5], [2, 2], [True, False]))):
        updates = [
            update_of(s, {"params": {"x": torch.zeros(1)}, "buffers": b}, examples=w)
            for s, b, w in zip("ab", sent, weights, strict=True)
        ]
        new = after(FedAvg(server_learning_rate=0.1), state_of([0.0], old), updates).buffers
        assert (new["f"].tolist(), new["n"].tolist(), new["b"].tolist()) == expected
        assert {n: t.dtype for n, t in new.items()} == {n: t.dtype for n, t in old.items()}


def test_frozen_parameters_are_held_or_averaged() -> None:
    state = state_of([0.0], frozen=[1.0])
    updates = [update_of("a", params([2.0])), update_of("b", params([4.0]))]
    assert after(FedAvg(), state, updates).frozen["f"] is state.frozen["f"]
    assert "frozen" not in FedAvg().expects(state, "train")
    sent = [update_of(s, {**params([v]), "frozen": {"f": torch.tensor([v])}}) for s, v in (("a", 2.0), ("b", 4.0))]
    averaging = FedAvg(frozen="average")
    assert after(averaging, state, sent).frozen["f"].tolist() == [3.0]
    assert averaging.expects(state, "train")["frozen"].keys() == {"f"}


# -- what it equals ----------------------------------------------------------------------------------------------------
FLOAT32 = st.floats(-(2.0**120), 2.0**120, width=32)


@settings(max_examples=100)
@given(st.lists(st.tuples(FLOAT32, FLOAT32), min_size=1, max_size=20), st.integers(1, 10**6))
def test_one_site_at_rate_one_gives_back_its_model_to_the_bit(pairs: list[tuple[float, float]], examples: int) -> None:
    x, y = (torch.tensor(v) for v in zip(*pairs, strict=True))
    new = after(FedAvg(), state_of(x), [update_of("a", params(y), examples)])
    assert same_bits(new.params["x"], y)


@settings(max_examples=100)
@given(FLOAT32, FLOAT32)
def test_a_difference_loses_at_most_a_unit_in_the_last_place(start: float, end: float) -> None:
    x, y = torch.tensor([start]), torch.tensor([end])
    algorithm = FedAvg(transfer="delta")
    update, _ = algorithm.site_update(
        {"params": {"x": x}, "frozen": {}, "buffers": {}},
        NoState(),
        Returns(y),
        RoundContext("r", 0, "train", "a", 1, 0),
    )
    assert update.tensors["delta"]["x"].dtype == torch.float32 and "params" not in update.tensors
    found = after(algorithm, state_of(x), [update]).params["x"].item()
    unit = Fraction(float(np.spacing(np.float32(max(abs(start), abs(end))))))
    assert abs(Fraction(found) - Fraction(end)) <= unit


class Returns:
    """A training that ends at a given model."""

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def train(self, broadcast: Groups, ctx: RoundContext, **wishes: object) -> LocalResult:
        return LocalResult({"x": self.y}, {}, {}, examples=1, steps=1, lr_sum=0.1)


class Quadratic(TorchWorkload):
    """f(x) = a/2 ‖x − b‖²; one batch, always the same."""

    def __init__(self, a: float, b: Sequence[float]) -> None:
        self.a, self.b = a, torch.tensor(b)

    def __len__(self) -> int:
        return 1

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[None]:
        return [None]

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        return self.a / 2 * ((model.x - self.b.to(model.x.dtype)) ** 2).sum()  # type: ignore[operator]


class Point(nn.Module):
    def __init__(self, x: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x, dtype=dtype))


def rounds(
    algorithm: FedAvg,
    model: Callable[[], nn.Module],
    works: Sequence[TorchWorkload],
    training: LocalTraining,
    count: int,
) -> Tensor:
    """x after so many rounds of the algorithm over these sites."""
    start = model()
    state = algorithm.init(
        {"params": {n: p.detach() for n, p in start.named_parameters()}, "frozen": {}, "buffers": {}}
    )
    for number in range(count):
        broadcast, updates = algorithm.broadcast(state, "train"), []
        for i, work in enumerate(works):
            context = RoundContext("r", number, "train", f"site-{i}", len(works), derive_seed(number, i))
            trainer = LocalTrainer(model, work, training, Numerics())
            updates.append(algorithm.site_update(broadcast, NoState(), trainer, context)[0])
        state = after(algorithm, state, updates)
    return state.params["x"]


def test_one_site_and_one_step_are_one_step_of_torchs_sgd() -> None:
    work, lr = Quadratic(3.0, [1.0, -2.0, 0.1]), 0.07
    found = rounds(
        FedAvg(), lambda: Point([0.3, 0.2, 0.1]), [work], LocalTraining(steps=1, optimizer=Optimizer(lr=lr)), 1
    )
    model = Point([0.3, 0.2, 0.1])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    work.loss(model, None).backward()
    optimizer.step()
    assert same_bits(found, model.x.detach())


def test_equal_sites_are_one_site() -> None:
    """Three sites with the same data send the same y; Σ pᵢ yᵢ = y, but for the rounding of three thirds."""
    training = LocalTraining(steps=3, optimizer=Optimizer(lr=0.1, momentum=0.9))
    works = [Quadratic(2.0, [1.0, 5.0])] * 3
    one, three = (rounds(FedAvg(), lambda: Point([0.0, 0.0]), works[:n], training, 2) for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-6, atol=0)


def test_it_settles_where_the_sites_pulls_cancel() -> None:
    """K steps of SGD on aᵢ/2 (x − bᵢ)² give yᵢ − x = cᵢ (bᵢ − x) with cᵢ = 1 − (1 − η aᵢ)ᴷ.

    So x* solves Σ pᵢ cᵢ (bᵢ − x*) = 0: x* = Σ pᵢ cᵢ bᵢ / Σ pᵢ cᵢ, not the optimum Σ pᵢ aᵢ bᵢ / Σ pᵢ aᵢ of the sum.
    """
    eta, k, sites = 0.1, 4, [(1.0, 3.0, 1.0), (5.0, -1.0, 3.0)]  # aᵢ, bᵢ, weight
    algorithm = FedAvg(weight_by="uniform", aggregation_weights={f"site-{i}": w for i, (_, _, w) in enumerate(sites)})
    training = LocalTraining(steps=k, optimizer=Optimizer(lr=eta))
    works = [Quadratic(a, [b]) for a, b, _ in sites]
    found = rounds(algorithm, lambda: Point([10.0], torch.float64), works, training, 60)
    pulls = [(w * (1 - (1 - eta * a) ** k), b) for a, b, w in sites]
    assert found.item() == pytest.approx(sum(c * b for c, b in pulls) / sum(c for c, _ in pulls), rel=1e-9)


# -- bad settings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bad",
    [
        {"server_learning_rate": -1},
        {"server_learning_rate": float("nan")},
        {"weight_by": "loss"},
        {"aggregation_weights": {"a": 0}},
        {"aggregation_weights": {"a": float("inf")}},
        {"transfer": "float16"},
        {"momentum": 0.9},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        FedAvg(**bad)


# -- what the engine asks ----------------------------------------------------------------------------------------------
VARIANTS = {
    "as published": FedAvg(),
    "differences": FedAvg(transfer="delta", server_learning_rate=0.5),
    "all averaged": FedAvg(frozen="average", weight_by="steps", aggregation_weights={"site-2": 0.25}),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found
