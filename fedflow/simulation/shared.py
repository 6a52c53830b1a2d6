"""Tensors in memory that processes share: where they lie in it is known to both sides from their spec."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fedflow.tensors import Packed, Place
from fedflow.types import Groups, Spec, Tensors

__all__ = ["Layout", "Names", "SharedBuffer", "copied", "fill", "named", "names_of"]

_ALIGNED = 64  # bytes: a line of the processor's cache
_WIDE = torch.float64


class Layout:
    """Where the tensors of a spec lie: those of a group and dtype one behind the other.

    size: bytes of all of them; sums: bytes of as many float64 sums
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = {group: dict(tensors) for group, tensors in spec.items()}
        self._places: dict[str, dict[str, Place]] = {}
        self._flats: dict[str, dict[torch.dtype, int]] = {}  # elements
        for group, tensors in self.spec.items():
            self._places[group], self._flats[group] = {}, {}
            for dtype in dict.fromkeys(s.dtype for s in tensors.values()):
                elements, step = 0, max(1, _ALIGNED // dtype.itemsize)
                for name, s in tensors.items():
                    if s.dtype == dtype:
                        self._places[group][name] = (dtype, elements, s.shape)
                        elements += -(-prod(s.shape) // step) * step
                self._flats[group][dtype] = elements
        found = [(dtype.itemsize, n) for flats in self._flats.values() for dtype, n in flats.items()]
        self.size, self.sums = sum(size * n for size, n in found), sum(_WIDE.itemsize * n for _, n in found)

    def views(
        self, buffer: mmap.mmap | bytearray, start: int = 0, *, dtype: torch.dtype | None = None
    ) -> dict[str, Packed]:
        """The tensors in `buffer` from byte `start` on, by group; they change when its bytes do. dtype: of all of them there"""
        found = {}
        for group, flats in self._flats.items():
            packed = {}
            for own, elements in flats.items():
                packed[own] = _flat(buffer, dtype or own, elements, start)
                start += elements * (dtype or own).itemsize
            found[group] = Packed(packed, self._places[group])
        return found

    def views_of_sums(self, buffer: mmap.mmap | bytearray, start: int) -> dict[str, Packed]:
        """The same of their sums."""
        return self.views(buffer, start, dtype=_WIDE)

    def empty(self) -> dict[str, Packed]:
        """The same in memory of their own, to be filled."""
        return self.views(bytearray(max(self.size, 1)))


def _flat(buffer: mmap.mmap | bytearray, dtype: torch.dtype, elements: int, start: int) -> Tensor:
    if not elements:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=elements, offset=start)


def copied(groups: Groups) -> dict[str, Tensors]:
    """The same tensors in memory of their own."""
    return {group: _copied(tensors) for group, tensors in groups.items()}


def _copied(tensors: Tensors) -> Tensors:
    if isinstance(tensors, Packed):
        return Packed({dtype: flat.clone() for dtype, flat in tensors.flats.items()}, tensors.places)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def fill(views: Mapping[str, Packed], groups: Groups) -> dict[str, Tensors]:
    """Copy `groups`, or those names of them that are there, into `views`. Returns the groups as they then are there."""
    found: dict[str, Tensors] = {}
    with torch.no_grad():
        for group, tensors in groups.items():
            there, own = views[group], list(tensors.values())
            places = [there[name] for name in tensors]
            fit = all(place.shape == tensor.shape for place, tensor in zip(places, own, strict=True))
            if not fit:  # `TensorSpec.up_to`
                places = [p if p.shape == t.shape else p[: len(t)] for p, t in zip(places, own, strict=True)]
            if own:
                torch._foreach_copy_(places, own)
            found[group] = there if fit and len(own) == len(there) else dict(zip(tensors, places, strict=True))
    return found


Names = Mapping[str, Mapping[str, int] | None]
"""Group -> the names that came, with the rows of each (1 of a scalar); None: all of them, whole."""


def names_of(groups: Groups) -> Names:
    """What came, of what `fill` returned."""
    return {
        group: None if isinstance(tensors, Packed) else {n: len(t) if t.dim() else 1 for n, t in tensors.items()}
        for group, tensors in groups.items()
    }


def named(groups: Mapping[str, Packed], names: Names) -> dict[str, Tensors]:
    """What came, there."""
    found: dict[str, Tensors] = {}
    for group, wanted in names.items():
        there = groups[group]
        found[group] = there if wanted is None else {n: _rows(there[n], rows) for n, rows in wanted.items()}
    return found


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor[:rows] if tensor.dim() else tensor


class SharedBuffer:
    """Bytes that other processes of this user see at `place`; gone when the last of them is."""

    _numbers = itertools.count()

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        if hasattr(os, "memfd_create"):
            descriptor, self.path = os.memfd_create("fedflow"), ""
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, self.path = tempfile.mkstemp(prefix="fedflow-shared-")
        self.place = self.path, next(self._numbers)  # the path alone may come again
        os.ftruncate(descriptor, self.size)
        self._descriptor, self.map = descriptor, mmap.mmap(descriptor, self.size)

    def close(self) -> None:
        """Give it up here; tensors in it keep their bytes."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if not self.path.startswith("/proc/"):
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()

    @staticmethod
    def attach(path: str, number: int) -> mmap.mmap:
        """What is at that place, here."""
        with Path(path).open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)
