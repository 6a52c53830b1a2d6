"""Arithmetic on named tensors, with bits that depend on nothing but the values and the order of the sites."""

from __future__ import annotations

import cmath
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from fedflow.memory import fresh
from fedflow.types import Groups, Tensors, canonical_json

__all__ = [
    "BLOCK",
    "CHUNK",
    "LazyGroups",
    "ModelDigest",
    "Packed",
    "Stored",
    "WeightedMean",
    "cast",
    "dtype_name",
    "interpolate",
    "model_digest",
    "non_finite",
    "pairs",
    "raw_bytes",
    "select",
    "squared_norm",
    "subtract",
]

BLOCK = 16
"""Contributors a block of the reduction tree: sums run over a block in site order, then over the blocks in order."""

_NARROW = (torch.float16, torch.bfloat16)


class Stored(Mapping[str, Tensor], ABC):
    """Tensors that lie elsewhere, each read when it is asked for."""

    @abstractmethod
    def read_into(self, own: Tensors) -> None:
        """Fill `own`, of the same names, shapes and dtypes, without a second copy in memory."""


class Packed(Mapping[str, Tensor]):
    """Tensors that lie in a few flat ones, so that what is done to all of them is done to those.

    flats:  dtype -> one-dimensional tensor; of sums, float64 whatever the dtype is
    places: name -> dtype, first element and shape of its tensor there. What lies between them is of no matter.
    """

    def __init__(self, flats: Mapping[torch.dtype, Tensor], places: Mapping[str, Place]) -> None:
        self.flats, self.places = flats, places
        self._views: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        found = self._views.get(name)
        if found is None:
            dtype, start, shape = self.places[name]
            found = self._views[name] = self.flats[dtype][start : start + math.prod(shape)].view(shape)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


Place = tuple[torch.dtype, int, tuple[int, ...]]


class WeightedMean:
    """Σ wᵢ·tᵢ / Σ wᵢ per name, in float64, over a fixed tree: blocks of `BLOCK` updates in the order of `add`.

    A name is averaged over the updates that have it. A mean of one update is that update, to the bit.
    Memory: one update and two float64 sums at most, whatever the number of updates.
    Updates that are all packed in the same way are averaged as they are packed, to the same bits.
    """

    def __init__(self) -> None:
        self._places: Mapping[str, Place] | None = None
        self._total: dict[str, Tensor] = {}
        self._block: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}  # sums of blocks that are closed: memory for the next one's
        self._scratch: Tensor | None = None
        self._weight: dict[str, float] = {}
        self._single: dict[str, Tensor | None] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._shape: dict[str, torch.Size] = {}
        self._added = 0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one update. Raises ValueError where a name comes with another shape or dtype than before."""
        if isinstance(tensors, Packed) and (not self._added or tensors.places == self._places):
            self._places = tensors.places
            tensors = {dtype_name(dtype): flat for dtype, flat in tensors.flats.items()}
        elif self._places is not None:
            self._unpack(self._places)
        for name, tensor in tensors.items():
            if self._dtype.setdefault(name, tensor.dtype) != tensor.dtype:
                raise ValueError(f"{name}: {tensor.dtype} after {self._dtype[name]}")
            if name in self._shape and self._shape[name] != tensor.shape:
                raise ValueError(f"{name}: {list(tensor.shape)} after {list(self._shape[name])}")
            self._shape[name] = tensor.shape
            if name in self._block:
                self._add_scaled(self._block[name], tensor, weight)
            else:
                room = self._spare.pop(name) if name in self._spare else fresh(tensor.shape, torch.float64)
                self._block[name] = room.copy_(tensor).mul_(weight)
            self._weight[name] = self._weight.get(name, 0.0) + weight
            self._single[name] = None if name in self._single else tensor
        self._added += 1
        if self._added % BLOCK == 0:
            self._close_block()

    def sums(self) -> Packed | None:
        """Σ wᵢ·tᵢ of what was added, at most one block of updates; None where they were not packed alike."""
        if self._places is None:
            return None
        sums = self._block or self._total
        return Packed({dtype: sums[dtype_name(dtype)] for dtype, _, _ in self._places.values()}, self._places)

    def add_block(self, sums: Packed, weights: Sequence[float]) -> None:
        """Add a block of several updates, of which `sums` is what `sums` of another mean gave; to the bits of `add` with each.
        Raises ValueError after a block that is not whole."""
        if self._added % BLOCK:
            raise ValueError(
                f"a block after {self._added % BLOCK} updates of another one, expected whole blocks of {BLOCK}"
            )
        if not self._added:
            self._places = sums.places
        elif self._places is not None and sums.places != self._places:
            self._unpack(self._places)
        if self._places is not None:
            parts = {dtype_name(dtype): (dtype, flat) for dtype, flat in sums.flats.items()}
        else:
            parts = {name: (sums.places[name][0], tensor) for name, tensor in sums.items()}
        for name, (dtype, tensor) in parts.items():
            self._dtype.setdefault(name, dtype)
            self._shape.setdefault(name, tensor.shape)
            self._total[name] = self._total[name].add_(tensor) if name in self._total else tensor.clone()
            self._weight[name] = reduce(operator.add, weights, self._weight.get(name, 0.0))  # sum() rounds otherwise
            self._single[name] = None
        self._added += len(weights)

    def partial(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Σ wᵢ·tᵢ in float64 and Σ wᵢ of every name, for `add_partial` of another mean. To be asked once."""
        self._close_block()
        if self._places is not None:
            self._unpack(self._places)
        return self._total, self._weight

    def add_partial(self, sums: Tensors, weights: Mapping[str, float]) -> None:
        """Add what `partial` of another mean gave, as a block of its own behind those that were added. No update comes after it."""
        self._close_block()
        if self._places is not None:
            self._unpack(self._places)
        for name, tensor in sums.items():
            self._total[name] = self._total[name].add_(tensor) if name in self._total else tensor.clone()
            self._weight[name] = self._weight.get(name, 0.0) + weights[name]
            self._single[name] = None

    def _unpack(self, places: Mapping[str, Place]) -> None:
        """From now on by name."""

        def views(flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(Packed({d: flats[dtype_name(d)] for d, _, _ in places.values()}, places)) if flats else {}

        names = {name: dtype_name(dtype) for name, (dtype, _, _) in places.items()}
        singles = {flat: one for flat, one in self._single.items() if one is not None}
        self._places, self._total, self._block, self._spare = None, views(self._total), views(self._block), {}
        self._single = {**dict.fromkeys(places), **views(singles)}
        self._weight = {name: self._weight[flat] for name, flat in names.items()}
        self._dtype = {name: dtype for name, (dtype, _, _) in places.items()}
        self._shape = {name: torch.Size(shape) for name, (_, _, shape) in places.items()}

    def _add_scaled(self, total: Tensor, tensor: Tensor, weight: float) -> None:
        """total ← total + weight·tensor in float64, product and sum each rounded once; without temporaries of their size."""
        if self._scratch is None or len(self._scratch) < min(_TILE, tensor.numel()):
            self._scratch = torch.empty(min(_TILE, tensor.numel()), dtype=torch.float64)
        exact = tensor.dtype == torch.float32 and float(weight).is_integer() and abs(weight) <= _EXACT
        if tensor.numel() <= _TILE:
            wide = self._scratch[: tensor.numel()]
            _add_tile(total.view(-1), wide.copy_(tensor.reshape(-1)), weight, exact)
            return
        for into, tile in zip(torch.split(total.view(-1), _TILE), torch.split(tensor.reshape(-1), _TILE), strict=True):
            _add_tile(into, self._scratch[: len(tile)].copy_(tile), weight, exact)

    def _close_block(self) -> None:
        for name, partial in self._block.items():
            if name in self._total:
                self._total[name].add_(partial)
                self._spare[name] = partial
            else:
                self._total[name] = partial
        self._block = {}

    def means(self) -> dict[str, Tensor]:
        """The means in float64, not yet rounded (see `cast`); a mean of one update as that update sent it. To be asked once."""
        self._close_block()
        total, self._total, self._spare = self._total, {}, {}
        found = {
            name: total[name].div_(self._weight[name]) if (one := self._single[name]) is None else one for name in total
        }
        if self._places is None:
            return found
        flats = {dtype: found[dtype_name(dtype)] for dtype, _, _ in self._places.values()}
        return dict(Packed(flats, self._places))


_TILE = 1 << 16  # elements whose float64 values fit into a core's cache
_EXACT = 1 << 29  # whole numbers up to here times a float32 are exact in float64: a fused sum has nothing else to round


def _add_tile(total: Tensor, wide: Tensor, weight: float, exact: bool) -> None:
    if exact:
        total.add_(wide, alpha=weight)
    else:
        total.add_(wide.mul_(weight))


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (float64) in `dtype`, rounded once: integers half to even, booleans true from 0.5 up."""
    if value.dtype == dtype:
        return value.clone()
    if dtype == torch.bool:
        return value >= 0.5
    if not dtype.is_floating_point:
        return value.round().to(dtype)
    if dtype in _NARROW:
        return _round_to_odd(value).to(dtype)  # float64 -> float32 -> dtype would round twice
    return value.to(dtype)


def _round_to_odd(value: Tensor) -> Tensor:
    """float64 -> float32 so that a further rounding to 16 bits gives what one rounding would (Boldo, Melquiond 2008)."""
    near = value.to(torch.float32)
    error = value - near.to(torch.float64)
    even = (near.view(torch.int32) & 1) == 0
    toward = torch.copysign(torch.full_like(near, torch.inf), error.to(torch.float32))
    return torch.where((error != 0) & even, torch.nextafter(near, toward), near)


def interpolate(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight·(end − start) in float64; at weight 0 and 1 these to the bit, the sign of a zero included."""
    if weight in (0.0, 1.0):
        return (end if weight else start).to(torch.float64)
    return torch.lerp(start.to(torch.float64), end.to(torch.float64), weight)


def subtract(minuend: Tensors, subtrahend: Tensors, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """minuend − subtrahend by name, formed in float64 and rounded once to `dtype`."""
    return {
        name: cast(tensor.to(torch.float64) - subtrahend[name].to(torch.float64), dtype)
        for name, tensor in minuend.items()
    }


CHUNK = 16_384
"""Elements that are summed at a time: below torch's threshold for more than one thread, so that bits don't depend on it."""


def squared_norm(tensor: Tensor) -> float:
    """Σ t² in float64, summed per chunk and then over the chunks: the same bits with any number of threads."""
    return math.fsum(float(part.double().square().sum()) for part in torch.split(tensor.reshape(-1), CHUNK))


class LazyGroups(Mapping[str, Tensors]):
    """Groups of these names, of which `make` makes each when it is first asked for. made: those that were."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensors]) -> None:
        self._names, self._make = dict.fromkeys(names), make
        self.made: dict[str, Tensors] = {}

    def __getitem__(self, group: str) -> Tensors:
        if group not in self._names:
            raise KeyError(group)
        if group not in self.made:
            self.made[group] = self._make(group)
        return self.made[group]

    def __contains__(self, group: object) -> bool:
        return group in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def select(groups: Groups, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The part of every group that is among `names`."""
    wanted = set(names)
    return {group: {n: t for n, t in tensors.items() if n in wanted} for group, tensors in groups.items()}


def pairs(groups: Groups) -> Iterator[tuple[str, str, Tensor]]:
    """(group, name, tensor), groups and names in alphabetical order."""
    for group in sorted(groups):
        for name in sorted(groups[group]):
            yield group, name, groups[group][name]


def non_finite(groups: Groups) -> str | None:
    """The first tensor that holds NaN or infinity, as "group/name (count of size)", or None."""
    some = {g: t for g, t in groups.items() if not (isinstance(t, Packed) and all(map(_is_finite, t.flats.values())))}
    for group, name, tensor in pairs(some):
        if not _is_finite(tensor):
            bad = int((~torch.isfinite(_comparable(tensor))).sum())
            return f"{group}/{name} ({bad} of {tensor.numel()} elements are NaN or infinite)"
    return None


def _is_finite(tensor: Tensor) -> bool:
    """By the sum, and where that overflows by the extremes; NaN is both."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = _comparable(tensor)
    if cmath.isfinite(values.sum().item()):  # one that is not finite makes the sum so
        return True
    low, high = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _comparable(tensor: Tensor) -> Tensor:
    """8-bit floats have no comparisons."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, C-contiguous, little-endian as on every machine that torch supports."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()).cast("B") if flat.numel() else memoryview(bytearray())  # type: ignore[arg-type]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


class ModelDigest:
    """The digest of a model whose tensors, or consecutive rows of them, come one after the other."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[blake3, list[int], str]] = {}
        self._done: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor, *, more: bool = False) -> None:
        """The tensor `name`, or its next rows. more: further ones follow."""
        digest, shape, dtype = self._begun.pop(name, (blake3(), [0, *tensor.shape[1:]], dtype_name(tensor.dtype)))
        digest.update(raw_bytes(tensor))
        shape = [shape[0] + len(tensor), *shape[1:]] if tensor.dim() else []
        if more:
            self._begun[name] = (digest, shape, dtype)
        else:
            self._done[name] = [shape, dtype, digest.hexdigest()]

    def result(self) -> str:
        """`blake3:<hex>` over names, shapes, dtypes and digests of all tensors, in name order."""
        return (
            f"blake3:{blake3(canonical_json([[name, *self._done[name]] for name in sorted(self._done)])).hexdigest()}"
        )


def model_digest(tensors: Tensors | Mapping[str, Any]) -> str:
    """`blake3:<hex>` over names, shapes, dtypes and bytes: equal if and only if the models are."""
    digest = ModelDigest()
    for name in tensors:
        digest.add(name, tensors[name])
    return digest.result()
