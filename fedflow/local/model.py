"""A torch module as named groups of tensors, and back."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedflow.errors import CheckpointError, ResolveError, field_error
from fedflow.local.generators import seed_torch
from fedflow.registry import call, resolve
from fedflow.tensors import Packed, Stored
from fedflow.types import Groups, TensorSpec, derive_seed, spec_of

__all__ = ["Copies", "NoModel", "build_model", "load_checkpoint", "load_groups", "model_groups", "with_aliases"]


def build_model(path: str, args: Mapping[str, Any], *, seed: int = 0, **resolution: Any) -> nn.Module:
    """The module that `path` makes of `args`, initialised from `seed`; the global generator is left as it was.

    Raises ResolveError where the name leads to nothing, the arguments do not fit, or no `nn.Module` comes out.
    """
    factory = resolve("models", path, field="model", **resolution)
    with torch.random.fork_rng(devices=[]):
        seed_torch(derive_seed("model", seed))
        model = call(factory, args, field="model.args")
    if not isinstance(model, nn.Module):
        raise ResolveError(
            field_error("model", type(model).__name__, "a torch.nn.Module", "return one from the factory")
        )
    return model


class NoModel(nn.Module):
    """The model of a run that trains nothing: without tensors."""


def model_groups(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The model's tensors (not copied) as "params" (trainable), "frozen" (requires_grad False) and "buffers" (persistent).

    A tied tensor appears once, under its first name in `named_parameters()`.
    """
    groups: dict[str, dict[str, Tensor]] = {"params": {}, "frozen": {}, "buffers": {}}
    for name, parameter in model.named_parameters():
        groups["params" if parameter.requires_grad else "frozen"][name] = parameter.detach()
    if buffers := dict(model.named_buffers()):
        persistent = model.state_dict().keys()
        groups["buffers"] = {name: buffer.detach() for name, buffer in buffers.items() if name in persistent}
    return groups


def load_groups(model: nn.Module, groups: Groups) -> None:
    """Copy `groups` into the model. Raises CheckpointError listing every name or shape that does not fit; then the model
    is unchanged."""
    own = {name: tensor for tensors in model_groups(model).values() for name, tensor in tensors.items()}
    there = {
        name: tensor
        for tensors in groups.values()
        if type(tensors) in (dict, Packed)
        for name, tensor in tensors.items()
    }
    if own.keys() == there.keys() and all(_alike(own[name], t) for name, t in there.items()):
        with torch.no_grad():
            torch._foreach_copy_(list(own.values()), [there[name] for name in own])
        return
    given = {name: spec for specs in spec_of(groups).values() for name, spec in specs.items()}
    problems = _differences(spec_of({"": own})[""], given)
    if problems:
        raise CheckpointError(
            f"the tensors do not fit the model: {'; '.join(problems)}; give a checkpoint of this model"
        )
    with torch.no_grad():
        for tensors in groups.values():
            if isinstance(tensors, Stored):
                tensors.read_into(own)
                continue
            for name in tensors:
                own[name].copy_(tensors[name])


def _alike(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.dtype == given.dtype


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor], most: int = 8) -> list[str]:
    """Differences in names, shapes and dtypes, at most `most` of them spelled out."""
    ours, theirs = spec_of({"ours": own, "theirs": given}).values()
    return _differences(ours, theirs, most)


def _differences(own: Mapping[str, TensorSpec], given: Mapping[str, TensorSpec], most: int = 8) -> list[str]:
    found = [f"{name} is missing" for name in own if name not in given]
    found += [f"{name} is not in the model" for name in given if name not in own]
    for name in own.keys() & given.keys():
        if own[name] != given[name]:
            found.append(f"{name} is {given[name]}, the model has {own[name]}")
    found.sort()
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]


def with_aliases(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the model's `names`, where a PEFT adapter's were saved without the adapter's own name.

    "x.lora_A.default.weight", if absent, is what "x.lora_A.weight" holds; an exact name goes before; others stay as they are.
    """
    found = dict(tensors)
    for name in names:
        head, dot, rest = name.partition(".default")
        if dot and name not in tensors and head + rest in found:
            found[name] = found.pop(head + rest)
    return found


_SMALL = 32 << 20  # bytes of a module of which a copy is kept, from which the others are made


class Copies:
    """Makes modules as `build` does: small ones as copies of the first, before anything was done to it."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build
        self._first: nn.Module | None = None
        self._copied = False

    def __call__(self) -> nn.Module:
        if self._first is not None:
            return _copied(self._first, {})
        module = self._build()
        size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        if not self._copied and size <= _SMALL:
            self._copied = True
            with contextlib.suppress(Exception):  # what cannot be copied is built again
                self._first = copy.deepcopy(module)
        return module


_VALUES = {NoneType, bool, int, float, str, bytes, FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device}


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(module, memo)`, which takes longer than a small model's training: most of a module are empty mappings."""
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    kind = type(module)
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _OWN_WAYS):
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = kind.__new__(kind)
    for name, value in vars(module).items():
        if name in _PARTS:
            new.__dict__[name] = type(value)((n, _copied_value(v, memo)) for n, v in value.items())
        else:
            new.__dict__[name] = _copied_value(value, memo)
    return new


_PARTS = {"_modules", "_parameters", "_buffers"}
_OWN_WAYS = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__slots__")


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _VALUES:
        return value
    if kind in (dict, OrderedDict, set) and not value and id(value) not in memo:
        memo[id(value)] = kind()
        return memo[id(value)]
    return _copied(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


def load_checkpoint(model: nn.Module, source: str) -> None:
    """Initialise `model` from a safetensors file or from a PyTorch file that holds tensors only.

    Raises CheckpointError where the file cannot be read safely or does not fit; names and shapes are listed.
    """
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(field_error("checkpoint", source, "a readable file", "check the path"))
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            field_error("checkpoint", source, "a safetensors file", f"write it anew: {error}")
        ) from error
    aliases = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in model.named_parameters()}
    tensors = with_aliases(aliases, tensors)
    untied = {n: t for n, t in tensors.items() if n not in aliases or first[id(aliases[n])] == n}
    try:
        load_groups(model, {"checkpoint": untied})
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {source}: {error}") from error


def _load_torch(path: Path) -> dict[str, Tensor]:
    fix = "save the model's state_dict(), or convert it to safetensors"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            field_error("checkpoint", str(path), "a file that loads with weights_only=True", f"{fix}: {reason}")
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(field_error("checkpoint", str(path), "a mapping of names to tensors", fix))
    return loaded
