"""Numerics: what decides the bits of a training, applied here and nowhere else."""

from __future__ import annotations

import os
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedflow.errors import RecipeError, field_error
from fedflow.local.generators import seed_all
from fedflow.recipe import Numerics

__all__ = ["applied", "own_generators", "recorded", "wants_channels_last"]

_COMPILER = "TORCHINDUCTOR_DETERMINISTIC"


class _Own:
    generators = False


def own_generators() -> None:
    """From now on the random generators of this process are the trainings': each sets them, and leaves them where they then are.

    For processes that do nothing but train; to have numpy's state said and set takes longer than a step of a small model.
    """
    _Own.generators = True


@contextmanager
def applied(numerics: Numerics, seed: int) -> Iterator[None]:
    """Threads, determinism and every random generator set for one training; all as before afterwards."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[numerics.device]:
        raise RecipeError(
            field_error("numerics.device", numerics.device, "a device of this machine", "set numerics.device: cpu")
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    threads = torch.get_num_threads()
    with _generators(numerics), _strict(numerics.deterministic == "bitwise"):
        try:
            torch.set_num_threads(numerics.threads)
            seed_all(seed)
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _strict(wanted: bool) -> Iterator[None]:
    """Whether an operation that is not deterministic is an error."""
    before, told = torch.get_deterministic_debug_mode(), os.environ.get(_COMPILER)
    try:
        _insist(2 if wanted else 0)
        if wanted:
            os.environ[_COMPILER] = "1"  # read when the compiler is imported
        yield
    finally:
        os.environ.pop(_COMPILER, None)
        if told is not None:
            os.environ[_COMPILER] = told
        _insist(before)


def _insist(strictness: int) -> None:
    """As `torch.use_deterministic_algorithms`, which would import the compiler, a second's work, only to tell it."""
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(strictness > 0, warn_only=strictness == 1)
    else:
        torch.set_deterministic_debug_mode(strictness)


@contextmanager
def _generators(numerics: Numerics) -> Iterator[None]:
    """Every random generator as it was, afterwards."""
    if _Own.generators:
        yield
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if numerics.device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def wants_channels_last(numerics: Numerics, model: nn.Module) -> bool:
    """Whether `model` is quicker with its channels innermost, and its bits may be others."""
    return numerics.deterministic == "fast" and any(isinstance(module, nn.Conv2d) for module in model.modules())


def recorded(numerics: Numerics) -> dict[str, Any]:
    """What an update says of the numerics it was made with; sites that differ here can differ in bits."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if numerics.device == "cuda" else numerics.device,
        "threads": numerics.threads,
        "deterministic": numerics.deterministic,
    }
