"""What a site's training remembers between rounds: optimizer, scheduler, generators, place in the data.

It is written as tensors and JSON, and read back to the bit; nothing in it runs code.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedflow.errors import SiteError
from fedflow.local.generators import generators, set_generators
from fedflow.local.optimizers import Plain
from fedflow.types import Tensors, canonical_json

__all__ = ["Memory", "Preserved", "TrainingState", "decode", "encode", "join", "schedulers_of", "split"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """A tree of plain values: `structure` is its JSON, in which tensors are named, and `tensors` has them."""

    tensors: Tensors
    structure: str


_PARTS = {"fingerprint", "optimizer", "schedulers", "generators", "data"}


class Memory:
    """Where a training finds what was kept with the site's last accepted update, and leaves what is to be kept with this one.

    read:  what was kept; None where there was nothing yet. Raises SiteError with the reason where it is lost
    kept:  what `before` found
    after: what is to be kept
    note:  "continued", or "fresh (reason)"; None = nothing was preserved
    """

    def __init__(self, read: Callable[[], TrainingState | None] = lambda: None) -> None:
        self._read = read
        self.kept: TrainingState | None = None
        self.after: TrainingState | None = None
        self.note: str | None = None

    def before(self) -> Any:
        """The tree that was kept, or None; `note` says which."""
        state = self.read()
        if state is None:
            return None
        try:
            tree = decode(state)
            if missing := _PARTS - tree.keys():
                raise ValueError(f"found nothing of {min(missing)!r} in what was kept")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.fresh(str(error))
            return None
        return tree

    def read(self) -> TrainingState | None:
        """What was kept, as it is; None where there was nothing or it is lost."""
        try:
            self.kept = self._read()
        except SiteError as error:
            self.fresh(str(error))
            return None
        self.note = "fresh (first participation)" if self.kept is None else "continued"
        return self.kept

    def leave(self, after: TrainingState | None, note: str | None) -> None:
        """What a training in another process says."""
        self.after = after
        if self.kept is not None:
            self.note = note

    def fresh(self, reason: str) -> None:
        """Something that was kept cannot be used: one line says why."""
        self.note = f"fresh ({reason})"
        log.warning("training state: starting fresh: %s", reason)


# -- one training's part in it -----------------------------------------------------------------------------------------
class Preserved:
    """What one session restores and captures.

    names: id of a parameter -> its name in the model
    """

    def __init__(self, memory: Memory, names: Mapping[int, str]) -> None:
        self._memory, self._names = memory, names
        self._kept: Any = memory.before()
        self._tracked: list[Any] = []
        self._schedulers: list[Any] = []
        self._generators: dict[str, Any] | None = None
        self._restored = False

    def place(self, view: int) -> Any:
        """Where data view number `view` goes on; None = at the beginning."""
        places = self._kept["data"] if self._kept else []
        return places[view] if view < len(places) else None

    def track(self, objects: Iterable[Any]) -> None:
        self._tracked += [o for o in objects if all(o is not known for known in self._tracked)]

    def restore_generators(self) -> None:
        if self._kept is not None and not self._restored:
            set_generators(self._kept["generators"])

    def note_generators(self) -> None:
        """The generators as the last step left them: what comes after belongs to no step."""
        self._generators = generators()

    def restore(self, optimizer: Optimizer | Plain) -> None:
        """Before the first step, once: optimizer and schedulers as they were kept, or fresh with the reason."""
        if self._restored:
            return
        self._restored = True
        self._schedulers = schedulers_of(optimizer)
        if self._kept is None:
            return
        reason = self._misfit(optimizer)
        if reason is None:
            try:
                self._load(optimizer)
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self._memory.fresh(reason)

    def _load(self, optimizer: Optimizer | Plain) -> None:
        optimizer.load_state_dict(self._kept["optimizer"])
        for scheduler, state in zip(self._all_tracked(), self._kept["schedulers"], strict=True):
            scheduler.load_state_dict(state)

    def _misfit(self, optimizer: Optimizer | Plain) -> str | None:
        kept, now = self._kept["fingerprint"], self._fingerprint(optimizer)
        for field in ("optimizer", "schedulers", "groups"):
            if kept[field] != now[field]:
                return f"{field}: found {_difference(now[field], kept[field])}"
        return None

    def _fingerprint(self, optimizer: Optimizer | Plain) -> dict[str, Any]:
        groups = [
            [[self._names.get(id(p), "?"), list(p.shape), str(p.dtype)] for p in group["params"]]
            for group in optimizer.param_groups
        ]
        schedulers = [type(s).__qualname__ for s in self._all_tracked()]
        return {"optimizer": type(optimizer).__qualname__, "schedulers": schedulers, "groups": groups}

    def _all_tracked(self) -> list[Any]:
        return [*self._schedulers, *(t for t in self._tracked if all(t is not s for s in self._schedulers))]

    def capture(self, optimizer: Optimizer | Plain | None, places: list[Any]) -> None:
        """Leave the state after the training in the memory."""
        if optimizer is None:
            raise SiteError(
                "preserving the training's state: found steps without a torch optimizer, expected one; use one, or an "
                "algorithm that preserves nothing"
            )
        self._schedulers = self._schedulers or schedulers_of(optimizer)
        tree = {
            "fingerprint": self._fingerprint(optimizer),
            "optimizer": optimizer.state_dict(),
            "schedulers": [s.state_dict() for s in self._all_tracked()],
            "generators": self._generators or generators(),
            "data": places,
        }
        self._memory.after = encode(tree)


def schedulers_of(optimizer: Optimizer | Plain) -> list[LRScheduler]:
    """The schedulers that refer to `optimizer`, or to a wrapper of it, by name; parts of other schedulers are left out."""
    if isinstance(optimizer, Plain):  # of a loop of our own, which has none
        return []
    optimizers: list[Optimizer] = [optimizer]
    found: list[LRScheduler] = []
    for known in optimizers:
        for owner in _owners(known):
            if isinstance(owner, LRScheduler) and owner.optimizer is known and all(owner is not f for f in found):
                found.append(owner)
            elif isinstance(owner, Optimizer) and getattr(owner, "optimizer", None) is known:
                optimizers.append(owner)
    parts = {id(part) for s in found for part in getattr(s, "_schedulers", ())}
    return sorted((s for s in found if id(s) not in parts), key=lambda s: type(s).__qualname__)


def _owners(thing: Any) -> Iterator[Any]:
    """Objects with an attribute that is `thing`."""
    referrers = gc.get_referrers(thing)
    dicts = [referrer for referrer in referrers if isinstance(referrer, dict)]
    yield from (referrer for referrer in referrers if not isinstance(referrer, dict))
    if dicts:
        yield from gc.get_referrers(*dicts)  # every call searches the whole heap: some 20 ms


def _difference(now: Any, kept: Any) -> str:
    if not isinstance(now, list) or not now or not isinstance(now[0], list):
        return f"{now}, kept {kept}"
    flat_now, flat_kept = ([p for group in groups for p in group] for groups in (now, kept))
    for a, b in zip(flat_now, flat_kept, strict=False):
        if a != b:
            return f"{_parameter(a)}, kept {_parameter(b)}"
    return f"{len(flat_now)} parameters in {len(now)} groups, kept {len(flat_kept)} in {len(kept)}"


def _parameter(entry: Any) -> str:
    name, shape, dtype = entry
    return f"{name} {dtype.removeprefix('torch.')}{shape}"


# -- trees of plain values <-> tensors and JSON ------------------------------------------------------------------------
_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def encode(tree: Any) -> TrainingState:
    """`tree` of dicts, lists, tuples, tensors, arrays, numbers, strings, booleans, None. Raises SiteError for another kind."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, "state")
    return TrainingState(tensors, canonical_json(structure).decode())


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        plain = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return _named("tensor", path, plain, tensors)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.array(value)
        return _named("array" if isinstance(value, np.ndarray) else "scalar", path, torch.from_numpy(array), tensors)
    if kind in (list, tuple):
        return {kind.__name__: [_encode(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if kind in _MAPPINGS.values():
        pairs = [[_encode(k, tensors, path), _encode(v, tensors, f"{path}.{k}")] for k, v in value.items()]
        return {kind.__name__: pairs}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise SiteError(
        f"{path}: found {kind.__module__}.{kind.__qualname__}, expected tensors, arrays, numbers, strings, "
        "booleans, None, and lists, tuples and dicts of them; keep nothing else in what is preserved"
    )


def _named(kind: str, path: str, tensor: Tensor, tensors: dict[str, Tensor]) -> dict[str, str]:
    name = f"{len(tensors)}:{path}"
    tensors[name] = tensor
    return {kind: name}


def join(states: list[TrainingState]) -> TrainingState | None:
    """The states of several processes as one; None where there are none."""
    tensors = {f"{rank}/{name}": t for rank, state in enumerate(states) for name, t in state.tensors.items()}
    return TrainingState(tensors, canonical_json([s.structure for s in states]).decode()) if states else None


def split(state: TrainingState) -> list[TrainingState]:
    """What `join` joined; nothing where it is something else."""
    try:
        structures = json.loads(state.structure)
    except ValueError:
        return []
    parts = structures if isinstance(structures, list) else []
    return [
        TrainingState({n.partition("/")[2]: t for n, t in state.tensors.items() if n.startswith(f"{rank}/")}, part)
        for rank, part in enumerate(parts)
    ]


def decode(state: TrainingState) -> Any:
    """The tree of `encode`. Raises ValueError or LookupError where it is none."""
    return _decode(json.loads(state.structure), state.tensors)


def _decode(value: Any, tensors: Tensors) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind in ("tensor", "array", "scalar"):
        tensor = tensors[content].clone()
        return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy()[()]
    if kind in ("list", "tuple"):
        items = [_decode(v, tensors) for v in content]
        return items if kind == "list" else tuple(items)
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return getattr(torch, content)
    return _MAPPINGS[kind]({_decode(k, tensors): _decode(v, tensors) for k, v in content})
