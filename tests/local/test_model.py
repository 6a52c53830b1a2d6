"""A module as named groups of tensors, and checkpoints that fit it or are refused."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedflow.errors import CheckpointError, ResolveError
from fedflow.local.model import Copies, build_model, load_checkpoint, load_groups, model_groups
from tests.builders import Tiny, recipe, run


class Tied(nn.Module):
    """Input and output embedding are one tensor; a buffer that is not stored, one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.body.weight.requires_grad_(False)
        self.register_buffer("seen", torch.tensor(2))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)


# -- groups ------------------------------------------------------------------------------------------------------------
def test_tied_weights_appear_once_and_scratch_buffers_not_at_all() -> None:
    groups = model_groups(Tied())
    assert {group: list(tensors) for group, tensors in groups.items()} == {
        "params": ["embed.weight"],
        "frozen": ["body.weight"],
        "buffers": ["seen"],
    }


def test_loading_groups_keeps_ties() -> None:
    model = Tied()
    load_groups(model, model_groups(Tied()) | {"params": {"embed.weight": torch.ones(5, 3)}})
    assert model.head.weight is model.embed.weight and model.head.weight.eq(1).all()


class Knotted(nn.Module):
    """Modules in lists, a way back to itself, methods, a cache that two share, a hook, a part that copies itself in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.normed, self.own_way = Tied(), nn.BatchNorm1d(3), OwnWay()
        self.again = self.tied.body
        self.listed, self.parents, self.method = [self.normed, self.tied], {"me": self}, self.tied.forward
        self.cache: dict[str, Any] = {}
        self.normed.cache = self.cache
        self.activation, self.sizes, self.name = torch.relu, (3, 5), "knotted"
        self.normed.register_forward_hook(_double)


class OwnWay(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        memo[id(self)] = new = OwnWay()
        new.load_state_dict({name: tensor + 1 for name, tensor in self.state_dict().items()})
        return new


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_copies_of_a_module_are_deep_copies() -> None:
    """As copy.deepcopy makes them: nothing that can change is shared with the first, and what is one thing stays one."""
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(Knotted())
        return built[-1]

    copies = Copies(build)
    first, one, two = copies(), copies(), copies()
    assert built == [first] and len({id(m) for m in (first, one, two)}) == 3
    expected = copy.deepcopy(first).state_dict()
    own = {name for name in expected if name.startswith("own_way")}
    for found in (one, two):
        assert isinstance(found, Knotted)
        state = found.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected.keys() - own)
        assert found.tied.head.weight is found.tied.embed.weight and found.again is found.tied.body
        assert found.listed[0] is found.normed and found.listed[1] is found.tied and found.parents["me"] is found
        assert found.method.__self__ is found.tied and found.normed.cache is found.cache is not first.cache
        assert not found.tied.body.weight.requires_grad and found.tied.embed.weight.requires_grad
        assert [list(group) for group in model_groups(found).values()] == [
            list(g) for g in model_groups(first).values()
        ]
        inputs = torch.randn(4, 3)
        torch.testing.assert_close(
            found.normed(inputs), 2 * nn.functional.batch_norm(inputs, None, None, training=True)
        )
        assert found.normed.num_batches_tracked == 1
    tensors = [t for m in (first, one, two) for t in (*m.parameters(), *m.buffers())]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert first.normed.num_batches_tracked == 0


def test_what_does_not_fit_is_listed_and_changes_nothing() -> None:
    model, before = Tiny(), {n: t.clone() for n, t in Tiny.state_dict(Tiny()).items()}
    load_groups(model, {"all": before})
    wrong = dict(before)
    wrong["0.weight"] = torch.zeros(6, 5)
    wrong["1.num_batches_tracked"] = torch.zeros(())
    wrong["9.weight"] = wrong.pop("4.weight")
    with pytest.raises(CheckpointError) as caught:
        load_groups(model, {"all": wrong})
    for told in (
        "0.weight is float32[6, 5], the model has float32[6, 4]",
        "1.num_batches_tracked is float32[], the model has int64[]",
        "4.weight is missing",
        "9.weight is not in the model",
    ):
        assert told in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_of_many_differences_a_few_are_spelled_out() -> None:
    with pytest.raises(CheckpointError, match="and 1 more"):
        load_groups(Tiny(), {})


# -- building ----------------------------------------------------------------------------------------------------------
def test_a_model_is_initialised_from_the_seed_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (build_model("tests.builders:Tiny", {}, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "args", "told"),
    [
        ("tests.builders:Tinny", {}, "Tiny"),
        ("tests.builders:Tiny", {"width": 3}, "model.args: found {'width': 3}"),
        ("tests.builders:blobs", {"examples": 3, "seed": 0}, "a torch.nn.Module"),
    ],
)
def test_a_model_that_is_none_is_told_by_name(path: str, args: dict[str, Any], told: str) -> None:
    with pytest.raises(ResolveError) as caught:
        build_model(path, args)
    assert told in str(caught.value)


# -- checkpoints -------------------------------------------------------------------------------------------------------
def state_of(seed: int) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in build_model("tests.builders:Tiny", {}, seed=seed).state_dict().items()}


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "m.safetensors": save_file,
    "m.pt": torch.save,
    "wrapped.pt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_a_run_starts_from_its_checkpoint(tmp_path: Path, name: str) -> None:
    state = state_of(9)
    SAVERS[name](state, tmp_path / name)
    model = build_model("tests.builders:Tiny", {}, seed=0)
    load_checkpoint(model, str(tmp_path / name))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_checkpoint_of_a_tied_model_may_name_the_tensor_once_or_twice(tmp_path: Path, name: str) -> None:
    state = Tied().state_dict()
    if name == "m.safetensors":
        del state["head.weight"]  # that format has no shared tensors
    SAVERS[name](state, tmp_path / name)
    model = Tied()
    load_checkpoint(model, str(tmp_path / name))
    assert torch.equal(model.head.weight, state["embed.weight"])


def test_a_checkpoint_that_does_not_fit_stops_the_run_before_anything_is_written(tmp_path: Path) -> None:
    state = state_of(1) | {"0.weight": torch.zeros(1, 4)}
    del state["4.bias"]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        run(recipe(checkpoint=str(tmp_path / "m.safetensors")), str(tmp_path / "store"))
    for told in ("m.safetensors", "4.bias is missing", "0.weight is float32[1, 4], the model has float32[6, 4]"):
        assert told in str(caught.value)
    assert not (tmp_path / "store").exists()


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch's format", "a bare pickle", "torch's old format"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, bomb = tmp_path / "m.pt", Bomb(tmp_path / "exploded")
    if kind == "a bare pickle":
        path.write_bytes(pickle.dumps({"0.weight": bomb}))
    else:
        torch.save({"0.weight": bomb}, path, _use_new_zipfile_serialization=kind == "torch's format")
    with pytest.raises(CheckpointError, match="a file that loads with weights_only=True"):
        load_checkpoint(Tiny(), str(path))
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def _not_tensors(path: Path) -> None:
    torch.save({"lr": 0.1}, path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"")


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("none.safetensors", lambda path: None, "a readable file"),
        ("bad.safetensors", lambda path: path.write_bytes(b"not tensors"), "a safetensors file"),
        ("bad.pt", lambda path: path.write_bytes(b"not tensors"), "weights_only=True"),
        ("zip.pt", _zip, "weights_only=True"),
        ("numbers.pt", _not_tensors, "a mapping of names to tensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Tiny(), str(tmp_path / name))
    assert name in str(caught.value) and told in str(caught.value) and "\n" not in str(caught.value)
