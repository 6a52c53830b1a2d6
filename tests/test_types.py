"""Values that cross a boundary."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedflow.types import TensorSpec, canonical_json, derive_seed, spec_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, min_size=2, max_size=5))
def test_equal_json_values_have_one_byte_string(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_json_has_not_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([bad])


def test_a_seed_is_blake2_of_the_canonical_json() -> None:
    """BLAKE2b with 8 bytes of '["cohort",1,null]', as a big-endian number, without its lowest bit."""
    expected = int.from_bytes(hashlib.blake2b(b'["cohort",1,null]', digest_size=8).digest(), "big") >> 1
    assert derive_seed("cohort", 1, None) == expected < 2**63


@given(
    st.lists(st.integers() | st.text(), min_size=1, max_size=4),
    st.lists(st.integers() | st.text(), min_size=1, max_size=4),
)
def test_seeds_of_different_places_differ(a: list[int | str], b: list[int | str]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_a_spec_says_shape_and_dtype() -> None:
    found = spec_of({"params": {"a": torch.zeros(2, 3)}, "buffers": {"n": torch.tensor(1)}})
    assert found == {
        "params": {"a": TensorSpec((2, 3), torch.float32)},
        "buffers": {"n": TensorSpec((), torch.int64)},
    }
    assert str(found["params"]["a"]) == "float32[2, 3]"
