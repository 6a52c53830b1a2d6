"""Fewer bits a number: 16-bit floats, and integers of 8 or 4 bits with a scale a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedflow.tensors import cast
from fedflow.transforms.differences import Lossy, blocks
from fedflow.types import Groups, TensorSpec

__all__ = ["Cast", "Quantise"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Cast(Lossy):
    """Differences as 16-bit floats: half the bytes. float16 keeps 11 bits of each number and overflows at 65504, which
    excludes the update; bfloat16 keeps 8 bits and float32's range."""

    kind: Literal["cast"] = "cast"
    by_rows: ClassVar[bool] = True
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    broadcast: bool = False
    """Whether what sites receive is cast too: they then train from the rounded model."""

    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        return {self.dtype: TensorSpec(spec.shape, _DTYPES[self.dtype])}

    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        return {self.dtype: cast(tensor.double(), _DTYPES[self.dtype])}

    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        return parts[self.dtype].to(spec.dtype)

    def at_broadcast(self, groups: Groups) -> Groups:
        if not self.broadcast:
            return groups
        narrow, found = _DTYPES[self.dtype], dict(groups)
        for dtype in (torch.float32, torch.float64):
            for group, tensors in groups.items():
                of = {n: t for n, t in tensors.items() if t.dtype == dtype}
                if of:
                    found[group] = {n: t for n, t in found[group].items() if n not in of}
                    found[_cast_from(group, dtype)] = {n: cast(t.double(), narrow) for n, t in of.items()}
        return found

    def at_arrival(self, groups: Groups) -> Groups:
        if not self.broadcast:
            return groups
        found = {g: dict(t) for g, t in groups.items() if _CAST not in g}
        for dtype in (torch.float32, torch.float64):
            for group in list(found):
                for name, tensor in groups.get(_cast_from(group, dtype), {}).items():
                    found[group][name] = tensor.to(dtype)
        return found


_CAST = ".from-"


def _cast_from(group: str, dtype: torch.dtype) -> str:
    return f"{group}{_CAST}{str(dtype).removeprefix('torch.')}"


class Quantise(Lossy):
    """Differences as integers of 8 or 4 bits: a block of numbers shares a scale, so that |d − decoded(d)| is at most
    max|d| / 254 (8 bits) or max|d| / 14 (4 bits) over the block."""

    kind: Literal["quantise"] = "quantise"
    bits: Literal[4, 8] = 8
    block: Annotated[int, Field(ge=2, le=65536, multiple_of=2, strict=True)] = 256
    """Numbers that share a scale; ours. Smaller: more exact, and more bytes of scales."""

    @property
    def _most(self) -> int:
        """Codes are −most … most."""
        return 127 if self.bits == 8 else 7

    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        count = math.ceil(math.prod(spec.shape) / self.block)
        codes = (count, self.block) if self.bits == 8 else (count, self.block // 2)
        return {
            f"int{self.bits}": TensorSpec(codes, torch.int8 if self.bits == 8 else torch.uint8),
            "scales": TensorSpec((count,), spec.dtype),
        }

    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        values = blocks(tensor, self.block)
        scales = cast(values.abs().amax(dim=1) / self._most, tensor.dtype)
        divisors = torch.where(scales > 0, scales.double(), 1.0)
        codes = (values / divisors[:, None]).round().clamp(-self._most, self._most).to(torch.int8)
        return {f"int{self.bits}": codes if self.bits == 8 else _packed(codes), "scales": scales}

    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        codes = parts[f"int{self.bits}"] if self.bits == 8 else _unpacked(parts["int4"])
        values = codes.double() * parts["scales"].double()[:, None]
        return cast(values.reshape(-1)[: math.prod(spec.shape)].reshape(spec.shape), spec.dtype)


def _packed(codes: Tensor) -> Tensor:
    """Two codes −8 … 7 a byte."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] * 16 + nibbles[:, 1::2]


def _unpacked(packed: Tensor) -> Tensor:
    nibbles = torch.stack([packed // 16, packed % 16], dim=2).reshape(len(packed), 2 * packed.shape[1])
    return nibbles.to(torch.int8) - 8
