"""State <-> store: frozen dataclasses of tensor mappings and JSON scalars."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fedflow.errors import FedflowError
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import StateRecord
from fedflow.store.tensors import read_tensors, write_tensors
from fedflow.types import canonical_json

__all__ = ["merge", "read_state", "restrict", "tensor_fields", "write_state"]


def tensor_fields(state: Any) -> dict[str, Mapping[str, Tensor]]:
    """The fields of `state` that hold tensors by name."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if isinstance(value, Mapping)}


def write_state(
    store: ObjectStore, prefix: str, state: Any, known: Mapping[int, ObjectRef] | None = None
) -> StateRecord:
    """Write `state` below `prefix`. known: id of a tensor mapping -> object that holds it already."""
    known = known or {}
    tensors = tensor_fields(state)
    scalars = {f.name: _as_json(state, f.name) for f in dataclasses.fields(state) if f.name not in tensors}
    refs = {name: known.get(id(value)) or write_tensors(store, prefix, value) for name, value in tensors.items()}
    return StateRecord(tensors=refs, scalars=scalars)


def _as_json(state: Any, field: str) -> Any:
    value = getattr(state, field)
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise FedflowError(
            f"{type(state).__name__}.{field}: found {type(value).__name__}, expected tensors by name or a JSON value ({error}); "
            "keep what must persist in these"
        ) from error


def read_state(store: ObjectStore, cls: type[Any], record: StateRecord, names: Iterable[str] | None = None) -> Any:
    """The state of class `cls`, verified; with `names` only those tensors of every field. Lists come back as tuples."""
    wanted = None if names is None else list(names)
    tensors = {field: read_tensors(store, ref, wanted) for field, ref in record.tensors.items()}
    scalars = {name: tuple(v) if isinstance(v, list) else v for name, v in record.scalars.items()}
    return cls(**tensors, **scalars)


def restrict(state: Any, names: Iterable[str]) -> Any:
    """`state` with only those tensors of every field."""
    wanted = set(names)
    parts = {
        field: {n: t for n, t in tensors.items() if n in wanted} for field, tensors in tensor_fields(state).items()
    }
    return dataclasses.replace(state, **parts)


def merge(parts: Iterable[Any]) -> Any:
    """One state from the parts that `server_update` made of a partition. Raises FedflowError where scalars differ."""
    merged: Any = None
    for part in parts:
        if merged is None:
            merged = part
            continue
        tensors = tensor_fields(part)
        for field in dataclasses.fields(part):
            if field.name not in tensors and getattr(part, field.name) != getattr(merged, field.name):
                raise FedflowError(
                    f"{type(part).__name__}.{field.name}: found {getattr(part, field.name)!r} and {getattr(merged, field.name)!r} "
                    "from two parts of the names, expected one value; compute scalars from the context, not from the part"
                )
        joined = {name: {**getattr(merged, name), **value} for name, value in tensors.items()}
        merged = dataclasses.replace(merged, **joined)
    return merged
