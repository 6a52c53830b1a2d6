"""State <-> store: frozen dataclasses of tensor mappings and JSON scalars."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedflow.errors import FedflowError
from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.records import StateRecord
from fedflow.store.tensors import Part, TensorReader, read_spec, read_tensors, write_tensors
from fedflow.types import Spec, TensorSpec, canonical_json

__all__ = ["StateReader", "read_outline", "read_state", "scalars_of", "tensor_fields", "write_state"]


def tensor_fields(state: Any) -> dict[str, Mapping[str, Tensor]]:
    """The fields of `state` that hold tensors by name."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if isinstance(value, Mapping)}


def scalars_of(state: Any) -> dict[str, Any]:
    """The other fields, as JSON has them. Raises FedflowError where one is neither."""
    tensors = tensor_fields(state)
    return {f.name: _as_json(state, f.name) for f in dataclasses.fields(state) if f.name not in tensors}


def write_state(
    store: ObjectStore | None, prefix: str, state: Any, known: Mapping[int, ObjectRef] | None = None
) -> StateRecord:
    """Write `state` below `prefix`. store: None: nothing is written; known: id of a tensor mapping -> object that holds it already."""
    known, tensors, scalars = known or {}, tensor_fields(state), scalars_of(state)
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


class StateReader:
    """A state in the store, read a part at a time; see `TensorReader`."""

    def __init__(self, store: ObjectStore, cls: type[Any], record: StateRecord) -> None:
        self._cls, self._record = cls, record
        self._fields = {field: TensorReader(store, ref) for field, ref in record.tensors.items()}

    @property
    def spec(self) -> Spec:
        """Field -> names, shapes and dtypes."""
        return {field: reader.spec for field, reader in self._fields.items()}

    def read(self, part: Part) -> Any:
        """The state with those tensors, or rows of them, of every field. Lists come back as tuples."""
        return _built(self._cls, self._record, {field: reader.read(part) for field, reader in self._fields.items()})

    def finish(self) -> None:
        """Verify what was read and is not verified yet. Raises ObjectCorrupt."""
        for reader in self._fields.values():
            reader.finish()


def read_state(store: ObjectStore, cls: type[Any], record: StateRecord) -> Any:
    """The state of class `cls`, verified. Lists come back as tuples."""
    return _built(cls, record, {field: read_tensors(store, ref) for field, ref in record.tensors.items()})


def read_outline(store: ObjectStore, cls: type[Any], record: StateRecord, spec: Spec | None = None) -> Any:
    """The state of class `cls` with tensors that have a shape and a dtype but no values, from the headers alone; fields that
    are `SMALL` have values too.

    spec: the headers, where they are known
    """
    small = {f.name for f in dataclasses.fields(cls) if f.metadata.get("small")}

    def outlined(field: str, ref: ObjectRef) -> dict[str, Tensor]:
        if field in small:
            return read_tensors(store, ref)
        return {name: _hollow(s) for name, s in (read_spec(store, ref) if spec is None else spec[field]).items()}

    return _built(cls, record, {field: outlined(field, ref) for field, ref in record.tensors.items()})


def _hollow(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _built(cls: type[Any], record: StateRecord, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    scalars = {name: tuple(v) if isinstance(v, list) else v for name, v in record.scalars.items()}
    return cls(**tensors, **scalars)
