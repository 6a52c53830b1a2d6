"""The process's random generators: torch, CUDA, numpy, python."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["generators", "seed_all", "seed_torch", "set_generators"]


def generators() -> dict[str, Any]:
    """Their states now, as a tree of tensors, arrays and JSON values."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Put them into `states`, as `generators` gave them. CUDA's only where there are as many devices."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def seed_all(number: int) -> None:
    """All of them from one number."""
    seed_torch(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, which takes a millisecond to note the seed for a GPU that might appear; here none does."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
