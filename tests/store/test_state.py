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
from fedflow.store.state import merge, read_state, restrict, tensor_fields, write_state
from fedflow.tensors import model_digest


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
    state = momentum()
    part = read_state(store, Momentum, write_state(store, "objects", state), ["b", "unknown"])
    assert digests(part) == digests(restrict(state, ["b"])) and list(part.velocity) == ["b"]


def test_tensors_that_lie_somewhere_already_are_not_written_again(store: ObjectStore) -> None:
    state = momentum()
    first = write_state(store, "public", state)
    known = {id(state.params): first.tensors["params"]}
    again = write_state(store, "server", state, known)
    assert again.tensors["params"].key.startswith("public/") and again.tensors["velocity"].key.startswith("server/")


def test_parts_of_the_names_make_the_whole() -> None:
    state = momentum(step=2)
    whole = merge([restrict(state, ["b"]), restrict(state, []), restrict(state, ["a"])])
    assert digests(whole) == digests(state) and whole.step == 2


def test_parts_that_disagree_about_a_scalar_are_refused() -> None:
    with pytest.raises(FedflowError, match=r"Momentum\.step: found 2 and 1 from two parts"):
        merge([restrict(momentum(step=1), ["a"]), restrict(momentum(step=2), ["b"])])


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
