"""Arithmetic on named tensors: against numpy, exact fractions, and the tree of sums written out."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedflow.tensors import (
    BLOCK,
    Packed,
    WeightedMean,
    cast,
    interpolate,
    model_digest,
    non_finite,
    pairs,
    raw_bytes,
    select,
    subtract,
)

properties = settings(max_examples=60)

WEIGHTS = st.integers(1, 1000)
NAMES = ("a", "b", "c")
Update = tuple[float, dict[str, Tensor]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(raw_bytes(a)) == bytes(raw_bytes(b))


def mean_of(updates: list[Update]) -> dict[str, Tensor]:
    mean = WeightedMean()
    for weight, tensors in updates:
        mean.add(tensors, weight)
    return mean.means()


@st.composite
def ragged_updates(draw: st.DrawFn, dtype: torch.dtype = torch.float32, most: int = 2 * BLOCK + 3) -> list[Update]:
    """Updates of which each has only some of the names."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    present = random.random((draw(st.integers(1, most)), len(NAMES))) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    updates: list[Update] = []
    for row in present:
        names = [name for name, there in zip(NAMES, row, strict=True) if there]
        tensors = {n: torch.from_numpy(random.normal(0, 100, 1 + NAMES.index(n))).to(dtype) for n in names}
        updates.append(
            (random.integers(1, 1000).item() if random.random() < 0.5 else random.uniform(0.01, 100), tensors)
        )
    return updates


# -- the mean ----------------------------------------------------------------------------------------------------------
@properties
@given(ragged_updates())
def test_every_name_is_averaged_over_the_updates_that_have_it(updates: list[Update]) -> None:
    means = mean_of(updates)
    for name in NAMES:
        present = [(w, t[name].numpy().astype(np.float64)) for w, t in updates if name in t]
        assert (name in means) == bool(present)
        if present:
            expected = np.average([t for _, t in present], axis=0, weights=[w for w, _ in present])
            np.testing.assert_allclose(means[name].double().numpy(), expected, rtol=1e-12, atol=1e-12)


@properties
@given(ragged_updates())
def test_the_sum_runs_over_blocks_of_sixteen_updates_and_then_over_the_blocks(updates: list[Update]) -> None:
    """Bitwise: partial_k = Σ_{i in block k} wᵢ·tᵢ from left to right in float64; mean = (Σ_k partial_k) / Σ wᵢ."""
    means = mean_of(updates)
    for name in NAMES:
        partials, weight, count = list[Any](), 0.0, 0
        for block in (updates[i : i + 16] for i in range(0, len(updates), 16)):
            terms = [t[name].numpy().astype(np.float64) * w for w, t in block if name in t]
            if terms:
                partials.append(sum(terms[1:], start=terms[0]))
        for w, t in updates:
            if name in t:
                weight, count = weight + w, count + 1
        if count > 1:
            expected = torch.from_numpy(sum(partials[1:], start=partials[0]) / weight)
            assert same_bits(means[name], expected)


@properties
@given(ragged_updates(), st.sets(st.sampled_from(NAMES)))
def test_names_may_be_averaged_in_any_partition(updates: list[Update], part: set[str]) -> None:
    def only(names: set[str]) -> list[Update]:
        return [(w, {n: t for n, t in tensors.items() if n in names}) for w, tensors in updates]

    whole = mean_of(updates)
    parts = mean_of(only(part)) | mean_of(only(set(NAMES) - part))
    assert whole.keys() == parts.keys() and all(same_bits(whole[n], parts[n]) for n in whole)


@properties
@given(st.integers(0, 2**32), st.integers(1, 3 * BLOCK), st.sets(st.integers(0, 3 * BLOCK)))
def test_blocks_may_be_summed_apart(seed: int, count: int, ragged: set[int]) -> None:
    """Whole blocks of packed updates, and of what is left one update after the other; some updates lack a name."""
    random = np.random.default_rng(seed)
    updates: list[Update] = []
    for i in range(count):
        flat = torch.from_numpy(random.normal(0, 100, 8)).float()
        packed = Packed({torch.float32: flat}, {"a": (torch.float32, 0, (5,)), "b": (torch.float32, 5, (3,))})
        updates.append((random.uniform(0.01, 100), {"b": packed["b"]} if i in ragged else packed))
    mean = WeightedMean()
    for start in range(0, count, BLOCK):
        block = updates[start : start + BLOCK]
        if len(block) > 1 and all(isinstance(tensors, Packed) for _, tensors in block):
            apart = WeightedMean()
            for weight, tensors in block:
                apart.add(tensors, weight)
            sums = apart.sums()
            assert sums is not None
            mean.add_block(sums, [weight for weight, _ in block])
        else:
            for weight, tensors in block:
                mean.add(tensors, weight)
    found, wanted = mean.means(), mean_of([(weight, dict(tensors)) for weight, tensors in updates])
    assert found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)


@properties
@given(st.integers(0, 2**32), WEIGHTS | st.floats(1e-300, 1e300), st.sampled_from(["f2", "f4", "f8", "i8", "u1", "?"]))
def test_a_mean_of_one_update_is_that_update_to_the_bit(seed: int, weight: float, dtype: str) -> None:
    raw = np.random.default_rng(seed).bytes(64)
    values = np.frombuffer(bytes(b & 1 for b in raw) if dtype == "?" else raw, dtype=dtype)
    tensor = torch.from_numpy(values.copy())
    (mean,) = mean_of([(weight, {"a": tensor})]).values()
    assert same_bits(cast(mean, tensor.dtype), tensor)


def test_threads_change_no_bit_of_a_mean() -> None:
    tensors = [torch.randn(100_003, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    means, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            means.append(mean_of([(i + 0.1, {"a": t}) for i, t in enumerate(tensors)])["a"])
    finally:
        torch.set_num_threads(before)
    assert same_bits(*means)


def test_the_mean_matches_numbers_computed_independently() -> None:
    for case in json.loads((Path(__file__).parent / "vectors/fedavg.json").read_text()):
        updates = [(w, {"a": torch.tensor(t, dtype=torch.float64)}) for w, t in case["updates"]]
        torch.testing.assert_close(
            mean_of(updates)["a"], torch.tensor(case["expected"], dtype=torch.float64), rtol=1e-15, atol=0
        )


def pack(tensors: dict[str, Tensor], gap: int) -> Packed:
    """`tensors` in a flat one a dtype, with `gap` elements between them."""
    flats, places = {}, {}
    for dtype in {t.dtype for t in tensors.values()}:
        parts: list[Tensor] = []
        for name, tensor in tensors.items():
            if tensor.dtype == dtype:
                places[name] = (dtype, sum(map(len, parts)), tuple(tensor.shape))
                parts += [tensor.reshape(-1), torch.full((gap,), 7, dtype=dtype)]
        flats[dtype] = torch.cat(parts)
    return Packed(flats, places)


@properties
@given(st.lists(st.tuples(WEIGHTS, st.booleans()), min_size=1, max_size=40), st.integers(0, 3), st.booleans())
def test_packed_updates_have_the_mean_of_those_that_are_not(
    updates: list[tuple[int, bool]], gap: int, all_packed: bool
) -> None:
    """Some of them packed, all of them, none."""
    random = torch.Generator().manual_seed(len(updates))

    def drawn() -> dict[str, Tensor]:
        some = {"a": torch.randn(3, 2, generator=random), "b": torch.randn((), generator=random).double()}
        return some | {"c": torch.randint(9, (2,), generator=random), "d": torch.empty(0, 4), "e": torch.ones(1) / 3}

    plain = [(weight, drawn()) for weight, _ in updates]
    mixed = [
        (weight, pack(tensors, gap) if all_packed or chosen else tensors)
        for (weight, tensors), (_, chosen) in zip(plain, updates, strict=True)
    ]
    found, wanted = mean_of(mixed), mean_of(plain)
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) and found[name].shape == wanted[name].shape for name in wanted)


def test_a_name_with_two_dtypes_is_refused() -> None:
    mean = WeightedMean()
    mean.add({"a": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"a: torch\.float64 after torch\.float32"):
        mean.add({"a": torch.zeros(1, dtype=torch.float64)}, 1)


@properties
@given(st.lists(st.tuples(WEIGHTS, st.integers(-(2**40), 2**40)), min_size=2, max_size=40))
def test_integers_are_averaged_and_rounded_half_to_even(updates: list[tuple[int, int]]) -> None:
    """Exact: |Σ wᵢ nᵢ| < 2⁵³, and a quotient of such integers lies on a half only if it is one."""
    (mean,) = mean_of([(w, {"a": torch.tensor([n])}) for w, n in updates]).values()
    exact = Fraction(sum(w * n for w, n in updates), sum(w for w, _ in updates))
    assert cast(mean, torch.int64).item() == round(exact)  # Python rounds fractions half to even


@pytest.mark.parametrize(("values", "expected"), [((0, 1), 0), ((1, 2), 2), ((2, 3), 2), ((-1, 0), 0), ((-1, -2), -2)])
def test_half_an_integer_goes_to_the_even_one(values: tuple[int, int], expected: int) -> None:
    for dtype in (torch.int64, torch.int32, torch.int8):
        mean = mean_of([(3, {"a": torch.tensor([v], dtype=dtype)}) for v in values])["a"]
        assert cast(mean, dtype).item() == expected


@properties
@given(st.lists(st.tuples(WEIGHTS, st.booleans()), min_size=1, max_size=40))
def test_booleans_go_with_the_majority_of_weight_and_ties_are_true(updates: list[tuple[int, bool]]) -> None:
    (mean,) = mean_of([(w, {"a": torch.tensor([value])}) for w, value in updates]).values()
    yes, no = (sum(w for w, value in updates if value is wanted) for wanted in (True, False))
    assert cast(mean, torch.bool).item() is (yes >= no)


# -- rounding ----------------------------------------------------------------------------------------------------------
def rounded(x: float, precision: int, smallest: int, largest: float) -> float:
    """x to `precision` significant bits, half to even, above the unit 2^smallest; by exact fractions."""
    exponent = int(np.frexp(x)[1])
    unit = Fraction(2) ** max(exponent - precision, smallest)
    value = round(Fraction(x) / unit) * unit
    return float(np.copysign(np.inf, x)) if abs(value) > largest else float(np.copysign(float(value), x))


NARROW = {  # significant bits, exponent of the smallest unit, largest number
    torch.bfloat16: (8, -133, float(torch.finfo(torch.bfloat16).max)),
    torch.float16: (11, -24, float(torch.finfo(torch.float16).max)),
}


@st.composite
def near_a_half(draw: st.DrawFn, dtype: torch.dtype) -> float:
    """Midway between two neighbours of `dtype`, or a few float64 steps beside it: where rounding twice goes wrong."""
    low = torch.tensor([draw(st.integers(-(2**15), 2**15 - 1))], dtype=torch.int16).view(dtype)
    high = torch.nextafter(low, torch.tensor([torch.inf], dtype=dtype))
    middle = (float(low) + float(high)) / 2
    for _ in range(draw(st.integers(0, 2))):
        middle = float(np.nextafter(middle, draw(st.sampled_from([-np.inf, np.inf]))))
    return middle


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    @settings(max_examples=400)
    @given(near_a_half(dtype) | st.floats(allow_nan=False, allow_infinity=False))
    def holds(x: float) -> None:
        if not np.isfinite(x):
            return
        expected = torch.tensor([rounded(x, *NARROW[dtype])], dtype=torch.float64)
        found = cast(torch.tensor([x], dtype=torch.float64), dtype)
        assert found.dtype == dtype and same_bits(found.double(), expected), (x, found, expected)

    holds()


@properties
@given(st.lists(st.floats(-6e4, 6e4, width=16), min_size=2, max_size=20), st.data())
def test_a_mean_of_half_precision_is_that_of_float64_rounded_once(values: list[float], data: st.DataObject) -> None:
    weights = data.draw(st.lists(WEIGHTS, min_size=len(values), max_size=len(values)))
    updates = [(w, {"a": torch.tensor([v], dtype=torch.float16)}) for w, v in zip(weights, values, strict=True)]
    exact = sum(w * Fraction(v) for w, v in zip(weights, values, strict=True)) / sum(weights)
    float64 = float(exact)
    found = cast(mean_of(updates)["a"], torch.float16)
    if Fraction(float64) == exact:  # the mean in float64 has no error of its own
        assert found.item() == rounded(float64, *NARROW[torch.float16])
    np.testing.assert_allclose(found.item(), np.float16(float64), rtol=2**-10, atol=2**-24)


def test_infinities_and_nan_stay_what_they_are() -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(cast(special, dtype).double(), special, equal_nan=True, rtol=0, atol=0)


# -- the rest ----------------------------------------------------------------------------------------------------------
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@properties
@given(FLOATS, FLOATS)
def test_interpolation_is_exact_at_both_ends(start: float, end: float) -> None:
    x, y = torch.tensor([start]), torch.tensor([end])
    assert same_bits(cast(interpolate(x, y, 0.0), x.dtype), x)
    assert same_bits(cast(interpolate(x, y, 1.0), y.dtype), y)


@properties
@given(FLOATS, FLOATS, st.floats(0, 2))
def test_interpolation_is_x_plus_weight_times_the_difference(start: float, end: float, weight: float) -> None:
    exact = Fraction(start) + Fraction(weight) * (Fraction(end) - Fraction(start))
    found = interpolate(torch.tensor([start]), torch.tensor([end]), weight).item()
    assert abs(Fraction(found) - exact) <= Fraction(2) ** -50 * (abs(Fraction(start)) + 2 * abs(Fraction(end)))


@properties
@given(FLOATS, FLOATS)
def test_a_difference_is_formed_in_float64_and_rounded_once(a: float, b: float) -> None:
    found = subtract({"x": torch.tensor([a])}, {"x": torch.tensor([b]), "other": torch.zeros(1)}, torch.float32)
    assert found.keys() == {"x"}
    assert same_bits(found["x"], torch.from_numpy((np.array([a], np.float64) - np.array([b], np.float64)).astype("f4")))


def test_selection_keeps_every_group_and_only_the_names() -> None:
    groups = {"params": {"a": torch.zeros(1), "b": torch.ones(1)}, "buffers": {"b": torch.ones(2)}}
    found = select(groups, ["b", "unknown"])
    assert [(group, name) for group, name, _ in pairs(found)] == [("buffers", "b"), ("params", "b")]
    assert found["params"]["b"] is groups["params"]["b"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_what_is_not_finite_is_named_and_counted(bad: float, dtype: torch.dtype) -> None:
    good = {"a": torch.zeros(3, dtype=dtype), "n": torch.tensor([7])}
    assert non_finite({"params": good}) is None
    found = non_finite({"params": good, "buffers": {"b": torch.tensor([0, bad, bad], dtype=dtype)}})
    assert found == "buffers/b (2 of 3 elements are NaN or infinite)"


# -- the digest of a model ---------------------------------------------------------------------------------------------
def test_equal_models_have_equal_digests_in_any_order_and_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(3)
    again = {"b": b.clone(), "a": a.t().contiguous().t()}  # same values, other strides
    assert model_digest({"a": a, "b": b}) == model_digest(again)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2, 1), "b": torch.ones(2)},
        {"a": torch.zeros(2, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, -0.0]), "b": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.zeros(2)},
    ],
    ids=["name", "missing", "shape", "dtype", "sign of zero", "values"],
)
def test_models_that_differ_in_anything_have_different_digests(other: dict[str, Tensor]) -> None:
    assert model_digest({"a": torch.zeros(2), "b": torch.ones(2)}) != model_digest(other)
