"""Giving memory back."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

__all__ = ["tidy", "tidy_after"]


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


def tidy_after(round: int, every: int) -> None:
    """`tidy` after each `every`-th round, counted from 0; every = 0: never."""
    if every and (round + 1) % every == 0:
        tidy()
