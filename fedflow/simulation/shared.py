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

from fedflow.types import Groups, Spec, Tensors

__all__ = ["Layout", "SharedBuffer"]

_ALIGNED = 64  # bytes: a line of the processor's cache


class Layout:
    """Where the tensors of a spec lie, one after the other. size: bytes of all of them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = {group: dict(tensors) for group, tensors in spec.items()}
        self._places: dict[str, list[tuple[str, int, int]]] = {}
        at = 0
        for group, tensors in self.spec.items():
            self._places[group] = []
            for name, s in tensors.items():
                count = prod(s.shape)
                self._places[group].append((name, at, count))
                at += -(-count * s.dtype.itemsize // _ALIGNED) * _ALIGNED
        self.size = at

    def views(self, buffer: mmap.mmap, start: int = 0) -> dict[str, dict[str, Tensor]]:
        """The tensors in `buffer` from byte `start` on; they change when its bytes do."""
        found: dict[str, dict[str, Tensor]] = {}
        for group, places in self._places.items():
            found[group] = {}
            for name, at, count in places:
                shape, dtype = self.spec[group][name].shape, self.spec[group][name].dtype
                if count:
                    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + at)
                    found[group][name] = flat.view(shape)
                else:
                    found[group][name] = torch.empty(shape, dtype=dtype)
        return found


def fill(views: Mapping[str, Tensors], groups: Groups) -> None:
    """Copy `groups`, or those names of them that are there, into `views`."""
    with torch.no_grad():
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                views[group][name].copy_(tensor)


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
        os.close(self._descriptor)
        if not self.path.startswith("/proc/"):
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()

    @staticmethod
    def attach(path: str, number: int) -> mmap.mmap:
        """What is at that place, here."""
        with Path(path).open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)
