"""Numerics: what decides the bits of a training, applied here and nowhere else."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedflow.errors import RecipeError, field_error
from fedflow.local.generators import seed_torch
from fedflow.recipe import Numerics

__all__ = ["applied", "recorded"]


@contextmanager
def applied(numerics: Numerics, seed: int) -> Iterator[None]:
    """Threads, determinism and every random generator set for one training; all as before afterwards."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[numerics.device]:
        raise RecipeError(
            field_error("numerics.device", numerics.device, "a device of this machine", "set numerics.device: cpu")
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if numerics.device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(numerics.threads)
            torch.use_deterministic_algorithms(numerics.deterministic == "bitwise")
            seed_torch(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.use_deterministic_algorithms(strict, warn_only=only_warn)
            torch.set_num_threads(threads)


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
