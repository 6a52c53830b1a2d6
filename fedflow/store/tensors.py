"""Tensors in the store: one group of tensors is one safetensors object, named by its content."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedflow.errors import ObjectCorrupt
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.types import Tensors, TensorSpec

__all__ = ["read_spec", "read_tensors", "write_tensors"]

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip
_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit


def write_tensors(store: ObjectStore, prefix: str, tensors: Tensors) -> ObjectRef:
    """Write `tensors` as one object below `prefix`. The same tensors give the same bytes, and are written once."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
    return store.write(prefix, data, ".safetensors")


def read_tensors(store: ObjectStore, ref: ObjectRef, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of `ref`, in name order; with `names` only those among them, reading only their byte ranges.

    Every byte read is verified. Raises ObjectCorrupt where the object is not what `ref` says or not safetensors.
    """
    header, base = _header(store, ref)
    wanted = sorted(header if names is None else header.keys() & set(names))
    blocks = store.read_ranges(ref, [(base + start, base + end) for _, start, end in (header[n] for n in wanted)])
    return {name: _tensor(block, header[name][0]) for name, block in zip(wanted, blocks, strict=True)}


def read_spec(store: ObjectStore, ref: ObjectRef) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes in `ref`, from its header alone. Raises ObjectCorrupt."""
    return {name: spec for name, (spec, _, _) in _header(store, ref)[0].items()}


def _tensor(data: bytes | memoryview, spec: TensorSpec) -> Tensor:
    if not len(data):
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(spec.dtype).reshape(spec.shape)


def _header(store: ObjectStore, ref: ObjectRef) -> tuple[dict[str, tuple[TensorSpec, int, int]], int]:
    """(name -> (spec, start, end) relative to the data, offset of the data)."""
    if ref.size < 8:
        raise ObjectCorrupt(f"{ref.key}: found {ref.size} bytes, expected a safetensors file of at least 8")
    length = int.from_bytes(store.read(ref, 0, 8), "little")
    if length > min(_MAX_HEADER, ref.size - 8):
        raise ObjectCorrupt(
            f"{ref.key}: found a header of {length} bytes, expected at most {min(_MAX_HEADER, ref.size - 8)}"
        )
    try:
        entries = json.loads(bytes(store.read(ref, 8, 8 + length)))
        parsed = {
            name: _entry(entry, ref.size - 8 - length) for name, entry in entries.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ObjectCorrupt(f"{ref.key}: found a header that is not safetensors: {error}") from error
    return parsed, 8 + length


def _entry(entry: Mapping[str, Any], available: int) -> tuple[TensorSpec, int, int]:
    spec = TensorSpec(tuple(int(n) for n in entry["shape"]), _DTYPES[entry["dtype"]])
    start, end = (int(n) for n in entry["data_offsets"])
    count = 1
    for n in spec.shape:
        if n < 0:
            raise ValueError(f"shape {spec.shape}")
        count *= n
    if not (0 <= start <= end <= available) or end - start != count * spec.dtype.itemsize:
        raise ValueError(f"offsets {start} to {end} for {spec}, with {available} bytes of data")
    return spec, start, end
