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

from fedflow.errors import FedflowError, ObjectCorrupt
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.tensors import StoredTensors, TensorReader, file_order, read_spec, read_tensors, write_tensors
from fedflow.tensors import model_digest
from fedflow.types import TensorSpec, spec_of

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
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


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def any_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name, shape, dtype in draw(st.lists(st.tuples(names, shapes, st.sampled_from(DTYPES)), max_size=8)):
        random = torch.Generator().manual_seed(len(found))
        found[name] = torch.randint(0, 2, shape, generator=random).to(dtype)
    return found


@settings(max_examples=200)
@given(any_tensors())
def test_every_byte_is_the_reference_librarys(given: dict[str, Tensor]) -> None:
    store = ObjectStore("memory://bytes")
    assert store.get(write_tensors(store, "objects", given).key) == safetensors.torch.save(given)


@settings(max_examples=100)
@given(any_tensors(), st.data())
def test_parts_in_any_order_are_those_of_the_whole(given: dict[str, Tensor], data: st.DataObject) -> None:
    """Rows of tensors, forwards and backwards, in chunks of 64 bytes."""
    store = ObjectStore("memory://parts")
    reader = TensorReader(store, store.write("objects", safetensors.torch.save(given), chunk_size=64))
    assert list(reader.spec) == file_order(spec_of({"g": given})["g"])
    stored = StoredTensors(store, reader.ref)
    assert list(stored) == list(reader.spec) == list(stored.spec) and "unknown" not in stored
    own = {name: torch.empty_like(tensor) for name, tensor in given.items()}
    stored.read_into(own)
    assert model_digest(own) == model_digest(given)
    for name in data.draw(st.lists(st.sampled_from(sorted(given)), max_size=8) if given else st.just([])):
        rows, whole = None, given[name]
        if whole.dim():
            rows = tuple(sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2))))
        found = reader.read({name: rows, "unknown": None})
        expected = whole if rows is None else whole[slice(*rows)]
        assert model_digest({name: stored[name]}) == model_digest({name: whole})
        assert list(found) == [name] and model_digest(found) == model_digest({name: expected})
    reader.finish()


def test_damage_in_what_was_read_is_found_at_the_latest_at_the_end(store: ObjectStore) -> None:
    tensors = {name: torch.zeros(1000, dtype=torch.uint8) for name in "abc"}
    data = safetensors.torch.save(tensors)
    ref = store.write("objects", data, chunk_size=len(data) - 10)  # the last chunk: the end of c
    store.put(ref.key, data[:-1] + b"!", mode="overwrite")
    reader = TensorReader(store, ref)
    reader.read({"a": None, "b": None})
    reader.finish()
    with pytest.raises(ObjectCorrupt, match="in chunk 1 of 2"):
        reader.read({"c": None})
    store.put(ref.key, data[:-11] + b"!" + data[-10:], mode="overwrite")
    with pytest.raises(ObjectCorrupt, match="in chunk 0 of 2"):
        TensorReader(store, ref)


def test_a_hundred_thousand_names_are_one_object(store: ObjectStore) -> None:
    given = {f"layer.{i}.weight": torch.tensor([float(i)]) for i in range(100_000)}
    ref = write_tensors(store, "objects", given)
    reader = TensorReader(store, ref)
    assert reader.read({"layer.77777.weight": None})["layer.77777.weight"].item() == 77777
    assert len(reader.spec) == 100_000


def test_what_the_format_has_no_name_for_is_refused(store: ObjectStore) -> None:
    for tensors in ({"a": torch.zeros(2, dtype=torch.complex128)}, {"__metadata__": torch.zeros(2)}):
        with pytest.raises(FedflowError, match="found a tensor of.*expected one of U64, .*convert it, or rename it"):
            write_tensors(store, "objects", tensors)
    assert store.list() == []


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
        header(entry(shape=(True, 4))),
        header(entry(shape=(2, 2.0))),
        header(entry(shape=(0, 2**80), offsets=(0, 0)), b""),
        header(entry(shape=(3,), offsets=(0, 12))),  # 4 bytes are nobody's
        header(entry(shape=(3,), offsets=(4, 16))),
        header(entry(shape=(2,), offsets=(0, 8)) | {"b": entry(shape=(3,), offsets=(4, 16))["a"]}),  # overlapping
        header(entry() | {"b": entry()["a"]}),
        header({}),
        header(entry(shape=[2**62] * 50_000)),  # whose product would take minutes
        header(entry(shape=("\ud800",))),  # which no record can hold
        header(entry(dtype="F" * 3_000_000)),
        header(json.dumps(entry()).encode("utf-16")),
        header(b" " + json.dumps(entry()).encode()),
        header(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}'
        ),
        header(b'{"a":{"dtype":"F32","dtype":"I32","shape":[4],"data_offsets":[0,16]}}'),
    ],
    ids=range(33),
)
def test_what_is_no_safetensors_file_is_named(store: ObjectStore, data: bytes) -> None:
    ref = store.write("objects", data, ".safetensors")
    for read in (read_tensors, read_spec):
        with pytest.raises(ObjectCorrupt, match=ref.key) as caught:
            read(store, ref)
        assert len(str(caught.value).encode()) < 2000


def test_a_header_larger_than_it_can_be_is_not_parsed(store: ObjectStore) -> None:
    ref = store.write("objects", header(json.dumps(entry()).encode().ljust(1000)), ".safetensors")
    assert list(read_spec(store, ref)) == ["a"]
    with pytest.raises(ObjectCorrupt, match="found a header of 1000 bytes, expected at most 999"):
        read_spec(store, ref, largest_header=999)


def test_a_reference_that_does_not_match_its_object_is_named(store: ObjectStore) -> None:
    ref = write_tensors(store, "objects", {"a": torch.ones(3)})
    other = ObjectRef.of(ref.key, b"x" * ref.size)
    with pytest.raises(ObjectCorrupt, match=ref.key):
        read_tensors(store, other)


@settings(max_examples=300)
@given(st.data())
def test_a_file_that_was_tampered_with_is_refused_or_is_as_large_as_it_says(data: st.DataObject) -> None:
    """What a header claims takes no memory beyond the file's own size."""
    whole = safetensors.torch.save({"a": torch.zeros(5), "b": torch.ones(2, 3, dtype=torch.int8)})
    end = 8 + int.from_bytes(whole[:8], "little")
    tampered = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end - 1))
        tampered[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789,:[]{}"'))
    tampered = tampered[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]
    store = ObjectStore("memory://tampered")
    ref = store.write("objects", bytes(tampered))
    try:
        found = read_spec(store, ref)
    except ObjectCorrupt as error:
        assert ref.key in str(error)
        return
    bytes_of = sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in found.values())
    assert bytes_of <= len(tampered)
    assert spec_of({"g": read_tensors(store, ref)})["g"] == found == dict(found)
    assert all(isinstance(spec, TensorSpec) for spec in found.values())
