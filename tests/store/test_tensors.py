"""Tensors in the store: safetensors that the reference library reads, verified, a part at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedflow.errors import ObjectCorrupt
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.tensors import read_spec, read_tensors, write_tensors
from fedflow.tensors import model_digest
from fedflow.types import spec_of

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
]


def tensors_of_all_kinds() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {f"{dtype}": torch.randint(0, 2, (3, 5), generator=random).to(dtype) for dtype in DTYPES}
    found |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 4), "ünï/code": torch.ones(1)}
    return found | {"transposed": torch.arange(6.0).reshape(2, 3).t(), "part": torch.arange(9.0)[2:5]}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path))


def test_tensors_of_all_kinds_come_back_to_the_bit(store: ObjectStore) -> None:
    given = tensors_of_all_kinds()
    ref = write_tensors(store, "objects", given)
    assert model_digest(read_tensors(store, ref)) == model_digest(given)
    assert read_spec(store, ref) == spec_of({"g": given})["g"]


def test_the_reference_library_reads_what_is_written_and_the_other_way_round(store: ObjectStore) -> None:
    given = tensors_of_all_kinds()
    ref = write_tensors(store, "objects", given)
    assert model_digest(safetensors.torch.load(store.get(ref.key))) == model_digest(given)
    theirs = safetensors.torch.save({n: t.contiguous() for n, t in given.items()}, metadata={"format": "pt"})
    assert model_digest(read_tensors(store, store.write("objects", theirs))) == model_digest(given)


def test_equal_tensors_are_one_object_in_any_order_and_layout(store: ObjectStore) -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    first = write_tensors(store, "objects", {"a": a, "b": b})
    assert write_tensors(store, "objects", {"b": b, "a": a.t().contiguous().t()}) == first
    assert store.list() == [first.key]


@settings(max_examples=40)
@given(st.sets(st.sampled_from([*tensors_of_all_kinds(), "unknown"])))
def test_a_part_of_the_names_is_read_without_the_rest(names: set[str]) -> None:
    """With chunks of 64 bytes, so that parts lie in other chunks: what is not asked for may be damaged."""
    given = tensors_of_all_kinds()
    store = ObjectStore("memory://parts")
    data = safetensors.torch.save({n: t.contiguous() for n, t in sorted(given.items())})
    ref = store.write("objects", data, chunk_size=64)
    found = read_tensors(store, ref, names)
    assert list(found) == sorted(names & given.keys())
    assert model_digest(found) == model_digest({n: given[n] for n in found})


def header(entries: Any, data: bytes = b"\0" * 16) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (2**40).to_bytes(8, "little") + b"{}",
        header(b"not json"),
        header(b"[1]"),
        header(b"[" * 100_000),
        header({"a": 1}),
        header({"a": {"dtype": "F32"}}),
        header(entry(dtype="F33")),
        header(entry(dtype="O")),
        header(entry(shape=(5,))),
        header(entry(shape=(-2, -2))),
        header(entry(shape=("x",))),
        header(entry(offsets=(0, 1 << 40))),
        header(entry(offsets=(-4, 12))),
        header(entry(offsets=(16, 0))),
        header(entry(offsets=(0,))),
        header(entry(shape=(2**62, 4), offsets=(0, 0))),
    ],
    ids=range(18),
)
def test_what_is_no_safetensors_file_is_named(store: ObjectStore, data: bytes) -> None:
    ref = store.write("objects", data, ".safetensors")
    for read in (read_tensors, read_spec):
        with pytest.raises(ObjectCorrupt, match=ref.key):
            read(store, ref)


def test_a_reference_that_does_not_match_its_object_is_named(store: ObjectStore) -> None:
    ref = write_tensors(store, "objects", {"a": torch.ones(3)})
    other = ObjectRef.of(ref.key, b"x" * ref.size)
    with pytest.raises(ObjectCorrupt, match=ref.key):
        read_tensors(store, other)
