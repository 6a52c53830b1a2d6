"""Digits at many sites, by similarity, with sites that attack; logistic regression, as in the SCAFFOLD paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedflow.algorithm import Transform
from fedflow.local import TensorWorkload
from fedflow.template import workload
from fedflow.types import RoundContext, Update

__all__ = ["Attack", "HeldOut", "Logistic", "Similar"]


HeldOut = cache(workload.HeldOut)
digits = cache(workload.digits)


class Logistic(nn.Sequential):
    """64 pixels to 10 classes."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


def shares(labels: Tensor, sites: int, similarity: float, seed: int) -> list[Tensor]:
    """Row indices per site: the share `similarity` of all rows dealt at random, the rest in the order of the labels
    (arXiv:1910.06378, section 7: "s % i.i.d.")."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    mixed, rest = order[: round(similarity * len(order))], order[round(similarity * len(order)) :]
    by_label = rest[labels[rest].sort(stable=True).indices]
    return [torch.cat(parts) for parts in zip(mixed.tensor_split(sites), by_label.tensor_split(sites), strict=True)]


class Similar(TensorWorkload):
    """One site's share. flipped: sites that train on 9 − label."""

    def __init__(
        self, site: str, sites: list[str], similarity: float, seed: int = 0, flipped: Sequence[str] = ()
    ) -> None:
        images, labels = (part[workload.TEST_EXAMPLES :] for part in digits())
        mine = shares(labels, len(sites), similarity, seed)[sites.index(site)]
        super().__init__(images[mine], 9 - labels[mine] if site in flipped else labels[mine])


class Attack(Transform):
    """Multiplies what `sites` send: −1 flips signs, 10 drowns the others. For measuring defences only."""

    kind: Literal["attack"] = "attack"
    sites: list[str]
    factor: float

    def at_site(self, update: Update, state: Any, ctx: RoundContext) -> tuple[Update, Any]:
        if ctx.site not in self.sites:
            return update, state
        delta: Mapping[str, Tensor] = {n: self.factor * d for n, d in update.tensors["delta"].items()}
        return Update(**{**vars(update), "tensors": {**update.tensors, "delta": delta}}), state
