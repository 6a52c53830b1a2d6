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

__all__ = ["Layout", "SharedBuffer", "copied", "fill"]

_ALIGNED = 64  # bytes: a line of the processor's cache


class Layout:
    """Where the tensors of a spec lie: those of a group and dtype one behind the other. size: bytes of all of them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = {group: dict(tensors) for group, tensors in spec.items()}
        self._places: dict[str, dict[str, Place]] = {}
        self._flats: dict[str, dict[torch.dtype, tuple[int, int]]] = {}  # first byte, elements
        at = 0
        for group, tensors in self.spec.items():
            self._places[group], self._flats[group] = {}, {}
            for dtype in dict.fromkeys(s.dtype for s in tensors.values()):
                elements, step = 0, max(1, _ALIGNED // dtype.itemsize)
                for name, s in tensors.items():
                    if s.dtype == dtype:
                        self._places[group][name] = (dtype, elements, s.shape)
                        elements += -(-prod(s.shape) // step) * step
                self._flats[group][dtype] = at, elements
                at += elements * dtype.itemsize
        self.size = at

    def views(self, buffer: mmap.mmap | bytearray, start: int = 0) -> dict[str, Packed]:
        """The tensors in `buffer` from byte `start` on, by group; they change when its bytes do."""

        def flat(dtype: torch.dtype, at: int, elements: int) -> Tensor:
            if not elements:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(buffer, dtype=dtype, count=elements, offset=start + at)

        return {
            group: Packed({dtype: flat(dtype, *place) for dtype, place in flats.items()}, self._places[group])
            for group, flats in self._flats.items()
        }

    def empty(self) -> dict[str, Packed]:
        """The same in memory of their own, to be filled."""
        return self.views(bytearray(max(self.size, 1)))


def copied(groups: Mapping[str, Packed]) -> dict[str, Packed]:
    """The same tensors in memory of their own."""
    return {g: Packed({dtype: flat.clone() for dtype, flat in p.flats.items()}, p.places) for g, p in groups.items()}


def fill(views: Mapping[str, Packed], groups: Groups) -> dict[str, Tensors]:
    """Copy `groups`, or those names of them that are there, into `views`. Returns the groups as they then are there."""
    found: dict[str, Tensors] = {}
    with torch.no_grad():
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                views[group][name].copy_(tensor)
            whole = len(tensors) == len(views[group])
            found[group] = views[group] if whole else {name: views[group][name] for name in tensors}
    return found


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
