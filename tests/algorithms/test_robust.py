"""Robust reductions, against their definitions written with numpy, and against attackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.algorithm import Algorithm
from fedflow.algorithms import DiLoCo, FedAvg, FedOpt, Scaffold
from fedflow.errors import QuorumLost, RecipeError
from fedflow.recipe import Recipe
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Update
from tests.algorithms.playing import aggregated
from tests.builders import outcome, recipe, run, trainings

Points = Sequence[Sequence[float]]


def reduce(reduction: Any, points: Points, weights: Sequence[int] | None = None, transfer: Any = "full") -> np.ndarray:
    """The server's model, from 0, after one round in which the sites send these points, over two tensors."""
    algorithm = FedAvg(reduction=reduction, transfer=transfer)
    zero = {n: torch.zeros(len(points[0]), dtype=torch.float64) for n in ("x", "y")}
    state = algorithm.init({"params": zero, "frozen": {}, "buffers": {}})
    group = "delta" if transfer == "delta" else "params"
    updates = [
        Update(
            f"s{i:02}",
            0,
            w,
            1,
            0.1,
            {group: {"x": torch.tensor(p, dtype=torch.float64), "y": -torch.tensor(p, dtype=torch.float64)}},
        )
        for i, (p, w) in enumerate(zip(points, weights or [1] * len(points), strict=True))
    ]
    new = aggregated(algorithm, state, updates).params
    torch.testing.assert_close(new["x"], -new["y"])
    found: np.ndarray = new["x"].numpy()
    return found


def krum(points: Points, f: int) -> int:
    """The definition: the sum of squared distances to the n − f − 2 nearest others is smallest; ties to the first."""
    n = len(points)
    scores = []
    for i, p in enumerate(points):
        others = sorted(float(((np.array(p) - np.array(q)) ** 2).sum()) for j, q in enumerate(points) if j != i)
        scores.append(sum(others[: max(n - f - 2, 1)]))
    return int(np.argmin(scores))


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "bulyan", "geometric_median", "multi_krum"])
def test_no_bit_depends_on_how_many_columns_are_reduced_together(kind: str) -> None:
    """float64, in which nothing is hidden by a rounding."""
    reduction = kind if kind in ("median", "geometric_median") else {"kind": kind, "byzantine": 1}
    points = torch.randn(9, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    chosen = FedAvg(reduction=reduction).reduction
    values, shares = torch.tensor(points, dtype=torch.float64), torch.full((9,), 1 / 9, dtype=torch.float64)
    whole = chosen.combine(values, shares)
    for split in (1, 3, 8, 20, 36):
        apart = torch.cat([chosen.combine(part, shares) for part in values.split([split, 37 - split], dim=1)])
        assert torch.equal(apart, whole)


GRID = st.lists(st.lists(st.integers(-50, 50).map(float), min_size=3, max_size=3), min_size=7, max_size=11)


# -- what they are -----------------------------------------------------------------------------------------------------
def test_a_median_by_hand() -> None:
    assert reduce("median", [[1.0], [9.0], [2.0]]).tolist() == [2.0]
    assert reduce("median", [[1.0], [9.0], [2.0], [4.0]]).tolist() == [3.0]


def test_a_trimmed_mean_by_hand() -> None:
    assert reduce({"kind": "trimmed_mean", "byzantine": 1}, [[1.0], [100.0], [2.0], [-50.0], [6.0]]).tolist() == [3.0]


def test_krum_by_hand() -> None:
    """f = 1, n = 5: 2 nearest. Of 0, 1, 2, 10, 11 the sums are 1+4, 1+1, 1+4, 1+64, 1+81: the second."""
    assert reduce({"kind": "krum", "byzantine": 1}, [[0.0], [1.0], [2.0], [10.0], [11.0]]).tolist() == [1.0]


def test_multi_krum_by_hand() -> None:
    """The scores of the test before: the three best are 0, 1 and 2."""
    points = [[0.0], [1.0], [2.0], [10.0], [11.0]]
    assert reduce({"kind": "multi_krum", "byzantine": 1, "select": 3}, points).tolist() == [1.0]
    assert reduce({"kind": "multi_krum", "byzantine": 1}, points).tolist() == [13 / 4]


def test_a_geometric_median_by_hand() -> None:
    """Of three corners of an equilateral triangle its centre; of weights of which one has more than half, that point."""
    corners = [[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]
    assert reduce("geometric_median", corners) == pytest.approx([0, 0], abs=1e-9)
    assert reduce("geometric_median", corners, weights=[5, 1, 1]) == pytest.approx([1, 0], abs=1e-5)


def test_clipping_by_hand() -> None:
    """Norms over both tensors, (3, 4, −3, −4): 5√2, scaled to √2 with factor 1/5; (0.3, 0.4) stays."""
    clip = {"kind": "norm_clip", "max_norm": 2**0.5}
    assert reduce(clip, [[3.0, 4.0], [0.3, 0.4]], transfer="delta") == pytest.approx([0.45, 0.6])


@settings(max_examples=40)
@given(GRID)
def test_medians_and_trimmed_means_are_numpys(points: Points) -> None:
    np.testing.assert_allclose(reduce("median", points), np.median(points, axis=0))
    trimmed = np.sort(points, axis=0)[2:-2].mean(axis=0)
    np.testing.assert_allclose(reduce({"kind": "trimmed_mean", "byzantine": 2}, points), trimmed)


@settings(max_examples=40)
@given(GRID, st.integers(0, 2))
def test_krum_is_its_definition(points: Points, f: int) -> None:
    assert reduce({"kind": "krum", "byzantine": f}, points).tolist() == list(points[krum(points, f)])


@settings(max_examples=40)
@given(GRID)
def test_bulyan_is_its_definition(points: Points) -> None:
    left, picked = list(points), []
    while len(picked) < len(points) - 2:
        picked.append(left.pop(krum(left, 1)))
    expected = []
    for column in np.array(picked).T:
        near = np.argsort(np.abs(column - np.median(column)), kind="stable")[: len(picked) - 2]
        values = np.sort(np.abs(column - np.median(column)))
        if len(picked) > len(near) and values[len(near) - 1] == values[len(near)]:
            return  # two equally near: either may count
        expected.append(column[near].mean())
    np.testing.assert_allclose(reduce({"kind": "bulyan", "byzantine": 1}, points), expected, atol=1e-12)


@settings(max_examples=30)
@given(GRID)
def test_no_point_near_a_geometric_median_is_better(points: Points) -> None:
    def total(z: np.ndarray) -> float:
        return float(np.linalg.norm(np.array(points) - z, axis=1).sum())

    found = reduce({"kind": "geometric_median", "iterations": 300}, points)
    for step in np.vstack([np.eye(3), -np.eye(3)]):
        assert total(found) <= total(found + 0.05 * step) + 1e-3


def test_the_mean_is_what_it_was() -> None:
    plain, named = (outcome(run(recipe(algorithm=a))) for a in ("fedavg", {"kind": "fedavg", "reduction": "mean"}))
    assert plain == {**named, "updates": plain["updates"], "accepted": plain["accepted"]}


# -- what they are for -------------------------------------------------------------------------------------------------
ROBUST: Mapping[str, Any] = {
    "median": "median",
    "trimmed mean": {"kind": "trimmed_mean", "byzantine": 2},
    "geometric median": "geometric_median",
    "krum": {"kind": "krum", "byzantine": 2},
    "multi-krum": {"kind": "multi_krum", "byzantine": 2},
    "bulyan": {"kind": "bulyan", "byzantine": 2},
}


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", [1e6, -1e6, -3.0])
def test_two_of_eleven_sites_cannot_move_the_model_far(name: str, attack: float) -> None:
    """Nine send about 1, two send the same lie; the mean of them all is off by 2/11 of it."""
    honest = [[1 + 0.01 * i, 1 - 0.01 * i] for i in range(9)]
    points = [*honest, [attack, attack], [attack, attack]]
    assert np.abs(reduce(ROBUST[name], points) - 1).max() < 0.2
    assert np.abs(reduce("mean", points) - 1).max() > 0.5


def test_buffers_of_who_is_left_out_are_left_out_and_integers_stay_integers() -> None:
    algorithm = FedAvg(reduction={"kind": "krum", "byzantine": 0})
    state = algorithm.init({"params": {"x": torch.zeros(1)}, "frozen": {}, "buffers": {"n": torch.tensor(0)}})
    updates = [
        Update(s, 0, 1, 1, 0.1, {"params": {"x": torch.tensor([v])}, "buffers": {"n": torch.tensor(n)}})
        for s, v, n in (("a", 1.0, 3), ("b", 1.1, 5), ("c", 99.0, 7000))
    ]
    new = aggregated(algorithm, state, updates)
    assert (new.params["x"].item(), new.buffers["n"].item(), new.buffers["n"].dtype) == (1.0, 3, torch.int64)


def test_control_variates_keep_their_sum() -> None:
    """SCAFFOLD's c stays the mean of all cᵢ, whatever becomes of the model."""
    algorithm = Scaffold(reduction="median")
    state = algorithm.init({"params": {"x": torch.zeros(1)}, "frozen": {}, "buffers": {}})
    updates = [
        Update(
            s, 0, 1, 1, 0.1, {"params": {"x": torch.tensor([v])}, "buffers": {}, "control": {"x": torch.tensor([v])}}
        )
        for s, v in (("a", 1.0), ("b", 2.0), ("c", 90.0))
    ]
    new = aggregated(algorithm, state, updates)
    assert (new.params["x"].item(), new.control["x"].item()) == (2.0, 93.0)


# -- too few for f -----------------------------------------------------------------------------------------------------
FEW = [
    ({"kind": "trimmed_mean", "byzantine": 2}, 5),
    ({"kind": "krum", "byzantine": 1}, 5),
    ({"kind": "multi_krum", "byzantine": 1, "select": 6}, 6),
    ({"kind": "bulyan", "byzantine": 1}, 7),
]


@pytest.mark.parametrize(("reduction", "least"), FEW, ids=[r["kind"] for r, _ in FEW])
def test_too_few_updates_for_f_are_an_error_before_any_training(reduction: Any, least: int, tmp_path: Any) -> None:
    algorithm = {"kind": "fedavg", "reduction": reduction}
    with pytest.raises(RecipeError, match=rf"quorum \({least - 1}\) must be at least {least}"):
        recipe(algorithm=algorithm, quorum=least - 1)
    with pytest.raises(RecipeError, match=rf"sites_per_round \({least - 1}\) must be at least {least}"):
        recipe(algorithm=algorithm, schedule={"kind": "sampled", "sites_per_round": least - 1})
    workload = {"path": "tests.builders:Blobs", "args": {"log": str(tmp_path / "log")}}
    with pytest.raises(QuorumLost, match=rf"found a quorum of 3, expected at least the {least} updates"):
        run(recipe(algorithm=algorithm, workload=workload))
    assert not trainings(tmp_path / "log")


def test_clipping_needs_differences() -> None:
    clip = {"kind": "norm_clip", "max_norm": 1.0}
    with pytest.raises(ValidationError, match="set transfer: delta"):
        FedAvg(reduction=clip)
    FedAvg(reduction=clip, transfer="delta")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("mode", "reduction"),
        ("krum", "byzantine"),
        ({"kind": "krum", "byzantine": -1}, "byzantine"),
        ({"kind": "trimmed_mean", "byzantine": 1.5}, "byzantine"),
        ({"kind": "norm_clip", "max_norm": 0}, "max_norm"),
        ({"kind": "geometric_median", "smoothing": 0}, "smoothing"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(bad: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        FedAvg(reduction=bad)


VARIANTS: Mapping[str, Algorithm] = {
    "median": FedAvg(reduction="median"),
    "krum": FedOpt(reduction={"kind": "krum", "byzantine": 0}),
    "geometric median": DiLoCo(reduction="geometric_median"),
    "clipping": FedAvg(reduction={"kind": "norm_clip", "max_norm": 0.05}, transfer="delta"),
    "bulyan": Scaffold(reduction={"kind": "bulyan", "byzantine": 0}),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        found: Algorithm = request.param
        return found

    @pytest.fixture
    def recipe(self, algorithm: Algorithm) -> Recipe:
        return recipe(algorithm=algorithm)
