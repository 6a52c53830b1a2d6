"""What lossy transforms have in common: which groups they encode, and what a site remembers of what was lost."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedflow.algorithm import NoState, Transform
from fedflow.errors import RecipeError, UpdateInvalid, field_error
from fedflow.tensors import cast, non_finite
from fedflow.types import Groups, RoundContext, Spec, Tensors, TensorSpec, Update, derive_seed

__all__ = ["ANY", "Lossy", "Residual", "blocks", "joined"]


@dataclass(frozen=True)
class Residual:
    """What was lost and is yet to be sent: e, by tensor name."""

    residual: Tensors


class Lossy(Transform):
    """Encodes every floating tensor of the groups that are differences.

    With error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847, Algorithm 2) a site adds to
    its difference what was lost before, and keeps what is lost now: e ← d + e − decoded(encoded(d + e)).
    """

    groups: list[str] = ["delta"]
    """Groups of an update that are encoded: differences, which a small error changes little. "delta" is there with
    `algorithm.transfer: delta`."""
    error_feedback: bool = False
    """Whether a site sends later what was lost. Its memory is one more tensor for each that is encoded."""

    @property
    def SiteState(self) -> type[Any]:  # type: ignore[override]
        """Nothing is kept at a site without error feedback."""
        return Residual if self.error_feedback else NoState

    # -- one tensor
    @abstractmethod
    def parts(self, spec: TensorSpec) -> Mapping[str, TensorSpec]:
        """Part -> what it looks like, of an encoded tensor; the same parts for every tensor."""

    @abstractmethod
    def encode(self, tensor: Tensor, seed: int) -> Mapping[str, Tensor]:
        """The parts of `tensor`. seed: of this round, site and tensor; known to the server."""

    @abstractmethod
    def restore(self, parts: Mapping[str, Tensor], spec: TensorSpec, seed: int) -> Tensor:
        """A tensor of `spec`. Raises ValueError where the parts cannot be one's."""

    # -- updates
    def encoded(self, spec: Spec) -> Spec:
        found: dict[str, dict[str, TensorSpec]] = {g: dict(t) for g, t in spec.items() if g not in self.groups}
        for group in self.groups:
            if group not in spec:
                fix = "set algorithm.transfer: delta" if group == "delta" else "correct the name"
                raise RecipeError(field_error(f"transforms.{self.kind}.groups", group, f"one of {sorted(spec)}", fix))
            found |= {joined(group, part): {} for part in self.parts(ANY)}
            for name, tensor in spec[group].items():
                for part, of_part in (self.parts(tensor) if _floating(tensor) else {"": tensor}).items():
                    found.setdefault(joined(group, part), {})[name] = of_part
        return found

    def init_site(self, broadcast: Groups) -> Any:
        return Residual({}) if self.error_feedback else NoState()

    def at_site(self, update: Update, state: Any, ctx: RoundContext) -> tuple[Update, Any]:
        found: dict[str, dict[str, Tensor]] = {g: dict(t) for g, t in update.tensors.items() if g not in self.groups}
        lost: dict[str, Tensor] = {}
        for group in self.groups:
            found |= {joined(group, part): {} for part in self.parts(ANY)}
            for name, tensor in update.tensors[group].items():
                parts: Mapping[str, Tensor] = {"": tensor}
                if tensor.is_floating_point():
                    key, seed = f"{group}/{name}", _seed(update, group, name)
                    wanted = self._with_lost(tensor, state, key)
                    parts = self.encode(wanted, seed)
                    sent = self.restore(parts, TensorSpec(tuple(tensor.shape), tensor.dtype), seed)
                    lost[key] = cast(wanted.double() - sent.double(), tensor.dtype)
                for part, value in parts.items():
                    found.setdefault(joined(group, part), {})[name] = value
        return replace(update, tensors=found), Residual({**state.residual, **lost}) if self.error_feedback else state

    def _with_lost(self, tensor: Tensor, state: Any, key: str) -> Tensor:
        if not self.error_feedback or key not in state.residual:
            return tensor
        return cast(tensor.double() + state.residual[key].double(), tensor.dtype)

    def decode(self, update: Update, spec: Spec) -> Update:
        own = {joined(group, part) for group in self.groups for part in ("", *self.parts(ANY))}
        found: dict[str, dict[str, Tensor]] = {g: dict(t) for g, t in update.tensors.items() if g not in own}
        for group in self.groups:
            found[group] = {}
            for name, tensor in spec[group].items():
                names = list(self.parts(ANY)) if _floating(tensor) else [""]
                sent = {part: update.tensors.get(joined(group, part), {}) for part in names}
                parts = {part: tensors[name] for part, tensors in sent.items() if name in tensors}
                if len(parts) == len(names):
                    found[group][name] = self._restored(parts, tensor, update, group, name)
        return replace(update, tensors=found)

    def _restored(self, parts: Mapping[str, Tensor], spec: TensorSpec, update: Update, group: str, name: str) -> Tensor:
        if "" in parts:
            return parts[""]
        try:
            tensor = self.restore(parts, spec, _seed(update, group, name))
        except (ValueError, IndexError, RuntimeError) as error:
            raise UpdateInvalid(
                f"{group}/{name}: cannot be decoded by {self.kind}: {error}", site=update.site
            ) from error
        if problem := non_finite({group: {name: tensor}}):
            raise UpdateInvalid(f"not finite once decoded by {self.kind}: {problem}", site=update.site)
        return tensor


ANY = TensorSpec((1,), torch.float32)
"""Some floating tensor: the names of its parts are those of every other's."""


def _floating(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point


def joined(group: str, part: str) -> str:
    """The group that a part of every encoded tensor of `group` travels in."""
    return f"{group}.{part}" if part else group


def _seed(update: Update, group: str, name: str) -> int:
    """Of this round, site and tensor: known to both ends."""
    return derive_seed("transform", update.base_round, update.site, group, name)


def blocks(tensor: Tensor, size: int) -> Tensor:
    """(count, size) values in float64, the last block filled up with zeros."""
    flat = tensor.reshape(-1).double()
    count = math.ceil(len(flat) / size)
    padded = torch.zeros(count * size, dtype=torch.float64)
    padded[: len(flat)] = flat
    return padded.reshape(count, size)
