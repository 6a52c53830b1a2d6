"""States in the store: frozen dataclasses of tensors by name and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedflow.errors import FedflowError
from fedflow.store.objects import ObjectStore
from fedflow.store.state import StateReader, read_outline, read_state, tensor_fields, write_state
from fedflow.tensors import model_digest
from fedflow.types import spec_of


@dataclass(frozen=True)
class Momentum:
    params: Mapping[str, Tensor]
    velocity: Mapping[str, Tensor]
    step: int = 0
    rate: float = 0.1
    schedule: tuple[float, ...] = ()
    note: str | None = None


def momentum(**changes: Any) -> Momentum:
    names = {"a": torch.randn(3), "b": torch.randn(2)}
    return Momentum(**{"params": names, "velocity": {n: -t for n, t in names.items()}, **changes})


def digests(state: Any) -> dict[str, str]:
    return {field: model_digest(tensors) for field, tensors in tensor_fields(state).items()}


@pytest.fixture
def store(tmp_path: Any) -> ObjectStore:
    return ObjectStore(str(tmp_path))


def test_a_state_comes_back_as_it_was(store: ObjectStore) -> None:
    state = momentum(step=3, rate=1e-300, schedule=(0.1, 0.2), note="ü")
    again = read_state(store, Momentum, write_state(store, "objects", state))
    assert digests(again) == digests(state)
    assert (again.step, again.rate, again.schedule, again.note) == (3, 1e-300, (0.1, 0.2), "ü")


def test_a_part_of_the_names_is_the_same_part_of_every_field(store: ObjectStore) -> None:
    state = momentum(step=3)
    reader = StateReader(store, Momentum, write_state(store, "objects", state))
    part = reader.read({"b": None, "a": (1, 3), "unknown": None})
    reader.finish()
    assert digests(part) == digests(Momentum(*({"a": t["a"][1:], "b": t["b"]} for t in (state.params, state.velocity))))
    assert part.step == 3


def test_an_outline_has_shapes_and_no_values(store: ObjectStore) -> None:
    state = momentum(step=3)
    found = read_outline(store, Momentum, write_state(store, "objects", state))
    assert found.step == 3 and spec_of(tensor_fields(found)) == spec_of(tensor_fields(state))
    assert all(t.is_meta for tensors in tensor_fields(found).values() for t in tensors.values())


def test_tensors_that_lie_somewhere_already_are_not_written_again(store: ObjectStore) -> None:
    state = momentum()
    first = write_state(store, "public", state)
    known = {id(state.params): first.tensors["params"]}
    again = write_state(store, "server", state, known)
    assert again.tensors["params"].key.startswith("public/") and again.tensors["velocity"].key.startswith("server/")


@pytest.mark.parametrize(
    "bad",
    [torch.ones(1), {1, 2}, object(), float("inf"), [float("nan")]],
    ids=["tensor", "set", "object", "infinity", "NaN"],
)
def test_what_is_neither_tensors_nor_json_is_named(store: ObjectStore, bad: Any) -> None:
    with pytest.raises(
        FedflowError, match=rf"Momentum\.note: found {type(bad).__name__}, expected tensors by name or a JSON value"
    ):
        write_state(store, "objects", momentum(note=bad))
    assert store.list() == []
