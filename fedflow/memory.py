"""What a process does with its memory, and how much of the machine is its."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["available", "fresh", "keep_freed", "processors", "seldom_searched", "settle", "tidy", "tidy_after"]


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with memory of its own, and nothing in it yet. For those that come and go by the hundred, all of one size.

    torch asks for aligned memory. For it glibc before 2.38 finds no room where a tensor of the same size was, and a process grows
    (by a half, in aggregations of many sites); NumPy's memory fits there.
    """
    size = prod(shape) * dtype.itemsize
    return (
        torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    )


def available() -> int | None:
    """Bytes that this process and its children may still take, by the machine and by its container; None where nobody says."""
    left = []
    with suppress(OSError, ValueError, IndexError):
        (line,) = (one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable:"))
        left.append(int(line.split()[1]) << 10)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        left.append(max(0, limit - used))
    return min(left, default=None)


def processors() -> int:
    """How many this process may use; where the system does not say (macOS), how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tidy() -> None:
    """Collect cycles, return freed pages to the system (glibc keeps them otherwise), and empty CUDA's cache.

    Costs some ten milliseconds; no result depends on it.
    """
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


_THRESHOLD, _TRIM, _ARENAS = -3, -1, -8  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h


def keep_freed() -> None:
    """Have this process use freed blocks of up to 32 MiB again, where glibc would give them back to the system and ask for
    fresh ones, which the kernel must clear. For a process that does the same over and over, and then ends.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for option, value in ((_THRESHOLD, 32 << 20), (_TRIM, 1 << 30), (_ARENAS, 1)):
            libc.mallopt(option, value)


def settle() -> None:
    """What is imported by now stays for good: neither the garbage collector nor whoever searches its objects need look at it again.

    For processes of our own that train many sites: a session that looks for the schedulers of an optimizer searches the heap.
    """
    gc.collect()
    gc.freeze()


_OBJECTS = 50_000


@contextmanager
def seldom_searched() -> Iterator[None]:
    """Have Python search for cycles after 50,000 new objects instead of 700. For a thread that keeps books of many sites, which are
    made of what has no cycles, and for no training: cycles of one may hold large tensors.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def tidy_after(round: int, every: int) -> None:
    """`tidy` after each `every`-th round, counted from 0; every = 0: never."""
    if every and (round + 1) % every == 0:
        tidy()
