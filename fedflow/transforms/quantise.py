"""Fewer bits a number: 16-bit floats, and integers of 8 or 4 bits with a scale a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedflow.errors import RecipeError, field_error
from fedflow.tensors import LazyGroups, cast
from fedflow.transforms.differences import ANY, Lossy, blocks, joined
from fedflow.types import Groups, Spec, Tensors, TensorSpec

__all__ = ["Cast", "Quantise"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class _Narrow(Lossy):
    """A lossy transform that can also encode what sites receive.

    Sites then train from the decoded model x̂, and send y − x̂, which the server adds to its own exact x: what is lost on the
    way to the sites moves the point at which they take gradients, and is never in the model.
    """

    exact: ClassVar[frozenset[str]] = frozenset()
    """Groups of a broadcast that are sent as they are."""
    broadcast: bool = False
    """Whether what sites receive is encoded too: they then train from the rounded model. Needs `algorithm.transfer: delta`."""

    def encoded(self, spec: Spec) -> Spec:
        if self.broadcast and "params" in spec:
            field, expected = f"transforms.{self.kind}.broadcast", "false where sites send positions"
            fix = "set algorithm.transfer: delta, or what is lost of a broadcast would be in the model"
            raise RecipeError(field_error(field, self.broadcast, expected, fix))
        return super().encoded(spec)

    def at_broadcast(self, groups: Groups) -> Groups:
        if not self.broadcast:
            return groups
        found: dict[str, Tensors] = dict(groups)
        for group, tensors in groups.items():
            wide = {n: t for n, t in tensors.items() if t.dtype in _WIDE and t.numel()}
            if wide and group not in self.exact:
                parts = {n: {**self.encode(t, 0), _LIKE: t.new_empty((0, *t.shape))} for n, t in wide.items()}
                found[group] = {n: t for n, t in tensors.items() if n not in wide}
                for part in (*self.parts(ANY), _LIKE):
                    found[joined(group, part)] = {n: of[part] for n, of in parts.items()}
        return found

    def at_arrival(self, groups: Groups) -> Groups:
        if not self.broadcast:
            return groups
        parts = (*self.parts(ANY), _LIKE)
        encoded = {group for group in groups if joined(group, parts[0]) in groups}
        sent = {joined(group, part) for group in encoded for part in parts}

        def decoded(group: str) -> Tensors:
            if group not in encoded:
                return groups[group]
            *values, likes = (groups[joined(group, part)] for part in parts)
            found = dict(groups[group])
            for name, like in likes.items():
                of = {part: tensors[name] for part, tensors in zip(parts, values, strict=False)}
                found[name] = self.restore(of, TensorSpec(tuple(like.shape[1:]), like.dtype), 0)
            return found

        return LazyGroups([group for group in groups if group not in sent], decoded)


_WIDE = (torch.float32, torch.float64)
_LIKE = "like"
"""A part of no bytes that says the shape and the dtype: empty, with the shape after a 0."""


class Cast(_Narrow):
    """Differences as 16-bit floats: half the bytes. float16 keeps 11 bits of each number and overflows at 65504, which
    excludes the update; bfloat16 keeps 8 bits and float32's range. Of a broadcast, all but buffers: a late update's are moved by
    the difference of two broadcasts."""

    exact: ClassVar[frozenset[str]] = frozenset({"buffers"})

    kind: Literal["cast"] = "cast"
    dtype: Literal["float16", "bfloat16"] = "bfloat16"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Of a broadcast not: beside the numbers it has the shape of the whole."""
        return not self.broadcast

    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        return {self.dtype: TensorSpec(spec.shape, _DTYPES[self.dtype])}

    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        return {self.dtype: cast(tensor.double(), _DTYPES[self.dtype])}

    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        return parts[self.dtype].to(spec.dtype)


class Quantise(_Narrow):
    """Differences as integers of 8 or 4 bits: a block of numbers shares a scale, so that |d − decoded(d)| is at most
    max|d| / 254 (8 bits) or max|d| / 14 (4 bits) over the block. Of a broadcast, all but frozen parameters and buffers."""

    exact: ClassVar[frozenset[str]] = frozenset({"frozen", "buffers"})

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
