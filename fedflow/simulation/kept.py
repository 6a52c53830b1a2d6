"""What a site remembers, as JSON and one safetensors file: between processes, and on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from fedflow.algorithm import Algorithm, NoState
from fedflow.errors import ObjectCorrupt
from fedflow.local.state import TrainingState
from fedflow.store.state import scalars_of, tensor_fields
from fedflow.store.tensors import file_order, header
from fedflow.tensors import raw_bytes
from fedflow.types import spec_of

__all__ = ["Encoded", "Kept", "decode", "encode"]

Encoded = tuple[str, bytes]
"""JSON, and one safetensors file."""

_TRAINING = "training"


@dataclass(frozen=True)
class Kept:
    """What a site remembers: the algorithm's C, and what its training preserved."""

    state: Any
    training: TrainingState | None = None


def encode(kept: Kept) -> Encoded | None:
    """All of it, in memory of its own; None where nothing is remembered."""
    if isinstance(kept.state, NoState) and kept.training is None:
        return None
    parts = {"state": kept.state} | ({_TRAINING: kept.training} if kept.training is not None else {})
    plain = {part: {"scalars": scalars_of(s), "tensors": sorted(tensor_fields(s))} for part, s in parts.items()}
    if plain == {"state": {"scalars": {}, "tensors": []}}:
        return None
    tensors = {
        f"{part}/{field}/{name}": tensor
        for part, state in parts.items()
        for field, found in tensor_fields(state).items()
        for name, tensor in found.items()
    }
    spec = spec_of({"": tensors})[""]
    names = file_order(spec)
    head = header({name: spec[name] for name in names})
    return json.dumps(plain), b"".join([head, *(raw_bytes(tensors[name]) for name in names)])


def decode(encoded: Encoded, algorithm: Algorithm) -> Kept:
    """The inverse of `encode`. Raises ObjectCorrupt."""
    try:
        plain, tensors = json.loads(encoded[0]), safetensors.torch.load(encoded[1])
        parts = {part: _parted(found, tensors, part) for part, found in plain.items()}
        state = algorithm.SiteState(**parts["state"])
        return Kept(state, TrainingState(**parts[_TRAINING]) if _TRAINING in parts else None)
    except (ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise ObjectCorrupt(f"what a site remembers: found {error!r}, expected what was written; restore it") from error


def _parted(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], part: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain["scalars"].items()}
    for field in plain["tensors"]:
        start = f"{part}/{field}/"
        found[field] = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return found
