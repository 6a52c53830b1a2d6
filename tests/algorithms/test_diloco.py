"""DiLoCo: the outer optimizer is torch.optim.SGD on g = −Σ pᵢ (yᵢ − x); arXiv:2311.08105, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, LocalResult
from fedflow.algorithms import DiLoCo, FedAvg
from fedflow.algorithms.diloco import DiLoCoState
from fedflow.engine.aggregation import read_model
from fedflow.errors import RecipeError
from fedflow.local import TorchWorkload
from fedflow.recipe import LocalTraining, Optimizer
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Groups, RoundContext, Update
from tests.algorithms.playing import Game, Point, aggregated, quadratic, same_bits, vectors
from tests.builders import head, recipe, run

F64 = torch.float64


def sent(site: str, y: Tensor, examples: int = 1, **buffers: Tensor) -> Update:
    return Update(site, 0, examples, 1, 0.1, {"params": {"x": y}, "buffers": buffers})


def start(x: Tensor, **buffers: Tensor) -> DiLoCoState:
    return DiLoCoState({"x": x}, {}, buffers, momentum={})


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_two_rounds_by_hand() -> None:
    """Nesterov, lr 0.5, β = 0.5; x = 0, deltas of the sites 1 and 3: g = −2, m = −2, direction −3, x = 1.5.

    Then deltas 0 and 2: g = −1, m = −2, direction −2, x = 2.5.
    """
    algorithm = DiLoCo(outer_learning_rate=0.5, outer_momentum=0.5)
    state = start(torch.tensor([0.0]))
    for deltas, x, m in (((1.0, 3.0), 1.5, -2.0), ((0.0, 2.0), 2.5, -2.0)):
        updates = [sent(s, state.params["x"] + d) for s, d in zip("ab", deltas, strict=True)]
        state = aggregated(algorithm, state, updates)
        assert (state.params["x"].item(), state.momentum["x"].item()) == (x, m)


@pytest.mark.parametrize(
    "case", vectors("diloco_outer"), ids=lambda c: f"{c['outer_optimizer']}, {c['aggregation_weighting']}"
)
def test_rounds_computed_independently(case: dict[str, Any]) -> None:
    state = start(torch.tensor(case["theta0"], dtype=F64))
    for deltas, lr, expected in zip(case["rounds"], case["outer_learning_rate"], case["expected_theta"], strict=True):
        algorithm = DiLoCo(
            outer_optimizer=case["outer_optimizer"],
            aggregation_weighting=case["aggregation_weighting"],
            outer_learning_rate=lr,
            outer_momentum=case["outer_momentum"],
        )
        updates = [
            sent(s, state.params["x"] + torch.tensor(d, dtype=F64), case["weights"][s]) for s, d in deltas.items()
        ]
        state = aggregated(algorithm, state, updates)
        assert state.params["x"].tolist() == pytest.approx(expected, rel=1e-9)


class Shift(nn.Module):
    """One parameter, at 0 in the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))


class Shifting(TorchWorkload):
    """One SGD step at rate 1 moves the model by +1 at site-1 and by +3 at site-2."""

    def __init__(self, site: str) -> None:
        self.by = {"site-1": 1.0, "site-2": 3.0}[site]

    def __len__(self) -> int:
        return 1

    def batches(self, batch_size: int, generator: torch.Generator) -> list[None]:
        return [None]

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        return -self.by * model.x.sum()  # type: ignore[operator]


@pytest.mark.parametrize(("algorithm", "expected"), [("diloco", 2 * 1.9 * 0.7), ("fedavg", 2.0)])
def test_from_the_recipe_two_sites_that_shift_by_1_and_3_give_2_66(algorithm: str, expected: float) -> None:
    """m = g = −2, direction g + 0.9 m = −2·1.9, lr 0.7: x = 2.66; the mean is 2."""
    shifting = recipe(
        algorithm=algorithm,
        model=f"{__name__}:Shift",
        workload=f"{__name__}:Shifting",
        rounds=1,
        training={"steps": 1, "optimizer": {"lr": 1.0}},
    )
    journal = run(shifting, sites=["site-1", "site-2"])

    assert read_model(journal, head(journal))["params"]["x"].item() == pytest.approx(expected, rel=1e-6)


# -- the outer step is torch's -----------------------------------------------------------------------------------------
RATES = [0.7, 0.7, 0.35, 1.3, 0.0, 0.7, 0.01]
SETTINGS: Mapping[str, dict[str, Any]] = {
    "sgd": {},
    "sgdm": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("outer", SETTINGS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_seven_rounds_are_torchs_sgd_to_the_bit_also_when_the_rate_changes(outer: Any, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = nn.Parameter(torch.randn(size, dtype=F64, generator=generator))
    optimizer = torch.optim.SGD([x], lr=1.0, **SETTINGS[outer])
    state = start(x.detach().clone())
    for lr in RATES:
        y = state.params["x"] + torch.randn(size, dtype=F64, generator=generator)
        x.grad = -(y - state.params["x"])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        state = aggregated(DiLoCo(outer_optimizer=outer, outer_learning_rate=lr), state, [sent("a", y)])
        assert same_bits(state.params["x"], x.detach())


@pytest.mark.parametrize("outer", SETTINGS)
def test_on_float32_it_is_the_step_in_float64_rounded_once(outer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    state = start(torch.randn(100, generator=generator))
    for lr in RATES:
        x = nn.Parameter(state.params["x"].double())
        optimizer = torch.optim.SGD([x], lr=lr, **SETTINGS[outer])
        if state.momentum:
            optimizer.state[x]["momentum_buffer"] = state.momentum["x"].double()
        y = state.params["x"] + torch.randn(100, generator=generator)
        x.grad = -(y.double() - state.params["x"].double())
        optimizer.step()
        state = aggregated(DiLoCo(outer_optimizer=outer, outer_learning_rate=lr), state, [sent("a", y)])
        assert same_bits(state.params["x"], x.detach().float())
        if outer != "sgd":
            assert same_bits(state.momentum["x"], optimizer.state[x]["momentum_buffer"].float())


# -- what it equals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("weighting", "weight_by"), [("uniform", "uniform"), ("num_samples", "examples")])
def test_plain_sgd_at_rate_1_is_fedavg_of_the_same_weighting(weighting: Any, weight_by: Any) -> None:
    works = {"a": quadratic(1.0, 3.0, 2), "b": quadratic(4.0, -1.0, 6)}
    outer = DiLoCo(outer_optimizer="sgd", outer_learning_rate=1.0, aggregation_weighting=weighting)
    games = [Game(a, works, Point([5.0], torch.float32), steps=4) for a in (outer, FedAvg(weight_by=weight_by))]
    for game in games:
        for _ in range(5):
            game.play()
    assert same_bits(games[0].x, games[1].x)


def test_a_model_at_which_the_sites_pulls_cancel_is_fixed_once_momentum_has_died() -> None:
    """Sites move by cᵢ (bᵢ − x): with any outer optimizer x* = Σ cᵢ bᵢ / Σ cᵢ, cᵢ = 1 − (1 − η aᵢ)ᴴ."""
    sites, eta, H = {"a": (1.0, 3.0), "b": (5.0, -1.0)}, 0.1, 3
    algorithm = DiLoCo(outer_momentum=0.5, local_steps_per_round=H)
    game = Game(
        algorithm,
        {s: quadratic(a, b) for s, (a, b) in sites.items()},
        Point(10.0),
        trainings=dict.fromkeys(sites, LocalTraining(optimizer=Optimizer(lr=eta))),
    )
    for _ in range(50):
        game.play()
    pulls = [(1 - (1 - eta * a) ** H, b) for a, b in sites.values()]
    assert {u.steps for u in game.sent.values()} == {H}
    assert game.x.item() == pytest.approx(sum(c * b for c, b in pulls) / sum(c for c, _ in pulls), rel=1e-9)


def test_the_outer_step_goes_through_differences_even_where_it_is_fedavg(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes means of positions is not called."""

    def forbidden(*given: Any) -> Any:
        raise AssertionError("the mean of the positions was taken")

    for path in ("averaging.moved", "averaging.interpolate", "fedavg.moved"):
        monkeypatch.setattr(f"fedflow.algorithms.{path}", forbidden)
    plain = DiLoCo(outer_optimizer="sgd", outer_learning_rate=1.0)
    new = aggregated(plain, start(torch.zeros(1)), [sent("a", torch.ones(1)), sent("b", torch.full((1,), 3.0))])
    assert new.params["x"].item() == 2.0
    with pytest.raises(AssertionError, match="positions"):
        aggregated(FedAvg(), start(torch.zeros(1)), [sent("a", torch.ones(1))])


def test_every_outer_step_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fedflow"):
        run(recipe(algorithm="diloco", rounds=2, training={"optimizer": {"lr": 0.05}}))
    lines = [r.getMessage() for r in caplog.records if "outer step" in r.getMessage()]
    told = "nesterov, learning rate 0.7, momentum 0.9, weighting uniform, on parameters; 3 updates, 6 tensors"
    assert lines == [f"run run, round {round}: outer step: {told}" for round in range(2)]


# -- which tensors -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("scope", "expected"), [("parameters", 1.0), ("all_floating", 1.33)])
def test_the_outer_optimizer_steps_parameters_or_all_that_is_floating(scope: Any, expected: float) -> None:
    """A buffer goes from 0 to 1: the plain mean is 1, a first Nesterov step 1·1.9·0.7. Integers take the mean."""
    state = start(torch.zeros(1), f=torch.zeros(1), n=torch.tensor(0), b=torch.tensor(False))
    update = sent("a", torch.ones(1), f=torch.ones(1), n=torch.tensor(5), b=torch.tensor(True))
    new = aggregated(DiLoCo(apply_outer_optimizer_to=scope), state, [update])
    assert new.params["x"].item() == pytest.approx(1.33)
    assert new.buffers["f"].item() == pytest.approx(expected)
    assert (new.buffers["n"].item(), new.buffers["b"].item()) == (5, True)
    assert new.momentum.keys() == ({"x"} if scope == "parameters" else {"x", "f"})


@pytest.mark.parametrize(
    "stale", [torch.ones(3), torch.ones(2, dtype=F64), torch.ones(2).half()], ids=["shape", "float64", "float16"]
)
def test_momentum_of_another_shape_or_dtype_starts_anew_and_of_a_tensor_that_is_gone_goes(stale: Tensor) -> None:
    state = DiLoCoState({"x": torch.zeros(2)}, {}, {}, momentum={"x": stale, "gone": torch.ones(2)})
    found = aggregated(DiLoCo(), state, [sent("a", torch.ones(2))])
    fresh = aggregated(DiLoCo(), start(torch.zeros(2)), [sent("a", torch.ones(2))])
    assert same_bits(found.params["x"], fresh.params["x"])
    assert found.momentum.keys() == {"x"} and same_bits(found.momentum["x"], fresh.momentum["x"])


def test_a_tensor_that_nobody_sent_keeps_its_momentum() -> None:
    state = DiLoCoState({"x": torch.zeros(1), "y": torch.zeros(1)}, {}, {}, momentum={"y": torch.ones(1)})
    new = aggregated(DiLoCo(), state, [sent("a", torch.ones(1))])
    assert new.momentum["y"].item() == 1.0 and new.params["y"].item() == 0.0


# -- who counts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weighting", ["uniform", "num_samples"])
def test_an_update_without_examples_does_not_count(weighting: Any) -> None:
    assert DiLoCo(aggregation_weighting=weighting).weight(sent("a", torch.ones(1), examples=0)) == 0


@pytest.mark.parametrize(("weighting", "expected"), [("uniform", (1 + 5) / 2), ("num_samples", (1 * 1 + 3 * 5) / 4)])
def test_updates_weigh_the_same_or_by_examples(weighting: Any, expected: float) -> None:
    algorithm = DiLoCo(outer_optimizer="sgd", outer_learning_rate=1.0, aggregation_weighting=weighting)
    updates = [sent("a", torch.tensor([1.0])), sent("b", torch.tensor([5.0]), examples=3)]
    assert aggregated(algorithm, start(torch.zeros(1)), updates).params["x"].item() == expected


# -- what a site is asked for ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, {"steps": None, "preserve": True}),
        ({"local_steps_per_round": 7, "preserve_optimizer_state": False}, {"steps": 7, "preserve": False}),
    ],
)
def test_the_site_is_asked_for_h_steps_and_to_go_on_where_it_stopped(
    fields: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    wishes: dict[str, Any] = {}

    class Asked:
        def train(self, broadcast: Groups, ctx: RoundContext, **given: Any) -> LocalResult:
            wishes.update(given)
            return LocalResult(broadcast["params"], {}, {}, 1, 1, 0.1)

    Game(DiLoCo(**fields), {"a": Asked()}, Point(0.0)).play()
    assert {name: wishes.get(name) for name in asked} == asked


def test_steps_said_twice_and_differently_are_refused() -> None:
    algorithm = {"kind": "diloco", "local_steps_per_round": 5}
    with pytest.raises(RecipeError, match=r"training\.steps \(6\) contradicts algorithm\.local_steps_per_round \(5\)"):
        recipe(algorithm=algorithm, training={"steps": 6})
    recipe(algorithm=algorithm, training={"steps": 5})


# -- settings ----------------------------------------------------------------------------------------------------------
BAD: Sequence[Mapping[str, Any]] = [
    {"outer_optimizer": "adam"},
    {"outer_optimizer": 1},
    {"outer_learning_rate": -0.1},
    {"outer_learning_rate": float("nan")},
    {"outer_momentum": 1.0},
    {"outer_momentum": -0.1},
    {"aggregation_weighting": "examples"},
    {"apply_outer_optimizer_to": "all"},
    {"local_steps_per_round": 0},
    {"local_steps_per_round": -1},
    {"local_steps_per_round": True},
    {"local_steps_per_round": 2.0},
    {"preserve_optimizer_state": "maybe"},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_setting_is_refused_by_name(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        DiLoCo(**bad)


def test_the_defaults_are_the_papers_and_names_come_in_any_case() -> None:
    found = DiLoCo()
    assert (found.outer_optimizer, found.outer_learning_rate, found.outer_momentum) == ("nesterov", 0.7, 0.9)
    assert DiLoCo.model_validate({"outer_optimizer": "SGDM"}).outer_optimizer == "sgdm"


VARIANTS = {
    "as published": DiLoCo(),
    "all floating, by examples, H": DiLoCo(
        outer_optimizer="sgdm",
        aggregation_weighting="num_samples",
        apply_outer_optimizer_to="all_floating",
        local_steps_per_round=3,
        transfer="delta",
    ),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found
