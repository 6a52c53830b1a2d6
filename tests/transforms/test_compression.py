"""Compression: what is lost is bounded, or sent later; what travels is smaller by what is promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, Transform
from fedflow.algorithms import DiLoCo, FedAvg, Scaffold, StreamingDiLoCo
from fedflow.engine import site
from fedflow.engine.aggregation import read_model
from fedflow.errors import RecipeError, UpdateInvalid
from fedflow.local import TorchWorkload
from fedflow.recipe import Recipe
from fedflow.store.tensors import read_tensors
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.transforms import Cast, Quantise, RandomK, TopK
from fedflow.types import RoundContext, Spec, Update, spec_of
from tests.builders import head, outcome, recipe, run, trainings

CONTEXT = RoundContext("run", 0, "train", "a", 1, 0)
FLOAT = st.floats(-1e6, 1e6, width=32)


def update_of(delta: Any, round: int = 0, **others: Tensor) -> Update:
    groups = {"delta": {"x": torch.as_tensor(delta)}, "buffers": others}
    return Update("a", round, 1, 1, 0.1, groups)


def there(transform: Transform, update: Update, state: Any = None) -> tuple[Update, Any]:
    """(as it is sent, state after)"""
    broadcast = {"params": {}, "frozen": {}, "buffers": {}}
    return transform.at_site(update, transform.init_site(broadcast) if state is None else state, CONTEXT)


def and_back(transform: Transform, update: Update) -> Tensor:
    """What the server reads of the difference."""
    spec: Spec = spec_of(update.tensors)
    sent, _ = there(transform, update)
    assert spec_of(sent.tensors) == transform.encoded(spec), "what is sent must be what the server expects"
    found = transform.decode(sent, spec)
    assert spec_of(found.tensors) == spec
    return found.tensors["delta"]["x"]


# -- integers ----------------------------------------------------------------------------------------------------------
@settings(max_examples=100)
@given(st.lists(FLOAT, min_size=1, max_size=40), st.sampled_from([(8, 254), (4, 14)]), st.sampled_from([2, 4, 16]))
def test_the_error_of_a_block_is_bounded_by_its_largest_number(
    values: list[float], bits: tuple[Any, int], block: int
) -> None:
    """|x − decoded| ≤ max|x| / 254 (8 bits) or / 14 (4 bits), and then one rounding to float32."""
    x = torch.tensor(values)
    found = and_back(Quantise(bits=bits[0], block=block), update_of(x))
    for now, then in zip(x.double().split(block), found.double().split(block), strict=True):
        largest = float(now.abs().max())
        assert float((now - then).abs().max()) <= largest / bits[1] + largest * 2.0**-23 + 1e-44


def test_integers_by_hand() -> None:
    """8 bits, a block of 4: max 127, so the scale is 1: numbers are rounded. 4 bits: max 7; half to even."""
    assert and_back(Quantise(block=4), update_of([127.0, 0.4, -3.6, 0.0])).tolist() == [127.0, 0.0, -4.0, 0.0]
    assert and_back(Quantise(bits=4, block=4), update_of([7.0, -7.0, 2.5, -0.6])).tolist() == [7.0, -7.0, 2.0, -1.0]


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 7), (0,)], ids=str)
@pytest.mark.parametrize("transform", [Quantise(block=4), Quantise(bits=4, block=4), Cast()], ids=str)
def test_shapes_and_zeros_come_back(shape: tuple[int, ...], transform: Transform) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(and_back(transform, update_of(zero)), zero)


# -- 16 bits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_cast_rounds_to_nearest_once(dtype: Any, wide: torch.dtype) -> None:
    x = torch.randn(1000, dtype=wide, generator=torch.Generator().manual_seed(0))
    found = and_back(Cast(dtype=dtype), update_of(x))
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert float(((found - x) / x).abs().max()) <= unit


def test_integers_and_booleans_of_a_group_travel_as_they_are() -> None:
    update = update_of([1.0, 2.0], n=torch.tensor(7), b=torch.tensor(True), f=torch.tensor([0.1]))
    transform = Cast(groups=["delta", "buffers"])
    sent, _ = there(transform, update)
    assert {g: set(t) for g, t in sent.tensors.items()} == {
        "delta.bfloat16": {"x"},
        "buffers": {"n", "b"},
        "buffers.bfloat16": {"f"},
    }
    found = transform.decode(sent, spec_of(update.tensors))
    assert (int(found.tensors["buffers"]["n"]), bool(found.tensors["buffers"]["b"])) == (7, True)


# -- fewer numbers -----------------------------------------------------------------------------------------------------
def test_the_largest_by_hand() -> None:
    """Two of six, by absolute value; of equals the first."""
    assert and_back(TopK(fraction=1 / 3), update_of([1.0, -5.0, 3.0, -3.0, 0.0, 2.0])).tolist() == [0, -5, 3, 0, 0, 0]


def test_random_numbers_are_others_every_round_and_known_to_both_ends() -> None:
    x = torch.arange(1.0, 101.0)
    transform = RandomK(fraction=0.1)
    found = [and_back(transform, update_of(x, round)) for round in range(2)]
    for kept in found:
        assert int((kept != 0).sum()) == 10 and torch.equal(kept[kept != 0], x[kept != 0])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "transform",
    [TopK(fraction=0.1), RandomK(fraction=0.2), Quantise(bits=4, error_feedback=True), Cast(error_feedback=True)],
    ids=lambda t: t.kind,
)
def test_what_was_not_sent_is_remembered_and_sent_later(transform: Transform) -> None:
    """Σ sent + what is kept = Σ differences, after every round: nothing is ever lost."""
    generator = torch.Generator().manual_seed(0)
    wanted = sent = torch.zeros(30, dtype=torch.float64)
    state = None
    for round in range(12):
        update = update_of(torch.randn(30, generator=generator), round)
        wanted = wanted + update.tensors["delta"]["x"].double()
        encoded, state = there(transform, update, state)
        sent = sent + transform.decode(encoded, spec_of(update.tensors)).tensors["delta"]["x"].double()
        torch.testing.assert_close(sent + state.residual["delta/x"].double(), wanted, rtol=0, atol=1e-5)
    assert float((sent - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("transform", [Quantise(), TopK(error_feedback=False)], ids=lambda t: t.kind)
def test_without_error_feedback_nothing_is_remembered(transform: Transform) -> None:
    assert not transform.SiteState.__dataclass_fields__


@pytest.mark.parametrize("places", [[0, 6], [-1, 2], [2, 2], [3, 1]], ids=str)
def test_places_that_cannot_be_are_an_invalid_update(places: list[int]) -> None:
    update = update_of([1.0, -5.0, 3.0, -3.0, 0.0, 2.0])
    sent, _ = there(TopK(fraction=1 / 3), update)
    forged = {**sent.tensors, "delta.places": {"x": torch.tensor(places, dtype=torch.int32)}}
    with pytest.raises(UpdateInvalid, match="places") as caught:
        TopK(fraction=1 / 3).decode(replace(sent, tensors=forged), spec_of(update.tensors))
    assert caught.value.site == "a"


def test_scales_that_overflow_are_an_invalid_update() -> None:
    update = update_of([1.0, 2.0])
    sent, _ = there(Quantise(block=2), update)
    forged = {**sent.tensors, "delta.scales": {"x": torch.tensor([3e38])}}
    with pytest.raises(UpdateInvalid, match="not finite once decoded"):
        Quantise(block=2).decode(replace(sent, tensors=forged), spec_of(update.tensors))


# -- through the store -------------------------------------------------------------------------------------------------
class Wide(nn.Linear):
    """8 thousand parameters."""

    def __init__(self) -> None:
        super().__init__(4, 2000)


FEDAVG: Mapping[str, Any] = {"kind": "fedavg", "transfer": "delta"}
SAVED: list[tuple[Any, float]] = [
    ("cast", 2.0),
    ("quantise", 4 / (1 + 4 / 256)),
    ({"kind": "quantise", "bits": 4}, 8 / (1 + 8 / 256)),
    ({"kind": "top_k", "fraction": 0.01}, 50.0),
    ({"kind": "random_k", "fraction": 0.01}, 100.0),
]


@pytest.mark.parametrize(("transform", "times"), SAVED, ids=str)
def test_so_many_times_fewer_bytes_are_in_the_store(transform: Any, times: float) -> None:
    """As counted there, headers of some hundred bytes aside."""
    sizes = []
    for transforms in ([], [transform]):
        small = recipe(algorithm=FEDAVG, model=f"{__name__}:Wide", transforms=transforms, rounds=1)
        manifest = head(run(small, sites=["site-1"]))
        sizes.append(manifest.contributors["site-1"].bytes)
    headers = 900
    assert sizes[0] / times - 100 <= sizes[1] <= sizes[0] / times + headers


class Square(nn.Linear):
    """512 × 512 and no bias."""

    def __init__(self) -> None:
        super().__init__(512, 512, bias=False)


class Drifting(TorchWorkload):
    """A step of SGD at rate 1 adds 1 to every parameter, wherever it starts."""

    def __len__(self) -> int:
        return 1

    def batches(self, batch_size: int, generator: torch.Generator) -> list[None]:
        return [None]

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        return -sum(p.sum() for p in model.parameters())  # type: ignore[return-value]


BROADCAST = [
    ("cast", {}, 2.0),
    ("quantise", {"bits": 8}, 4 / (1 + 4 / 256)),
    ("quantise", {"bits": 4}, 8 / (1 + 8 / 256)),
]


@pytest.mark.parametrize(("kind", "options", "times"), BROADCAST, ids=str)
@pytest.mark.parametrize("algorithm", ["fedavg", "streaming_diloco"])
def test_sites_read_so_many_times_fewer_bytes_and_train_from_what_they_decode(
    kind: str, options: Mapping[str, Any], times: float, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes counted as a site reads them from the store. delta = y − x̂ is 1 for all that is decoded to x̂, and the server's x
    goes from x to x + 1: to x̂ + 1 it would if what was lost were in the model."""
    read: list[int] = []
    transform = {"kind": kind, "broadcast": True, "groups": [], **options}
    fields = {"kind": algorithm, "transfer": "delta"} | (
        {"fragments": 1, "tau": 0, "outer_optimizer": "sgd", "outer_learning_rate": 1.0}
        if algorithm == "streaming_diloco"
        else {}
    )
    small = recipe(
        algorithm=fields,
        model=f"{__name__}:Square",
        workload=f"{__name__}:Drifting",
        transforms=[transform],
        rounds=1,
        training={"steps": 1, "optimizer": {"lr": 1.0}},
    )

    def counted(store: Any, ref: Any, *names: Any) -> Any:
        assert store.size(ref.key) == ref.size
        read.append(ref.size)
        return read_tensors(store, ref, *names)

    monkeypatch.setattr(site, "read_tensors", counted)
    journal = run(small, sites=["site-1"])
    assert 512 * 512 * 4 / times <= sum(read) <= 512 * 512 * 4 / times + 1000
    assert head(journal).contributors["site-1"].received == sum(read)
    first = journal.manifest(-1, "initial")
    assert first is not None
    (x,), (now,) = (read_model(journal, m)["params"].values() for m in (first, head(journal)))
    assert float((now - x - 1).abs().max()) < 1e-6
    sent = {group: read_tensors(journal.store, ref) for group, ref in first.broadcast.items()}
    arrived = journal.recipe().transforms[0].at_arrival(sent)
    (decoded,) = [t for group in arrived.keys() - {"frozen", "buffers"} for t in arrived[group].values()]
    assert float((x - decoded).abs().max()) > 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_site_starts_from_is_within_the_bound(bits: Any) -> None:
    groups = {
        "params": {
            "w": torch.randn(3, 50, generator=torch.Generator().manual_seed(0)),
            "n": torch.tensor(3),
            "s": torch.tensor(0.3),
        },
        "frozen": {"f": torch.randn(4)},
        "buffers": {"b": torch.rand(4).double()},
    }
    transform = Quantise(bits=bits, block=32, broadcast=True)
    found = transform.at_arrival(transform.at_broadcast(groups))
    assert spec_of(found) == spec_of(groups)
    for group in ("frozen", "buffers"):
        assert all(torch.equal(found[group][n], t) for n, t in groups[group].items())
    w, decoded = (g["params"]["w"].double().flatten().split(32) for g in (groups, found))
    for now, then in zip(w, decoded, strict=True):
        assert float((now - then).abs().max()) <= float(now.abs().max()) * (1 / (254 if bits == 8 else 14) + 2.0**-23)
    assert not torch.equal(found["params"]["w"], groups["params"]["w"])


@pytest.mark.parametrize("transform", ["cast", "quantise"])
def test_a_rounded_broadcast_needs_differences(transform: str) -> None:
    fields = {"algorithm": "fedavg", "transforms": [{"kind": transform, "broadcast": True, "groups": []}]}
    with pytest.raises(
        RecipeError, match=rf"transforms\.{transform}\.broadcast: found True.*algorithm\.transfer: delta"
    ):
        run(recipe(**fields))


def test_a_training_that_moves_nothing_sends_nothing_even_from_a_rounded_broadcast() -> None:
    """The learning rate is 0 in float32: y = the rounded x, so y − x is 0 and the model stays."""
    still = recipe(
        algorithm=FEDAVG,
        model=f"{__name__}:Wide",
        transforms=[{"kind": "cast", "broadcast": True}, {"kind": "quantise", "groups": ["delta.bfloat16"]}],
        training={"optimizer": {"lr": 1e-60}},
    )
    journal = run(still)
    first, last = journal.manifest(-1, "initial"), head(journal)
    assert first is not None and first.model_digest == last.model_digest


@pytest.mark.parametrize("kind", ["cast", "quantise"])
def test_a_model_trained_with_it_stays_near_the_one_without(kind: str) -> None:
    journals = [run(recipe(algorithm=FEDAVG, transforms=t, rounds=3)) for t in ([], [kind])]
    plain, lossy = (read_model(j, head(j))["params"] for j in journals)
    for name, x in plain.items():
        assert float((lossy[name] - x).abs().max()) < 0.05 * float(x.abs().max()) + 1e-3


def test_positions_cannot_be_compressed_and_that_is_said_before_any_training(tmp_path: Any) -> None:
    workload = {"path": "tests.builders:Blobs", "args": {"log": str(tmp_path / "log")}}
    with pytest.raises(RecipeError, match=r"transforms\.quantise\.groups: found 'delta'.*algorithm\.transfer: delta"):
        run(recipe(algorithm="fedavg", transforms=["quantise"], workload=workload))
    assert not trainings(tmp_path / "log")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("zip", "'zip'"),
        ({"kind": "quantise", "bits": 2}, "bits"),
        ({"kind": "quantise", "block": 3}, "block"),
        ({"kind": "cast", "dtype": "int8"}, "dtype"),
        ({"kind": "top_k", "fraction": 0}, "fraction"),
        ({"kind": "random_k", "k": 3}, "unknown field"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(bad: Any, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        recipe(algorithm=FEDAVG, transforms=[bad])


VARIANTS: Mapping[str, tuple[Algorithm, list[Any]]] = {
    "16 bits both ways": (Scaffold(transfer="delta"), [Cast(broadcast=True, groups=["delta", "control"])]),
    "8 bits of the largest": (
        FedAvg(transfer="delta"),
        [TopK(fraction=0.3), Quantise(groups=["delta.values"], block=4)],
    ),
    "8 bits both ways": (Scaffold(transfer="delta"), [Quantise(broadcast=True, block=16)]),
    "4 bits both ways, by fragments": (
        StreamingDiLoCo(transfer="delta", pattern="sequential"),
        [Quantise(bits=4, broadcast=True, block=8, error_feedback=True)],
    ),
    "4 bits": (DiLoCo(transfer="delta"), [Quantise(bits=4, block=8, error_feedback=True)]),
    "random, robust": (FedAvg(transfer="delta", reduction="geometric_median"), [RandomK(fraction=0.5)]),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
    def variant(self, request: pytest.FixtureRequest) -> tuple[Algorithm, list[Any]]:
        found: tuple[Algorithm, list[Any]] = request.param
        return found

    @pytest.fixture
    def algorithm(self, variant: tuple[Algorithm, list[Any]]) -> Algorithm:
        return variant[0]

    @pytest.fixture
    def recipe(self, variant: tuple[Algorithm, list[Any]]) -> Recipe:
        return recipe(algorithm=variant[0], transforms=variant[1])


def test_the_order_of_arrival_and_a_second_start_change_no_bit() -> None:
    """With residuals at the sites."""
    fields: dict[str, Any] = {"algorithm": FEDAVG, "transforms": ["top_k"], "rounds": 3}
    expected = outcome(run(recipe(**fields)))
    run(recipe(**{**fields, "rounds": 1}), "memory://resumed")
    assert outcome(run(recipe(**fields), "memory://resumed"))["model"] == expected["model"]
