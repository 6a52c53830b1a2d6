"""Fewer numbers: the largest, or some drawn at random. What is not sent now is sent later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedflow.transforms.differences import Lossy
from fedflow.types import TensorSpec

__all__ = ["RandomK", "TopK"]


class _Sparse(Lossy):
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """k / n of every tensor, at least one number; 1 % is usual, 0.1 % in Lin et al., arXiv:1712.01887."""
    error_feedback: bool = True
    """Without it what is not sent is lost, and training may not converge (Karimireddy et al., arXiv:1901.09847)."""

    def count(self, numbers: int) -> int:
        return min(numbers, max(1, math.ceil(self.fraction * numbers)))

    def scattered(self, rows: Tensor, values: Tensor, spec: TensorSpec) -> Tensor:
        flat = torch.zeros(math.prod(spec.shape), dtype=spec.dtype)
        flat[rows.long()] = values
        return flat.reshape(spec.shape)


class TopK(_Sparse):
    """The k numbers that are largest in absolute value, with their places (Stich et al., arXiv:1809.07599)."""

    kind: Literal["top_k"] = "top_k"

    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        k = self.count(math.prod(spec.shape))
        return {"values": TensorSpec((k,), spec.dtype), "places": TensorSpec((k,), torch.int32)}

    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        flat = tensor.reshape(-1)
        order = flat.abs().sort(descending=True, stable=True).indices
        places = order[: self.count(len(flat))].sort().values
        return {"values": flat[places], "places": places.to(torch.int32)}

    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        places, numbers = parts["places"], math.prod(spec.shape)
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= numbers or bool((places.diff() <= 0).any())):
            raise ValueError(f"places: found some that are not ascending in 0 … {numbers - 1}")
        return self.scattered(places, parts["values"], spec)


class RandomK(_Sparse):
    """k numbers at places that both ends draw from round, site and tensor, so that no places travel (Stich et al.,
    arXiv:1809.07599)."""

    kind: Literal["random_k"] = "random_k"

    def _places(self, numbers: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(numbers, generator=generator)[: self.count(numbers)].sort().values

    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        return {"values": TensorSpec((self.count(math.prod(spec.shape)),), spec.dtype)}

    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        return {"values": tensor.reshape(-1)[self._places(tensor.numel(), seed)]}

    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        return self.scattered(self._places(math.prod(spec.shape), seed), parts["values"], spec)
